"""Sampling from a vLLM server with any number of LoRA adapters: the seed's functions, and a class.

    import vllm_backend

    vllm_backend.register_lora_adapter("math", "runs/digits/adapter")
    vllm_backend.generate_with_vllm(["12+34="], adapter_id="math", max_tokens=5)

The functions are a thin face over one default `VLLMBackend`, made on first use from the environment
(`tink_rl/settings.py`). Adapters are copied into a private store and registered on disk, so that every
process of this user, the worker among them, sees the same ones. Everything here is thread-safe; vLLM
need not be installed.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.policy.registry import AdapterRegistry, Registration, check_adapter_id
from tink_rl.policy.shapes import BaseShapes
from tink_rl.policy.store import AdapterStore
from tink_rl.residency.loaders import PathLoader, PluginLoader
from tink_rl.residency.server_view import ServerView, base_dir, look, vocab_size
from tink_rl.residency.table import AdapterVersion, Entry, Residency
from tink_rl.settings import Settings
from tink_rl.transport import payloads
from tink_rl.transport.vllm_client import VLLMClient
from tink_rl.types import Completion, SamplingParams

if TYPE_CHECKING:
    from tink_rl.weight_sync import WeightSync

logger = logging.getLogger("tink_rl")
T = TypeVar("T")

__all__ = [
    "VLLMBackend",
    "close_communicator",
    "default_backend",
    "generate_with_vllm",
    "get_client_info",
    "init_communicator",
    "initialize_vllm_client",
    "list_lora_adapters",
    "register_lora_adapter",
    "reset_prefix_cache",
    "unregister_lora_adapter",
    "update_model_weights",
]

Completions = list[list[Completion]]
Config = Settings | Mapping[str, Any] | None
_VERSIONED = re.compile(r"^(?P<id>[^@]+)@(?P<version>\d{1,18})$")
MAX_TRIES = 4
"""How often a request is sent whose model the server turned out not to serve (nothing was generated)."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a `model_id` means at one moment; a request that waits keeps the meaning it was admitted with.

    Example: `Model(model_id="math", adapter=AdapterVersion(adapter_id="math", version=3, ...))`
    """

    model_id: str | None
    """What was asked for; None is the base."""
    adapter: AdapterVersion | None = None
    """The registered version; None for the base and for names that the server itself serves."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a request goes. Give it back with `VLLMBackend.release`."""

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


class VLLMBackend:
    """One vLLM server and the adapters that are registered for it.

    Example:
        with VLLMBackend({"base_url": "http://127.0.0.1:8000"}) as backend:
            backend.register("math", "runs/digits/adapter")
            [[completion]] = backend.generate(["12+34="], "math", max_tokens=5)
            completion.text, completion.version, completion.digest
    """

    def __init__(self, config: Config = None, *, client: VLLMClient | None = None) -> None:
        """Read the settings; the server is asked on first use.

        Args:
            config: `Settings`, a dict of some of them, or None for environment and defaults.
            client: Instead of one made from the settings.

        Raises:
            ConfigError: a setting is wrong.
        """
        self.settings = Settings.load(config)
        self.store = AdapterStore(self.settings.tink_store_dir)
        self.registry = AdapterRegistry(self.store.root)
        self.client = client or _client(self.settings)
        self._residency = Residency(
            _LoaderByServer(self), capacity=self.settings.tink_max_resident_adapters
        )
        self._view: ServerView | None = None
        self._incarnation: str | None = None
        self._current: dict[str, int] = {}
        self._vocab: dict[str, int | None] = {}
        self._lock = threading.Lock()
        self._sync: WeightSync | None = None
        self._sync_lock = threading.Lock()

    def __enter__(self) -> VLLMBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End connections; what is registered, and what lies on the server, stays. Idempotent."""
        self.close_communicator()
        self._residency.close()
        self.client.close()
        self.registry.close()

    def connect(self) -> VLLMBackend:
        """Wait up to VLLM_TIMEOUT for the server.

        Raises:
            ServerUnreachable: a `ConnectionError`; nobody answered.
        """
        self.client.wait_until_reachable(self.settings.vllm_timeout)
        return self

    # -- the server -------------------------------------------------------------------------------

    def view(self, *, fresh: bool = False) -> ServerView:
        """What is known of the server; asks it if nothing is, or with `fresh`.

        Raises:
            ServerUnreachable, RequestTimeout, NotReady.
        """
        view = self._view
        if view is None or fresh:
            view = look(self.client)
            found = view.status.incarnation if view.status is not None else None
            with self._lock:
                restarted = self._incarnation not in (None, found)
                self._view, self._incarnation = view, found
            if restarted:
                logger.warning("the vLLM server at %s was restarted", self.client.base_url)
                self._residency.forget_all()
        return view

    def base_dir(self) -> Path | None:
        """Directory of the base model, as far as it can be read here; asks the server if need be."""
        try:
            view = self.view()
        except errors.ServerUnreachable:
            if self.settings.tink_base_model is None:
                raise
            view = None
        return base_dir(view, self.settings.tink_base_model)

    # -- adapters ---------------------------------------------------------------------------------

    def register(
        self, adapter_id: str, lora_path: str | Path, *, roots: Sequence[Path] | None = None
    ) -> Registration:
        """Check a PEFT directory, copy it into the store, and let `adapter_id` mean it from now on.

        Other bytes under a known id are its next version; requests under way end on the old one.

        Args:
            adapter_id: 1-100 letters, digits, '.', '_' or '-'.
            lora_path: Directory with adapter_config.json and adapter_model.safetensors.
            roots: Directories below which it must lie; None: those of TINK_ADAPTER_ROOTS, and
                anywhere if there are none.

        Raises:
            AdapterPathMissing: `LoRA path does not exist: PATH`, a `ValueError`.
            PickleRefused, AdapterFilesInvalid, UnsupportedAdapter, BaseMismatch, RankExceeded, ...:
                what is wrong with it.
            AdapterConflict: another one was registered under this id at the same time.
        """
        if not self.settings.vllm_enable_lora:
            raise errors.ConfigError(
                "VLLM_ENABLE_LORA=False: adapters are switched off; set VLLM_ENABLE_LORA=true"
            )
        check_adapter_id(adapter_id)
        before = self.registry.current(adapter_id)
        allowed = roots if roots is not None else (self.settings.adapter_roots or None)
        base = self._base_shapes()
        self._check_free(adapter_id)
        stored = self.store.add(lora_path, roots=allowed, base=base, max_rank=self._max_rank())
        found = self.registry.register(
            adapter_id,
            stored,
            lora_path,
            expected_version=before.version if before is not None else 0,
        )
        self._current[adapter_id] = found.version
        self._residency.retire(adapter_id, keep=found.version)
        return found

    def _base_shapes(self) -> BaseShapes | None:
        directory = self.base_dir()
        if directory is not None:
            return BaseShapes.from_model_dir(directory)
        if self.settings.tink_allow_unverified_base:
            return None
        raise errors.BaseMismatch(
            f"the base model of {self.client.base_url} cannot be read here, so no adapter can be "
            "checked against it; set TINK_BASE_MODEL to its directory, or "
            "TINK_ALLOW_UNVERIFIED_BASE=true to register unchecked"
        )

    def _max_rank(self) -> int:
        status = self._view.status if self._view is not None else None
        return (
            status.max_lora_rank if status is not None else 0
        ) or self.settings.vllm_max_lora_rank

    def _check_free(self, adapter_id: str) -> None:
        view = self._view
        if view is not None and adapter_id in {view.base, *view.names}:
            raise errors.BadRequest(
                f"adapter_id {adapter_id!r} is a name that {self.client.base_url} itself serves; take "
                "another one"
            )

    def unregister(self, adapter_id: str) -> None:
        """Let `adapter_id` mean nothing any more; requests under way end on it.

        Raises:
            UnknownAdapter: it means nothing now.
        """
        self.registry.unregister(adapter_id)
        self._residency.retire(adapter_id)

    def list(self, *, details: bool = False) -> list[dict[str, Any]]:
        """`[{"adapter_id", "lora_path"}]` of every registered adapter, as the caller named the paths.

        With `details` also `version`, `digest`, `registered_at`, `server_name`, `resident` (on the
        server, as far as this process knows) and `running` (requests of this process on it).
        """
        found = []
        pins = self._residency.resident()
        for item in self.registry.list():
            row: dict[str, Any] = {"adapter_id": item.adapter_id, "lora_path": item.lora_path}
            if details:
                name = _adapter(item).name
                row |= {
                    "version": item.version,
                    "digest": item.digest,
                    "registered_at": item.registered_at,
                    "server_name": name,
                    "resident": name in pins,
                    "running": pins.get(name, 0),
                }
            found.append(row)
        return found

    # -- which model ------------------------------------------------------------------------------

    def resolve(self, model_id: str | None) -> Model | None:
        """What `model_id` means now, by what is known here; None if only the server can say.

        Raises:
            UnknownAdapter: `id@N` of a registered id that has no such version.
        """
        if model_id is None:
            return Model(model_id=None)
        current = self.registry.current(model_id)
        if current is not None:
            self._note_current(current)
            return Model(model_id=model_id, adapter=_adapter(current))
        match = _VERSIONED.match(model_id)
        if match and self.registry.current(match["id"]) is not None:
            old = self.registry.get(match["id"], int(match["version"]))
            if old is None:
                raise self._unknown(model_id)
            return Model(model_id=model_id, adapter=_adapter(old))
        if self._view is not None and model_id in {self._view.base, *self._view.names}:
            return Model(model_id=model_id)
        return None

    def _note_current(self, current: Registration) -> None:
        """Retire what another process replaced."""
        if self._current.get(current.adapter_id) != current.version:
            self._current[current.adapter_id] = current.version
            self._residency.retire(current.adapter_id, keep=current.version)

    def _unknown(self, model_id: str) -> errors.UnknownAdapter:
        ids = [item.adapter_id for item in self.registry.list()]
        names = list(self._view.names) if self._view is not None else []
        known = ", ".join((ids + names)[:10]) or "none"
        return errors.UnknownAdapter(
            f"model_id {model_id!r} is neither a registered adapter nor served by "
            f"{self.client.base_url} (known: {known}); register it with "
            "register_lora_adapter(adapter_id, lora_path)"
        )

    def find(self, model_id: str | None) -> Model:
        """What `model_id` means now; asks the server for names that are not known here.

        Raises:
            UnknownAdapter, ServerUnreachable.
        """
        model = self.resolve(model_id)
        if model is None:
            self.view(fresh=True)
            model = self.resolve(model_id)
        if model is None:
            assert model_id is not None
            self._residency.retire(model_id)  # if another process unregistered it
            raise self._unknown(model_id)
        return model

    def acquire_now(self, model: Model) -> Target | None:
        """As `acquire`, if that needs no waiting; else None."""
        if model.adapter is not None:
            entry = self._residency.pin_if_resident(model.adapter)
            return None if entry is None else _adapter_target(model, entry)
        return None if self._view is None else self._server_target(model, self._view)

    def acquire(self, model: Model) -> Target:
        """Where a request for `model` goes; loads an adapter that is not on the server.

        Raises:
            UnknownAdapter: the server does not serve that name (any more).
            ModeUnavailable: a policy is folded into the weights, so there is no base.
            TinkError: why an adapter could not be loaded.
        """
        if model.adapter is not None:
            return _adapter_target(model, self._residency.acquire(model.adapter))
        return self._server_target(model, self.view())

    def _server_target(self, model: Model, view: ServerView) -> Target:
        name = model.model_id
        if name is None or name == view.base:
            if name is None and view.merged is not None:
                raise errors.ModeUnavailable(
                    f"the base is not served: {view.merged} is folded into the weights of "
                    f"{self.client.base_url}; sample model_id={view.merged!r}, or use a second server"
                )
            policy = _VERSIONED.match(view.base)
            served = view.status.served if view.status is not None else {}
            return Target(
                name=view.base,
                model=model,
                version=int(policy["version"]) if policy else None,
                digest=served.get(view.base),
            )
        if name not in view.names:
            raise self._unknown(name)
        policy = _VERSIONED.match(name)
        version = int(policy["version"]) if policy else None
        return Target(name=name, model=model, version=version, digest=view.names[name])

    def release(self, target: Target) -> None:
        """The request on `target` has ended; returns at once."""
        if target.entry is not None:
            self._residency.release(target.entry)

    def refused(self, target: Target) -> None:
        """The server does not serve `target` after all: dropped by another process, or a restart."""
        if target.entry is not None:
            self._residency.forget(target.entry)
        self._view = None

    # -- sampling ---------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        adapter_id: str | None = None,
        *,
        timeout: float | None = None,
        **params: Any,
    ) -> Completions:
        """`n` completions of each prompt: `[P][n]`.

        Args:
            prompts: Texts or token ids; one prompt alone may stand without a list around it.
            adapter_id: A registered adapter, `id@N` for one of its versions, a name that the server
                itself serves (`policy@17`), or None for the base.
            timeout: Seconds for all of it; None: TINK_REQUEST_TIMEOUT.
            params: Fields of `SamplingParams`: max_tokens, temperature, top_p, top_k, min_p, n, stop,
                seed, repetition_penalty, logprobs, ...

        Raises:
            UnknownAdapter: nothing of that name.
            SamplingRefused: a parameter or a token id that is not allowed.
            ServerUnreachable, RequestTimeout, EngineUnavailable, BackendError.
        """
        asked = as_prompts(prompts)
        checked = as_params(params)
        self.check(asked, checked)
        deadline = time.monotonic() + (timeout or self.settings.tink_request_timeout)
        model = self.find(adapter_id)

        def send(target: Target) -> list[Completion]:
            answer = self.client.complete(
                payloads.completion_payload(asked, target.name, checked),
                timeout_s=max(0.001, deadline - time.monotonic()),
                expected=len(asked) * checked.n,
            )
            return payloads.as_completions(answer["choices"], checked, **target.origin())

        flat = self._with_target(model, send)
        return [flat[i : i + checked.n] for i in range(0, len(flat), checked.n)]

    def check(
        self, prompts: Sequence[payloads.Prompt], params: SamplingParams, *, ask: bool = True
    ) -> bool:
        """Refuse what is wrong for this server's base; whether everything could be checked.

        With `ask` it asks the server which base it has, if that is not known yet.

        Raises:
            SamplingRefused.
        """
        names_ids = bool(
            params.stop_token_ids
            or params.logit_bias
            or any(not isinstance(prompt, str) for prompt in prompts)
        )
        known = self._view is not None
        if names_ids and not known and not ask:
            payloads.check_prompts(prompts, None)
            payloads.check_params(replace(params, stop_token_ids=(), logit_bias=None), None)
            return False
        size = self._vocab_size() if names_ids else None
        payloads.check_prompts(prompts, size)
        payloads.check_params(params, size)
        return True

    def _vocab_size(self) -> int | None:
        view = self._view or self.view()
        if view.root not in self._vocab:
            self._vocab[view.root] = vocab_size(base_dir(view, self.settings.tink_base_model))
        return self._vocab[view.root]

    def _with_target(self, model: Model, send: Callable[[Target], T]) -> T:
        """`send(target)`, again if the server turned out not to serve it (it generated nothing)."""
        for _ in range(MAX_TRIES):
            target = self.acquire(model)
            try:
                return send(target)
            except errors.UnknownVersion:
                self.refused(target)
            finally:
                self.release(target)
        raise gave_up(model, self.client.base_url)

    # -- weights ----------------------------------------------------------------------------------

    def init_communicator(self, device: Any = "cpu") -> None:
        """Open the channel for `update_model_weights`: NCCL between GPUs, gloo otherwise.

        Args:
            device: Where the model that will be sent lies, such as "cuda" or "cpu".

        Raises:
            PluginMissing: the server was not started by `tink-rl serve`.
            LeaseHeld: somebody else updates this server's weights.
        """
        with self._sync_lock:
            self._open_sync(device)

    def _open_sync(self, device: Any) -> WeightSync:
        from tink_rl.weight_sync import WeightSync

        if self._sync is None:
            view = self.view(fresh=True)
            if not view.plugin:
                raise errors.PluginMissing(
                    f"the vLLM server at {self.client.base_url} runs without the tink_rl plugin, which "
                    "takes whole models; start it with `tink-rl serve MODEL --mode full`",
                    replica=self.client.base_url,
                )
            directory = self.base_dir()
            if directory is None:
                raise errors.BaseMismatch(
                    f"the base model {view.root!r} cannot be read here; set TINK_BASE_MODEL to its "
                    "directory"
                )
            config = SyncConfig(mode="full", token_file=self.settings.tink_token_file)
            self._sync = WeightSync(self.client, base_model=directory, config=config)
            self._sync.open()
        return self._sync

    def update_model_weights(self, model: Any) -> Any:
        """Serve the weights of `model` as the base from now on; the `PublishRecord`.

        Registered adapters stay, and add to the new weights.

        Args:
            model: A transformers or PEFT model, or an iterable of (name, tensor) pairs such as
                Megatron-Bridge's `export_hf_weights` yields.

        Raises:
            PluginMissing, PublishFailed, ShapeMismatch, UnknownModules.
        """
        with self._sync_lock:
            sync: Any = self._open_sync(_device_of(model))
            record = sync.publish_full(model)
            self._view = None
        return record

    def close_communicator(self) -> None:
        """Give the channel back; the weights stay as they are. Idempotent."""
        with self._sync_lock:
            sync, self._sync = self._sync, None
            if sync is not None:
                sync.close()

    def reset_prefix_cache(self) -> None:
        """Let the server forget every cached prefix.

        Never needed for right answers: every version has a cache of its own (name and salt).

        Raises:
            NotSupportedByBackend: the server offers no way.
            DrainTimeout: requests that run kept their prefixes in use.
        """
        self.client.reset_prefix_cache()

    # -- facts ------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """Client status and configuration; asks the server, and says so if it does not answer.

        Keys: `url`, `reachable`, `reason`, `plugin`, `base_model`, `modes`, `max_model_len`, `serves`,
        `missing` (what does not work without the plugin), `adapters`, `communicator`, `settings`.
        """
        facts: dict[str, Any] = {
            "url": self.client.base_url,
            "adapters": len(self.registry.list()),
            "communicator": self._sync is not None,
            "settings": self.settings.model_dump(mode="json"),
        }
        try:
            view = self.view(fresh=True)
        except errors.TinkError as error:
            return {**facts, "reachable": False, "reason": error.message}
        status = view.status
        return {
            **facts,
            "reachable": True,
            "reason": view.token_refused,
            "plugin": view.plugin,
            "base_model": view.base,
            "modes": [str(mode) for mode in status.modes] if status is not None else [],
            "max_model_len": view.max_model_len,
            "serves": sorted(view.names),
            "missing": view.missing(),
        }


class _LoaderByServer:
    """The loader that fits the server, as it is at that moment."""

    def __init__(self, backend: VLLMBackend) -> None:
        self._backend = backend

    def _loader(self) -> PluginLoader | PathLoader:
        backend = self._backend
        view = backend.view()
        if view.token_refused is not None:
            raise errors.BadToken(view.token_refused)
        kind = PluginLoader if view.plugin else PathLoader
        return kind(backend.client, backend.store)

    def load(self, wanted: AdapterVersion) -> None:
        self._loader().load(wanted)

    def drop(self, name: str) -> None:
        self._loader().drop(name)


def gave_up(model: Model, url: str) -> errors.TinkError:
    """The error after `MAX_TRIES` tries."""
    return errors.EngineUnavailable(
        f"{url} did not serve {model.model_id!r} {MAX_TRIES} times in a row, though it was loaded; do "
        "several processes share the server? Raise TINK_MAX_RESIDENT_ADAPTERS in all of them"
    )


def as_prompts(prompts: Any) -> list[payloads.Prompt]:
    """A list of prompts from one prompt or several.

    Raises:
        SamplingRefused: neither text nor token ids.
    """
    if isinstance(prompts, str):
        return [prompts]
    found = list(prompts) if isinstance(prompts, Iterable) else []
    if found and all(type(item) is int for item in found):
        return [found]
    for i, prompt in enumerate(found):
        if not isinstance(prompt, (str, list, tuple)):
            raise errors.SamplingRefused(f"prompts[{i}]={prompt!r}: expected text or token ids")
    return [p if isinstance(p, str) else list(p) for p in found]


def as_params(given: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from keywords; one stop text may stand without a list around it.

    Raises:
        SamplingRefused: an unknown name; the values are checked by `VLLMBackend.check`.
    """
    values = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(set(values) - set(SamplingParams.__dataclass_fields__))
    if unknown:
        names = ", ".join(SamplingParams.__dataclass_fields__)
        raise errors.SamplingRefused(f"unknown parameters {unknown}; expected some of {names}")
    stop = values.get("stop", ())
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    values["stop_token_ids"] = tuple(values.get("stop_token_ids", ()))
    return SamplingParams(**values)


def _adapter(item: Registration) -> AdapterVersion:
    return AdapterVersion(adapter_id=item.adapter_id, version=item.version, digest=item.digest)


def _adapter_target(model: Model, entry: Entry) -> Target:
    found = entry.version
    return Target(
        name=found.name, model=model, version=found.version, digest=found.digest, entry=entry
    )


def _client(settings: Settings) -> VLLMClient:
    try:
        token = SyncConfig(token_file=settings.tink_token_file).read_token()
    except errors.ConfigError:
        if settings.tink_token_file is not None:
            raise
        token = None  # a stock server needs none; one with the plugin will say so
    return VLLMClient(
        settings.url,
        token=token,
        api_key=settings.api_key(),
        request_timeout_s=settings.tink_request_timeout,
        connect_timeout_s=settings.vllm_timeout,
    )


def _device_of(model: Any) -> Any:
    return getattr(model, "device", "cpu")


# -- the seed's functions -----------------------------------------------------------------------------

_default: VLLMBackend | None = None
_default_lock = threading.Lock()


def default_backend() -> VLLMBackend:
    """The backend behind the functions of this module; made from the environment if there is none."""
    global _default
    with _default_lock:
        if _default is None:
            _default = VLLMBackend()
        return _default


def initialize_vllm_client(config: Config = None) -> VLLMBackend:
    """Make the backend that the functions below use, and wait for its server.

    Args:
        config: `Settings` or a dict (`{"base_url": "http://10.0.0.7:8000", "timeout": 2.0}`); what it
            does not name comes from the environment, then from the defaults.

    Raises:
        ServerUnreachable: `The vLLM server can't be reached at URL`, a `ConnectionError`.
        ConfigError: a setting is wrong.
    """
    global _default
    fresh = VLLMBackend(config)
    try:
        fresh.connect()
    except BaseException:
        fresh.close()
        raise
    with _default_lock:
        old, _default = _default, fresh
    if old is not None:
        old.close()
    return fresh


def generate_with_vllm(
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    adapter_id: str | None = None,
    max_tokens: int = 16,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    n: int = 1,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    repetition_penalty: float = 1.0,
    logprobs: int | None = None,
    timeout: float | None = None,
    **more: Any,
) -> list[list[dict[str, Any]]]:
    """`n` completions of each prompt, `[P][n]`, each a dict with the fields of `Completion`.

    `answer[0][0]["text"]`, `["token_ids"]`, `["logprobs"]`, `["finish_reason"]`, `["version"]`,
    `["digest"]`. Arguments and errors are those of `VLLMBackend.generate`.
    """
    found = default_backend().generate(
        prompts,
        adapter_id,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        n=n,
        stop=stop,
        seed=seed,
        repetition_penalty=repetition_penalty,
        logprobs=logprobs,
        timeout=timeout,
        **more,
    )
    return [[asdict(completion) for completion in row] for row in found]


def register_lora_adapter(adapter_id: str, lora_path: str | Path) -> dict[str, Any]:
    """See `VLLMBackend.register`; `{"adapter_id", "lora_path", "version", "digest"}`."""
    found = default_backend().register(adapter_id, lora_path)
    return {
        "adapter_id": found.adapter_id,
        "lora_path": found.lora_path,
        "version": found.version,
        "digest": found.digest,
    }


def unregister_lora_adapter(adapter_id: str) -> None:
    """See `VLLMBackend.unregister`."""
    default_backend().unregister(adapter_id)


def list_lora_adapters(details: bool = False) -> list[dict[str, Any]]:
    """See `VLLMBackend.list`."""
    return default_backend().list(details=details)


def init_communicator(device: Any = "cuda") -> None:
    """See `VLLMBackend.init_communicator`."""
    default_backend().init_communicator(device)


def update_model_weights(model: Any) -> Any:
    """See `VLLMBackend.update_model_weights`."""
    return default_backend().update_model_weights(model)


def close_communicator() -> None:
    """See `VLLMBackend.close_communicator`."""
    default_backend().close_communicator()


def reset_prefix_cache() -> None:
    """See `VLLMBackend.reset_prefix_cache`."""
    default_backend().reset_prefix_cache()


def get_client_info() -> dict[str, Any]:
    """See `VLLMBackend.info`."""
    return default_backend().info()
