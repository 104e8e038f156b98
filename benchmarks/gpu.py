"""`python -m benchmarks.gpu`: what only a GPU can tell, in under nine minutes on one card.

Every tier runs in a process of its own with its own limit, prints one JSON object per finding as soon as it
has it, and may fail: the others go on, and the command exits 0 with what there is. `--rehearse` runs the same
on the CPU in small shapes.

- facts (60 s): card, free memory, speed of copies; pinned ones should be well above pageable ones.
- fold (180 s): 28 layers of Qwen2.5-7B folded as vLLM's reload does and in place, and a graph captured before
  a fold; in place should be faster with a peak near 0, `differs` below 0.002, `equals_eager` true.
- memory (120 s): pinning an adapter tensor by tensor, golden weights in one piece; `code` should be 0.
- packet (120 s): a trainer's adapter from the GPU into shared memory, and its digest; milliseconds.

Report the file, the driver (`nvidia-smi`) and the log of `make test`. vLLM's engine is not measured: start
`tink-rl serve MODEL --mode both`, train with `recipes/grpo.py`, report the probe's line and
`rollout/logprob_gap`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.provenance import provenance
from tink_rl.policy import packet
from tink_rl.server import direct
from tink_rl.server.modules import Layer, Shard
from tink_rl.transport.shared_memory import Segment
from tink_rl.types import SyncMode

LIMITS_S = {"facts": 60, "fold": 180, "memory": 120, "packet": 120}
"""Tiers in the order in which they run, and the seconds that each may take."""
QWEN_7B = (
    (3584, 3584),
    (512, 3584),
    (512, 3584),
    (3584, 3584),
    (18944, 3584),
    (18944, 3584),
    (3584, 18944),
)
"""(out, in) of one decoder layer of Qwen2.5-7B: q, k, v, o, gate, up, down."""
RANK = 16


class Place:
    """Where a tier runs, and how large its shapes are."""

    def __init__(self, rehearse: bool) -> None:
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.shapes = tuple((o // 32, i // 32) for o, i in QWEN_7B) if rehearse else QWEN_7B
        self.num_layers = 2 if rehearse else 28

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time_ms(self, work: Callable[[], Any], times: int = 5) -> float:
        """Milliseconds of `work`, the least of some."""
        found = []
        for _ in range(times):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append((time.perf_counter() - start) * 1e3)
        return round(min(found), 3)

    def random(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.randn(*size, device=self.device) * 0.02).to(dtype)


def facts(place: Place) -> Iterator[dict[str, Any]]:
    """The card, the versions, and how fast memory is."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if place.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"gpu": torch.cuda.get_device_name(), "free_bytes": free, "total_bytes": total}
    yield found
    size = 2**30 if place.device.type == "cuda" else 2**24
    there = torch.zeros(size, dtype=torch.uint8, device=place.device)
    here = torch.zeros(size, dtype=torch.uint8)
    copies: dict[str, Callable[[], Any]] = {
        "d2d": lambda: there.clone(),
        "h2d pageable": lambda: there.copy_(here),
        "d2h pageable": lambda: here.copy_(there),
    }
    if place.device.type == "cuda":
        pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        copies["h2d pinned"] = lambda: there.copy_(pinned, non_blocking=True)
        copies["d2h pinned"] = lambda: pinned.copy_(there, non_blocking=True)
    for name, copy in copies.items():
        ms = place.time_ms(copy)
        yield {"copy": name, "gb_per_s": round(size / ms / 1e6, 2)}


def fold(place: Place) -> Iterator[dict[str, Any]]:
    """Folding a whole model: as the reload does it, and in place; what a captured graph then computes."""
    model = [_Layer(place) for _ in range(place.num_layers)]
    num_bytes = sum(t.numel() * 2 for layer in model for t in layer.golden.values())

    def reloaded() -> None:
        for layer in model:
            for name, rows in layer.rows.items():
                whole = torch.addmm(layer.golden[name].float(), layer.b[name], layer.a[name])
                rows.copy_(whole.to(torch.bfloat16).clone())

    def in_place() -> None:
        with direct.exact_products(place.device):
            for layer in model:
                direct.fold_in_place(layer.layer, layer.rows, layer, layer.tensors)

    for name, work in (("reloaded", reloaded), ("in place", in_place)):
        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        ms = place.time_ms(work)
        line = {"fold": name, "ms": ms, "weight_bytes": num_bytes, "gb_per_s": num_bytes / ms / 1e6}
        if place.device.type == "cuda":
            line["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        yield line
    yield _rounding(model[0])
    if place.device.type == "cuda":
        yield _graph(model[0], place)


class _Layer:
    """Random projections of one decoder layer: served rows, golden weights and an adapter."""

    def __init__(self, place: Place) -> None:
        names = [f"layer.{i}" for i in range(len(place.shapes))]
        self.rows = {
            n: place.random(*s, dtype=torch.bfloat16)
            for n, s in zip(names, place.shapes, strict=True)
        }
        self.golden = {n: rows.clone() for n, rows in self.rows.items()}
        self.a = {n: place.random(RANK, rows.shape[1]) for n, rows in self.rows.items()}
        self.b = {n: place.random(rows.shape[0], RANK) for n, rows in self.rows.items()}
        self.tensors = {f"{n}.lora_A.weight": t for n, t in self.a.items()}
        self.tensors |= {f"{n}.lora_B.weight": t for n, t in self.b.items()}
        shards = tuple(
            Shard(
                name=n,
                layer="layer",
                shard_id=None,
                shape=(rows.shape[0], rows.shape[1]),
                rows=slice(0, rows.shape[0]),
                columns=slice(0, rows.shape[1]),
            )
            for n, rows in self.rows.items()
        )
        self.layer = Layer(name="layer", module=torch.nn.Module(), shards=shards)

    def weight(self, shard: Shard) -> torch.Tensor:
        """See `direct.Golden`."""
        return self.golden[shard.name]


def _rounding(layer: _Layer) -> dict[str, Any]:
    """Which part of the weights folded in place is not the correctly rounded one, and how far off."""
    differ = total = 0
    worst = 0.0
    for name, rows in layer.rows.items():
        exact = layer.golden[name].double() + layer.b[name].double() @ layer.a[name].double()
        off = (rows.double() - exact.to(torch.bfloat16).double()).abs()
        differ += int((off > 0).sum())
        total += off.numel()
        worst = max(worst, float((off / exact.abs().clamp(min=1e-6)).max()))
    return {"rounding": "in place", "differs": differ / total, "largest_relative": worst}


def _graph(layer: _Layer, place: Place) -> dict[str, Any]:
    """Whether a graph that was captured before a fold computes with the weights after it."""
    rows = layer.rows["layer.0"]
    x = place.random(8, rows.shape[1], dtype=torch.bfloat16)
    out = x @ rows.T  # warms cuBLAS up before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = x @ rows.T
    double = {n: t * 2 for n, t in layer.tensors.items()}
    direct.fold_in_place(layer.layer, layer.rows, layer, double)
    graph.replay()
    place.wait()
    return {"graph": "replayed after a fold", "equals_eager": bool(torch.equal(out, x @ rows.T))}


def memory(place: Place) -> Iterator[dict[str, Any]]:
    """What pinning costs: an adapter tensor by tensor, golden weights in one piece."""
    sizes = [RANK * (o + i) * 2 for o, i in place.shapes * place.num_layers]
    if place.device.type != "cuda":
        yield {"pinning": "needs a GPU", "tensors": len(sizes)}
        return
    for turn in ("first", "again"):
        ms = place.time_ms(
            lambda: [torch.empty(s, dtype=torch.uint8, pin_memory=True) for s in sizes], 1
        )
        yield {"pinned": f"{len(sizes)} tensors, {turn}", "ms": ms, "bytes": sum(sizes)}
    slab = torch.zeros(4 * 2**30, dtype=torch.uint8)
    cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    code = int(cuda.cudaHostRegister(slab.data_ptr(), slab.numel(), 0))
    ms = round((time.perf_counter() - start) * 1e3, 1)
    yield {"registered": "one piece", "ms": ms, "bytes": slab.numel(), "code": code}
    there = torch.empty(2**30, dtype=torch.uint8, device=place.device)
    ms = place.time_ms(lambda: there.copy_(slab[: 2**30], non_blocking=True))
    yield {"copy": "h2d registered", "gb_per_s": round(2**30 / ms / 1e6, 2)}


def pack(place: Place) -> Iterator[dict[str, Any]]:
    """A trainer's adapter from the device into shared memory, and its digest."""
    tensors = {}
    for layer in range(place.num_layers):
        for i, (out, width) in enumerate(place.shapes):
            tensors[f"model.layers.{layer}.p{i}.lora_A.weight"] = place.random(RANK, width)
            tensors[f"model.layers.{layer}.p{i}.lora_B.weight"] = place.random(out, RANK)
    header = packet.layout(tensors, mode=SyncMode.MERGED, base_fingerprint="0" * 32, rank=RANK)
    segment = Segment.create(header.num_bytes)
    buffer = segment.buffer[: header.num_bytes]
    ms = place.time_ms(lambda: packet.fill(header, buffer, tensors))
    yield {"fill": f"{len(tensors)} tensors", "ms": ms, "bytes": header.num_bytes}
    ms = place.time_ms(lambda: packet.digest_of(header, buffer))
    yield {"digest": "blake3", "gb_per_s": round(header.num_bytes / ms / 1e6, 2)}


TIERS: dict[str, Callable[[Place], Iterator[dict[str, Any]]]] = {
    "facts": facts,
    "fold": fold,
    "memory": memory,
    "packet": pack,
}


def run_tier(name: str, rehearse: bool) -> None:
    """Print the findings of one tier, each as soon as it is there."""
    torch.manual_seed(0)
    for finding in TIERS[name](Place(rehearse)):
        print(json.dumps({"tier": name, **finding}), flush=True)


def main() -> None:
    """Run every tier in a process of its own; keep what each has printed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in small shapes")
    parser.add_argument("--tier", choices=TIERS, help="this one only, in this process")
    parser.add_argument("--out", type=Path, help="append every line to this file too")
    given = parser.parse_args()
    if given.tier:
        run_tier(given.tier, given.rehearse)
        return
    out = SimpleNamespace(write=lambda line: None)
    if given.out:
        out = given.out.open("a", buffering=1)  # type: ignore[assignment]
    command = "python -m benchmarks.gpu" + (" --rehearse" if given.rehearse else "")
    _say(out, {"tier": "start", **provenance(), "command": command})
    for name, limit_s in LIMITS_S.items():
        _run_in_child(name, limit_s, given.rehearse, out)


def _run_in_child(name: str, limit_s: float, rehearse: bool, out: Any) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--tier", name]
    command += ["--rehearse"] if rehearse else []
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    start = time.monotonic()
    try:
        text, errors = child.communicate(timeout=limit_s)
        end = "ended" if child.returncode == 0 else f"failed ({child.returncode})"
    except subprocess.TimeoutExpired:
        child.kill()
        text, errors = child.communicate()
        end = f"gave up after {limit_s} s"
    for line in text.splitlines():
        _say(out, json.loads(line))
    last = errors.strip().splitlines()[-1:] if end != "ended" else []
    _say(out, {"tier": name, "end": end, "s": round(time.monotonic() - start, 1), "error": last})


def _say(out: Any, finding: dict[str, Any]) -> None:
    line = json.dumps(finding)
    print(line, flush=True)
    out.write(line + "\n")


if __name__ == "__main__":
    main()
