"""Fixtures: tiny models, and real vLLM servers, one start per set of flags in a session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # its processes inherit the one that it made
    _hub = tempfile.TemporaryDirectory(prefix="tink-rl-hub-")
    os.environ["HF_HUB_CACHE"] = _hub.name
os.environ.setdefault("WANDB_MODE", "disabled")
from tests import cores

cores.share()

from tests import tiny_models, warm_server
from tink_rl.gpus import exact_dtype
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
    """Real servers by flags: the one that most tests ask for, and the other that was used last.

    An idle server takes no time, and 3 GiB.
    """

    HOME = ("qwen3", (("mode", "both"),))

    def __init__(self, root: Path, model_dir: Callable[[str], Path]) -> None:
        self._root, self._model_dir = root, model_dir
        self._running: dict[object, VLLMServer] = {}
        self._stopped: set[object] = set()

    def get(self, shape: str = "qwen3", **options: Any) -> VLLMServer:
        """A running server of `shape` with these `ServerOptions`."""
        key = (shape, tuple(sorted((k, str(v)) for k, v in options.items())))
        here = os.environ.get("PYTEST_CURRENT_TEST", "")
        assert key != self.HOME or "@" not in here or "@home" in here, (
            "this process would start the shared server once more; mark the test pytest.mark.home"
        )
        found = self._running.get(key)
        if found is not None and found.alive:
            return found
        assert key not in self._stopped, f"{key} would be started twice; keep its tests together"
        if found is not None:  # it died
            self._running.pop(key).stop()
        if key != self.HOME:
            self._make_room()
        settings: dict[str, object] = {
            "dtype": exact_dtype(options.get("mode", "both")),
            "max_model_len": 256,
            "max_lora_rank": 16,
            "token_file": str(self._root / "token"),
            **options,
        }
        if num_workers := options.get("tensor_parallel_size"):
            settings["env"] = {**cores.for_workers(num_workers), **options.get("env", {})}
        self._running[key] = warm_server.make_server(self._model_dir(shape), **settings).start()
        return self._running[key]

    def _make_room(self) -> None:
        for key in [key for key in self._running if key != self.HOME]:
            self._running.pop(key).stop()
            self._stopped.add(key)

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
    """Unit tests first; then by file, the files about shapes by shape, so that servers are reused."""

    def key(item: pytest.Item) -> tuple[bool, str, str, str]:
        path = str(item.path)
        together, _, rest = path.partition("test_shapes_")
        return "tests/unit" not in path, together, _shape(item), rest

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

    A process has its own pool of servers, so what asks for the same one stays together: no server is
    started twice for the same flags.
    """
    path = item.path.relative_to(Path(__file__).parent)
    if path.parts[0] == "unit":
        return str(path)
    is_home = item.get_closest_marker("home") is not None
    if path.parts[0] == "server" and _shape(item):
        is_home = _shape(item) == ServerPool.HOME[0]
    return "home" if is_home else "others"


def _shape(item: pytest.Item) -> str:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return str(parameters.get("shape", ""))
