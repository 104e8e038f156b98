"""Publishing: adapter and merged mode against TRL's own adapter route, and decoding under each."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from recipes.tiny_base import ensure_tiny_base, make_tokenizer
from tink_rl import SyncConfig, VLLMServer, WeightSync
from tink_rl.gpus import exact_dtype
from tink_rl.policy import packet
from tink_rl.policy.adapter import AdapterCollector
from tink_rl.publish.stopwatch import Stopwatch
from tink_rl.training.probe import Prober
from tink_rl.types import Phase, PublishRecord, SyncMode

RAM_DISK = Path("/dev/shm")
NUM_SEQUENCES = 128
NUM_WARM_UP = 4
"""Publishes of a round until every buffer that is used in turn (two versions kept, one spare on each
side) has its pages."""


def random_100m(directory: Path) -> Path:
    """A randomly initialised Qwen3 of 110M parameters."""
    if (directory / "config.json").is_file():
        return directory
    torch.manual_seed(0)
    config = Qwen3Config(
        **{"vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2048},
        **{"num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12},
        **{"head_dim": 64, "max_position_embeddings": 512, "tie_word_embeddings": False},
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def measure(repeats: int = 12) -> dict[str, Any]:
    """Medians by model and route; the routes take turns in every round.

    Each route's first publishes of a round are not counted: what a run of hundreds pays is asked.
    """
    models = {
        "tiny (0.6M, r=16)": (ensure_tiny_base(), 16, 32, 6),
        "random (110M, r=32)": (random_100m(Path(".cache/random_100m")), 32, 8, 3),
    }
    results: dict[str, Any] = {"publish_seconds": {}, "decode_tokens_per_second": {}, "detail": {}}
    for name, (directory, rank, num_tokens, rounds) in models.items():
        print(f"publish: {name}", flush=True)
        found = _measure_model(directory, rank, num_tokens, rounds, repeats)
        for key in ("publish_seconds", "decode_tokens_per_second"):
            results[key][name] = found.pop(key)
        results["detail"][name] = found
    return results


def _measure_model(
    directory: Path, rank: int, num_tokens: int, rounds: int, repeats: int
) -> dict[str, Any]:
    collector, model = _lora(directory, rank)
    trl: list[float] = []
    records: dict[str, list[PublishRecord]] = {"adapter": [], "merged": []}
    speeds: dict[str, list[float]] = {"base": [], "slot": [], "merged": []}
    with VLLMServer(
        directory,
        mode="both",
        dtype=exact_dtype("both"),
        shared_with_trainer=False,
        max_model_len=256,
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},  # for TRL's route, on the same server
    ) as server:
        for seed in range(rounds):
            seeds = range(seed * repeats, (seed + 1) * repeats)
            trl += [_trl_route(server, model, collector, k) for k in seeds][NUM_WARM_UP:]
            for mode, decode in (("adapter", "slot"), ("merged", "merged")):
                with _sync(server, directory, mode) as sync:
                    records[mode] += [_publish(sync, collector, k) for k in seeds][NUM_WARM_UP:]
                    speeds[decode] += _decode(server, sync.current.name, num_tokens)  # type: ignore[union-attr]
                    for name in server.client().status().served:
                        sync.fleet.each(lambda replica, name=name: replica.drop(name))
                # right beside what it is compared with: these machines drift within a minute
                speeds["base"] += _decode(server, server.client().status().base_model, num_tokens)
    median = statistics.median
    return {
        "publish_seconds": {
            **{mode: median(r.seconds for r in found) for mode, found in records.items()},
            "trl_adapter_route": median(trl),
            "memcpy": _memcpy(records["adapter"][0].num_bytes),
        },
        "decode_tokens_per_second": {route: median(found) for route, found in speeds.items()},
        "decode_tokens_per_sequence": num_tokens,
        "bytes": records["adapter"][0].num_bytes,
        "held_seconds": median(r.held_seconds for r in records["merged"]),
        "phase_seconds": {
            mode: {p: median(r.phase_seconds.get(p, 0.0) for r in rs) for p in rs[0].phase_seconds}
            for mode, rs in records.items()
        },
        "pack_and_digest_seconds": _pack(collector),
    }


def _lora(directory: Path, rank: int) -> tuple[AdapterCollector, Any]:
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    model = get_peft_model(base, settings)
    return AdapterCollector(model), model


def measure_bf16_gap() -> dict[str, float]:
    """Largest |trainer - sampler| logprob of the probe prompt on a bf16 server, by mode."""
    directory = ensure_tiny_base()
    collector, model = _lora(directory, 16)
    prober = Prober(model, vocab_size=model.config.vocab_size)
    gaps = {}
    with VLLMServer(
        directory,
        mode="both",
        dtype="bfloat16",
        shared_with_trainer=False,
        max_model_len=256,
        max_lora_rank=16,
    ) as server:
        for mode in ("merged", "adapter"):
            with _sync(server, directory, mode) as sync, collector.swapped(collector.random_like()):
                record = sync.publish(collector.collect())
                gaps[mode] = prober.compare(sync, record.name).gap
                sync.drop_current()
    return gaps


def _sync(server: VLLMServer, directory: Path, mode: str) -> WeightSync:
    return WeightSync(
        server.url, base_model=directory, config=SyncConfig(mode=mode, token=server.token)
    )


def _publish(sync: WeightSync, collector: AdapterCollector, k: int) -> PublishRecord:
    with collector.swapped(collector.random_like(k)):
        watch = Stopwatch()
        with watch(Phase.COLLECT):
            adapter = collector.collect(live=True)
        return sync.publish(adapter, watch=watch)


def _trl_route(server: VLLMServer, model: Any, collector: AdapterCollector, k: int) -> float:
    """TRL's asynchronous trainer: save_pretrained, then /v1/load_lora_adapter; here on a RAM disk."""
    directory = Path(tempfile.mkdtemp(dir=RAM_DISK))
    try:
        with collector.swapped(collector.random_like(k)):
            start = time.perf_counter()
            model.save_pretrained(directory)
            body = {"lora_name": f"trl-{k}", "lora_path": str(directory)}
            httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).raise_for_status()
            seconds = time.perf_counter() - start
        body = {"lora_name": f"trl-{k}"}
        httpx.post(f"{server.url}/v1/unload_lora_adapter", json=body).raise_for_status()
        return seconds
    finally:
        shutil.rmtree(directory)


def _decode(server: VLLMServer, name: str, num_tokens: int) -> list[float]:
    """Tokens per second of 2 requests after a warm-up."""
    prompts = [[4 + i % 40, 5, 6, 7] for i in range(NUM_SEQUENCES)]
    speeds = []
    with server.client() as client:
        for _ in range(3):
            start = time.perf_counter()
            client.generate(
                prompts,
                max_tokens=num_tokens,
                model=name,
                generation_kwargs={"ignore_eos": True},
            )
            speeds.append(NUM_SEQUENCES * num_tokens / (time.perf_counter() - start))
    return speeds[1:]


def _memcpy(num_bytes: int) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(21):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _pack(collector: AdapterCollector) -> float:
    adapter = collector.collect()
    times = []
    for _ in range(11):
        start = time.perf_counter()
        packet.seal(
            *packet.pack(
                adapter.tensors, mode=SyncMode.ADAPTER, base_fingerprint="", rank=adapter.rank
            )
        )
        times.append(time.perf_counter() - start)
    return statistics.median(times)
