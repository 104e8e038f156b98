"""The script that measures the shape of the code, on a package of five files."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import hops, structure
from tink_rl.types import PolicyVersion

FILES = {
    "README.md": "Two words.\n<!-- a mark -->\n```bash\na command\n```\n",
    "docs/index.md": "| a | table |\n|---|---|\n",
    "tink_rl/__init__.py": "",
    "tink_rl/errors.py": "class TinkError(Exception): ...\nclass A(TinkError): ...\n",
    "tink_rl/a.py": (
        "from typing import TYPE_CHECKING, Any\n"
        "from tink_rl import errors\n"
        "if TYPE_CHECKING:\n    from tink_rl.b import f\n"
        "class B(errors.A): ...\n"
        "def g(x: Any, *, y: dict[str, Any], **z: int) -> Any: ...\n"
    ),
    "tink_rl/b.py": "def f(self, x: int):\n    from tink_rl import c\n",
    "tink_rl/c.py": "import tink_rl.a\n",
}
MOST_HOPS = {"packet": 90, "prompt": 29, "caller": 56}
"""As measured; lower them when a layer goes."""


@pytest.fixture
def checkout(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_figures_of_a_small_package(checkout):
    assert structure.measure(checkout) == {
        "files": 5,
        "lines": 11,
        "circles": [["tink_rl.a", "tink_rl.b", "tink_rl.c"]],
        "longest_file": "tink_rl/a.py",
        "longest_lines": 6,
        "arguments": 4,
        "any_percent": 25.0,
        "error_classes": 3,
        "doc_pages": 1,
        "doc_words": 4,
    }


def test_a_chain_of_imports_is_not_a_circle():
    assert structure.circles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"d"}}) == [["d"]]


def test_program_prints_the_table_and_json(checkout):
    program = [sys.executable, "-m", "benchmarks.structure", str(checkout)]
    root = Path(structure.__file__).parents[1]
    shown, read = (
        subprocess.run([*program, *more], cwd=root, capture_output=True, text=True, check=True)
        for more in ([], ["--json"])
    )
    assert "| import circles | 1 |" in shown.stdout
    assert json.loads(read.stdout)["error_classes"] == 3


def test_hop_is_a_named_function_of_ours_that_calls_another_one():
    def go():
        threading.Thread(target=lambda: PolicyVersion.parse("policy@3")).start()

    walk = hops.Walk(rest_s=0.1)
    with walk.watched():
        found = walk.of(go)
    assert found == {"types.py:PolicyVersion.parse": True, "types.py:PolicyVersion.find": False}


@pytest.mark.long
def test_ways_of_a_packet_a_prompt_and_a_caller_do_not_grow():
    pytest.importorskip("uvicorn", reason="the server extra is not installed")
    root = Path(structure.__file__).parents[1]
    program = [sys.executable, "-m", "benchmarks.hops"]
    shown = subprocess.run(program, cwd=root, capture_output=True, text=True, check=True).stdout
    lines = [line for line in shown.splitlines() if line.startswith("|")]  # libraries talk, too
    rows = [[word.strip() for word in line.split("|")] for line in lines[2:]]
    counts = {row[1]: int(row[2]) for row in rows}
    assert counts.keys() == MOST_HOPS.keys()
    for way, most in MOST_HOPS.items():
        assert counts[way] <= most, shown
