"""POST /api/v1/sample beside the same load sent straight to vLLM: `python -m benchmarks.sample`.

Both routes are driven by the same client code against the same server, in turns, because these machines
drift within a minute. Both ask for the same tokens in the same detail (`return_token_ids`). A process of
its own: `benchmarks.run` pins itself to a core, which server, worker and clients must share here.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tink_rl import placement

NUM_CLIENTS = 64
NUM_ADAPTERS = 8
NUM_TOKENS = 32
REQUESTS_A_ROUND = 320
NUM_ROUNDS = 7
NUM_PAIRS = 400
"""Requests by each route at concurrency 1, of one token: vLLM's own work is least there."""

Body = Callable[[int, int], dict[str, Any]]


def measure() -> dict[str, Any]:
    """Run this module in a process of its own; its figures."""
    print("sample: worker and direct, in turns", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sample"],
        stdout=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
        preexec_fn=lambda: os.sched_setaffinity(0, placement.CORES),
    )
    if done.returncode:
        raise SystemExit(f"benchmarks.sample failed with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print one line of JSON."""
    from recipes.tiny_base import ensure_tiny_base
    from tink_rl.gpus import exact_dtype
    from tink_rl.launch import VLLMServer

    base = ensure_tiny_base()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(
            VLLMServer(
                base,
                mode="adapter",
                dtype=exact_dtype("adapter"),
                max_model_len=256,
                max_lora_rank=16,
                max_loras=NUM_ADAPTERS,
                token_file=str(directory / "token"),
                shared_with_trainer=True,
            )
        )
        _save_adapters(base, directory)
        worker = stack.enter_context(_worker(server.url, directory))
        names = asyncio.run(_register(worker, directory))
        print(json.dumps(asyncio.run(_measure(server.url, worker, names))))


async def _measure(server: str, worker: str, names: list[str]) -> dict[str, Any]:
    import aiohttp

    served = await _served_names(server, names)
    routes: dict[str, tuple[str, Body]] = {
        "direct": (f"{server}/v1/completions", lambda i, n: _direct(served[i % len(names)], i, n)),
        "worker": (f"{worker}/api/v1/sample", lambda i, n: _through(names[i % len(names)], i, n)),
    }
    speeds: dict[str, list[float]] = {route: [] for route in routes}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    ) as http:
        for round_ in range(NUM_ROUNDS + 1):
            for route, (url, body) in routes.items():
                speed = await _load(http, url, body)
                if round_:  # the first is a warm-up
                    speeds[route].append(speed)
        seconds = await _pairs(http, routes)
    ratios = [w / d for w, d in zip(speeds["worker"], speeds["direct"], strict=True)]
    return {
        "requests_per_second": {route: statistics.median(found) for route, found in speeds.items()},
        "throughput_ratio": statistics.median(ratios),
        "throughput_ratios": ratios,
        "latency_ms": {
            route: {"median": 1e3 * _at(found, 0.5), "p99": 1e3 * _at(found, 0.99)}
            for route, found in seconds.items()
        },
        "added_ms": {
            name: 1e3 * (_at(seconds["worker"], at) - _at(seconds["direct"], at))
            for name, at in (("median", 0.5), ("p99", 0.99))
        },
        "load": {
            "clients": NUM_CLIENTS,
            "adapters": NUM_ADAPTERS,
            "tokens": NUM_TOKENS,
            "requests": REQUESTS_A_ROUND,
            "rounds": NUM_ROUNDS,
            "pairs": NUM_PAIRS,
        },
    }


async def _load(http: Any, url: str, body: Body) -> float:
    """Requests per second of `NUM_CLIENTS` clients that each wait for their answer."""
    numbers = iter(range(REQUESTS_A_ROUND))

    async def client() -> None:
        for i in numbers:
            await _post(http, url, body(i, NUM_TOKENS))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    return REQUESTS_A_ROUND / (time.perf_counter() - start)


async def _pairs(http: Any, routes: dict[str, tuple[str, Body]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {route: [] for route in routes}
    for i in itertools.chain(range(20), range(NUM_PAIRS)):
        for route, (url, body) in routes.items():
            start = time.perf_counter()
            await _post(http, url, body(i, 1))
            seconds[route].append(time.perf_counter() - start)
    return {route: found[20:] for route, found in seconds.items()}


async def _post(http: Any, url: str, body: dict[str, Any]) -> None:
    async with http.post(url, json=body) as answer:
        data = await answer.json()
        if answer.status != 200:
            raise SystemExit(f"{url} answered {answer.status}: {data}")
        found = data.get("completions") or data["choices"]
        wanted = body.get("max_tokens") or body["sampling_params"]["max_tokens"]
        if len(found[0]["token_ids"]) != wanted:
            raise SystemExit(f"{url} sampled {found[0]['token_ids']}, expected {wanted} tokens")


def _prompt(i: int) -> list[int]:
    return [4 + i % 40, 5 + i % 7, 6 + i % 11, 7]


def _direct(name: str, i: int, num_tokens: int) -> dict[str, Any]:
    return {
        "model": name,
        "prompt": _prompt(i),
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def _through(name: str, i: int, num_tokens: int) -> dict[str, Any]:
    return {
        "prompts": [_prompt(i)],
        "model_id": name,
        "sampling_params": {"max_tokens": num_tokens, "ignore_eos": True},
    }


def _at(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# -- what is measured -----------------------------------------------------------------------------


def _save_adapters(base: Path, directory: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for seed in range(NUM_ADAPTERS):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 50)
        adapted.save_pretrained(directory / "adapters" / f"adapter-{seed}")


@contextmanager
def _worker(server: str, directory: Path) -> Iterator[str]:
    """`tink-rl worker` as a user starts it; its URL."""
    log = directory / "worker.log"
    command = [sys.executable, "-m", "tink_rl.cli", "worker", "--port", "0", "--vllm-url", server]
    command += ["--adapter-root", str(directory / "adapters")]
    settings = {"TINK_STORE_DIR": directory / "store", "TINK_TOKEN_FILE": directory / "token"}
    env = {**os.environ, **{name: str(path) for name, path in settings.items()}}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stderr=stream, env=env)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"worker at (\S+) ", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the worker did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


async def _register(worker: str, directory: Path) -> list[str]:
    import aiohttp

    names = [f"adapter-{seed}" for seed in range(NUM_ADAPTERS)]
    headers = {"Authorization": f"Bearer {(directory / 'token').read_text().strip()}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        for i, name in enumerate(names):
            body = {"adapter_id": name, "lora_path": str(directory / "adapters" / name)}
            async with http.post(f"{worker}/api/v1/adapters", json=body) as answer:
                answer.raise_for_status()
            await _post(http, f"{worker}/api/v1/sample", _through(name, i, 1))  # loads it
    return names


async def _served_names(server: str, names: list[str]) -> list[str]:
    """What the server calls them."""
    import aiohttp

    async with aiohttp.ClientSession() as http, http.get(f"{server}/v1/models") as answer:
        served = [item["id"] for item in (await answer.json())["data"]]
    return [next(s for s in served if s.startswith(f"{name}.")) for name in names]


if __name__ == "__main__":
    main()
