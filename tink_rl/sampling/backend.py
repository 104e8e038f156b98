"""`VLLMBackend`: one vLLM server and the adapters that are registered for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tink_rl import errors
from tink_rl.adapters.registry import AdapterRegistry, Registration, check_adapter_id
from tink_rl.adapters.store import AdapterStore
from tink_rl.config import SyncConfig
from tink_rl.policy.shapes import BaseShapes
from tink_rl.sampling import completions
from tink_rl.sampling.base_weights import BaseWeights
from tink_rl.sampling.cache import AdapterCache
from tink_rl.sampling.calls import Calls, counted
from tink_rl.sampling.loaders import LoaderByServer
from tink_rl.sampling.resolver import ModelResolver, Target
from tink_rl.sampling.server_view import KnownServer, ServedBase, ServerView
from tink_rl.settings import Settings
from tink_rl.transport import payloads
from tink_rl.transport.sampling_client import SamplingClient
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.types import Completion, PublishRecord

logger = logging.getLogger("tink_rl")
Completions = list[list[Completion]]
KEPT_DAYS = 7
"""Days for which the bytes of an unregistered adapter stay in the store."""
Config = Settings | Mapping[str, Any] | None


class VLLMBackend:
    """One vLLM server and the adapters that are registered for it.

    Example:
        with VLLMBackend({"base_url": "http://127.0.0.1:8000"}) as backend:
            backend.register("math", "runs/digits/adapter")
            [[completion]] = backend.generate(["12+34="], "math", max_tokens=5)
            completion.text, completion.version, completion.digest
    """

    def __init__(self, config: Config = None, *, client: SamplingClient | None = None) -> None:
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
        self._secrets = read_secrets(self.settings)
        self.client = client or _client(self.settings, *self._secrets)
        self.server = KnownServer(
            self.client, self.settings.tink_base_model, lambda: self._cache.discard_all()
        )
        self._cache = AdapterCache(
            LoaderByServer(self.server, self.store),
            capacity=self.settings.tink_max_resident_adapters,
        )
        self.resolver = ModelResolver(
            self.registry,
            self._cache,
            self.server,
            adapters_on=self.settings.vllm_enable_lora,
        )
        self._base_weights = BaseWeights(self.server, self.settings)
        self.calls = Calls()
        self._closed = False

    def __enter__(self) -> VLLMBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End connections; what is registered, and what lies on the server, stays. Idempotent."""
        self._closed = True
        self.close_communicator()
        self._cache.close()
        self.client.close()
        self.registry.close()

    def is_as_new(self, settings: Settings) -> bool:
        """Whether it is what `settings` and their files would make now."""
        return (
            not self._closed
            and self._secrets == read_secrets(settings)
            and self.settings == settings
            and self.settings.model_fields_set == settings.model_fields_set
        )

    def connect(self) -> VLLMBackend:
        """Wait up to VLLM_TIMEOUT for the server.

        Raises:
            ServerUnreachable: a `ConnectionError`; nobody answered.
        """
        self.client.wait_until_reachable(self.settings.vllm_timeout)
        return self

    # -- adapters ---------------------------------------------------------------------------------

    @counted
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
            AdapterFilesInvalid, UnsupportedAdapter, BaseMismatch, RankExceeded, ...:
                what is wrong with it.
            AdapterConflict: another one was registered under this id at the same time.
        """
        self.resolver.check_on()
        check_adapter_id(adapter_id)
        before = self.registry.current(adapter_id)
        allowed = roots if roots is not None else (self.settings.adapter_roots or None)
        base = self.server.base()
        shapes = self._shapes(base)
        self.resolver.check_free(adapter_id)
        stored = self.store.add(lora_path, roots=allowed, base=shapes, max_rank=self._max_rank())
        found = self.registry.register(
            adapter_id,
            stored.digest,
            lora_path,
            expected_version=before.version if before is not None else 0,
            base_fingerprint=base.fingerprint,
        )
        self.resolver.registered(found)
        self._tidy()
        return found

    def _tidy(self) -> None:
        """Remove stored bytes that nothing can name any more; never fails a registration.

        Every version of a registered id stays, because `id@N` names it; of an unregistered one until
        KEPT_DAYS later, because requests under way end on it; and what the server lists, because stock
        vLLM reads the directory of an evicted adapter again.
        """
        kept_s = KEPT_DAYS * 86_400.0
        try:
            names = [card["id"] for card in self.client.model_cards()]
            keep = self.registry.needed(time.time() - kept_s)
            keep |= {d for d in self.store.digests() if any(f".{d[:12]}@" in n for n in names)}
            self.store.gc(keep, min_age_s=kept_s)
        except errors.TinkError as error:
            logger.info("the adapter store was not tidied: %s", error)

    def _shapes(self, base: ServedBase) -> BaseShapes | None:
        if base.directory is not None:
            return BaseShapes.from_model_dir(base.directory)
        if self.settings.tink_allow_unverified_base:
            return None
        raise errors.BaseMismatch(
            f"the base model of {self.client.base_url} cannot be read here, so no adapter can be "
            "checked against it; set TINK_BASE_MODEL to its directory, or "
            "TINK_ALLOW_UNVERIFIED_BASE=true to register unchecked"
        )

    def _max_rank(self) -> int:
        """What the server's slots take, or less if the user says so."""
        view = self.server.cached()
        slots = view.status.max_lora_rank if view is not None and view.status is not None else 0
        asked = self.settings.vllm_max_lora_rank
        if self.settings.set_value("vllm_max_lora_rank") is None:
            return slots or asked
        return min(slots or asked, asked)

    @counted
    def unregister(self, adapter_id: str) -> None:
        """Let `adapter_id` mean nothing any more; requests under way end on it.

        Raises:
            UnknownAdapter: it means nothing now.
        """
        self.registry.unregister(adapter_id)
        self.resolver.unregistered(adapter_id)

    @counted
    def list(self, *, details: bool = False) -> list[dict[str, Any]]:
        """`[{"adapter_id", "lora_path"}]` of every registered adapter, as the caller named the paths.

        With `details` also `version`, `digest`, `registered_at`, `server_name`, `resident` (on the
        server, as far as this process knows) and `running` (requests of this process on it).
        """
        found = []
        pins = self._cache.resident()
        for item in self.registry.list():
            row: dict[str, Any] = {"adapter_id": item.adapter_id, "lora_path": item.lora_path}
            if details:
                name = item.server_name
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

    # -- sampling ---------------------------------------------------------------------------------

    @counted
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
            timeout: Seconds for the answer; None: TINK_REQUEST_TIMEOUT. An adapter that must be loaded
                first has deadlines of its own.
            params: Fields of `SamplingParams`: max_tokens, temperature, top_p, top_k, min_p, n, stop,
                seed, repetition_penalty, logprobs, ...

        Raises:
            UnknownAdapter: nothing of that name.
            BaseMismatch: the server has another base than when the adapter was registered.
            AdapterConflict: a registered adapter, and a name that the server itself serves.
            ConfigError: an adapter, and VLLM_ENABLE_LORA is false.
            SamplingRefused: a parameter or a token id that is not allowed.
            ServerUnreachable, RequestTimeout, EngineUnavailable, BackendError.
        """
        asked = payloads.as_prompts(prompts)
        checked = completions.as_params(params)
        needed = completions.names_ids(asked, checked)
        self.check(asked, checked, self.server.view() if needed else self.server.cached())
        deadline = time.monotonic() + (timeout or self.settings.tink_request_timeout)
        model = self.resolver.find(adapter_id)

        def send(target: Target) -> list[Completion]:
            answer = self.client.complete(
                completions.completion_payload(asked, target.name, checked),
                timeout_s=max(0.001, deadline - time.monotonic()),
                expected=len(asked) * checked.n,
                limits=self.server.limits(),
            )
            return completions.as_completions(answer["choices"], checked, **target.origin())

        flat = self.resolver.with_target(model, send)
        return [flat[i : i + checked.n] for i in range(0, len(flat), checked.n)]

    def check(
        self, prompts: Sequence[payloads.Prompt], params: SamplingParams, view: ServerView | None
    ) -> None:
        """Refuse what is wrong for the server of `view`.

        Raises:
            SamplingRefused: a token id or a length that it does not take, or ids whose vocabulary is not
                known.
        """
        limits = self.server.limits_of(view)
        completions.check_vocabulary(params, limits.vocab_size)
        completions.check_fits(prompts, params, limits)

    # -- weights ----------------------------------------------------------------------------------

    @counted
    def init_communicator(self, device: object = "cpu") -> None:
        """Open the channel for `update_model_weights`: shared memory on one machine, else gloo.

        Never NCCL, also between GPUs: it cannot connect two ranks on one GPU (docs/architecture.md). A
        model on the CPU of a machine with a GPU always goes through gloo. A call that fails opens
        nothing and holds nothing; once a channel is open, further calls do nothing.

        Args:
            device: Where the model that will be sent lies: "cuda", "cuda:1" or "cpu".

        Raises:
            ConfigError: no such device here.
            PluginMissing: the server was not started by `tink-rl serve`.
            BaseMismatch: the server's base cannot be read here, or is another one.
            ModeUnavailable: the server does not offer full mode.
            LeaseHeld: somebody else updates this server's weights.
        """
        self._base_weights.open(device)

    @counted
    def update_model_weights(self, model: object) -> PublishRecord:
        """Serve the weights of `model` as the base from now on; the `PublishRecord`.

        Registered adapters stay, and add to the new weights.

        Args:
            model: A transformers or PEFT model, or an iterable of (name, tensor) pairs such as
                Megatron-Bridge's `export_hf_weights` yields.

        Raises:
            PluginMissing, PublishFailed, ShapeMismatch, UnknownModules.
        """
        return self._base_weights.publish(model)

    def close_communicator(self) -> None:
        """Give the channel back; the weights stay as they are. Idempotent."""
        self._base_weights.close()

    @counted
    def reset_prefix_cache(self) -> None:
        """Let the server forget every cached prefix.

        Never needed for right answers: every version has a cache of its own (name and salt).

        Raises:
            NotSupportedByBackend: the server offers no way.
            DrainTimeout: running requests kept their prefixes in use.
        """
        self.client.forget_prefixes()

    # -- facts ------------------------------------------------------------------------------------

    @counted
    def info(self) -> dict[str, Any]:
        """Client status and configuration; asks the server, and says so if it does not answer.

        Keys: `url`, `reachable`, `reason`, `plugin`, `base_model`, `modes`, `max_model_len`, `serves`,
        `missing` (what does not work without the plugin), `adapters`, `communicator`, `settings`.
        """
        facts: dict[str, Any] = {
            "url": self.client.base_url,
            "adapters": len(self.registry.list()),
            "communicator": self._base_weights.is_open,
            "settings": self.settings.model_dump(mode="json"),
        }
        try:
            view = self.server.view(fresh=True)
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


def read_secrets(settings: Settings) -> tuple[str | None, str | None]:
    """Token of the control routes and vLLM's own key, as their files hold them now."""
    try:
        token = SyncConfig(token_file=settings.tink_token_file).read_token()
    except errors.ConfigError:
        if settings.tink_token_file is not None:
            raise
        token = None  # a stock server needs none; one with the plugin will say so
    return token, settings.api_key()


def _client(settings: Settings, token: str | None, api_key: str | None) -> SamplingClient:
    return SamplingClient(
        settings.url,
        token=token,
        api_key=api_key,
        request_timeout_s=settings.tink_request_timeout,
        connect_timeout_s=settings.vllm_timeout,
        ca_file=settings.tink_ca_file,
    )
