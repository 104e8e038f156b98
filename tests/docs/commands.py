"""Finds the commands of README and docs, and parses them as the programs themselves would."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Programs of others: their flags are not ours to check.
OF_OTHERS = {
    *("cd", "curl", "docker", "export", "git", "hf", "jupyter", "nvidia-smi", "ray", "source"),
    *("srun", "trl", "vllm"),
}
_BLOCK = re.compile(
    r"(?:^<!-- ((?:run|not run)[^>]*?) -->\n)?^```(?:bash|sh)\n(.*?)^```", re.M | re.S
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of commands and how it is marked.

    Example: `Block(page="README.md", mark="run", commands=["tink-rl doctor"])`
    """

    page: str
    mark: str
    """"run", "run, exit code N", "run with a server", "run by FILE::TEST", or "not run: WHY"."""
    commands: list[str]


def blocks() -> list[Block]:
    """Every block of every page."""
    found = []
    for path in PAGES:
        for mark, text in _BLOCK.findall(path.read_text()):
            lines = text.replace("\\\n", " ").splitlines()
            commands = [c for line in lines if (c := re.sub(r"(^|\s)#.*$", "", line).strip())]
            found.append(Block(page=path.name, mark=mark, commands=commands))
    return found


class Parsed(BaseException):
    """The program accepted its arguments; passes every `except Exception` on its way out."""


def check(command: str) -> None:
    """Raise AssertionError unless the program takes these arguments."""
    words = [word for word in shlex.split(command) if word not in ("...", "&")]
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program in OF_OTHERS:
        return
    checkers = {
        "tink-rl": check_tink_rl,
        "accelerate": _check_accelerate,
        "make": _check_make,
        "pip": _check_pip,
        "python": _check_python,
    }
    assert program in checkers, f"{command!r}: {program} is not known to tests/docs/commands.py"
    checkers[program](arguments)


def check_tink_rl(arguments: list[str]) -> None:
    from tink_rl.cli import _parser

    parsed, rest = _accepted(_parser().parse_known_args, arguments)
    if parsed.command == "serve" and rest:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        _, rest = _accepted(parser.parse_known_args, rest)
    assert rest == [], f"tink-rl {' '.join(arguments)}: unknown {rest}"


def _check_accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    parsed = _accepted(launch_command_parser().parse_args, arguments[1:])
    assert parsed.config_file is None or (ROOT / parsed.config_file).is_file(), parsed.config_file
    check_script(parsed.training_script, parsed.training_script_args)


def _check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        if arguments[1] != "pytest":
            check_script(f"{arguments[1].replace('.', '/')}.py", arguments[2:])
        return
    check_script(arguments[0], arguments[1:])


def check_script(script: str, arguments: list[str]) -> None:
    """Let the script read `arguments` in this process, and stop it there."""
    path = ROOT / script
    assert path.is_file(), f"{script} does not exist"
    module: Any = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with (
        patch.object(sys, "argv", [script, *arguments]),
        patch.object(argparse.ArgumentParser, "parse_args", _parse_and_stop),
        patch("trl.TrlParser.parse_args_and_config", _parse_and_stop),
        patch.object(module, "TrlParser", _trl_parser(), create=True),
    ):
        try:
            module.main()
        except Parsed:
            return
    raise AssertionError(f"{script} read no arguments")


def _trl_parser() -> Any:
    import trl

    return trl.TrlParser


def _parse_and_stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
    """What the parser would take; not the dataclasses' own checks, which may want a GPU."""
    arguments = list(sys.argv[1:])
    if type(parser).__name__ == "TrlParser" and "--config" in arguments:
        at = arguments.index("--config")
        assert (ROOT / arguments[at + 1]).is_file(), arguments[at + 1]
        del arguments[at : at + 2]
    _, rest = _accepted(lambda a: parser.parse_known_args(args=a), arguments)
    assert rest == [], f"{sys.argv[0]}: unknown {rest}"
    raise Parsed


def _check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for word in arguments:
        assert "=" in word or word in targets, f"make {word}: no such target"


def _check_pip(arguments: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for names in re.findall(r"(?:tink-rl|\.)\[([\w,]+)\]", " ".join(arguments)):
        assert set(names.split(",")) <= set(extras), names


def _accepted(parse: Any, arguments: list[str]) -> Any:
    try:
        return parse(arguments)
    except SystemExit as error:
        raise AssertionError(f"{arguments} are not accepted") from error
