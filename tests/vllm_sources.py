"""vLLM's sources, read without importing them: the installed release's, or another's in TINK_VLLM_SOURCES."""

from __future__ import annotations

import ast
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def folder() -> Path | None:
    """Where the package `vllm` lies."""
    if given := os.environ.get("TINK_VLLM_SOURCES"):
        return Path(given)
    spec = find_spec("vllm")
    return Path(spec.submodule_search_locations[0]) if spec else None


def source_of(path: str) -> str:
    """The text of a file."""
    return (folder() / path).read_text()


def function(path: str, name: str) -> str:
    """The source of one function or class of a file."""
    for node in ast.walk(ast.parse(source_of(path))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return ast.unparse(node)
    raise AssertionError(f"{path} has no {name}")


def find(path: str) -> ast.AST | None:
    """What a `tink_rl.seam.Name` is in the sources: a module, class, function or assignment; None: none."""
    module, _, attributes = path.partition(":")
    found: ast.AST | None = _module(module)
    for attribute in filter(None, attributes.split(".")):
        found = None if found is None else _member(module, found, attribute)
        if isinstance(found, ast.ImportFrom):
            home = f"{_absolute(module, found)}"
            is_module = _module(f"{home}.{attribute}")
            found = is_module or find(f"{home}:{attribute}")
    return found


def parameters(node: ast.AST) -> list[str]:
    """Of a function; of a class, the fields of its record or the parameters of its `__init__`."""
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)
        if init is None:
            return [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
        return parameters(init)[1:]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), ast.dump(node)[:80]
    is_bound = any(ast.unparse(mark) == "classmethod" for mark in node.decorator_list)
    return [a.arg for a in [*node.args.args, *node.args.kwonlyargs]][is_bound:]


@cache
def _module(name: str) -> ast.Module | None:
    path = folder().joinpath(*name.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text())
    return None


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module
    parts = module.split(".")
    is_package = (folder().joinpath(*parts[1:]) / "__init__.py").is_file()
    return ".".join([*parts[: len(parts) - node.level + is_package], *filter(None, [node.module])])


def _member(module: str, owner: ast.AST, name: str) -> ast.AST | None:
    for node in ast.walk(owner) if isinstance(owner, ast.Module) else owner.body:
        if getattr(node, "name", None) == name and not isinstance(node, ast.alias):
            return node
        if isinstance(node, ast.ImportFrom) and name in {a.asname or a.name for a in node.names}:
            return node
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in map(_text, targets):
            return node
    bases = map(_text, getattr(owner, "bases", ()))
    found = (find(f"{module}:{base}.{name}") for base in bases)
    return next(filter(None, found), None)


def _text(node: ast.AST) -> str:
    return ast.unparse(node)
