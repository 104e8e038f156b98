"""What may be asked, as pydantic models: the checks and the OpenAPI document."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tink_rl.errors import BadRequest, SamplingRefused
from tink_rl.transport.request_fields import MAX_INT, check_together
from tink_rl.transport.sampling_params import SamplingParams, within

MAX_BODY_BYTES = 8 * 2**20
MAX_PROMPTS = 64
MAX_N = 16
MAX_COMPLETIONS = 256
"""prompts x n of one request."""
MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_BIASES = 300
MAX_TIMEOUT_S = 3600.0
ADAPTER_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
MODEL_ID = r"^(/|\./)?\.?[A-Za-z0-9_][A-Za-z0-9._@:+=~/-]*$"
"""Also of a directory: vLLM serves a base under the path that it was started with."""
MAX_MODEL_ID_CHARS = 255
REQUEST_ID = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"

_M = TypeVar("_M", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# -- parts of a request ---------------------------------------------------------------------------


def _check_prompts(value: object) -> Any:
    """Prompts of one kind, none empty. By hand: pydantic would name every branch of the union."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PROMPTS:
        raise _problem(f"expected a list of 1 to {MAX_PROMPTS} prompts, got {_short(value)}")
    kind = type(value[0])
    for index, prompt in enumerate(value):
        if type(prompt) not in (str, list):
            raise _problem(f"[{index}]: expected text or a list of token ids, got {_short(prompt)}")
        if type(prompt) is not kind:
            raise _problem(f"[{index}]: text and token ids cannot be mixed in one request")
        if not prompt:
            raise _problem(f"[{index}]: is empty; expected at least one token")
        if kind is list:
            _check_ids(index, prompt)
    return value


def _check_ids(index: int, ids: list[Any]) -> None:
    if set(map(type, ids)) != {int}:
        bad = next(i for i in ids if type(i) is not int)
        raise _problem(f"[{index}]: token ids are integers, got {_short(bad)}")
    if min(ids) < 0 or max(ids) > MAX_INT:
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise _problem(f"[{index}]: token id {_short(bad)} is not in 0..{MAX_INT}")


def _as_tuple(value: object) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_texts(value: object) -> Any:
    return (value,) if isinstance(value, str) else _as_tuple(value)


def _parse_biases(value: object) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise _problem(f"expected an object of at most {MAX_BIASES} token ids, got {_short(value)}")
    biases = {}
    for key, bias in value.items():
        if not (len(key) <= 10 and key.isascii() and key.isdecimal() and int(key) <= MAX_INT):
            raise _problem(f"the key {_short(key)} is no token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:  # NaN fails this too
            raise _problem(f"the bias of token {key} is {_short(bias)}; expected -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def _no_top_k(value: int) -> int:
    return max(value, 0)


def _array(items: dict[str, Any], **bounds: int) -> dict[str, Any]:
    return {"type": "array", **bounds, "items": items}


_IDS = _array({"type": "integer", "minimum": 0, "maximum": MAX_INT}, minItems=1)
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
Prompts = Annotated[
    list[str] | list[list[int]],
    BeforeValidator(_check_prompts),
    WithJsonSchema(
        {
            "oneOf": [
                _array(items, minItems=1, maxItems=MAX_PROMPTS)
                for items in ({"type": "string", "minLength": 1}, _IDS)
            ],
            "description": "Texts, or lists of token ids; one kind per request.",
        }
    ),
]
Stops = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)], ...],
    BeforeValidator(_as_texts),
    Field(max_length=MAX_STOPS),
    WithJsonSchema({"anyOf": [_STOP, _array(_STOP, maxItems=MAX_STOPS)]}),
]
Biases = Annotated[
    dict[int, float] | None,
    BeforeValidator(_parse_biases),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "maxProperties": MAX_BIASES,
                    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                },
                {"type": "null"},
            ],
            "description": "Token id (as a string) -> what is added to its logit.",
        }
    ),
]
TokenIds = Annotated[
    tuple[Annotated[int, Field(ge=0, le=MAX_INT)], ...],
    BeforeValidator(_as_tuple),
    Field(max_length=64),
]


def _narrower(name: str, **bounds: float) -> Any:
    """A field of `SamplingParams` within `low` and `high`."""
    field = SamplingParams.model_fields[name]
    return within(name, field.default, description=field.description, **bounds)


class SamplingFields(SamplingParams):
    """How completions are sampled. Unknown fields are refused, never dropped."""

    top_k: Annotated[int, AfterValidator(_no_top_k)] = _narrower("top_k")
    n: int = _narrower("n", high=MAX_N)
    stop: Stops = ()
    stop_token_ids: TokenIds = ()
    seed: int | None = _narrower("seed", low=0, high=MAX_INT)
    repetition_penalty: float = _narrower("repetition_penalty", high=10)
    logprobs: int | None = _narrower("logprobs", high=20)
    logit_bias: Biases = None

    @model_validator(mode="after")
    def _check_together(self) -> SamplingFields:
        try:
            check_together(dict(self))
        except SamplingRefused as error:
            raise _problem(f".{error.message}") from error
        return self


class SampleRequest(_Strict):
    """`POST /api/v1/sample`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompts": ["Once upon a time"],
                    "model_id": "my_lora_adapter",
                    "sampling_params": {"max_tokens": 50, "temperature": 0.8, "top_p": 0.95},
                }
            ]
        }
    )
    prompts: Prompts
    model_id: str | None = Field(
        default=None,
        pattern=MODEL_ID,
        max_length=MAX_MODEL_ID_CHARS,
        description="A registered adapter, `id@N` for its version N, or another name that the "
        "server serves. Left out: the base model.",
    )
    sampling_params: SamplingFields = SamplingFields()
    request_id: str | None = Field(
        default=None,
        pattern=REQUEST_ID,
        description="Makes a retry idempotent: it joins the running request or gets its answer again.",
    )
    stream: bool = Field(default=False, description="Answer as server-sent events.")
    timeout_s: float | None = Field(
        default=None, gt=0, le=MAX_TIMEOUT_S, description="Deadline, seconds."
    )

    @model_validator(mode="after")
    def _check_together(self) -> SampleRequest:
        total = len(self.prompts) * self.sampling_params.n
        if total > MAX_COMPLETIONS:
            raise _problem(
                f"sampling_params.n={self.sampling_params.n} x {len(self.prompts)} prompts are "
                f"{total} completions; at most {MAX_COMPLETIONS} fit into one request"
            )
        return self

    def fingerprint(self) -> str:
        """Equal for bodies that ask for the same."""
        asked = self.model_dump(exclude={"request_id"})
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class AdapterRequest(_Strict):
    """`POST /api/v1/adapters`."""

    adapter_id: str = Field(pattern=ADAPTER_ID)
    lora_path: str = Field(
        min_length=1, max_length=4096, description="PEFT directory on the worker's machine."
    )


# -- between JSON and records ---------------------------------------------------------------------


def validate(model: type[_M], value: object) -> _M:
    """`value` as a `model`.

    Raises:
        BadRequest: names the first parameter that is wrong, what was given and what is allowed.
    """
    if not isinstance(value, dict):
        raise BadRequest(f"the body is {_short(value)}; expected a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise BadRequest(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown parameter {_short(name)}; it is refused, not dropped"
    if first["type"] == "missing":
        return f"{name} is missing"
    if first["type"] == _CUSTOM:
        return (
            f"{name}{'' if first['msg'].startswith(('.', '[')) or not name else ': '}{first['msg']}"
        )
    message = first["msg"]  # only its first letter: it may show a pattern
    return f"{name}={_short(first['input'])}: {message[:1].lower()}{message[1:]}"


_CUSTOM = "tink"


def _problem(text: str) -> PydanticCustomError:
    # braces would be taken for placeholders
    return PydanticCustomError(_CUSTOM, "{text}", {"text": text})


def _short(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    if isinstance(value, str):
        value = value[:100]
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
