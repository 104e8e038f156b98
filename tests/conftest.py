"""Fixtures: tiny models, and real vLLM servers, one start per set of flags in a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
# Two servers and a trainer on two cores: more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import tiny_models
from tink_rl.launch import VLLMServer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_dir(shape)`: a saved tiny model, made once."""
    root = tmp_path_factory.mktemp("models")

    def make(shape: str) -> Path:
        directory = root / shape
        if not directory.is_dir():
            tiny_models.make_model(shape, directory)
        return directory

    return make


class ServerPool:
    """Real servers by flags: the one that most tests ask for, and one other."""

    HOME = ("qwen3", (("mode", "both"),))

    def __init__(self, root: Path, model_dir: Callable[[str], Path]) -> None:
        self._root, self._model_dir = root, model_dir
        self._running: dict[object, VLLMServer] = {}

    def get(self, shape: str = "qwen3", **options: object) -> VLLMServer:
        """A running server of `shape` with these `ServerOptions`."""
        key = (shape, tuple(sorted((k, str(v)) for k, v in options.items())))
        found = self._running.get(key)
        if found is not None and found.alive:
            return found
        # An idle server costs memory and no time; more than one other would be too much memory.
        for other in [k for k in self._running if k == key or self.HOME not in (k, key)]:
            self._running.pop(other).stop()
        settings: dict[str, object] = {
            "dtype": "float32",
            "max_model_len": 256,
            "max_lora_rank": 16,
            "token_file": str(self._root / "token"),
            **options,
        }
        self._running[key] = VLLMServer(self._model_dir(shape), **settings).start()
        return self._running[key]

    def stop(self) -> None:
        """Stop all."""
        while self._running:
            self._running.popitem()[1].stop()


@pytest.fixture(scope="session")
def servers(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[[str], Path]
) -> Iterator[ServerPool]:
    """The pool; its last server is stopped at the end of the session."""
    pool = ServerPool(tmp_path_factory.mktemp("server"), model_dir)
    yield pool
    pool.stop()


# A wrapper goes before xdist's own hook, which reads the groups and goes before any other.
@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Unit tests first; then by file and, inside a file, by shape, so that servers are reused."""

    def key(item: pytest.Item) -> tuple[bool, str, str]:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        shape = str(parameters.get("shape", ""))
        return "tests/unit" not in str(item.path), str(item.path), shape

    items.sort(key=key)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_track(item)))
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    yield
    if getattr(config.option, "loadgroup", False):
        lost = [item.nodeid for item in items if "@" not in item.nodeid]
        assert not lost, f"xdist does not see the group of {lost[0]}; see pytest in pyproject.toml"


def _track(item: pytest.Item) -> str:
    """What must run in one process of `pytest -n 2 --dist loadgroup`.

    A process has its own pool of servers, so what uses the pool stays together. The first track is as
    long as the other two and the unit tests.
    """
    path = item.path.relative_to(Path(__file__).parent)
    if path.parts[0] in ("multi", "invariant", "docs"):
        return "runs"
    if path.parts[0] in ("recipes", "notebooks"):
        return "launchers"
    return "server" if path.parts[0] == "server" else str(path)
