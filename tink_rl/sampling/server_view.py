"""What is known of a vLLM server: plugin or stock, its base, what it serves. Read once, until invalidated."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tink_rl import errors
from tink_rl.policy.fingerprint import base_fingerprint
from tink_rl.policy.model_dir import local_model_dir
from tink_rl.policy.shapes import vocab_size
from tink_rl.transport.payloads import NO_LIMITS, Limits
from tink_rl.transport.sampling_client import SamplingClient
from tink_rl.types import ServerStatus

logger = logging.getLogger("tink_rl")
_OURS = re.compile(r"\.[0-9a-f]{12}@\d+$")
"""ModelResolver that a `AdapterCache` gave; they are reached by adapter id only."""
_MAX_LOOKS = 3
STALE_S = 5.0
"""Age from which a look at the server is taken again, in the background, by the next request."""


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
            "no incarnation: a restart is noticed by what the server says of itself, or by the next "
            "refused name",
        ]


def fetch_view(client: SamplingClient) -> ServerView:
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
    status = view.status if view is not None else None
    revision = status.base_revision if status is not None else None
    for candidate in (view.root if view is not None else None, named):
        if candidate:
            with contextlib.suppress(errors.ConfigError):
                return local_model_dir(candidate, revision=revision)
    return None


@dataclass(frozen=True, kw_only=True)
class ServedBase:
    """The base model of a server: `ServedBase(directory=Path("models/base"), fingerprint="9f3a..")`"""

    directory: Path | None
    """Where it can be read here."""
    fingerprint: str | None
    """By the server's own word, else by the directory; None: not known."""


def served_base(view: ServerView | None, named: str | None) -> ServedBase:
    """The base that `view` shows, or, without one, the base that is `named`."""
    directory = base_dir(view, named)
    if view is not None and view.status is not None:
        return ServedBase(directory=directory, fingerprint=view.status.base_fingerprint)
    found = None
    if directory is not None:
        # Without safetensors there is none; whoever needs the shapes says so.
        with contextlib.suppress(errors.ConfigError):
            found = base_fingerprint(directory)
    return ServedBase(directory=directory, fingerprint=found)


class KnownServer:
    """A server and what was last seen of it; for any number of threads."""

    def __init__(
        self, client: SamplingClient, base_model: str | None, on_restart: Callable[[], None]
    ) -> None:
        """Store; asks nothing yet.

        Args:
            client: Of the server.
            base_model: Directory or hub id of the base, if the server's own cannot be read here.
            on_restart: Called when the server turned out to live anew.
        """
        self.client, self._base_model, self._on_restart = client, base_model, on_restart
        self._seen: ServerView | None = None
        self._stale_at = 0.0
        self._looks = itertools.count(1)
        self._newest = 0
        self._looking = threading.Lock()
        self._incarnation: str | None = None
        self._vocab: dict[str, int | None] = {}
        self._lock = threading.Lock()

    def cached(self) -> ServerView | None:
        """The last look, or None if there was none or it was invalidated; waits for nothing.

        From an age of `STALE_S` on the next look is under way, so that a restart is noticed.
        """
        view = self._seen
        if view is not None and time.monotonic() > self._stale_at:
            self._look_again()
        return view

    def _look_again(self) -> None:
        if not self._looking.acquire(blocking=False):
            return
        try:
            threading.Thread(target=self._refresh, name="tink-look", daemon=True).start()
        except RuntimeError:  # no thread can be started now; a later request tries again
            self._looking.release()

    def _refresh(self) -> None:
        try:
            self.view(fresh=True)
        except errors.TinkError as error:
            logger.debug("%s could not be looked at again: %s", self.client.base_url, error)
        finally:
            self._stale_at = time.monotonic() + STALE_S
            self._looking.release()

    def view(self, *, fresh: bool = False) -> ServerView:
        """What is known; asks the server if nothing is, or with `fresh`.

        Raises:
            ServerUnreachable, RequestTimeout, NotReady.
        """
        view = None if fresh else self.cached()
        if view is not None:
            return view
        for _ in range(_MAX_LOOKS):
            with self._lock:
                number = next(self._looks)
            view = fetch_view(self.client)
            if self._take(view, number):
                logger.warning("the vLLM server at %s was restarted", self.client.base_url)
                self._on_restart()
            if self._seen is not None:  # else invalidated meanwhile
                break
        assert view is not None
        return view

    def _take(self, view: ServerView, number: int) -> bool:
        """Know `view` from now on, unless a look that began later is known; whether the server is new."""
        found = view.status.incarnation if view.status is not None else None
        with self._lock:
            if number < self._newest:
                return False
            restarted = self._incarnation not in (None, found)
            self._newest, self._seen, self._incarnation = number, view, found
            self._stale_at = time.monotonic() + STALE_S
            if restarted:
                self._vocab = {}
        return restarted

    def invalidate(self) -> None:
        """Something is not as it was seen; look again before the next answer."""
        with self._lock:
            self._newest, self._seen = next(self._looks), None

    def base(self) -> ServedBase:
        """The base model as it is now; the one that was named if nobody answers.

        Raises:
            ServerUnreachable: nobody answers, and no base was named.
        """
        try:
            view = self.view(fresh=True)
        except errors.ServerUnreachable:
            if self._base_model is None:
                raise
            return served_base(None, self._base_model)
        return self.base_of(view)

    def base_of(self, view: ServerView) -> ServedBase:
        """The base model that `view` shows."""
        return served_base(view, self._base_model)

    def vocab_size(self, view: ServerView) -> int | None:
        """Size of the vocabulary of the base of `view`; None if it cannot be read here."""
        if view.status is not None and view.status.vocab_size is not None:
            return view.status.vocab_size
        if view.root not in self._vocab:
            self._vocab[view.root] = vocab_size(base_dir(view, self._base_model))
        return self._vocab[view.root]

    def limits_of(self, view: ServerView | None) -> Limits:
        """What a request to the server of `view` may hold, as far as it is known."""
        if view is None:
            return NO_LIMITS
        most = view.status.max_prompts if view.status is not None else NO_LIMITS.max_prompts
        return Limits(
            vocab_size=self.vocab_size(view),
            max_model_len=view.max_model_len,
            max_prompts=most,
        )

    def limits(self) -> Limits:
        """What a request may hold, as far as it is known; asks no server."""
        return self.limits_of(self.cached())
