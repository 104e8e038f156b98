"""What it costs to compare a trainer's base with its checkpoint: `python -m benchmarks.base_check`.

A random base of more than 1 GB, with both cores: in the file's dtype (read beside, no cast), in another
one (each chunk is cast), and the digests that a copy on another machine costs. The first pass is not
counted: it waits for the disk. Beside it `read_s`: touching every byte of the same files once.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.provenance import provenance
from tink_rl.policy.content import ContentDigest
from tink_rl.policy.fingerprint import MappedCheckpoint, checkpoint_index
from tink_rl.policy.live_check import check_live_base

ROUNDS = 5
DTYPES = ("float32", "bfloat16")


def random_base(directory: Path) -> Path:
    """A randomly initialised Qwen3 of 270M parameters, 1.1 GB in fp32."""
    if (directory / "config.json").is_file():
        return directory
    torch.manual_seed(0)
    config = Qwen3Config(
        **{"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072},
        **{"num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8},
        **{"head_dim": 64, "max_position_embeddings": 512, "tie_word_embeddings": False},
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def measure() -> dict[str, Any]:
    """Seconds per GB of the checkpoint, medians of rounds in which the ways take turns."""
    directory = random_base(Path(".cache/random_base"))
    index = checkpoint_index(directory)
    num_bytes = sum(entry.num_bytes for entry in index.values())
    models = {name: _adapted(directory, getattr(torch, name)) for name in DTYPES}
    ways: dict[str, Callable[[], Any]] = {
        "read": lambda: _read(index),
        **{
            f"check_{name}": lambda model=model: check_live_base(model, str(directory))
            for name, model in models.items()
        },
        "digest": lambda: ContentDigest(index).wait(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    of_cores: dict[str, list[float]] = {name: [] for name in ways}
    before = _anonymous_mb()
    for number in range(ROUNDS + 1):
        for name, work in ways.items():
            begin, cores = time.perf_counter(), time.process_time()
            work()
            if number:
                seconds[name].append(time.perf_counter() - begin)
                of_cores[name].append(time.process_time() - cores)
    gb = num_bytes / 1e9
    return {
        "checkpoint_bytes": num_bytes,
        "seconds_per_gb": {name: statistics.median(found) / gb for name, found in seconds.items()},
        "core_seconds_per_gb": {n: statistics.median(found) / gb for n, found in of_cores.items()},
        "all_seconds": seconds,
        "load_of_the_machine": os.getloadavg(),
        "anonymous_mb_grown": _anonymous_mb() - before,
        "threads": torch.get_num_threads(),
    }


def _adapted(directory: Path, dtype: torch.dtype) -> Any:
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))


def _read(index: Any) -> float:
    files = MappedCheckpoint()
    return sum(float(files.tensor(entry).view(torch.float32).sum()) for entry in index.values())


def _anonymous_mb() -> float:
    """Memory of this process that is no mapped file, now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return float(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no RssAnon")


def main() -> None:
    """Measure, print, and write results/base_check.json."""
    path = Path(__file__).parent / "results" / "base_check.json"
    results = {**provenance(), "command": "python -m benchmarks.base_check", **measure()}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["seconds_per_gb"], indent=1))


if __name__ == "__main__":
    main()
