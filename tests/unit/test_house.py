"""The house: imports point down, leaves stay light, names and lists agree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tink_rl
from benchmarks import structure

ROOT = Path(tink_rl.__file__).parent
# From the ground up: a room may import from itself and from what stands before it.
FLOORS = [
    {"errors", "types", "strict_json", "loopback", "gpus", "startup_log", "cpu_limit"},
    {"tokens", "urls", "tls", "post_mortem", "remedies", "seam"},
    {"config", "settings", "placement", "shared_names", "watchdog", "download"},
    {"plugin_settings"},
    {"policy"},
    {"protocol"},
    {"transport", "memory_plan"},
    {"serve_options"},
    {"publish", "server"},
    {"launch", "training", "adapters"},
    {"sampling"},
    {"vllm_backend"},
    {"worker", "tools"},
    {"cli"},
]
TRAINING = {"policy", "transport", "publish", "server", "training"}
SAMPLING_SERVICE = {"adapters", "sampling", "vllm_backend", "worker"}
FORBIDDEN = {
    "server": {"trl", "peft", "accelerate", "datasets", "wandb"},
    "training": {"vllm"},
    "transport": {"trl", "vllm", "peft"},
    "publish": {"trl", "vllm", "peft"},
    "policy": {"trl", "vllm"},
    "adapters": {"trl", "vllm", "peft"},
    "sampling": {"trl", "vllm", "peft"},
    "vllm_backend": {"trl", "vllm", "peft"},
    "worker": {"trl", "vllm", "torch"},
}


def _rooms() -> list[tuple[str, Path]]:
    paths = sorted(ROOT.rglob("*.py"))
    return [(p.relative_to(ROOT).parts[0].removesuffix(".py"), p) for p in paths]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize(("room", "path"), [r for r in _rooms() if r[0] != "__init__"], ids=str)
def test_imports_point_down(room, path):
    names = _imports(path)
    ours = {n.split(".")[1] for n in names if n.startswith("tink_rl.")} - {"__version__"}
    for other in ours - {room}:
        assert _floor(other) < _floor(room), f"{path} imports {other}"
    assert not {n.split(".")[0] for n in names} & FORBIDDEN.get(room, set())


def test_trainer_side_never_imports_the_server_side():
    for room, path in _rooms():
        if room != "server":
            assert not any("tink_rl.server" in name for name in _imports(path)), path


def test_no_module_imports_one_that_imports_it():
    """Over however many others; imports inside functions and under `TYPE_CHECKING` count."""
    assert structure.circles(structure.import_graph(ROOT.parent)) == []


def test_training_never_imports_the_sampling_service():
    for room, path in _rooms():
        if room in TRAINING:
            ours = {n.split(".")[1] for n in _imports(path) if n.startswith("tink_rl.")}
            assert not ours & SAMPLING_SERVICE, path


@pytest.mark.parametrize(
    "module",
    ["tink_rl", "tink_rl.config", "tink_rl.errors", "tink_rl.protocol", "tink_rl.types"],
)
def test_leaves_load_neither_torch_nor_trl_nor_vllm(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'trl', 'vllm') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_client_and_weight_sync_work_without_vllm_trl_and_peft():
    code = (
        "import sys\nfor m in ('vllm', 'trl', 'peft'): sys.modules[m] = None\n"
        "import tink_rl; tink_rl.WeightSync; tink_rl.VLLMClient; print('fine')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "fine"


def test_every_exported_name_resolves_and_is_listed():
    assert set(tink_rl._HOMES) | {"__version__"} == set(tink_rl.__all__)
    for name in tink_rl.__all__:
        assert getattr(tink_rl, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = tink_rl.nothing
