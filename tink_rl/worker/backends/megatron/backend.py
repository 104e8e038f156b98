"""Samples from a Megatron-LM text-generation server; it has no adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tink_rl import errors
from tink_rl.transport.payloads import NO_LIMITS, Limits, Prompt
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.types import Completion
from tink_rl.worker.backends import Admitted, Delta, ModelInfo
from tink_rl.worker.backends.megatron.client import MegatronClient
from tink_rl.worker.backends.megatron.contract import check_supported

BASE_NAME = "megatron"


class MegatronBackend:
    """The `Backend` over one Megatron server, static or dynamic, which a probe tells apart.

    Example: `MegatronBackend("http://localhost:5000")`
    """

    name = "megatron"

    def __init__(
        self,
        base_url: str = "http://localhost:5000",
        *,
        model_name: str = BASE_NAME,
        ca_file: str | None = None,
    ) -> None:
        """Store; asks no server.

        Args:
            base_url: The server's address (`MEGATRON_SERVER_URL`).
            model_name: What the served weights are called here; Megatron itself has no name for them.
            ca_file: See `MegatronClient`.
        """
        self._client = MegatronClient(base_url, ca_file=ca_file)
        self._model_name = model_name

    def limits(self) -> Limits:
        """See `Backend.limits`: Megatron says nothing of its model."""
        return NO_LIMITS

    def admit(
        self,
        prompts: Sequence[Prompt],
        model_id: str | None,
        params: SamplingParams,
        limits: Limits = NO_LIMITS,
    ) -> Admitted:
        """Refuse what this server cannot honour, as far as it is known before the first probe.

        Raises:
            NotSupportedByBackend: a `model_id`, a parameter or token ids that it cannot honour.
            SamplingRefused: no prompts, or an empty one.
        """
        if model_id is not None and model_id != self._model_name:
            raise errors.NotSupportedByBackend(
                f"model_id {model_id!r}: a Megatron server selects no adapter and takes no weights over "
                "HTTP; merge the adapter into the weights that it serves and leave model_id out, or "
                "sample from vLLM (USE_VLLM=true)",
                backend=self.name,
                model_id=model_id,
            )
        check_supported(self._client.kind, prompts, params)
        return Admitted(prompts=prompts, model_id=model_id, params=params)

    async def sample(
        self,
        admitted: Admitted,
        *,
        timeout_s: float,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[Completion]:
        """`admitted.num_sequences` completions, prompt-major; all or none.

        Cancelling closes the connection. The static server finishes what it began all the same.
        Megatron's answers come whole: each completion is one `Delta`.

        Raises:
            NotSupportedByBackend, SamplingRefused: the request's fault.
            EngineUnavailable, BackendError, DeadlineExceeded: the server's.
        """
        params = admitted.params
        found = await self._client.generate(admitted.prompts, params, timeout_s=timeout_s)
        completions = [
            Completion(
                prompt_index=i // params.n,
                index=i % params.n,
                text=one.text,
                token_ids=one.token_ids,
                logprobs=one.logprobs,
                prompt_token_ids=one.prompt_token_ids,
                finish_reason=one.finish_reason,
                model_id=admitted.model_id,
            )
            for i, one in enumerate(found)
        ]
        for done in completions if on_delta else ():
            assert on_delta is not None
            on_delta(_delta(done))
        return completions

    async def models(self) -> list[ModelInfo]:
        """The served weights: the only thing that can be sampled there."""
        return [ModelInfo(model_id=self._model_name, kind="base")]

    async def canary(self, timeout_s: float) -> None:
        """Sample one token; returns if one came.

        Raises:
            EngineUnavailable, DeadlineExceeded, BackendError.
        """
        params = SamplingParams(max_tokens=1, temperature=0.0)
        try:
            await self._client.generate(["a"], params, timeout_s=timeout_s)
        except errors.SamplingRefused as error:
            raise errors.BackendError(
                f"the Megatron server refuses to sample one token: {error.message}",
                backend=self.name,
            ) from error

    def describe(self) -> dict[str, Any]:
        """Server URL and, once probed, its kind."""
        kind = self._client.kind
        return {
            "backend": self.name,
            "url": self._client.base_url,
            "server": str(kind) if kind else "not probed yet",
            "adapters": False,
        }

    async def close(self) -> None:
        """End connections; idempotent."""
        await self._client.close()


def _delta(done: Completion) -> Delta:
    return Delta(
        prompt_index=done.prompt_index,
        index=done.index,
        text=done.text,
        token_ids=done.token_ids,
        logprobs=done.logprobs,
    )
