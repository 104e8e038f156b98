"""Stand-ins that implement our protocols: a backend that answers at once, late, wrongly or never."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from tink_rl.errors import UnknownAdapter
from tink_rl.protocol import read_status
from tink_rl.transport.payloads import NO_LIMITS, Limits
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.types import PROTOCOL_VERSION, Completion
from tink_rl.worker.backends import Admitted, Delta, ModelInfo

VOCAB_SIZE = 64
MAX_MODEL_LEN = 256


class FakeBackend:
    """Answers are a function of model, prompt and index, so that a mix-up shows."""

    name = "fake"

    def __init__(self, models: Sequence[str] = (), latency_s: float = 0.0) -> None:
        self.registered = {name: (1, f"digest-of-{name}") for name in models}
        self.latency_s = latency_s
        self.fails_with: Exception | None = None
        self.changes: Callable[[list[Completion]], list[Completion]] = lambda found: found
        self.hold: asyncio.Event | None = None
        self.num_calls = 0
        self.num_cancelled = 0
        self.running = 0
        self.most_running = 0
        self.order: list[str | None] = []
        self.is_closed = False

    def limits(self) -> Limits:
        return Limits(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)

    def admit(
        self,
        prompts: Sequence[str | Sequence[int]],
        model_id: str | None,
        params: SamplingParams,
        limits: Limits = NO_LIMITS,
    ) -> Admitted:
        if model_id is not None and model_id not in self.registered:
            raise UnknownAdapter(f"no adapter is registered as {model_id!r}")
        return Admitted(prompts=prompts, model_id=model_id, params=params)

    async def sample(
        self,
        admitted: Admitted,
        *,
        timeout_s: float,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[Completion]:
        model_id = admitted.model_id
        self.num_calls += 1
        self.order.append(model_id)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._sample(admitted.prompts, model_id, admitted.params, on_delta)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _sample(
        self,
        prompts: Sequence[str | Sequence[int]],
        model_id: str | None,
        params: SamplingParams,
        on_delta: Callable[[Delta], None] | None,
    ) -> list[Completion]:
        found = [
            self.completion(p, prompt, i, model_id, params)
            for p, prompt in enumerate(prompts)
            for i in range(params.n)
        ]
        if on_delta is not None:
            for completion in found:
                for token in completion.token_ids or ():
                    await asyncio.sleep(self.latency_s / 10)
                    on_delta(
                        Delta(
                            prompt_index=completion.prompt_index,
                            index=completion.index,
                            text=f"{token} ",
                            token_ids=[token],
                            logprobs=None,
                        )
                    )
        if self.hold is not None:
            await self.hold.wait()
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        if self.fails_with is not None:
            raise self.fails_with
        return self.changes(found)

    def completion(
        self,
        prompt_index: int,
        prompt: str | Sequence[int],
        index: int,
        model_id: str | None,
        params: SamplingParams,
    ) -> Completion:
        tokens = answer_of(model_id, prompt, index)[: params.max_tokens]
        version, digest = self.registered.get(model_id or "", (None, None))
        return Completion(
            prompt_index=prompt_index,
            index=index,
            text="".join(f"{t} " for t in tokens),
            token_ids=tokens,
            logprobs=None if params.logprobs is None else [-0.5] * len(tokens),
            prompt_token_ids=[ord(c) % VOCAB_SIZE for c in prompt]
            if isinstance(prompt, str)
            else list(prompt),
            finish_reason="length",
            model_id=model_id,
            version=version,
            digest=digest,
        )

    async def models(self) -> list[ModelInfo]:
        adapters = [
            ModelInfo(model_id=name, kind="adapter", version=version, digest=digest)
            for name, (version, digest) in self.registered.items()
        ]
        return [ModelInfo(model_id="base", kind="base"), *adapters]

    async def canary(self, timeout_s: float) -> None:
        if self.fails_with is not None:
            raise self.fails_with

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name}

    async def close(self) -> None:
        self.is_closed = True


def answer_of(model_id: str | None, prompt: str | Sequence[int], index: int = 0) -> list[int]:
    """Eight tokens that say who was asked what."""
    seed = repr((model_id, prompt if isinstance(prompt, str) else list(prompt), index))
    return [byte % VOCAB_SIZE for byte in hashlib.sha256(seed.encode()).digest()[:8]]


class FakeAdapters:
    """Registrations in a dict that a `FakeBackend` shares."""

    def __init__(self, backend: FakeBackend) -> None:
        self._backend = backend
        self._paths: dict[str, str] = {}
        self.fails_with: Exception | None = None
        self.num_calls = 0

    def register(self, adapter_id: str, lora_path: str) -> None:
        self.num_calls += 1
        if self.fails_with is not None:
            raise self.fails_with
        version, _ = self._backend.registered.get(adapter_id, (0, ""))
        self._backend.registered[adapter_id] = (version + 1, f"digest-of-{lora_path}")
        self._paths[adapter_id] = lora_path

    def unregister(self, adapter_id: str) -> None:
        self.num_calls += 1
        if adapter_id not in self._backend.registered:
            raise UnknownAdapter(f"no adapter is registered as {adapter_id!r}")
        del self._backend.registered[adapter_id]
        self._paths.pop(adapter_id, None)

    def list(self, details: bool = False) -> list[dict[str, Any]]:
        return [
            {"adapter_id": name, "lora_path": self._paths.get(name, ""), "version": v, "digest": d}
            for name, (v, d) in self._backend.registered.items()
        ]


def hub_error(kind: type[Exception]) -> Exception:
    """What huggingface_hub raises for an answer of the Hub's."""
    import httpx

    request = httpx.Request("GET", "https://huggingface.co/api/models/org/model")
    return kind("401 Client Error", response=httpx.Response(401, request=request))  # type: ignore[call-arg]


def status(modes=("adapter", "merged"), **changes):
    """What a server says of itself that offers `modes`."""
    base = {
        **{
            "protocol": PROTOCOL_VERSION,
            "incarnation": "i",
            "state": "ready",
            "modes": modes,
            "world_size": 1,
        },
        **{"base_model": "b", "base_fingerprint": "f", "dtype": "float32"},
        **{"adapter_dtype": "float32", "max_lora_rank": 16, "max_loras": 2, "max_model_len": 256},
        **{"logprobs_mode": "processed_logprobs", "device": "cpu", "served": {}},
    }
    return read_status({**base, "a_field_of_a_newer_server": 1, **changes})
