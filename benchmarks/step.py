"""Where a GRPO step goes, beside TRL's own CPU route: `python -m benchmarks.step`."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.grpo_run import Run
from benchmarks.grpo_run import measure as measure_run


def measure() -> dict[str, Any]:
    """Median seconds of a step by route and completion length, each in a fresh process."""
    results: dict[str, Any] = {}
    for tokens in (8, 64):
        for route in ("vllm", "trl"):
            print(f"step: {route}, {tokens} tokens a completion", flush=True)
            found = measure_run(Run(route=route, tokens=tokens))
            results.setdefault(f"{tokens} tokens", {})[route] = found
    return results


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
