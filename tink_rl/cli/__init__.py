"""`tink-rl`: serve a base model for training, sample from it, and ask how things are.

One module per command; each offers `add(commands)` and sets `run(arguments, rest) -> exit code`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from tink_rl import __version__
from tink_rl.cli.console import Heartbeat, say, show_wait
from tink_rl.cli.serve import model_first
from tink_rl.errors import LaunchFailed, TinkError

__all__ = ["Heartbeat", "main", "show_wait"]

_COMMANDS = ("serve", "status", "drop", "report", "doctor", "export", "worker", "convert")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(model_first(sys.argv[1:] if argv is None else argv))
    if rest and arguments.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(arguments.run(arguments, rest))
    except (TinkError, ImportError) as error:
        say(f"{error}")
        return error.exit_code if isinstance(error, LaunchFailed) else 1
    except KeyboardInterrupt:
        say("stopped")
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tink-rl", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"tink-rl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in _COMMANDS:
        import_module(f"tink_rl.cli.{name}").add(commands)
    return parser
