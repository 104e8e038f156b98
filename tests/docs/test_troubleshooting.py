"""The troubleshooting page has every error, in words that the code really says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tink_rl import errors, remedies

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
CODES = set(errors.by_code())


def rows():
    """(code, message) of every row of the tables of errors."""
    return re.findall(r"^\| `(\w+)`(?: \(\d\))? \| (?:`([^|]+)`)? ?\|", PAGE, re.MULTILINE)


def said_by_the_code():
    """Every text of the package, values replaced by "…"."""
    texts = []
    for path in sorted((ROOT / "tink_rl").rglob("*.py")):
        if path.name == "remedies.py":
            continue  # what it says of the others is what is checked
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_page_holds_the_tables_of_the_code():
    assert remedies.tables() in PAGE, "python -m tink_rl.remedies writes them"


def test_every_code_has_a_row_and_every_row_a_code():
    codes = [code for code, _ in rows()]
    assert set(codes) == CODES
    assert len(codes) == len(set(codes))


def test_every_message_is_one_that_the_code_says():
    texts = said_by_the_code()
    unknown = [
        (code, piece)
        for code, message in rows()
        for piece in re.split("…", message)
        if piece.strip(" :;,()") and piece.strip() not in texts
    ]
    assert unknown == []


def test_every_row_has_cause_and_cure():
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert all(cells[i] for i in (-1, -2)), line
