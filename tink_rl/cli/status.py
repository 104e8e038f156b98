"""`tink-rl status`: what a server says of itself."""

from __future__ import annotations

import argparse
import sys

from tink_rl.config import SyncConfig
from tink_rl.transport.sampling_client import SamplingClient


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    status = commands.add_parser("status", help="what a server says of itself", allow_abbrev=False)
    status.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    status.add_argument("--token-file")
    status.add_argument(
        "--ca-file", metavar="PEM", help="authorities to trust for https (default: TINK_CA_FILE)"
    )
    status.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print every field; 1 if the server is not ready."""
    token = SyncConfig(token_file=arguments.token_file).read_token()
    with SamplingClient(arguments.url, token=token, ca_file=arguments.ca_file) as client:
        status = client.status()
    for name in status.__dataclass_fields__:
        value = getattr(status, name)
        sys.stdout.write(f"{name:18} {value}\n")
    return 0 if status.reason is None else 1
