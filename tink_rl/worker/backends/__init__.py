"""What the queue asks of a backend. One of them serves a worker; settings say which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tink_rl.transport.payloads import NO_LIMITS, Limits, Prompt
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.types import Completion


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


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request that a backend has admitted: what was asked for, and what its names meant then.

    Example: `Admitted(prompts=["12+34="], model_id="math", params=SamplingParams(), model=Model(...))`
    """

    prompts: Sequence[Prompt]
    model_id: str | None
    """What the client asked for; the share that the request is counted against."""
    params: SamplingParams
    model: Any = None
    """What `model_id` meant when the request came, in the backend's own terms; None: only its server
    can say, when the request is sampled."""
    is_checked: bool = True
    """Whether all of it could be checked without asking the server."""

    @property
    def num_sequences(self) -> int:
        """Completions asked for."""
        return len(self.prompts) * self.params.n


class Backend(Protocol):
    """Samples for the queue. All coroutines run in the queue's event loop.

    Cancelling the task of `sample` ends the generation on the server too.
    """

    name: str
    """"vllm" or "megatron"."""

    def limits(self) -> Limits:
        """What a request may hold, as far as it is known; asks no server."""
        ...

    def admit(
        self,
        prompts: Sequence[Prompt],
        model_id: str | None,
        params: SamplingParams,
        limits: Limits = NO_LIMITS,
    ) -> Admitted:
        """Take a request, or refuse at once what `sample` would refuse anyway.

        A request that waits in the queue is answered by what was registered when it was admitted, even
        if that is unregistered or replaced meanwhile. Asks no server, but for a name that is not known
        here: then for a second at most.

        Args:
            prompts: Texts or token ids.
            model_id: What to sample from; None is the base.
            params: Checked already, as each of them allows.
            limits: What prompts and parameters were checked against already.

        Raises:
            NotSupportedByBackend: a parameter, token ids or a `model_id` that it cannot honour.
            SamplingRefused: ids whose vocabulary is not known.
            UnknownAdapter: nothing is registered or known under `model_id`.
        """
        ...

    async def sample(
        self,
        admitted: Admitted,
        *,
        timeout_s: float,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[Completion]:
        """`admitted.num_sequences` completions, prompt-major; all or none.

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
