"""What travels to a vLLM server for a sample and how its answer is read: pure, for every client.

An answer names the model that was asked for, every choice is there, every logprob belongs to its token.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tink_rl import errors
from tink_rl.transport.plain import plain
from tink_rl.transport.request_fields import check_fields, says_nothing

Prompt = str | Sequence[int]
MAX_PROMPTS = 1024
"""What vLLM takes in one request, unless its VLLM_MAX_COMPLETION_PROMPTS says otherwise."""
JSON = {"content-type": "application/json"}
IDLE_CONNECTION_S = 2.0
"""A connection that was not used for so long is not used again. uvicorn, and so vLLM, closes idle ones
after 5 s (`tink-rl serve` lets it keep them for 60 s); a request that is written at that moment is lost
without an answer."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request to one server may hold, as far as that is known: `Limits(vocab_size=151936)`"""

    vocab_size: int | None = None
    """Rows of the served embedding; an id beyond them ends the engine of vLLM 0.31."""
    max_model_len: int | None = None
    max_prompts: int = MAX_PROMPTS


NO_LIMITS = Limits()


def salt(model: str) -> str:
    """The cache salt of a model name: one version is never answered from another one's cache."""
    # vLLM refuses '@' and '/' in a salt, and both occur in names.
    return hashlib.sha256(model.encode()).hexdigest()[:32]


def unreachable(url: str, reason: str) -> str:
    """What a user is told when nobody answers at `url`."""
    return (
        f"The vLLM server can't be reached at {url}\n({reason}) Start one with `tink-rl serve MODEL "
        "--mode adapter`, or correct VLLM_BASE_URL."
    )


def redirected(url: str, path: str, location: str) -> str:
    """What a user is told when a request is sent elsewhere, which a POST with a token must not follow."""
    return f"{url} redirects {path} to {location or 'elsewhere'}; give the URL of the vLLM server itself"


# -- from a caller's words --------------------------------------------------------------------------


def as_prompts(prompts: object) -> list[Prompt]:
    """A list of prompts from one prompt or several; ids may be numpy's or torch's.

    Raises:
        SamplingRefused: neither text nor token ids.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        raise errors.SamplingRefused(
            f"prompts is a {type(prompts).__name__} of {', '.join(map(str, prompts))}: expected texts or "
            "token ids; of a tokenizer's output give ['input_ids']"
        )
    found = list(plain(prompts)) if isinstance(prompts, Iterable) else []
    if found and all(type(item) is int for item in found):
        return [found]
    for i, prompt in enumerate(found):
        if not isinstance(prompt, (str, list, tuple)):
            raise errors.SamplingRefused(f"prompts[{i}]={prompt!r}: expected text or token ids")
    return [p if isinstance(p, str) else list(p) for p in found]


# -- what is asked ----------------------------------------------------------------------------------


def sampling_fields(
    *,
    chat: bool = False,
    structured_outputs_regex: str | None = None,
    generation_kwargs: Mapping[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """The fields of a request of TRL's arguments: what is sent beside prompt and model.

    `generation_kwargs` win over `fields`, as they do in TRL; one of them that is None changes nothing.

    Raises:
        SamplingRefused: a name or value that is not taken; two grammars.
    """
    extra = given_kwargs(generation_kwargs)
    check_fields(extra, chat=chat, shown="generation_kwargs[{!r}]".format)
    if structured_outputs_regex is not None:
        regex = {"regex": structured_outputs_regex}
        if extra.get("structured_outputs", regex) != regex:
            raise errors.SamplingRefused(
                f"structured_outputs_regex={structured_outputs_regex!r} and "
                f"generation_kwargs['structured_outputs']={extra['structured_outputs']!r}: set one of them"
            )
        fields["structured_outputs"] = regex
    fields = {k: plain(v) for k, v in fields.items() if v is not None}
    return {k: v for k, v in {**fields, **extra}.items() if not says_nothing(k, v)}


def given_kwargs(generation_kwargs: Any) -> dict[str, Any]:
    """What `generation_kwargs` sets, as JSON has it; an entry that is None is left out.

    Raises:
        SamplingRefused: it is not a dict.
    """
    if not isinstance(generation_kwargs or {}, Mapping):
        raise errors.SamplingRefused(f"generation_kwargs={generation_kwargs!r}: expected a dict")
    return {k: plain(v) for k, v in (generation_kwargs or {}).items() if v is not None}


def check_payload(
    payload: Mapping[str, Any], limits: Limits = NO_LIMITS, *, stream: bool = False
) -> bytes:
    """The body that is sent for `payload`, once all of it was checked; nothing else is sent.

    Args:
        payload: As it is sent, everything merged into it.
        limits: Of the server, as far as they are known.
        stream: Whether the caller reads a stream.

    Raises:
        SamplingRefused: a field, a value, a token id or a length that the server must not get.
    """
    chat = "messages" in payload
    fields = {k: v for k, v in payload.items() if not (stream and k == "stream")}
    check_fields(fields, chat=chat, ours=True)
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        check_ids([as_id(key) for key in payload.get(name) or ()], limits.vocab_size, name)
    if not chat:
        prompts = as_prompts(payload.get("prompt"))
        check_prompts(prompts, limits.vocab_size)
        check_lengths(prompts, payload.get("max_tokens") or 16, limits.max_model_len)
    return encoded(payload)


def split(payload: Mapping[str, Any], max_prompts: int) -> list[dict[str, Any]]:
    """`payload` as requests of at most `max_prompts` prompts each, in order.

    vLLM draws the k-th completion of every prompt from `seed + k`, whatever stands beside it, so that
    seeds mean the same in one request and in several.
    """
    prompts = payload.get("prompt")
    if not isinstance(prompts, list) or len(prompts) <= max_prompts or type(prompts[0]) is int:
        return [dict(payload)]
    starts = range(0, len(prompts), max_prompts)
    return [{**payload, "prompt": prompts[i : i + max_prompts]} for i in starts]


def as_id(key: object) -> Any:
    """A token id that JSON wrote as text; anything else as it is."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() else key


def check_lengths(prompts: Sequence[Prompt], max_tokens: int, limit: int | None) -> None:
    """Raise `SamplingRefused` unless prompt and completion fit; how long a text is only the server knows."""
    if limit is None:
        return
    if max_tokens > limit:
        raise errors.SamplingRefused(
            f"max_tokens={max_tokens} exceeds the {limit} tokens that the server takes for prompt and "
            "completion; lower it, or restart the server with a larger --max-model-len"
        )
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and len(prompt) + max_tokens > limit:
            raise errors.SamplingRefused(
                f"prompts[{i}] has {len(prompt)} tokens, and max_tokens={max_tokens} may follow: the "
                f"server takes {limit} for both; shorten the prompt, lower max_tokens (of a trainer: "
                "max_completion_length), or restart the server with a larger --max-model-len"
            )


def encoded(payload: Mapping[str, Any]) -> bytes:
    """Strict JSON in UTF-8.

    Raises:
        SamplingRefused: names the field that cannot be written so.
    """
    try:
        return _json(payload)
    except (TypeError, ValueError):  # UnicodeEncodeError is one
        for name, value in payload.items():
            try:
                _json(value)
            except (TypeError, ValueError) as error:
                raise errors.SamplingRefused(
                    f"{name} cannot be sent as JSON: {error}; expected plain numbers, texts, lists and dicts"
                ) from error
        raise


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def check_prompts(prompts: Sequence[Prompt], vocab_size: int | None) -> None:
    """Raise `SamplingRefused` unless there are prompts and every token id lies in the vocabulary.

    With `vocab_size` None only what is wrong for every vocabulary is refused.
    """
    if not prompts:
        raise errors.SamplingRefused("prompts is empty; expected at least one")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise errors.SamplingRefused(f"prompts[{i}] is empty; expected text or token ids")
        if isinstance(prompt, str):
            _check_text(prompt, f"prompts[{i}]")
        else:
            check_ids(prompt, vocab_size, f"prompts[{i}]")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise errors.SamplingRefused(
            f"{where} holds half a surrogate pair, {text[error.start]!a} at {error.start}: no text that can "
            "be sent; decode what it came from with errors='replace'"
        ) from error


def check_ids(ids: Sequence[int], vocab_size: int | None, where: str) -> None:
    """Raise `SamplingRefused` unless every id is an integer in [0, vocab_size)."""
    limit = vocab_size if vocab_size is not None else 2**31
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < limit):
        return
    bad = next(i for i in ids if type(i) is not int or not 0 <= i < limit)
    known = "the served vocabulary has" if vocab_size is not None else "expected"
    raise errors.SamplingRefused(f"{where} holds {bad!r}; {known} token ids from 0 to {limit - 1}")


# -- what is answered -------------------------------------------------------------------------------


def read_answer(
    status: int, data: object, *, model: str, url: str, expected: int | None = None
) -> dict[str, Any]:
    """The JSON of a sample that may be trusted.

    Args:
        status: HTTP status.
        data: The body, as JSON where it is.
        model: What was asked for.
        url: Base URL of the server, for the error.
        expected: Number of choices; None: any.

    Raises:
        UnknownVersion: the server does not serve `model`, or answered as another one.
        SamplingRefused: vLLM refused the parameters.
        BadToken: vLLM has an --api-key of its own, and it was not sent.
        EngineUnavailable: the engine died or is stopping.
        BackendError: no completion, or not all of them.
        TinkError: what our plugin raised.
    """
    if status == 404:
        raise errors.UnknownVersion(
            f"the server at {url} does not serve {model!r}; it was dropped, replaced "
            "by a newer version, or the server was restarted",
            replica=url,
        )
    if status != 200:
        if is_ours(data):
            raise errors.from_wire(data, status)
        if status >= 500:
            raise errors.EngineUnavailable(
                f"vLLM at {url} answered HTTP {status}: {error_text(data)}; look into its log",
                replica=url,
            )
        check_key(status, data, url)
        raise errors.SamplingRefused(f"vLLM refused the request: {error_text(data)}")
    if not isinstance(data, dict) or "choices" not in data:
        raise errors.BackendError(f"the server at {url} answered no completion: {str(data)[:200]}")
    check_model(data.get("model"), model, url)
    if expected is not None and len(data["choices"]) != expected:
        raise errors.BackendError(
            f"{len(data['choices'])} completions came back from {url}, expected {expected}"
        )
    return data


def check_key(status: int, data: object, url: str) -> None:
    """Raise `BadToken` if vLLM did not let the request in."""
    if status in (401, 403):
        raise errors.BadToken(
            f"vLLM at {url} wants its own --api-key ({error_text(data)}); set VLLM_API_KEY or "
            "TINK_VLLM_API_KEY_FILE",
            replica=url,
        )


def check_model(found: object, model: str, url: str) -> None:
    """Raise `UnknownVersion` unless the server answered as the model that was asked for."""
    if found != model:
        raise errors.UnknownVersion(
            f"{model!r} was asked for, the server answered as {found!r}", replica=url
        )


def json_or_text(text: str) -> Any:
    """The body as JSON, or as it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def is_ours(data: object) -> bool:
    """Whether an error body was written by the tink_rl plugin."""
    error = data.get("error") if isinstance(data, dict) else None
    return isinstance(error, dict) and isinstance(error.get("code"), str) and "details" in error


def error_text(data: object) -> str:
    """The message of an error body of vLLM."""
    error = data.get("error", data) if isinstance(data, dict) else data
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def logprob_rows(choice: Mapping[str, Any]) -> list[dict[int, float]] | None:
    """Per token: id -> logprob, most likely first; the sampled token is always among them.

    Raises:
        BackendError: a logprob came back for another token than the one that was sampled.
    """
    found = choice["logprobs"]
    if found is None:
        return None
    rows = []
    tops = found.get("top_logprobs") or [None] * len(found["tokens"])
    tokens = zip(found["tokens"], found["token_logprobs"], tops, strict=True)
    for (token, logprob, top), token_id in zip(tokens, choice["token_ids"], strict=True):
        if _token_id(token) != token_id:
            raise errors.BackendError(f"token {token!r} came back for id {token_id}")
        row = {token_id: _number(logprob)}
        # A trainer asks for the sampled token's alone, thousands of times in a step.
        if top and (len(top) > 1 or token not in top):
            row = {_token_id(key): _number(value) for key, value in top.items()} | row
            row = dict(sorted(row.items(), key=lambda item: -item[1]))
        rows.append(row)
    return rows


def _token_id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
