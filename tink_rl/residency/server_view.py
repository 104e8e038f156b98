"""What is known of a vLLM server: plugin or stock, its base, what it serves. Read once, again on doubt."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from tink_rl import errors
from tink_rl.policy.fingerprint import local_model_dir
from tink_rl.transport.vllm_client import VLLMClient
from tink_rl.types import ServerStatus

logger = logging.getLogger("tink_rl")
_OURS = re.compile(r"\.[0-9a-f]{12}@\d+$")
"""Names that a `Residency` gave; they are reached by adapter id only."""


@dataclass(frozen=True, kw_only=True)
class ServerView:
    """One look at a server.

    Example: `ServerView(plugin=True, base="models/base", root="models/base", max_model_len=256,
    names={"policy@17": "9f.."})`
    """

    plugin: bool
    base: str
    """The name that answers without an adapter now; in full mode the version that was published."""
    root: str
    """Directory or hub id of the base model."""
    max_model_len: int | None
    names: dict[str, str | None] = field(default_factory=dict)
    """Other names that can be sampled, with digest if known: a trainer's versions, static modules."""
    status: ServerStatus | None = None
    token_refused: str | None = None
    """Why the plugin's control routes cannot be used."""

    @property
    def merged(self) -> str | None:
        """The adapter that is folded into the weights, so that the base is not served."""
        return self.status.merged if self.status is not None else None

    def missing(self) -> list[str]:
        """What this server cannot do without the tink_rl plugin; empty with it."""
        if self.plugin:
            return []
        return [
            "no check of an adapter by the server: digest, base model and finiteness are checked here "
            "only, before the server reads the files",
            "adapters only if it runs with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and sees TINK_STORE_DIR "
            "under the same path",
            "no weight updates: update_model_weights, recipes and merged or full mode need the plugin",
            "no drop that waits for running requests: unloading frees a name, not the memory",
            "no incarnation: a restart is noticed by the next refused name only",
        ]


def look(client: VLLMClient) -> ServerView:
    """Ask the server.

    Raises:
        ServerUnreachable, RequestTimeout, NotReady.
    """
    cards = client.model_cards()
    if not cards:
        raise errors.BackendError(f"the server at {client.base_url} serves no model")
    status, plugin, refused = None, True, None
    try:
        status = client.status()
    except errors.PluginMissing:
        plugin = False
    except errors.BadToken as error:
        refused = error.message
    served = status.served if status is not None else {}
    names = {card["id"]: served.get(card["id"]) for card in cards}
    base = cards[0]
    return ServerView(
        plugin=plugin,
        base=base["id"],
        root=str(base.get("root") or base["id"]),
        max_model_len=base.get("max_model_len"),
        names={n: d for n, d in names.items() if n != base["id"] and not _OURS.search(n)},
        status=status,
        token_refused=refused,
    )


def base_dir(view: ServerView | None, named: str | None) -> Path | None:
    """Directory of the served base model that can be read here: the server's own, else `named`."""
    for candidate in (view.root if view is not None else None, named):
        if candidate:
            with contextlib.suppress(errors.ConfigError):
                return local_model_dir(candidate)
    return None


def vocab_size(directory: Path | None) -> int | None:
    """Size of the vocabulary by `config.json`; None if it cannot be read."""
    if directory is None:
        return None
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return None
    found = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return found if type(found) is int else None
