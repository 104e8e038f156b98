"""The notebooks, top to bottom, each with its own server; and that nothing is left of it."""

from __future__ import annotations

import re
import time
import uuid
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.processes import marked_processes

pytestmark = [pytest.mark.recipe, pytest.mark.server, pytest.mark.home]
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_MARK = "MARK_OF_NOTEBOOK_TEST"  # not TINK_*: those are not handed on to a server


def with_parameters(path, **parameters):
    """The notebook with other values in its cell of parameters."""
    notebook = nbformat.read(path, as_version=4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for name, value in parameters.items():
        cell.source, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", cell.source)
        assert count == 1, name
    return notebook


class Watched(NotebookClient):
    """Counts the kernel's processes after each cell."""

    def __init__(self, *args, mark, **kwargs):
        super().__init__(*args, **kwargs)
        self.mark, self.num_processes = mark, []

    async def async_execute_cell(self, cell, *args, **kwargs):
        done = await super().async_execute_cell(cell, *args, **kwargs)
        if cell.cell_type == "code":
            self.num_processes.append(len(marked_processes(_MARK, self.mark)))
        return done


def run_notebook(path, tmp_path, monkeypatch, **parameters):
    """Execute it; its code cells' text, and the number of processes after each."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(_MARK, mark)
    monkeypatch.setenv("TINK_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = Watched(
        with_parameters(path, **parameters),
        mark=mark,
        timeout=280,
        resources={"metadata": {"path": str(path.parent)}},
    )
    notebook = client.execute()
    deadline = time.monotonic() + 30
    while marked_processes(_MARK, mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert marked_processes(_MARK, mark) == []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(map(_text, cell.outputs)) for cell in cells], client.num_processes


def _text(output):
    return output.get("text") or output.get("data", {}).get("text/plain", "")


def assert_server_ran_and_stopped(num_processes):
    assert num_processes[0] == num_processes[1] == 1  # the kernel alone
    assert max(num_processes) >= 4  # watchdog, API server, engine
    assert num_processes[-1] == 1  # the kernel still lives, nothing of the server does


@pytest.mark.long
@pytest.mark.timeout(400)
def test_grpo_notebook_trains_draws_and_stops_its_server(tmp_path, monkeypatch):
    path = ROOT / "notebooks/1_grpo.ipynb"
    outputs, processes = run_notebook(path, tmp_path, monkeypatch, MAX_STEPS=6, BATCH_SIZE=64)
    assert_server_ran_and_stopped(processes)
    assert re.search(r"digits@6 \[.*\] held-out, sampled: 0\.\d\d", "".join(outputs))
    assert (ROOT / "runs/notebook-grpo/report.html").is_file()
    assert outputs[-1] == "False"


@pytest.mark.long
@pytest.mark.timeout(400)
def test_modes_notebook_gets_the_same_tokens_in_every_mode(tmp_path, monkeypatch):
    path = ROOT / "notebooks/2_modes.ipynb"
    outputs, processes = run_notebook(path, tmp_path, monkeypatch, NUM_PUBLISHES=2, NUM_PROMPTS=32)
    assert_server_ran_and_stopped(processes)
    text = "".join(outputs)
    equal = [int(n) for n in re.findall(r"(\d+) of 32 greedy completions", text)]
    assert len(equal) == 2 and min(equal) >= 24  # near ties may flip
    row = r" +[\d.]+ +[\d,]+ +[\d,]+\n"
    assert re.search(rf"adapter{row}merged{row}full{row}", text)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_versions_notebook_serves_all_checkpoints_and_exports_the_best(tmp_path, monkeypatch):
    path = ROOT / "notebooks/3_versions.ipynb"
    outputs, processes = run_notebook(
        path, tmp_path, monkeypatch, MAX_STEPS=6, SAVE_STEPS=2, BATCH_SIZE=64
    )
    assert_server_ran_and_stopped(processes)
    text = "".join(outputs)
    for version in (1, 2, 3):
        assert f"candidates@{version} " in text
    assert "policy version | digits@" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)
