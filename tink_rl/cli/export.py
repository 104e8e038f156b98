"""`tink-rl export`: a trained policy in the Hub's format."""

from __future__ import annotations

import argparse
from pathlib import Path

from tink_rl.cli.console import say


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    export = commands.add_parser(
        "export",
        help="adapter or merged model with a model card",
        description="Write the adapter of a run (or its newest checkpoint, or a PEFT directory) to a "
        "new folder in the Hub's format, with a model card; or, merged, the base with it folded in.",
        allow_abbrev=False,
    )
    export.add_argument("source", metavar="RUN_OR_ADAPTER_DIR")
    export.add_argument(
        "--output", required=True, metavar="DIR", help="a folder that does not exist"
    )
    export.add_argument("--merged", action="store_true", help="fold the adapter into the base")
    export.add_argument("--base", help="directory or hub id; default: what the adapter names")
    export.add_argument(
        "--revision", help="of a hub id: branch, tag or commit; default: what the run says"
    )
    export.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Export, and say what was written."""
    from tink_rl.tools.export import export

    done = export(
        arguments.source,
        arguments.output,
        merged=arguments.merged,
        base=arguments.base,
        revision=arguments.revision,
    )
    kind = "merged model" if done.merged else "adapter"
    say(f"{kind} {done.policy or ''} written to {done.path}, with a model card".replace("  ", " "))
    if Path(done.base).exists():
        say(
            f"the base is the local directory {done.base}: before an upload, name the hub's with "
            "--base ORGANISATION/NAME"
        )
    return 0
