"""The OpenAPI document, from the models that check requests, and a page that shows it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tink_rl import __version__
from tink_rl.worker import schemas
from tink_rl.worker.auth import Scope

if TYPE_CHECKING:
    from tink_rl.worker.app import Route

_REF = "#/components/schemas/{model}"


@dataclass(frozen=True, kw_only=True)
class _Text:
    """What a route does, takes and gives."""

    summary: str
    answer: type[BaseModel] | str
    """A model, or the content type of an answer that is no JSON."""
    body: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()


_ANY_ERRORS = (400, 408, 413, 431, 500, 501)
"""What HTTP itself, or a crash, answers on any route."""
_TEXTS = {
    "sample": _Text(
        summary="Sample completions from the base model or an adapter.",
        answer=schemas.SampleResponse,
        body=schemas.SampleRequest,
        errors=(404, 409, 415, 429, 499, 502, 503, 504),
    ),
    "models": _Text(
        summary="Every name that can be sampled, the base first.",
        answer=schemas.ModelList,
        errors=(429, 502, 503, 504),
    ),
    "list_adapters": _Text(
        summary="All registered adapters.", answer=schemas.AdapterList, errors=(502, 503)
    ),
    "register_adapter": _Text(
        summary="Register a PEFT directory under an id; other bytes under a known id are a new version.",
        answer=schemas.AdapterOut,
        body=schemas.AdapterRequest,
        errors=(404, 409, 415, 422, 429, 502, 503, 504, 507),
    ),
    "unregister_adapter": _Text(
        summary="Forget an adapter; requests under way finish on it.",
        answer=schemas.AdapterGone,
        errors=(404, 409, 422, 429, 502, 503, 504, 507),
    ),
    "livez": _Text(summary="The process answers.", answer=schemas.Health),
    "readyz": _Text(
        summary="The backend sampled a token in the last 10 seconds.",
        answer=schemas.Health,
        errors=(503,),
    ),
    "metrics": _Text(summary="Figures for Prometheus.", answer="text/plain"),
    "openapi": _Text(summary="This document.", answer="application/json"),
    "docs": _Text(summary="This document, as a page.", answer="text/html"),
}
_EVENT = {
    "type": "object",
    "description": "With `stream`, each event: `delta`s, then `done` with the whole answer, or `error`.",
    "properties": {
        "event": {"enum": ["delta", "done", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}
_MODELS: tuple[type[BaseModel], ...] = (
    schemas.SampleRequest,
    schemas.SampleResponse,
    schemas.AdapterRequest,
    schemas.AdapterOut,
    schemas.AdapterList,
    schemas.AdapterGone,
    schemas.ModelList,
    schemas.Health,
    schemas.ErrorResponse,
)


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    _, defined = models_json_schema([(m, "validation") for m in _MODELS], ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = route.rule.replace("<", "{").replace(">", "}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tink worker", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": defined["$defs"],
            "securitySchemes": {
                "sampleToken": {"type": "http", "scheme": "bearer"},
                "adminToken": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    text = _TEXTS[route.name]
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": text.summary,
        "responses": _responses(route, text),
        "security": {
            Scope.OPEN: [],
            Scope.SAMPLE: [{}, {"sampleToken": []}, {"adminToken": []}],
            Scope.ADMIN: [{"adminToken": []}],
        }[route.scope],
    }
    if text.body is not None:
        content = {"application/json": {"schema": _ref(text.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    if "<adapter_id>" in route.rule:
        schema = {"type": "string", "pattern": schemas.ADAPTER_ID}
        operation["parameters"] = [
            {"name": "adapter_id", "in": "path", "required": True, "schema": schema}
        ]
    return operation


def _responses(route: Route, text: _Text) -> dict[str, Any]:
    if isinstance(text.answer, str):
        content: dict[str, Any] = {text.answer: {}}
    else:
        content = {"application/json": {"schema": _ref(text.answer)}}
    if route.name == "sample":
        content["text/event-stream"] = {"schema": _EVENT}
    responses = {"200": {"description": "Success.", "content": content}}
    for status in statuses(route):
        responses[str(status)] = {
            "description": "See `error.code`.",
            "content": {"application/json": {"schema": _ref(schemas.ErrorResponse)}},
        }
    return responses


def statuses(route: Route) -> list[int]:
    """Every status other than 200 that `route` can answer."""
    auth = {Scope.OPEN: (), Scope.SAMPLE: (401,), Scope.ADMIN: (401, 403)}[route.scope]
    return sorted({*_ANY_ERRORS, *auth, *_TEXTS[route.name].errors})


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


# -- the page -------------------------------------------------------------------------------------

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{font:14px/1.4 monospace}pre{background:#f4f4f4;padding:.7rem;overflow:auto}"
    "h2{border-top:1px solid #ccc;padding-top:1rem}b{display:inline-block;min-width:5rem}"
)
_SCOPES = {
    Scope.OPEN: "no token",
    Scope.SAMPLE: "sample token; if none is set, a client on this machine",
    Scope.ADMIN: "admin token",
}


def page(routes: Sequence[Route]) -> str:
    """HTML that loads nothing from anywhere."""
    described = document(routes)
    parts = [f"<h1>Tink worker {html.escape(__version__)}</h1>"]
    parts.append("<p>The same as <a href='openapi.json'>openapi.json</a>.</p>")
    for route in routes:
        text = _TEXTS[route.name]
        parts.append(f"<h2><b>{route.method}</b> <code>{html.escape(route.rule)}</code></h2>")
        parts.append(f"<p>{html.escape(text.summary)} Needs: {_SCOPES[route.scope]}.</p>")
        if text.body is not None:
            parts.append(f"<p>Body: {_link(text.body.__name__)}</p>")
        if not isinstance(text.answer, str):
            parts.append(f"<p>Answer: {_link(text.answer.__name__)}</p>")
        codes = ", ".join(map(str, statuses(route)))
        parts.append(f"<p>Errors: {codes}; their body is {_link('ErrorResponse')}.</p>")
    for name, schema in described["components"]["schemas"].items():
        shown = html.escape(json.dumps(schema, indent=1))
        parts.append(f"<h2 id='{name}'>{name}</h2><pre>{shown}</pre>")
    head = f"<!doctype html><meta charset='utf-8'><title>Tink worker</title><style>{_STYLE}</style>"
    return head + "\n".join(parts)


def _link(name: str) -> str:
    return f"<a href='#{name}'>{name}</a>"
