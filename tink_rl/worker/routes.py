"""The routes of the worker, one record each: what it needs, takes, answers and refuses with."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from tink_rl.worker import answers, schemas
from tink_rl.worker.auth import Scope

_ANY_ERRORS = (400, 408, 413, 431, 500, 501)
"""What HTTP itself, or a crash, answers on any route."""
_TOKEN_ERRORS = {Scope.OPEN: (), Scope.SAMPLE: (401,), Scope.ADMIN: (401, 403)}


@dataclass(frozen=True, kw_only=True)
class Route:
    """One route.

    Example: `Route(name="livez", method="GET", rule="/livez", scope=Scope.OPEN,
    summary="The process answers.", answer=answers.Health)`
    """

    name: str
    method: str
    rule: str
    scope: Scope
    summary: str
    answer: type[BaseModel] | str
    """A model, or the content type of an answer that is not one."""
    body: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    """Statuses of its own, beside those of HTTP and of the token."""

    @property
    def path(self) -> str:
        """The rule as OpenAPI writes it: `/api/v1/adapters/{adapter_id}`."""
        return self.rule.replace("<", "{").replace(">", "}")

    def statuses(self) -> list[int]:
        """Every status other than 200 that it can answer."""
        return sorted({*_ANY_ERRORS, *_TOKEN_ERRORS[self.scope], *self.errors})


ROUTES = (
    Route(
        name="sample",
        method="POST",
        rule="/api/v1/sample",
        scope=Scope.SAMPLE,
        summary="Sample completions from the base model or an adapter.",
        body=schemas.SampleRequest,
        answer=answers.SampleResponse,
        errors=(404, 409, 415, 429, 499, 502, 503, 504),
    ),
    Route(
        name="models",
        method="GET",
        rule="/api/v1/models",
        scope=Scope.SAMPLE,
        summary="Every name that can be sampled, the base first.",
        answer=answers.ModelList,
        errors=(429, 502, 503, 504),
    ),
    Route(
        name="list_adapters",
        method="GET",
        rule="/api/v1/adapters",
        scope=Scope.SAMPLE,
        summary="All registered adapters.",
        answer=answers.AdapterList,
        errors=(502, 503),
    ),
    Route(
        name="register_adapter",
        method="POST",
        rule="/api/v1/adapters",
        scope=Scope.ADMIN,
        summary="Register a PEFT directory under an id; other bytes under a known id are a new version.",
        body=schemas.AdapterRequest,
        answer=answers.AdapterOut,
        errors=(404, 409, 415, 422, 429, 502, 503, 504, 507),
    ),
    Route(
        name="unregister_adapter",
        method="DELETE",
        rule="/api/v1/adapters/<adapter_id>",
        scope=Scope.ADMIN,
        summary="Forget an adapter; requests under way finish on it.",
        answer=answers.AdapterGone,
        errors=(404, 409, 422, 429, 502, 503, 504, 507),
    ),
    Route(
        name="livez",
        method="GET",
        rule="/livez",
        scope=Scope.OPEN,
        summary="The process answers.",
        answer=answers.Health,
    ),
    Route(
        name="readyz",
        method="GET",
        rule="/readyz",
        scope=Scope.OPEN,
        summary="The backend sampled a token in the last 10 seconds.",
        answer=answers.Health,
        errors=(503,),
    ),
    Route(
        name="metrics",
        method="GET",
        rule="/metrics",
        scope=Scope.ADMIN,
        summary="Figures for Prometheus.",
        answer="text/plain",
    ),
    Route(
        name="openapi",
        method="GET",
        rule="/openapi.json",
        scope=Scope.SAMPLE,
        summary="This document.",
        answer="application/json",
    ),
    Route(
        name="docs",
        method="GET",
        rule="/docs",
        scope=Scope.SAMPLE,
        summary="This document, as a page.",
        answer="text/html",
    ),
)
