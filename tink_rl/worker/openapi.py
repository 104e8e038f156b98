"""The OpenAPI document, from the routes and the models that check requests, and a page that shows it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tink_rl import __version__
from tink_rl.worker import schemas
from tink_rl.worker.answers import ErrorResponse
from tink_rl.worker.auth import Scope
from tink_rl.worker.routes import ROUTES, Route

_REF = "#/components/schemas/{model}"
_PAGE = Path(__file__).with_name("openapi.html.j2")
_NEEDS = {
    Scope.OPEN: "no token",
    Scope.SAMPLE: "sample token; if none is set, a client on this machine",
    Scope.ADMIN: "admin token",
}
_SECURITY: dict[Scope, list[dict[str, list[str]]]] = {
    Scope.OPEN: [],
    Scope.SAMPLE: [{}, {"sampleToken": []}, {"adminToken": []}],
    Scope.ADMIN: [{"adminToken": []}],
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


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tink worker", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "sampleToken": {"type": "http", "scheme": "bearer"},
                "adminToken": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def page() -> str:
    """HTML that loads nothing from anywhere."""
    template = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE.read_text())
    shown = {name: json.dumps(schema, indent=1) for name, schema in _schemas().items()}
    return template.render(version=__version__, routes=ROUTES, needs=_NEEDS, schemas=shown)


@cache
def _schemas() -> dict[str, Any]:
    modes: dict[type[BaseModel], Literal["validation", "serialization"]] = {}
    for route in ROUTES:
        if route.body is not None:
            modes[route.body] = "validation"
        if not isinstance(route.answer, str):
            modes[route.answer] = "serialization"
    modes[ErrorResponse] = "serialization"
    defined: dict[str, Any] = models_json_schema(list(modes.items()), ref_template=_REF)[1]["$defs"]
    return defined


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "responses": _responses(route),
        "security": _SECURITY[route.scope],
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": _json(route.body)}
    if "{adapter_id}" in route.path:
        schema = {"type": "string", "pattern": schemas.ADAPTER_ID}
        operation["parameters"] = [
            {"name": "adapter_id", "in": "path", "required": True, "schema": schema}
        ]
    return operation


def _responses(route: Route) -> dict[str, Any]:
    content = {route.answer: {}} if isinstance(route.answer, str) else _json(route.answer)
    if route.name == "sample":
        content["text/event-stream"] = {"schema": _EVENT}
    responses = {"200": {"description": "Success.", "content": content}}
    for status in route.statuses():
        responses[str(status)] = {
            "description": "See `error.code`.",
            "content": _json(ErrorResponse),
        }
    return responses


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}
