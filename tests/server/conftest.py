"""The server that trainers train against, and adapters on disk with their golden answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.policies import PeftTwin
from tests.trainers import left_clean

NUM_GOLDENS = 32


@dataclass(frozen=True)
class GoldenAdapter:
    """One adapter, and the greedy tokens that it and nobody else answers."""

    name: str
    path: Path
    cases: dict[tuple[int, ...], list[int]]


@pytest.fixture(scope="session")
def golden_adapters(model_dir, tmp_path_factory):
    """32 adapters of the qwen3 base below one root; each answers its prompts as no other does."""
    twin = PeftTwin(model_dir("qwen3"))
    root, found = tmp_path_factory.mktemp("golden"), []
    for seed in range(NUM_GOLDENS):
        twin.randomise(seed)
        path = root / f"golden-{seed}"
        twin.model.save_pretrained(path)
        found.append(GoldenAdapter(f"golden-{seed}", path, twin.clear_cases(count=2)))
    assert len({str(sorted(golden.cases.items())) for golden in found}) == NUM_GOLDENS
    return found


@pytest.fixture
def server(servers):
    """The tiny Qwen3 in both modes; afterwards nothing of the test stays served."""
    with left_clean(servers.get("qwen3", mode="both")) as server:
        yield server


@pytest.fixture(scope="session")
def switch_file(tmp_path_factory):
    """What the servers of `faulty_options` read; one path, because a server keeps it for its life."""
    return tmp_path_factory.mktemp("switch") / "fault"


@pytest.fixture
def switch(switch_file):
    """The same, off before and after the test."""
    switch_file.unlink(missing_ok=True)
    yield switch_file
    switch_file.unlink(missing_ok=True)
