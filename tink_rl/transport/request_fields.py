"""The fields of a sampling request, by vLLM's names: which are taken, and what each of them changes.

One table for everybody who asks: the trainer's arguments, `VLLMClient`, the sampling backend and the worker.
A field that is not in it is never sent, because vLLM 0.31 ignores what it does not know, without a word.
`tests/unit/test_vllm_contract.py` compares it with vLLM's own request classes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tink_rl.errors import SamplingRefused
from tink_rl.types import FULL_LOGPROBS, IDS_ONLY

MAX_INT = 2**31 - 1
Shown = Callable[[str], str]
"""How the name of a field is written in an error: where its user has set it."""


class Effect(StrEnum):
    """What a field of a request changes."""

    PLAIN = "plain"
    """When a completion ends, how it is seeded, how it is written: its tokens are drawn as always."""
    DISTRIBUTION = "distribution"
    """From what the tokens are drawn: no longer softmax(logits / temperature) of the model."""
    SHAPE = "shape"
    """What comes back, or what it is an answer to: no caller here could read it rightly."""
    OURS = "ours"
    """Set by the client itself: which version answers, from which prompt, under which salt."""
    NEVER = "never"
    """Reaches the engine unchecked, or stops it."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field.

    Example: `Field(kind="whole", low=-1, effect=Effect.DISTRIBUTION, off=(0, -1))`
    """

    effect: Effect = Effect.PLAIN
    kind: str = "any"
    """A key of `_WANTED`."""
    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False
    """Whether `low` itself is refused."""
    off: tuple[Any, ...] = ()
    """Values that do what leaving it out does."""
    why: str = ""
    """Why it is refused and what to do instead."""


def _refused(effect: Effect, why: str, *off: Any) -> Field:
    return Field(effect=effect, why=why, off=off)


_DIST = Effect.DISTRIBUTION
_STREAM = "answers come whole; leave it out"
_PROMPT_CUT = "what is cut off would be trained on, but not sampled from; shorten the prompts"
_UNCHECKED = "it reaches the engine unchecked; leave it out"
_TEMPLATE = (
    "vLLM 0.31 can be stopped by a template, so it is never sent to a server; apply it in the trainer "
    "(chat_template_kwargs of its arguments) and send token ids"
)
_ROWS = "it changes what comes back for each token; set logprobs=K for the K most likely ones"

FIELDS: dict[str, Field] = {
    "max_tokens": Field(kind="whole", low=1, high=MAX_INT),
    "temperature": Field(kind="number", low=0, high=2),
    "n": Field(kind="whole", low=1, high=MAX_INT),
    "seed": Field(kind="whole", low=-(2**63), high=2**63 - 1),
    "logprobs": Field(kind="whole", low=0, high=MAX_INT),
    "prompt_logprobs": Field(kind="whole", low=-1, high=MAX_INT),
    "stop": Field(kind="texts"),
    "stop_token_ids": Field(kind="ids"),
    "include_stop_str_in_output": Field(kind="flag"),
    "ignore_eos": Field(kind="flag"),
    "skip_special_tokens": Field(kind="flag"),
    "spaces_between_special_tokens": Field(kind="flag"),
    "add_special_tokens": Field(kind="flag"),
    "repetition_detection": Field(kind="object"),
    "watermarking": Field(kind="flag"),
    "priority": Field(kind="whole", low=-(2**63), high=2**63 - 1),
    "user": Field(kind="text"),
    "session_id": Field(kind="text"),
    # -- from what is drawn ---------------------------------------------------------------------------
    "top_p": Field(effect=_DIST, kind="number", low=0, above_low=True, high=1, off=(1,)),
    "top_k": Field(effect=_DIST, kind="whole", low=-1, high=MAX_INT, off=(0, -1)),
    "min_p": Field(effect=_DIST, kind="number", low=0, high=1, off=(0,)),
    "repetition_penalty": Field(
        effect=_DIST, kind="number", low=0, above_low=True, high=1e4, off=(1,)
    ),
    "presence_penalty": Field(effect=_DIST, kind="number", low=-2, high=2, off=(0,)),
    "frequency_penalty": Field(effect=_DIST, kind="number", low=-2, high=2, off=(0,)),
    "min_tokens": Field(effect=_DIST, kind="whole", low=0, high=MAX_INT, off=(0,)),
    "logit_bias": Field(effect=_DIST, kind="biases", off=({},)),
    "bad_words": Field(effect=_DIST, kind="list of texts", off=([],)),
    "allowed_token_ids": Field(effect=_DIST, kind="some ids"),
    "structured_outputs": Field(effect=_DIST, kind="grammar", off=({},)),
    "response_format": Field(effect=_DIST, kind="object", off=({"type": "text"},)),
    "thinking_token_budget": Field(effect=_DIST, kind="whole", low=-1, high=MAX_INT, off=(-1,)),
    # -- what comes back ------------------------------------------------------------------------------
    "echo": _refused(
        Effect.SHAPE, "the prompt would come back as if it had been sampled; leave it out", False
    ),
    "stream": _refused(Effect.SHAPE, _STREAM, False),
    "stream_options": _refused(Effect.SHAPE, _STREAM),
    "stream_interval": _refused(Effect.SHAPE, _STREAM),
    "use_beam_search": _refused(
        Effect.SHAPE, "beams are no samples; set n (num_generations) for more of them", False
    ),
    "length_penalty": _refused(
        Effect.SHAPE,
        "it weighs beams, and nothing else in vLLM; score lengths in the reward instead",
        1,
    ),
    "suffix": _refused(
        Effect.SHAPE, "what follows the completion is no part of the policy's input; leave it out"
    ),
    "truncate_prompt_tokens": _refused(Effect.SHAPE, _PROMPT_CUT, -1),
    "truncation_side": _refused(Effect.SHAPE, _PROMPT_CUT),
    "prompt_embeds": _refused(Effect.SHAPE, "prompts are token ids or texts here; send those"),
    "logprob_token_ids": _refused(Effect.SHAPE, _ROWS, []),
    "return_token_offsets": _refused(
        Effect.SHAPE, "vLLM has them for /render only; leave it out", False
    ),
    "routed_experts_prompt_start": _refused(
        Effect.SHAPE, "routed experts are not read here; leave it out", 0
    ),
    # -- set by the client ----------------------------------------------------------------------------
    "model": _refused(Effect.OURS, "the version that is current is asked; use model= of the call"),
    "prompt": _refused(Effect.OURS, "the prompts of the call are sent"),
    "return_token_ids": _refused(Effect.OURS, "token ids always come back; leave it out", True),
    "return_tokens_as_token_ids": _refused(
        Effect.OURS, "logprobs are always by token id; leave it out", True
    ),
    "cache_salt": _refused(
        Effect.OURS, "it keeps one version's cached prefixes from another's answers; leave it out"
    ),
    "request_id": _refused(
        Effect.OURS, "one id for several requests ends all but one; leave it out"
    ),
    # -- never sent -----------------------------------------------------------------------------------
    # But for what the client asks of our own plugin.
    "vllm_xargs": _refused(
        Effect.NEVER,
        _UNCHECKED,
        {FULL_LOGPROBS: 1},
        {IDS_ONLY: 1},
        {FULL_LOGPROBS: 1, IDS_ONLY: 1},
    ),
    "kv_transfer_params": _refused(Effect.NEVER, _UNCHECKED),
    "ec_transfer_params": _refused(Effect.NEVER, _UNCHECKED),
}
"""What `POST /v1/completions` takes."""

CHAT_FIELDS: dict[str, Field] = {
    **{k: v for k, v in FIELDS.items() if k not in ("prompt", "suffix", "prompt_embeds")},
    "logprobs": Field(kind="flag"),
    "top_logprobs": Field(kind="whole", low=-1, high=MAX_INT),
    "max_completion_tokens": _refused(Effect.OURS, "set max_tokens"),
    "messages": _refused(Effect.OURS, "the messages of the call are sent"),
    "tools": _refused(Effect.OURS, "use tools= of the call"),
    "tool_choice": Field(effect=_DIST, off=("none", "auto")),
    "parallel_tool_calls": Field(kind="flag"),
    "reasoning_effort": Field(kind="text"),
    "include_reasoning": Field(kind="flag"),
    "add_generation_prompt": Field(kind="flag"),
    "continue_final_message": Field(kind="flag"),
    "documents": Field(kind="any"),
    "return_prompt_text": _refused(Effect.SHAPE, "the prompt comes back as token ids", False),
    "media_io_kwargs": _refused(Effect.NEVER, "this client sends text only; leave it out"),
    "mm_processor_kwargs": _refused(Effect.NEVER, "this client sends text only; leave it out"),
    "chat_template": _refused(Effect.NEVER, _TEMPLATE),
    "chat_template_kwargs": _refused(Effect.NEVER, _TEMPLATE),
}
"""What `POST /v1/chat/completions` takes."""

GRAMMAR = (
    *("json", "regex", "choice", "grammar", "json_object", "structural_tag", "whitespace_pattern"),
    *("disable_any_whitespace", "disable_additional_properties"),
)
"""What `structured_outputs` takes; vLLM ignores other keys without a word."""

_BEAMS = "no counterpart: vLLM samples here, without beams"
_BIAS = "vLLM's name is logit_bias={id: -100}"
_NONE = "vLLM has no counterpart; leave it out"
ELSEWHERE: dict[str, str] = {
    "max_new_tokens": "that is transformers' name; vLLM's is max_tokens (of a trainer: "
    "max_completion_length)",
    "max_length": "that is transformers' name; vLLM's is max_tokens, which counts the completion only",
    "min_new_tokens": "that is transformers' name; vLLM's is min_tokens",
    "min_length": "that is transformers' name; vLLM's is min_tokens, which counts the completion only",
    "do_sample": "that is transformers' name; vLLM always samples, and temperature=0 is greedy",
    "num_return_sequences": "that is transformers' name; vLLM's is n (of a trainer: num_generations)",
    "eos_token_id": "that is transformers' name; vLLM's is stop_token_ids=[...], beside the model's own end",
    "stop_strings": "that is transformers' name; vLLM's is stop=[...]",
    "stopping_criteria": "that is transformers' name; vLLM has stop=[...] and stop_token_ids=[...]",
    "num_beams": _BEAMS,
    "num_beam_groups": _BEAMS,
    "diversity_penalty": _BEAMS,
    "early_stopping": _BEAMS,
    "no_repeat_ngram_size": "no counterpart in vLLM; repetition_penalty or repetition_detection come nearest",
    "bad_words_ids": f"that is transformers' name; {_BIAS}, or bad_words=[text, ...]",
    "suppress_tokens": f"that is transformers' name; {_BIAS}",
    "sequence_bias": "that is transformers' name; vLLM's is logit_bias={id: bias}, of single tokens",
    "logits_processor": _NONE,
    "logits_processors": "a request of vLLM holds none; start the server with --logits-processors",
    "generation_config": "give its fields one by one, under vLLM's names",
    "best_of": "vLLM has it no more; set n (of a trainer: num_generations)",
    "guided_decoding": "vLLM's name is structured_outputs={...}",
    "guided_json": "vLLM's name is structured_outputs={'json': ...}",
    "guided_regex": "vLLM's name is structured_outputs={'regex': ...}",
    "guided_choice": "vLLM's name is structured_outputs={'choice': [...]}",
    "guided_grammar": "vLLM's name is structured_outputs={'grammar': ...}",
    "detokenize": "texts always come back; leave it out",
    "output_kind": _STREAM,
    "extra_args": _UNCHECKED,
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    **dict.fromkeys(
        (
            *("pad_token_id", "bos_token_id", "decoder_start_token_id", "use_cache", "max_time"),
            *("cache_implementation", "disable_compile", "return_dict_in_generate", "typical_p"),
            *("output_scores", "output_logits", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"),
            *("forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "top_h"),
            *("force_words_ids", "guidance_scale", "encoder_repetition_penalty", "synced_gpus"),
            *("renormalize_logits", "exponential_decay_length_penalty", "watermarking_config"),
        ),
        _NONE,
    ),
}
"""Names of transformers and of older releases of vLLM: what stands for them."""


# -- what is said about a request ---------------------------------------------------------------------


def distribution_changes(request: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields by which `request`, as it is sent, samples from something else than its temperature says.

    With none, tokens are drawn from softmax(logits / temperature), and the logprobs that come back are
    its logarithms. A field at the value that does nothing (`top_p=1.0`, `logit_bias={}`) is not among them.
    """
    return tuple(
        name
        for name, value in request.items()
        if (field := CHAT_FIELDS.get(name)) is not None
        and field.effect is Effect.DISTRIBUTION
        and not _is_off(field, value)
    )


def _is_off(field: Field, value: object) -> bool:
    if isinstance(value, Mapping):  # as vLLM reads {"regex": None}, and a bias of nothing
        value = {k: v for k, v in value.items() if v not in (None, 0)}
    if isinstance(value, tuple):
        value = list(value)
    return value is None or value in field.off


def says_nothing(name: str, value: object) -> bool:
    """Whether a field is better left out: vLLM refuses structured outputs that constrain nothing."""
    return name == "structured_outputs" and _is_off(FIELDS[name], value)


def check_fields(
    given: Mapping[str, Any],
    *,
    chat: bool = False,
    ours: bool = False,
    shown: Shown = str,
) -> None:
    """Check names and values of `given`; a value of None is as if the field were left out.

    Args:
        given: Fields of a request, by name.
        chat: For `/v1/chat/completions`.
        ours: Whether what the client itself sets may be among them.
        shown: How a name is written in an error.

    Raises:
        SamplingRefused: names the field, the value, and what to do instead.
    """
    fields = CHAT_FIELDS if chat else FIELDS
    for name, value in given.items():
        if value is None:
            continue
        field = fields.get(name)
        if field is None:
            raise SamplingRefused(f"{shown(name)}={_short(value)}: {_unknown(name, fields)}")
        allowed = (Effect.PLAIN, Effect.DISTRIBUTION, *((Effect.OURS,) if ours else ()))
        if field.effect not in allowed and not _is_off(field, value):
            raise SamplingRefused(f"{shown(name)}={_short(value)} is refused: {field.why}")
        if field.effect in (Effect.PLAIN, Effect.DISTRIBUTION):
            _check_value(shown(name), field, value)
    check_together(given, shown)


def _unknown(name: str, fields: Iterable[str]) -> str:
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    near = difflib.get_close_matches(str(name), list(fields), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "vLLM would ignore it without a word"
    return f"vLLM's requests have no field {name!r}; {hint}"


def _check_value(shown: str, field: Field, value: object) -> None:
    expected = _WANTED[field.kind]
    if field.kind in ("whole", "number"):
        start = f"above {field.low:g} and up" if field.above_low else f"from {field.low:g}"
        expected = f"{expected} {start} to {field.high:g}"
    if not _FITS[field.kind](field, value):
        raise SamplingRefused(f"{shown}={_short(value)}: expected {expected}")


def check_together(given: Mapping[str, Any], shown: Shown = str) -> None:
    """Raise `SamplingRefused` for fields that contradict each other, each of which is allowed alone."""
    low, high = given.get("min_tokens") or 0, given.get("max_tokens")
    if high is not None and low > high:
        raise SamplingRefused(f"{shown('min_tokens')}={low} exceeds max_tokens={high}")
    if given.get("temperature") == 0 and (given.get("n") or 1) > 1:
        raise SamplingRefused(
            f"n={given['n']} with temperature=0: greedy completions are all the same; set n=1"
        )


_WANTED = {
    "whole": "a whole number",
    "number": "a number",
    "flag": "True or False",
    "text": "text",
    "texts": "text, or a list of texts, none of them empty",
    "list of texts": "a list of texts, none of them empty",
    "ids": "a list of token ids",
    "some ids": "a list of token ids, not an empty one",
    "biases": "{token id: a number from -100 to 100}",
    "object": "a dict",
    "grammar": f"a dict of some of {', '.join(GRAMMAR)}",
    "any": "a value",
}


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # NaN fails this too


def _is_within(field: Field, value: object) -> bool:
    return _is_number(value, field.low, field.high) and not (field.above_low and value == field.low)


def _are_texts(value: object) -> bool:
    listed = [value] if isinstance(value, str) else value
    return isinstance(listed, (list, tuple)) and all(isinstance(t, str) and t for t in listed)


_FITS: dict[str, Callable[[Field, Any], bool]] = {
    "whole": lambda field, v: type(v) is int and field.low <= v <= field.high,
    "number": _is_within,
    "flag": lambda field, v: isinstance(v, bool),
    "text": lambda field, v: isinstance(v, str),
    "texts": lambda field, v: _are_texts(v),
    "list of texts": lambda field, v: not isinstance(v, str) and _are_texts(v),
    "ids": lambda field, v: isinstance(v, (list, tuple)),
    "some ids": lambda field, v: isinstance(v, (list, tuple)) and len(v) > 0,
    "biases": lambda field, v: (
        isinstance(v, Mapping) and all(_is_number(b, -100, 100) for b in v.values())
    ),
    "object": lambda field, v: isinstance(v, Mapping),
    "grammar": lambda field, v: isinstance(v, Mapping) and set(v) <= set(GRAMMAR),
    "any": lambda field, v: True,
}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
