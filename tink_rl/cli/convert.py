"""`tink-rl convert`: pickled adapter weights to safetensors, without running a pickle's code."""

from __future__ import annotations

import argparse

from tink_rl.adapters.convert import convert
from tink_rl.cli.console import say


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "convert",
        help="adapter_model.bin to safetensors, safely",
        description="Write adapter_model.safetensors beside the pickled adapter_model.bin of a PEFT "
        "directory. A pickle that asks for anything but tensors is refused, and none is ever run.",
        allow_abbrev=False,
    )
    parser.add_argument("directory", help="a PEFT directory with adapter_model.bin")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Convert; 0."""
    done = convert(arguments.directory)
    say(
        f"wrote {done.path}: {done.num_tensors} tensors, {done.num_bytes} bytes, read back and compared"
    )
    say(f"{done.source.name} is as it was; it is not used any more, delete it when you like")
    return 0
