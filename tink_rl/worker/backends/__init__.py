"""What the queue asks of a backend. One of them serves a worker; settings say which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tink_rl.types import Completion, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of a completion that is being streamed.

    Example: `Delta(prompt_index=0, index=0, text="13", token_ids=[5, 7], logprobs=None)`
    """

    prompt_index: int
    index: int
    text: str
    token_ids: list[int] | None
    logprobs: list[float] | None


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One name that can be sampled: `ModelInfo(model_id="math", kind="adapter", version=3, digest="9f..")`"""

    model_id: str
    kind: str
    """"base", "adapter" (registered here) or "policy" (published by a trainer)."""
    version: int | None = None
    digest: str | None = None


class Backend(Protocol):
    """Samples for the queue. All coroutines run in the queue's event loop.

    Cancelling the task of `sample` ends the generation on the server too.
    """

    name: str
    """"vllm" or "megatron"."""

    def check(
        self, prompts: Sequence[str | Sequence[int]], model_id: str | None, params: SamplingParams
    ) -> Any:
        """Refuse at once what `sample` would refuse anyway.

        Asks no server, but for a name that is not known here: then for a second at most.

        Returns:
            What `sample` takes in place of `model_id`: the version that `model_id` means now, so that
            a request which waits in the queue is answered by what was registered when it came, even
            if it is unregistered or replaced meanwhile.

        Raises:
            NotSupportedByBackend: a parameter, token ids or a `model_id` that it cannot honour.
            UnknownAdapter: nothing is registered or known under `model_id`.
        """
        ...

    async def sample(
        self,
        prompts: Sequence[str | Sequence[int]],
        model_id: Any,
        params: SamplingParams,
        *,
        timeout_s: float,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[Completion]:
        """`len(prompts) * params.n` completions, prompt-major; all or none.

        `model_id` is what `check` gave, or what the client asked for.

        Raises:
            UnknownAdapter, NotSupportedByBackend, SamplingRefused: the request's fault.
            EngineUnavailable, BackendError, DeadlineExceeded: the server's.
        """
        ...

    async def models(self) -> list[ModelInfo]:
        """Every name that can be sampled now, the base first."""
        ...

    async def canary(self, timeout_s: float) -> None:
        """Sample one token from the base; returns if one came.

        Raises:
            EngineUnavailable, DeadlineExceeded, BackendError.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Server URL and facts, for the status and the log."""
        ...

    async def close(self) -> None:
        """End connections; idempotent."""
        ...
