"""What is answered: models for the OpenAPI document, and the JSON of each without a detour through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from tink_rl.types import Completion
from tink_rl.worker.backends import ModelInfo


class Usage(BaseModel):
    """Tokens of one request, where the backend says them."""

    prompt_tokens: int | None
    completion_tokens: int | None


class SampleResponse(BaseModel):
    """Completions, prompt-major: `len(prompts) * n`."""

    request_id: str
    model_id: str | None
    completions: list[Completion]
    usage: Usage


class AdapterOut(BaseModel):
    """A registered adapter."""

    adapter_id: str
    lora_path: str
    version: int | None
    digest: str | None


class AdapterList(BaseModel):
    """`GET /api/v1/adapters`."""

    adapters: list[AdapterOut]


class AdapterGone(BaseModel):
    """`DELETE /api/v1/adapters/{adapter_id}`."""

    adapter_id: str
    unregistered: Literal[True]


class ModelList(BaseModel):
    """`GET /api/v1/models`."""

    models: list[ModelInfo]


class Health(BaseModel):
    """`GET /livez` and `/readyz`."""

    status: Literal["ok"]


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str
    message: str
    request_id: str


class ErrorResponse(BaseModel):
    """Every answer that is not a success."""

    error: ErrorBody


def adapter(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of `AdapterOut`, of an entry of `Adapters.list`."""
    return {name: entry.get(name) for name in AdapterOut.model_fields}


def sample_response(
    request_id: str, model_id: str | None, completions: Sequence[Completion]
) -> dict[str, Any]:
    """The JSON of `SampleResponse`."""
    tokens = [c.token_ids for c in completions]
    prompts = {c.prompt_index: c.prompt_token_ids for c in completions}.values()
    return {
        "request_id": request_id,
        "model_id": model_id,
        "completions": [vars(completion) for completion in completions],
        "usage": {"prompt_tokens": _total(prompts), "completion_tokens": _total(tokens)},
    }


def _total(lists: Iterable[list[int] | None]) -> int | None:
    total = 0
    for ids in lists:
        if ids is None:
            return None
        total += len(ids)
    return total
