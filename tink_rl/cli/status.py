"""`tink-rl status`: what a server says of itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tink_rl.config import SyncConfig
from tink_rl.transport.sampling_client import SamplingClient
from tink_rl.types import PendingRequest, ServedPolicy


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    status = commands.add_parser("status", help="what a server says of itself", allow_abbrev=False)
    status.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    status.add_argument("--token-file")
    status.add_argument(
        "--ca-file", metavar="PEM", help="authorities to trust for https (default: TINK_CA_FILE)"
    )
    status.set_defaults(run=run)


def _policies(found: Sequence[ServedPolicy]) -> Iterator[str]:
    for p in found:
        lease = "" if p.lease_s is None else f", lease {p.lease_s:.0f} s"
        yield (
            f"{', '.join(p.versions)}: {p.mode.value}, {p.num_bytes / 2**20:.1f} MiB, "
            f"{p.owner or 'nobody owns it'}{lease}, last used {p.idle_s:.0f} s ago"
        )


def _pending(found: Sequence[PendingRequest]) -> Iterator[str]:
    for p in found:
        yield f"{p.state} for {p.age_s:.1f} s: {p.what} from {p.address}"


_ROWS: dict[str, Callable[[Any], Iterator[str]]] = {"policies": _policies, "pending": _pending}
"""Fields of which every entry has a line of its own."""


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print every field; 1 if the server is not ready."""
    token = SyncConfig(token_file=arguments.token_file).read_token()
    with SamplingClient(arguments.url, token=token, ca_file=arguments.ca_file) as client:
        status = client.status()
    for name in status.__dataclass_fields__:
        value = getattr(status, name)
        rows = _ROWS[name](value) if name in _ROWS and value else [value]
        for row in rows:
            sys.stdout.write(f"{name:18} {row}\n")
    return 0 if status.reason is None else 1
