"""What a publish costs by formula, and what it costs here: `python -m benchmarks.scale`.

`docs/scale.md` gives seconds of a publish as `fixed + bytes / rate`. Here the two constants of each
transport are taken from the smallest and the largest rank, and the ranks between are predicted.
"""

from __future__ import annotations

from tink_rl import placement

if __name__ == "__main__":
    placement.place_trainer(max_staleness=1)  # server and trainer compute at the same time

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.publish import random_100m
from tink_rl import SyncConfig, VLLMServer, WeightSync
from tink_rl.gpus import exact_dtype
from tink_rl.policy.adapter import AdapterCollector
from tink_rl.publish.stopwatch import Stopwatch
from tink_rl.types import Phase

RANKS = (8, 16, 32, 64)
TRANSPORTS = ("gloo", "http")
NUM_WARM_UP, NUM_TIMED = 4, 9


def adapter_bytes(shapes: Iterable[tuple[int, int]], rank: int, item_bytes: int) -> int:
    """Bytes of one publish: `item_bytes * rank * sum(in + out)` over the adapted modules.

    Args:
        shapes: `(in, out)` of each.
        rank: LoRA rank.
        item_bytes: 4 in merged mode (folded in fp32); in adapter mode the server's LoRA dtype's.
    """
    return item_bytes * rank * sum(num_in + num_out for num_in, num_out in shapes)


def predict(num_bytes: int, fixed_s: float, bytes_per_s: float) -> float:
    """Seconds of one publish to one server."""
    return fixed_s + num_bytes / bytes_per_s


def fit(points: list[tuple[int, float]]) -> tuple[float, float]:
    """`(fixed_s, bytes_per_s)` of the line through the smallest and the largest point."""
    (b0, t0), (b1, t1) = min(points), max(points)
    bytes_per_s = (b1 - b0) / (t1 - t0)
    return t0 - b0 / bytes_per_s, bytes_per_s


def measure() -> dict[str, Any]:
    """Per transport the measured medians, the constants and the predictions."""
    directory = random_100m(Path(".cache/random_100m"))
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in TRANSPORTS}
    with VLLMServer(
        directory,
        mode="adapter",
        dtype=exact_dtype("adapter"),
        shared_with_trainer=False,
        max_model_len=256,
        max_lora_rank=max(RANKS),
    ) as server:
        for rank in RANKS:
            collector = _collector(directory, rank)
            for transport in TRANSPORTS:
                found[transport].append(_time(server, directory, transport, collector))
                print(f"rank {rank}, {transport}: {found[transport][-1]}", flush=True)
    return {name: _checked(points) for name, points in found.items()}


def _collector(directory: Path, rank: int) -> AdapterCollector:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    return AdapterCollector(get_peft_model(base, lora))


def _time(
    server: VLLMServer, directory: Path, transport: str, collector: AdapterCollector
) -> tuple[int, float]:
    config = SyncConfig(mode="adapter", token=server.token, transport=transport, policy=transport)
    seconds = []
    with WeightSync(server.url, base_model=directory, config=config) as sync:
        for k in range(NUM_WARM_UP + NUM_TIMED):
            with collector.swapped(collector.random_like(k)):
                watch = Stopwatch()
                with watch(Phase.COLLECT):
                    adapter = collector.collect(live=True)
                record = sync.publish(adapter, watch=watch)
            seconds.append(record.seconds)
        for name in server.client().status().served:
            sync.fleet.each(lambda replica, name=name: replica.drop(name))
    return record.num_bytes, statistics.median(seconds[NUM_WARM_UP:])


def _checked(points: list[tuple[int, float]]) -> dict[str, Any]:
    fixed_s, bytes_per_s = fit(points)
    return {
        "fixed_s": fixed_s,
        "bytes_per_s": bytes_per_s,
        "points": [
            {"bytes": b, "seconds": t, "predicted": predict(b, fixed_s, bytes_per_s)}
            for b, t in points
        ],
    }


def main() -> None:
    """Measure, print, and write results/scale.json."""
    from benchmarks.run import write  # it pins this process when it is imported

    source = {**provenance(), "command": "python -m benchmarks.scale"}
    results = {**source, "ranks": RANKS, "transports": measure()}
    write("scale", results)
    print(json.dumps(results["transports"], indent=1))


if __name__ == "__main__":
    main()
