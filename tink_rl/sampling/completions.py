"""`SamplingParams` as a request to vLLM, and its answer as `Completion`s: pure, for both ways of sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tink_rl import errors
from tink_rl.transport import payloads
from tink_rl.transport.payloads import Limits, Prompt, as_id, check_ids
from tink_rl.transport.plain import plain
from tink_rl.transport.request_fields import check_fields, check_together
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.types import Completion

_COLLECTIONS = ("stop", "stop_token_ids", "logit_bias")


# -- what is asked ----------------------------------------------------------------------------------


def as_params(given: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from keywords; one stop text may stand without a list around it.

    Raises:
        SamplingRefused: an unknown name, or a value that vLLM does not take.
    """
    values = {name: plain(value) for name, value in given.items() if value is not None}
    unknown = sorted(set(values) - set(SamplingParams.model_fields))
    if unknown:
        names = ", ".join(SamplingParams.model_fields)
        raise errors.SamplingRefused(f"unknown parameters {unknown}; expected some of {names}")
    check_fields(values)
    stop = values.get("stop", ())
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    values["stop_token_ids"] = tuple(values.get("stop_token_ids", ()))
    if "logit_bias" in values:
        values["logit_bias"] = {as_id(k): bias for k, bias in values["logit_bias"].items()}
    params = SamplingParams.model_construct(**values)  # checked, in the caller's words
    check_together(vars(params))  # with the defaults of what was not given
    return params


def names_ids(prompts: Sequence[Prompt], params: SamplingParams) -> bool:
    """Whether a request holds token ids, so that it needs the size of the vocabulary."""
    listed = any(not isinstance(prompt, str) for prompt in prompts)
    return bool(listed or params.stop_token_ids or params.logit_bias)


def check_vocabulary(params: SamplingParams, vocab_size: int | None) -> None:
    """Raise `SamplingRefused` for a parameter that names ids of an unknown vocabulary.

    An id outside the vocabulary corrupts other requests of the batch on some vLLM versions
    (CVE-2026-93840), so no parameter that names ids is let through unchecked.
    """
    if vocab_size is None and (params.stop_token_ids or params.logit_bias):
        raise errors.SamplingRefused(
            "stop_token_ids and logit_bias need the size of the vocabulary, which is unknown here: "
            "set TINK_BASE_MODEL to the directory of the served base model"
        )


def check_fits(prompts: Sequence[Prompt], params: SamplingParams, limits: Limits) -> None:
    """Raise `SamplingRefused` for a token id or a length that a server with these limits must not get."""
    payloads.check_prompts(prompts, limits.vocab_size)
    check_ids(params.stop_token_ids, limits.vocab_size, "stop_token_ids")
    check_ids(list(params.logit_bias or {}), limits.vocab_size, "logit_bias")
    payloads.check_lengths(prompts, params.max_tokens, limits.max_model_len)


def completion_payload(
    prompts: Sequence[Prompt], model: str, params: SamplingParams, *, stream: bool = False
) -> dict[str, Any]:
    """The body of `POST /v1/completions`."""
    payload: dict[str, Any] = {
        "model": model,
        "prompt": [p if isinstance(p, str) else list(p) for p in prompts],
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "cache_salt": payloads.salt(model),
        **_fields_of(params),
    }
    if stream:
        payload["stream"] = True
    return payload


def _fields_of(params: SamplingParams) -> dict[str, Any]:
    fields = {name: value for name, value in params if name not in _COLLECTIONS}
    if params.stop:
        fields["stop"] = list(params.stop)
    if params.stop_token_ids:
        fields["stop_token_ids"] = list(params.stop_token_ids)
    if params.logit_bias:
        fields["logit_bias"] = {str(key): value for key, value in params.logit_bias.items()}
    return fields


# -- what is answered -------------------------------------------------------------------------------


def as_completions(
    choices: Sequence[Mapping[str, Any]], params: SamplingParams, **origin: Any
) -> list[Completion]:
    """One record per choice, prompt-major; `origin` is `model_id`, `version` and `digest`.

    Raises:
        EngineUnavailable: the server ended one early; what came is not a completion.
    """
    found = []
    if any(choice["finish_reason"] == "abort" for choice in choices):
        raise errors.EngineUnavailable(
            f"the server aborted a completion of {origin.get('model_id')!r} midway, for a weight update "
            "or an operator; try again"
        )
    for number, choice in enumerate(choices):
        rows = payloads.logprob_rows(choice) if params.logprobs is not None else None
        found.append(
            Completion(
                prompt_index=number // params.n,
                index=number % params.n,
                text=choice["text"],
                token_ids=list(choice["token_ids"]),
                logprobs=_sampled(rows, choice["token_ids"]),
                top_logprobs=rows if rows is not None and params.logprobs else None,
                prompt_token_ids=choice.get("prompt_token_ids"),
                finish_reason=choice["finish_reason"],
                **origin,
            )
        )
    return found


def _sampled(rows: list[dict[int, float]] | None, token_ids: Sequence[int]) -> list[float] | None:
    if rows is None:
        return None
    return [row[token] for row, token in zip(rows, token_ids, strict=True)]


# -- server-sent events -----------------------------------------------------------------------------


class StreamedChoices:
    """Puts the chunks of a streamed sample together again, as the choices of a whole answer."""

    def __init__(self, count: int) -> None:
        self.choices: list[dict[str, Any]] = [
            {"text": "", "token_ids": [], "logprobs": None, "finish_reason": None}
            for _ in range(count)
        ]

    def add(self, piece: Mapping[str, Any]) -> None:
        """Take one choice of one chunk."""
        choice = self.choices[piece["index"]]
        choice["text"] += piece["text"]
        choice["token_ids"] += piece.get("token_ids") or []
        choice["finish_reason"] = piece.get("finish_reason") or choice["finish_reason"]
        if piece.get("prompt_token_ids") is not None:
            choice["prompt_token_ids"] = piece["prompt_token_ids"]
        if piece.get("logprobs") is not None:
            whole = choice["logprobs"] or {"tokens": [], "token_logprobs": [], "top_logprobs": []}
            for key, values in whole.items():
                values += piece["logprobs"].get(key) or []
            choice["logprobs"] = whole

    def finished(self) -> list[dict[str, Any]]:
        """The choices.

        Raises:
            BackendError: the stream ended before every choice had.
        """
        open_ones = [i for i, choice in enumerate(self.choices) if not choice["finish_reason"]]
        if open_ones:
            raise errors.BackendError(f"the stream ended, completions {open_ones[:8]} had not")
        return self.choices


def event_data(line: str) -> Any:
    """What one line of a stream of server-sent events carries: JSON, "[DONE]", or None.

    Raises:
        BackendError: the server reports an error inside the stream.
    """
    if not line.startswith("data:"):
        return None
    text = line.removeprefix("data:").strip()
    if text == "[DONE]":
        return text
    data = payloads.json_or_text(text)
    if not isinstance(data, dict) or "choices" not in data:
        raise errors.BackendError(f"the stream broke off: {payloads.error_text(data)}")
    return data
