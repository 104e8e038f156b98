"""What is known of a vLLM server: plugin or stock, its base, what it serves. Read once, again on doubt."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
from collections.abc import Callable
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


class KnownServer:
    """A server and what was last seen of it; for any number of threads."""

    def __init__(
        self, client: VLLMClient, base_model: str | None, on_restart: Callable[[], None]
    ) -> None:
        """Store; asks nothing yet.

        Args:
            client: Of the server.
            base_model: Directory or hub id of the base, if the server's own cannot be read here.
            on_restart: Called when the server turned out to live anew.
        """
        self.client, self._base_model, self._on_restart = client, base_model, on_restart
        self.known: ServerView | None = None
        """The last look, or None if there was none or it was doubted."""
        self._incarnation: str | None = None
        self._vocab: dict[str, int | None] = {}
        self._lock = threading.Lock()

    def view(self, *, fresh: bool = False) -> ServerView:
        """What is known; asks the server if nothing is, or with `fresh`.

        Raises:
            ServerUnreachable, RequestTimeout, NotReady.
        """
        view = self.known
        if view is None or fresh:
            view = look(self.client)
            found = view.status.incarnation if view.status is not None else None
            with self._lock:
                restarted = self._incarnation not in (None, found)
                self.known, self._incarnation = view, found
            if restarted:
                logger.warning("the vLLM server at %s was restarted", self.client.base_url)
                self._on_restart()
        return view

    def doubt(self) -> None:
        """Something is not as it was seen; look again before the next answer."""
        self.known = None

    def base_dir(self) -> Path | None:
        """Directory of the base model, as far as it can be read here.

        Raises:
            ServerUnreachable: nobody answers, and no base was named.
        """
        try:
            view = self.view()
        except errors.ServerUnreachable:
            if self._base_model is None:
                raise
            return base_dir(None, self._base_model)
        return base_dir(view, self._base_model)

    def vocab_size(self, view: ServerView) -> int | None:
        """Size of the vocabulary of the base of `view`; None if it cannot be read here."""
        if view.root not in self._vocab:
            self._vocab[view.root] = vocab_size(base_dir(view, self._base_model))
        return self._vocab[view.root]

    def limits(self) -> dict[str, int | None]:
        """`vocab_size` and `max_model_len`, as far as they are known; asks no server."""
        view = self.known
        if view is None:
            return {"vocab_size": None, "max_model_len": None}
        return {"vocab_size": self.vocab_size(view), "max_model_len": view.max_model_len}
