"""What a `model_id` means, and where a request for it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tink_rl import errors
from tink_rl.adapters.registry import AdapterRegistry, Registration
from tink_rl.sampling.cache import AdapterCache, Entry
from tink_rl.sampling.server_view import KnownServer, ServerView
from tink_rl.types import PolicyVersion

T = TypeVar("T")
MAX_TRIES = 4
"""How often a request is sent whose model the server turned out not to serve (nothing was generated)."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a `model_id` means at one moment; a request that waits keeps the meaning it was admitted with.

    Example: `Model(model_id="math", adapter=Registration(adapter_id="math", version=3, ...))`
    """

    model_id: str | None
    """What was asked for; None is the base."""
    adapter: Registration | None = None
    """The registered version; None for the base and for names that the server itself serves."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a request goes. Give it back with `ModelResolver.release`."""

    name: str
    """The server's name for it."""
    model: Model
    version: int | None = None
    digest: str | None = None
    entry: Entry | None = None

    def origin(self) -> dict[str, Any]:
        """The fields of a `Completion` that say who sampled it."""
        return {
            "model_id": self.model.model_id,
            "version": self.version,
            "digest": self.digest,
        }


def version_of(name: str) -> int | None:
    """Its number, if `name` is a policy's version."""
    found = PolicyVersion.find(name)
    return found.version if found is not None else None


class ModelResolver:
    """Model ids of one server: registered adapters, their versions, and what the server itself serves."""

    def __init__(
        self,
        registry: AdapterRegistry,
        cache: AdapterCache,
        server: KnownServer,
        *,
        adapters_on: bool = True,
    ) -> None:
        """Store; without `adapters_on` every registered adapter is refused."""
        self._registry, self._cache, self._server = registry, cache, server
        self._adapters_on = adapters_on
        self._current: dict[str, int] = {}

    def resolve(self, model_id: str | None) -> Model | None:
        """What `model_id` means now, by what is known here; None if only the server can say.

        Raises:
            AdapterConflict: a registered adapter, and a name that the server itself serves.
            ConfigError: a registered adapter, and adapters are switched off.
        """
        if model_id is None:
            return Model(model_id=None)
        found = self._registered(model_id)
        if found is not None and self._adapters_on:
            self._check_own_name(model_id, self._server.cached())
            return Model(model_id=model_id, adapter=found)
        if _serves(self._server.cached(), model_id):
            return Model(model_id=model_id)
        if found is not None:
            self.check_on()
        return None

    def _registered(self, model_id: str) -> Registration | None:
        current = self._registry.current(model_id)
        if current is not None:
            self.registered(current)
            return current
        named = PolicyVersion.find(model_id)
        if named is not None and self._registry.current(named.policy) is not None:
            return self._registry.get(named.policy, named.version)
        return None

    def check_on(self) -> None:
        """Raise unless adapters may be registered and sampled.

        Raises:
            ConfigError: VLLM_ENABLE_LORA says that they may not.
        """
        if not self._adapters_on:
            raise errors.ConfigError(
                "VLLM_ENABLE_LORA=False: adapters are switched off; set VLLM_ENABLE_LORA=true"
            )

    def _check_own_name(self, model_id: str, view: ServerView | None) -> None:
        """Registered while the server was away, or it has taken the name since: nobody may guess."""
        if _serves(view, model_id):
            adapter_id = model_id.partition("@")[0]
            raise errors.AdapterConflict(
                f"model_id {model_id!r} is a registered adapter, and {self._server.client.base_url} "
                f"itself serves that name; unregister_lora_adapter({adapter_id!r}) and register it "
                "under another id"
            )

    def registered(self, current: Registration) -> None:
        """Let what `current` replaced leave the server, also where another process registered it."""
        if current.version > self._current.get(current.adapter_id, 0):  # never back to an older one
            self._current[current.adapter_id] = current.version
            self._cache.retire(current.adapter_id, keep=current.version)

    def _unknown(self, model_id: str) -> errors.UnknownAdapter:
        ids = [item.adapter_id for item in self._registry.list()]
        view = self._server.cached()
        names = list(view.names) if view is not None else []
        known = ", ".join((ids + names)[:10]) or "none"
        return errors.UnknownAdapter(
            f"model_id {model_id!r} is neither a registered adapter nor served by "
            f"{self._server.client.base_url} (known: {known}); register it with "
            "register_lora_adapter(adapter_id, lora_path)"
        )

    def find(self, model_id: str | None) -> Model:
        """What `model_id` means now; asks the server for names that are not known here.

        Raises:
            UnknownAdapter, ServerUnreachable.
        """
        model = self.resolve(model_id)
        if model is None:
            self._server.view(fresh=True)
            model = self.resolve(model_id)
        if model is None:
            assert model_id is not None
            self._cache.retire(model_id)  # if another process unregistered it
            raise self._unknown(model_id)
        return model

    def acquire_now(self, model: Model) -> Target | None:
        """As `acquire`, if that needs no waiting; else None."""
        if model.adapter is not None:
            entry = self._cache.pin_if_resident(model.adapter)
            return None if entry is None else _adapter_target(model, entry)
        view = self._server.cached()
        return None if view is None else self._server_target(model, view)

    def acquire(self, model: Model) -> Target:
        """Where a request for `model` goes; loads an adapter that is not on the server.

        Raises:
            UnknownAdapter: the server does not serve that name (any more).
            AdapterConflict: an adapter whose name the server itself serves.
            ModeUnavailable: a policy is folded into the weights, so there is no base.
            TinkError: why an adapter could not be loaded.
        """
        if model.adapter is not None:
            assert model.model_id is not None
            self._check_own_name(model.model_id, self._server.view())
            entry = self._cache.acquire(model.adapter)
            self._retire_unless_current(model)
            return _adapter_target(model, entry)
        return self._server_target(model, self._server.view())

    def _retire_unless_current(self, model: Model) -> None:
        """Loaded for a request that was admitted before its version was replaced: it leaves with it."""
        if model.adapter is None or model.model_id != model.adapter.adapter_id:
            return
        current = self._registry.current(model.adapter.adapter_id)
        if current is None or current.version != model.adapter.version:
            keep = current.version if current is not None else None
            self._cache.retire(model.adapter.adapter_id, keep=keep)

    def _server_target(self, model: Model, view: ServerView) -> Target:
        name = model.model_id
        if name is None or name == view.base:
            if name is None and view.merged is not None:
                raise errors.ModeUnavailable(
                    f"the base is not served: {view.merged} is folded into the weights of "
                    f"{self._server.client.base_url}; sample model_id={view.merged!r}, or use a second server"
                )
            served = view.status.served if view.status is not None else {}
            return Target(
                name=view.base,
                model=model,
                version=version_of(view.base),
                digest=served.get(view.base),
            )
        if name not in view.names:
            raise self._unknown(name)
        return Target(name=name, model=model, version=version_of(name), digest=view.names[name])

    def release(self, target: Target) -> None:
        """The request on `target` has ended; returns at once."""
        if target.entry is not None:
            self._cache.release(target.entry)

    def refused(self, target: Target) -> None:
        """The server does not serve `target` after all: dropped by another process, or a restart."""
        if target.entry is not None:
            self._cache.discard(target.entry)
        self._server.invalidate()

    def check_free(self, adapter_id: str) -> None:
        """Raise unless `adapter_id` can be registered beside what the server itself serves.

        Raises:
            BadRequest: it is one of those names.
        """
        if _serves(self._server.cached(), adapter_id):
            raise errors.BadRequest(
                f"adapter_id {adapter_id!r} is a name that {self._server.client.base_url} itself "
                "serves; take another one"
            )

    def unregistered(self, adapter_id: str) -> None:
        """Let every version of `adapter_id` leave the server once its last request has ended."""
        self._cache.retire(adapter_id)

    def with_target(self, model: Model, send: Callable[[Target], T]) -> T:
        """`send(target)`, again if the server turned out not to serve it (it generated nothing).

        The worker does the same in its event loop (`worker/backends/vllm.py`). Through a loop in a thread a
        request took 0.8 ms of CPU in place of 1.3 ms, but other errors come from there, and it splits none.

        Raises:
            EngineUnavailable: it never did.
        """
        for _ in range(MAX_TRIES):
            target = self.acquire(model)
            try:
                return send(target)
            except errors.UnknownVersion:
                self.refused(target)
            finally:
                self.release(target)
        raise self.gave_up(model)

    def gave_up(self, model: Model) -> errors.EngineUnavailable:
        """The error after `MAX_TRIES` tries."""
        return errors.EngineUnavailable(
            f"{self._server.client.base_url} did not serve {model.model_id!r} {MAX_TRIES} times in a "
            "row, though it was loaded; do several processes share the server? Raise "
            "TINK_MAX_RESIDENT_ADAPTERS in all of them"
        )


def _serves(view: ServerView | None, name: str) -> bool:
    return view is not None and (name == view.base or name in view.names)


def _adapter_target(model: Model, entry: Entry) -> Target:
    found = entry.registered
    return Target(
        name=found.server_name, model=model, version=found.version, digest=found.digest, entry=entry
    )
