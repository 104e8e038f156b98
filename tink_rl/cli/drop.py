"""`tink-rl drop`: stop serving what runs have left."""

from __future__ import annotations

import argparse

from tink_rl.cli.console import say
from tink_rl.config import SyncConfig
from tink_rl.errors import ConfigError
from tink_rl.publish.vllm_client import VLLMClient


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    drop = commands.add_parser(
        "drop",
        help="stop serving a policy that nobody publishes",
        description="Stop serving policies, or single versions, that nobody publishes. Running requests "
        "end on them; where one was in the weights the base comes back.",
        allow_abbrev=False,
    )
    drop.add_argument("url")
    drop.add_argument("name", nargs="*", help="policy, or policy@N for one version")
    drop.add_argument(
        "--idle",
        action="store_true",
        help="all that no run publishes and no sampling service keeps",
    )
    drop.add_argument("--token-file")
    drop.add_argument(
        "--ca-file", metavar="PEM", help="authorities to trust for https (default: TINK_CA_FILE)"
    )
    drop.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Drop, and say what was; the exit code."""
    if bool(arguments.name) == arguments.idle:
        raise ConfigError(
            f"tink-rl drop with {len(arguments.name)} names and --idle={arguments.idle}: expected names "
            "or --idle; `tink-rl status URL` shows what is served"
        )
    token = SyncConfig(token_file=arguments.token_file).read_token()
    with VLLMClient(arguments.url, token=token, ca_file=arguments.ca_file) as client:
        if arguments.idle:
            dropped = client.drop_idle()
        else:
            dropped = [version for name in arguments.name for version in client.drop(name)]
    say(f"dropped {', '.join(dropped) or 'nothing: somebody owns all that is served'}")
    return 0
