"""What Megatron-LM's two text-generation servers read, ignore and answer; asks no server.

As read from Megatron-LM's sources, and tested against the resources of `megatron-core` 0.16.1. Two facts
about the static server that are easy to get wrong: HTTP 200 with a JSON string is an error (most of its
validation failures, and a `ValueError` of its engine, come that way); and its answers are prompt plus
generation, and do not say where the prompt ends. Its tokenizer is not ours and the text may be the
detokenized prompt, so it is asked once to score each new prompt (`tokens_to_generate: 0`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tink_rl import errors
from tink_rl.transport.sampling_params import SamplingParams

Prompt = str | Sequence[int]


class Kind(StrEnum):
    """Which of Megatron's two servers answers."""

    STATIC = "static"
    DYNAMIC = "dynamic"


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One completion as Megatron says it.

    Example: `Generated(text="13", token_ids=[5, 7], logprobs=[-0.1, -0.7], prompt_token_ids=[3, 9],
    finish_reason="length")`
    """

    text: str
    token_ids: list[int] | None
    """`[T]`; None from servers that do not return ids (static before core 0.15, dynamic of 0.16)."""
    logprobs: list[float] | None
    """`[T]`; None if not asked for."""
    prompt_token_ids: list[int] | None
    finish_reason: str | None


@dataclass(frozen=True)
class Scored:
    """A prompt as the static server sees it: what its answers begin with."""

    num_tokens: int
    text: str


def refused_parameters(kind: Kind | None, params: SamplingParams) -> dict[str, str]:
    """Name -> reason for each parameter that the server of this kind would ignore or misread.

    With `kind` None (not probed yet): those that both kinds refuse.
    """
    if kind is None:
        static, dynamic = (refused_parameters(k, params) for k in Kind)
        return {name: static[name] for name in static.keys() & dynamic.keys()}
    given = params.changed()
    refused = {name: "it has no such parameter" for name in given if name not in _KNOWN[kind]}
    if given.get("logprobs"):
        refused["logprobs"] = "it returns the sampled token's logprob only: 0, or none"
    if params.top_k and params.top_p < 1.0:
        refused["top_p"] = "it takes either top_k or top_p, not both"
    if params.top_p <= 0.0:
        refused["top_p"] = "it reads 0 as off"
    if params.max_tokens < 1:
        refused["max_tokens"] = "at least 1"
    if kind is Kind.STATIC and params.temperature > 100.0:
        refused["temperature"] = "at most 100"
    if kind is Kind.STATIC and params.top_k > 1000:
        refused["top_k"] = "at most 1000"
    return refused


_KNOWN = {
    # `random_seed` and every stop flag of /api are checked there and then ignored.
    Kind.STATIC: {"max_tokens", "temperature", "top_p", "top_k", "n", "logprobs"},
    Kind.DYNAMIC: {
        *("max_tokens", "temperature", "top_p", "top_k", "n", "logprobs", "stop", "ignore_eos"),
    },
}


def static_row(data: dict[str, Any], row: int, scored: Scored, params: SamplingParams) -> Generated:
    num_tokens = len(_pieces(data, row)) - scored.num_tokens
    logprobs = None
    if params.logprobs is not None:
        # One entry per token but the first, so the sampled ones are the tail.
        logprobs = [float(x) for x in data["logprobs"][row][scored.num_tokens - 1 :]]
    if num_tokens < 0 or (logprobs is not None and len(logprobs) != num_tokens):
        raise ValueError(f"{num_tokens} tokens with logprobs {logprobs}")
    tokens = [int(t) for t in data["tokens"][row]] if data.get("tokens") else None
    return Generated(
        text=_tail(data, row, scored),
        token_ids=tokens[scored.num_tokens :] if tokens else None,
        logprobs=logprobs,
        prompt_token_ids=tokens[: scored.num_tokens] if tokens else None,
        # It says no reason: a shorter answer than asked for ended by itself.
        finish_reason="length" if num_tokens == params.max_tokens else "stop",
    )


def scored_row(data: dict[str, Any], row: int) -> Scored:
    return Scored(len(_pieces(data, row)), str(data["text"][row]))


def _tail(data: dict[str, Any], row: int, scored: Scored) -> str:
    text = str(data["text"][row])
    if text.startswith(scored.text):
        return text[len(scored.text) :]
    # The detokenised whole does not begin with the detokenised prompt: join the tokens' own texts.
    return "".join(data["segments"][row][scored.num_tokens :])


def dynamic_row(choice: dict[str, Any], params: SamplingParams) -> Generated:
    tokens = choice.get("generation_token_ids")
    if tokens is None:
        _check_old_dynamic(params)
    logprobs = _dynamic_logprobs(choice) if params.logprobs is not None else None
    if tokens is not None and logprobs is not None and len(logprobs) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens with {len(logprobs)} logprobs")
    reason = choice.get("finish_reason")
    count = next((len(x) for x in (tokens, logprobs) if x is not None), None)
    if reason is None and count is not None:
        reason = "length" if count == params.max_tokens else "stop"
    return Generated(
        text=str(choice["text"]),
        token_ids=None if tokens is None else [int(t) for t in tokens],
        logprobs=logprobs,
        prompt_token_ids=choice.get("prompt_token_ids"),
        finish_reason=reason,
    )


def _dynamic_logprobs(choice: dict[str, Any]) -> list[float]:
    found = choice.get("generation_log_probs")
    if found is None:
        # This list begins with null, as if for a token before the first.
        found = choice["logprobs"]["token_logprobs"][1:]
    return [float(x) for x in found]


def check_supported(kind: Kind | None, prompts: Sequence[Prompt], params: SamplingParams) -> None:
    """Return if a server of this kind honours all that is asked; asks no server.

    Raises:
        NotSupportedByBackend: a parameter or token ids that it would ignore or misread.
        SamplingRefused: no prompts, or an empty one.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise errors.SamplingRefused("an empty prompt: Megatron needs at least one token; add one")
    name = f"the {kind} Megatron server" if kind else "Megatron"
    if kind is Kind.STATIC and not all(isinstance(p, str) for p in prompts):
        raise errors.NotSupportedByBackend(
            f"{name} takes no token ids; send text, or run "
            "tools/run_dynamic_text_generation_server.py, which takes both",
            backend="megatron",
        )
    refused = refused_parameters(kind, params)
    if refused:
        given = "; ".join(
            f"{name}={getattr(params, name)!r} ({why})" for name, why in refused.items()
        )
        raise errors.NotSupportedByBackend(
            f"{name} cannot honour {given}; leave it out, or sample from vLLM (USE_VLLM=true)",
            backend="megatron",
            parameters=sorted(refused),
        )


def _check_old_dynamic(params: SamplingParams) -> None:
    # The dynamic server of core 0.16 returns no ids, and reads neither of these two.
    ignored = [name for name in ("stop", "ignore_eos") if getattr(params, name)]
    if ignored:
        raise errors.NotSupportedByBackend(
            f"this dynamic Megatron server is too old to honour {', '.join(ignored)} (it returned no "
            "generation_token_ids); leave it out, or update Megatron-LM",
            backend="megatron",
            parameters=ignored,
        )


def static_fields(params: SamplingParams) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tokens_to_generate": params.max_tokens,
        "logprobs": params.logprobs is not None,
        "no_log": True,
    }
    if params.temperature == 0.0:
        return {**fields, "top_k": 1}  # it refuses temperature 0
    fields["temperature"] = params.temperature
    if params.top_k:
        fields["top_k"] = params.top_k
    elif params.top_p < 1.0:
        fields["top_p"] = float(params.top_p)  # a JSON integer is refused
    return fields


def dynamic_fields(params: SamplingParams) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        # Its sampler asserts that not both are set, and its default of 1.0 counts as set.
        "top_p": 0.0 if params.top_k or params.temperature == 0.0 else float(params.top_p),
        "logprobs": params.logprobs,
    }
    if params.stop:
        fields["stop"] = list(params.stop)
    if params.ignore_eos:
        fields["ignore_eos"] = True
    return fields


def _pieces(data: dict[str, Any], row: int) -> list[Any]:
    """One item per token of prompt and generation: ids, or before core 0.15 their texts."""
    for field in ("tokens", "segments"):
        if data.get(field):
            return list(data[field][row])
    raise ValueError("neither tokens nor segments")
