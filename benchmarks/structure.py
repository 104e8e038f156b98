"""The shape of the code in figures: `python -m benchmarks.structure [CHECKOUT] [--json] [--hops]`.

Reads the syntax trees of `CHECKOUT/tink_rl` (this one's unless given) and the words of its pages;
imports nothing of it, so any commit can be measured. Two commits side by side: run it on each.
With `--hops` the ways of this checkout are walked too (`benchmarks/hops.py`; half a minute).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PACKAGE = "tink_rl"
_NOT_PROSE = re.compile(r"^```.*?^```|^<!--.*?-->$", re.MULTILINE | re.DOTALL)
ROWS = {
    "files": "Python files",
    "lines": "lines",
    "circles": "import circles",
    "longest_file": "longest file",
    "longest_lines": "its lines",
    "arguments": "annotated arguments",
    "any_percent": "of these `Any`, %",
    "error_classes": "error classes",
    "doc_pages": "pages in docs/",
    "doc_words": "words of README and docs/",
    "packet": "hops of a packet",
    "prompt": "hops of a prompt",
    "caller": "hops of a caller of the service",
}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description="the shape of the code in figures")
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--json", action="store_true", help="JSON, with the files of each circle")
    parser.add_argument("--hops", action="store_true", help="of this checkout's ways, too")
    args = parser.parse_args()
    found = measure(args.checkout)
    if args.hops:
        from benchmarks import hops

        found |= {way: sum(entered.values()) for way, entered in hops.measure().items()}
    print(json.dumps(found, indent=1) if args.json else table(found))


def measure(checkout: Path) -> dict[str, Any]:
    """The figures of `checkout`, keyed as `ROWS`, but for hops; `circles` is a list of lists of modules."""
    trees = _trees(checkout)
    sizes = {path: len((checkout / path).read_text().splitlines()) for path in trees}
    longest = max(sizes, key=lambda path: sizes[path])
    given = [a for tree in trees.values() for a in _annotations(tree)]
    num_any = sum(isinstance(a, ast.Name) and a.id == "Any" for a in given)
    pages = sorted((checkout / "docs").glob("*.md"))
    return {
        "files": len(trees),
        "lines": sum(sizes.values()),
        "circles": circles(import_graph(checkout)),
        "longest_file": longest,
        "longest_lines": sizes[longest],
        "arguments": len(given),
        "any_percent": round(100 * num_any / max(len(given), 1), 1),
        "error_classes": len(_subclasses("TinkError", trees)),
        "doc_pages": len(pages),
        "doc_words": sum(_words(page) for page in [checkout / "README.md", *pages]),
    }


def table(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    shown = {**found, "circles": len(found["circles"])}
    rows = [f"| {text} | {shown[key]} |" for key, text in ROWS.items() if key in shown]
    return "\n".join(["| | |", "|---|---|", *rows])


def import_graph(checkout: Path) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, anywhere in its file.

    Imports inside functions and under `TYPE_CHECKING` count: who reads a file has to read those too.
    The package imports by absolute names only.
    """
    trees = {_module(path): tree for path, tree in _trees(checkout).items()}
    return {
        name: {found for node in ast.walk(tree) for found in _imported(node, trees)} - {name}
        for name, tree in trees.items()
    }


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, over others or not, all of its group."""
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted({n for n in reach[name] if name in reach[n]}))
        for name in graph
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def _words(page: Path) -> int:
    """Whatever holds a letter or a digit outside of blocks of code; not the bars of a table."""
    prose = _NOT_PROSE.sub("", page.read_text())
    return sum(any(map(str.isalnum, word)) for word in prose.split())


def _trees(checkout: Path) -> dict[str, ast.Module]:
    paths = sorted((checkout / PACKAGE).rglob("*.py"))
    return {str(p.relative_to(checkout)): ast.parse(p.read_text()) for p in paths}


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imported(node: ast.AST, modules: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if name in modules or node.module in modules:
                yield name if name in modules else str(node.module)


def _annotations(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            a = node.args
            for argument in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]:
                if argument is not None and argument.annotation is not None:
                    yield argument.annotation


def _subclasses(root: str, trees: Mapping[str, ast.Module]) -> set[str]:
    """`root` and every class of the package that comes from it, by name."""
    bases = [
        (node.name, {getattr(b, "id", getattr(b, "attr", "")) for b in node.bases})
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    found = {root}
    while new := {name for name, of in bases if of & found} - found:
        found |= new
    return found


if __name__ == "__main__":
    main()
