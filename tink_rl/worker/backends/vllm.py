"""vLLM behind the worker's queue: the adapters of `VLLMBackend`, sampled over aiohttp.

What is resident is sampled without leaving the event loop; a load waits in a thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tink_rl import errors
from tink_rl.sampling import completions
from tink_rl.sampling.async_sampler import AsyncSampler
from tink_rl.sampling.resolver import MAX_TRIES, Model, Target, version_of
from tink_rl.sampling.server_view import ServerView
from tink_rl.transport import payloads
from tink_rl.transport.payloads import NO_LIMITS, Limits, Prompt
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.types import Completion, PolicyVersion
from tink_rl.vllm_backend import VLLMBackend
from tink_rl.worker.backends import Admitted, Delta, ModelInfo

_NUM_LOADERS = 8
"""Adapters that are brought to the server at the same time."""
_NEWS_S = 1.0
"""For so long a look at the server answers for every name that it did not find."""
_LOOK_S = 1.0
"""A request waits so long for a look before it is queued."""


class VLLMSampler:
    """A `Backend` over a `VLLMBackend`, which it shares with whoever registers adapters."""

    name = "vllm"

    def __init__(self, backend: VLLMBackend) -> None:
        """Store; connections open on first use, in the loop that samples."""
        self.backend = backend
        self._resolver, self._server = backend.resolver, backend.server
        self._sampler = AsyncSampler(
            backend.client.base_url,
            api_key=backend.settings.api_key(),
            connect_timeout_s=backend.settings.vllm_timeout,
            ca_file=backend.settings.tink_ca_file,
        )
        self._threads = ThreadPoolExecutor(_NUM_LOADERS, thread_name_prefix="tink-acquire")
        self._look_lock = threading.Lock()
        self._looking: Future[None] | None = None
        self._seen: tuple[ServerView, float] | None = None
        """The last look for an unknown name, and when it began."""

    async def _in_thread(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))

    # -- Backend ------------------------------------------------------------------------------------

    def limits(self) -> Limits:
        """See `Backend.limits`."""
        return self._server.limits()

    def admit(
        self,
        prompts: Sequence[Prompt],
        model_id: str | None,
        params: SamplingParams,
        limits: Limits = NO_LIMITS,
    ) -> Admitted:
        """See `Backend.admit`.

        For an unknown name the server is looked at, at most once a second; if that takes long, `sample`
        looks. Ids are checked by `sample` if the server was never looked at.
        """
        is_checked = limits.vocab_size is not None or not completions.names_ids(prompts, params)
        if not is_checked and (view := self._server.cached()) is not None:
            self.backend.check(prompts, params, view)
            is_checked = True
        return Admitted(
            prompts=prompts,
            model_id=model_id,
            params=params,
            model=self._resolve(model_id),
            is_checked=is_checked,
        )

    def _resolve(self, model_id: str | None) -> Model | None:
        model = self._resolver.resolve(model_id)
        if model is None and model_id is not None and self._has_looked(model_id):
            model = self._resolver.resolve(model_id)
            if model is None:
                raise self._unknown(model_id)
        return model

    async def sample(
        self,
        admitted: Admitted,
        *,
        timeout_s: float,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[Completion]:
        """See `Backend.sample`."""
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                if not admitted.is_checked:
                    view = await self._in_thread(self._server.view)
                    self.backend.check(admitted.prompts, admitted.params, view)
                model = admitted.model or await self._find(admitted.model_id)
                for _ in range(MAX_TRIES):
                    target = self._resolver.acquire_now(model) or await self._acquire(model)
                    try:
                        left_s = (deadline.when() or 0.0) - asyncio.get_running_loop().time()
                        return await self._send(target, admitted, max(0.001, left_s), on_delta)
                    except errors.UnknownVersion:
                        self._resolver.refused(target)
                    finally:
                        self._resolver.release(target)
                raise self._resolver.gave_up(model)
        except errors.TinkError:
            raise
        except TimeoutError as error:
            raise errors.DeadlineExceeded(
                f"vLLM at {self._sampler.base_url} did not answer within {timeout_s:g} s; raise the "
                "timeout of the request, or lower max_tokens"
            ) from error

    async def _find(self, model_id: str | None) -> Model:
        model = self._resolver.resolve(model_id)
        if model is None:
            look, is_new = self._ask()
            await asyncio.shield(asyncio.wrap_future(look))
            model = self._resolver.resolve(model_id)
            published = model_id is not None and PolicyVersion.find(model_id) is not None
            if model is None and published and not is_new:  # the look may have begun before that
                await asyncio.shield(asyncio.wrap_future(self._ask()[0]))
                model = self._resolver.resolve(model_id)
        if model is None:
            assert model_id is not None
            raise self._unknown(model_id)
        return model

    def _ask(self) -> tuple[Future[None], bool]:
        """The look at the server that is under way, or a new one; and whether it is new."""
        with self._look_lock:
            is_new = self._looking is None
            if self._looking is None:
                self._looking = self._threads.submit(self._look)
            return self._looking, is_new

    def _look(self) -> None:
        began = time.monotonic()
        try:
            self._seen = (self._server.view(fresh=True), began)
        finally:
            with self._look_lock:
                self._looking = None

    def _has_looked(self, model_id: str) -> bool:
        """Whether a look within the last second says that the server does not serve `model_id`.

        Never of a `policy@N`: a trainer may have published it since.
        """
        if self._seen is not None and PolicyVersion.find(model_id) is None:
            view, began = self._seen
            if view is self._server.cached() and time.monotonic() - began <= _NEWS_S:
                return True
        look, is_new = self._ask()
        if not is_new:  # one thread of the HTTP server waits, not all of them
            return False
        try:
            look.result(_LOOK_S)
        except (errors.TinkError, TimeoutError):  # `sample` has the time to wait and to say why
            return False
        return True

    def _unknown(self, model_id: str) -> errors.UnknownAdapter:
        self._resolver.unregistered(model_id)  # maybe by another process
        return errors.UnknownAdapter(
            f"model_id {model_id!r} is neither a registered adapter nor served by "
            f"{self._sampler.base_url}; GET /api/v1/models lists what is, POST /api/v1/adapters "
            "registers an adapter"
        )

    async def _acquire(self, model: Model) -> Target:
        """A target; if the task is cancelled meanwhile, the pin that the thread takes is given back."""
        future = asyncio.ensure_future(self._in_thread(self._resolver.acquire, model))
        try:
            target: Target = await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._give_back)
            raise
        return target

    def _give_back(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._resolver.release(future.result())

    async def _send(
        self,
        target: Target,
        asked: Admitted,
        timeout_s: float,
        on_delta: Callable[[Delta], None] | None,
    ) -> list[Completion]:
        count, params = asked.num_sequences, asked.params
        payload = completions.completion_payload(
            asked.prompts, target.name, params, stream=on_delta is not None
        )
        if on_delta is None:
            data = await self._sampler.complete(payload, timeout_s=timeout_s, expected=count)
            choices = data["choices"]
        else:
            whole = completions.StreamedChoices(count)
            async for piece in self._sampler.stream(payload, timeout_s=timeout_s):
                whole.add(piece)
                on_delta(_delta(piece, params))
            choices = whole.finished()
        return completions.as_completions(choices, params, **target.origin())

    async def models(self) -> list[ModelInfo]:
        """See `Backend.models`."""
        view = await self._in_thread(self._server.view, fresh=True)
        found = []
        if view.merged is None:
            found.append(ModelInfo(model_id=view.base, kind="base"))
        else:
            found.append(self._policy(view.base, view.status.served.get(view.base)))
        for item in self.backend.registry.list():
            found.append(
                ModelInfo(
                    model_id=item.adapter_id,
                    kind="adapter",
                    version=item.version,
                    digest=item.digest,
                )
            )
        return found + [self._policy(name, digest) for name, digest in view.names.items()]

    def _policy(self, name: str, digest: str | None) -> ModelInfo:
        return ModelInfo(
            model_id=name,
            kind="policy",
            version=version_of(name),
            digest=digest,
        )

    async def canary(self, timeout_s: float) -> None:
        """See `Backend.canary`; a policy that is folded into the base answers for it."""
        try:
            async with asyncio.timeout(timeout_s):
                view = self._server.cached() or await self._in_thread(self._server.view, fresh=True)
                payload = completions.completion_payload(
                    [[0]], view.base, SamplingParams(max_tokens=1, temperature=0.0)
                )
                try:
                    await self._sampler.complete(payload, timeout_s=timeout_s, expected=1)
                except errors.UnknownVersion:  # another policy was published meanwhile
                    view = await self._in_thread(self._server.view, fresh=True)
                    payload = replace_model(payload, view.base)
                    await self._sampler.complete(payload, timeout_s=timeout_s, expected=1)
        except errors.TinkError:
            raise
        except TimeoutError as error:
            raise errors.DeadlineExceeded(
                f"vLLM at {self._sampler.base_url} sampled nothing within {timeout_s:g} s; is it "
                "paused or wedged? Look into its log"
            ) from error

    def describe(self) -> dict[str, Any]:
        """See `Backend.describe`."""
        settings, limits = self.backend.settings, self.limits()
        return {
            "backend": self.name,
            "url": self.backend.client.base_url,
            "store": str(self.backend.store.root),
            "max_resident_adapters": settings.tink_max_resident_adapters,
            "vocab_size": limits.vocab_size,
            "max_model_len": limits.max_model_len,
        }

    async def close(self) -> None:
        """See `Backend.close`; the `VLLMBackend` stays open for its owner."""
        await self._sampler.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def replace_model(payload: dict[str, Any], name: str) -> dict[str, Any]:
    """The payload for another model name."""
    return {**payload, "model": name, "cache_salt": payloads.salt(name)}


def _delta(piece: dict[str, Any], params: SamplingParams) -> Delta:
    ids = piece.get("token_ids")
    rows = (
        payloads.logprob_rows({**piece, "token_ids": ids or []}) if piece.get("logprobs") else None
    )
    return Delta(
        prompt_index=piece["index"] // params.n,
        index=piece["index"] % params.n,
        text=piece["text"],
        token_ids=list(ids) if ids is not None else None,
        logprobs=[row[i] for row, i in zip(rows, ids or [], strict=True)] if rows else None,
    )
