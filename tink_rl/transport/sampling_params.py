"""The sampling parameters of the service: every one of them once, within vLLM's own bounds."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tink_rl.transport.request_fields import FIELDS


def within(
    name: str, default: Any, *, low: float | None = None, high: float | None = None, **more: Any
) -> Any:
    """A field within the bounds that vLLM has for it, or narrower ones."""
    field = FIELDS[name]
    assert field.low <= (field.low if low is None else low), name
    assert field.high >= (field.high if high is None else high), name
    bounds: dict[str, Any] = {"le": field.high if high is None else high}
    bounds["gt" if field.above_low else "ge"] = field.low if low is None else low
    return Field(default=default, **bounds, **more)


class SamplingParams(BaseModel):
    """How completions are sampled; every backend takes these or refuses them by name.

    Example: `SamplingParams(max_tokens=50, temperature=0.8, top_p=0.95, top_k=40, n=2)`
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    max_tokens: int = within("max_tokens", 16)
    min_tokens: int = within("min_tokens", 0)
    temperature: float = within("temperature", 1.0, description="0 is greedy, and then n is 1.")
    top_p: float = within("top_p", 1.0)
    top_k: int = within("top_k", 0, description="0 or -1 is off.")
    min_p: float = within("min_p", 0.0)
    n: int = within("n", 1, description="Completions per prompt.")
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = within("seed", None)
    repetition_penalty: float = within("repetition_penalty", 1.0)
    presence_penalty: float = within("presence_penalty", 0.0)
    frequency_penalty: float = within("frequency_penalty", 0.0)
    logprobs: int | None = within(
        "logprobs",
        None,
        description="Logprobs of the sampled tokens (0), and of this many most likely ones.",
    )
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults: what a backend must honour or refuse."""
        fields = type(self).model_fields
        return {name: value for name, value in self if value != fields[name].default}
