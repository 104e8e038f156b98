"""The formulas of docs/scale.md: bytes of a real packet, and the table's own figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.scale import adapter_bytes, fit, predict
from tests.policies import PeftTwin
from tink_rl.policy import packet
from tink_rl.types import SyncMode

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
MEASURED = PAGE.parents[1] / "benchmarks/SCALE.md"
RESULTS = PAGE.parents[1] / "benchmarks/results/scale.json"
# hidden, intermediate, width of k and v, layers, parameters; from the models' config.json
MODELS = {
    "Qwen2.5-0.5B": (896, 4864, 128, 24, 0.494e9),
    "Qwen2.5-7B": (3584, 18944, 512, 28, 7.616e9),
    "Llama-3-70B": (8192, 28672, 1024, 80, 70.554e9),
}
TEN_GBE = 1.25e9


def linear_shapes(hidden, intermediate, narrow, layers):
    attention = [(hidden, hidden), (hidden, narrow), (hidden, narrow), (hidden, hidden)]
    mlp = [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    return (attention + mlp) * layers


@pytest.mark.parametrize(("dtype", "item_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_formula_gives_the_bytes_of_a_packet(model_dir, dtype, item_bytes):
    twin = PeftTwin(model_dir("qwen3"), r=8)
    adapter = twin.collector.collect(getattr(torch, dtype))
    header, buffer = packet.pack(
        adapter.tensors, mode=SyncMode.ADAPTER, base_fingerprint="", rank=adapter.rank
    )
    shapes = [
        (
            adapter.tensors[f"{name}.lora_A.weight"].shape[1],
            adapter.tensors[f"{name}.lora_B.weight"].shape[0],
        )
        for name in adapter.modules
    ]
    assert header.num_bytes == buffer.numel() == adapter_bytes(shapes, 8, item_bytes)


@pytest.mark.parametrize("model", MODELS)
def test_table_says_what_the_formula_gives(model):
    *sizes, parameters = MODELS[model]
    shapes = linear_shapes(*sizes)
    small, large = adapter_bytes(shapes, 16, 2), adapter_bytes(shapes, 16, 4)
    seconds = predict(small, 0.0, TEN_GBE)
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {model} "))
    for text in (
        f"| {sum(a + b for a, b in shapes):,} |",
        f"| {small / 1e6:.1f} MB | {large / 1e6:.1f} MB |",
        f"| {1e3 * seconds:.0f} ms | {1e2 * seconds:.2g} ms |",
        f"| {2 * parameters / TEN_GBE:.1f} s |",
    ):
        assert text in row


def test_two_points_give_the_line_through_them():
    fixed_s, bytes_per_s = fit([(2_000_000, 0.014), (1_000_000, 0.012)])
    assert predict(1_500_000, fixed_s, bytes_per_s) == pytest.approx(0.013)


def test_measured_publishes_on_the_page_are_those_of_the_results():
    rows = [line.strip("|").split("|") for line in MEASURED.read_text().splitlines()]
    found = json.loads(RESULTS.read_text())
    for transport, column in (("gloo", 2), ("http", 4)):
        for rank, point in zip(
            found["ranks"], found["transports"][transport]["points"], strict=True
        ):
            row = next(r for r in rows if r[0].strip() == str(rank) and len(r) == 6)
            assert row[1].strip() == f"{point['bytes']:,}"
            assert row[column].strip() == f"{1e3 * point['seconds']:.0f} ms"
            assert row[column + 1].strip() == f"{1e3 * point['predicted']:.0f}"
