"""The routes, as a Flask blueprint: an existing Flask worker takes them in one line.

app.register_blueprint(tink_rl.worker.app.blueprint())
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from flask import Blueprint, Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from tink_rl import errors
from tink_rl.errors import TinkError
from tink_rl.worker import answers, json_body, openapi, schemas
from tink_rl.worker.error_body import body_of, code_of, new_request_id, printable
from tink_rl.worker.metrics import CONTENT_TYPE
from tink_rl.worker.routes import ROUTES, Route
from tink_rl.worker.schemas import validate
from tink_rl.worker.service import WorkerService
from tink_rl.worker.work import Ticket

_LOG = logging.getLogger(__name__)
REPLAYED = "Tink-Replayed"
"""Header of a sampling answer: whether it is that of an earlier request with the same id."""
_DISCONNECTED = "waitress.client_disconnected"


def create_app(service: WorkerService) -> Flask:
    """A Flask app with these routes only, all of whose errors are our JSON."""
    app = Flask("tink_rl.worker", static_folder=None)
    app.url_map.merge_slashes = False  # a redirect would be an answer without a token
    app.register_blueprint(blueprint(service))
    app.register_error_handler(HTTPException, lambda error: _http_problem(error, service))
    app.register_error_handler(Exception, lambda error: _crash(error, service))
    return app


def blueprint(service: WorkerService | None = None) -> Blueprint:
    """The routes; without `service` over the backend that the environment names."""
    if service is None:
        from tink_rl.worker.build import service_from_environment

        service = service_from_environment()
    routes = Blueprint("tink_rl", __name__)
    for route in ROUTES:
        routes.add_url_rule(
            route.rule,
            endpoint=route.name,
            view_func=_guarded(service, route),
            methods=[route.method],
            provide_automatic_options=False,
        )
    return routes


def _guarded(service: WorkerService, route: Route) -> Callable[..., Response]:
    """The view behind its token check, with every outcome counted and in our form."""

    def view(**path: str) -> Response:
        g.request_id = new_request_id()
        try:
            headers = request.headers
            service.tokens.require(
                route.scope,
                headers.get("Authorization"),
                request.remote_addr,
                headers.get("Host"),
            )
            service.start()
            response = _VIEWS[route.name](service, **path)
        except TinkError as error:
            response = _problem(error, service)
        except HTTPException as error:
            response = _http_problem(error, service)
        except Exception as error:  # noqa: BLE001 - the client gets a code, the log the traceback
            response = _crash(error, service)
        service.metrics.answers.labels(route.name, str(response.status_code)).inc()
        return response

    return view


# -- views ----------------------------------------------------------------------------------------


def _sample(service: WorkerService) -> Response:
    asked = validate(schemas.SampleRequest, _json_body())
    is_gone = request.environ.get(_DISCONNECTED, lambda: False)
    ticket = service.sample(asked, g.request_id, is_gone)
    if ticket.is_joined:
        service.metrics.replays.inc()
    headers = {REPLAYED: "true" if ticket.is_joined else "false"}
    if asked.stream:
        return _streamed(service, ticket, headers)
    with ticket:
        ticket.result()
        return _json(_answer(service, ticket), headers=headers)


def _list_adapters(service: WorkerService) -> Response:
    found = [answers.adapter(entry) for entry in service.list_adapters()]
    return _json({"adapters": found})


def _register(service: WorkerService) -> Response:
    asked = validate(schemas.AdapterRequest, _json_body())
    return _json(answers.adapter(service.register(asked.adapter_id, asked.lora_path)))


def _unregister(service: WorkerService, adapter_id: str) -> Response:
    service.unregister(adapter_id)
    return _json({"adapter_id": adapter_id, "unregistered": True})


def _models(service: WorkerService) -> Response:
    return _json({"models": [vars(model) for model in service.models()]})


def _livez(service: WorkerService) -> Response:
    return _json({"status": "ok"})


def _readyz(service: WorkerService) -> Response:
    reason = service.not_ready_reason()
    if reason is not None:
        raise errors.NotReady(reason)
    return _json({"status": "ok"})


def _metrics(service: WorkerService) -> Response:
    return _secured(Response(service.metrics.render(), content_type=CONTENT_TYPE))


def _openapi(service: WorkerService) -> Response:
    return _json(openapi.document())


def _docs(service: WorkerService) -> Response:
    response = _secured(Response(openapi.page(), content_type="text/html; charset=utf-8"))
    response.headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'"
    return response


_VIEWS: dict[str, Callable[..., Response]] = {
    "sample": _sample,
    "models": _models,
    "list_adapters": _list_adapters,
    "register_adapter": _register,
    "unregister_adapter": _unregister,
    "livez": _livez,
    "readyz": _readyz,
    "metrics": _metrics,
    "openapi": _openapi,
    "docs": _docs,
}
"""By the name of the route."""


# -- requests -------------------------------------------------------------------------------------


def _json_body() -> Any:
    if request.mimetype != "application/json" or "Content-Encoding" in request.headers:
        raise errors.BadRequest(
            f"the body is {printable(request.content_type or 'of no type')!r}"
            f"{' with Content-Encoding' if 'Content-Encoding' in request.headers else ''}; send "
            "`Content-Type: application/json`, not compressed",
            code="unsupported_media_type",
        )
    request.max_content_length = schemas.MAX_BODY_BYTES
    value = json_body.parse(request.get_data(cache=False))
    given = value.get("request_id") if isinstance(value, dict) else None
    if isinstance(given, str) and re.fullmatch(schemas.REQUEST_ID, given):
        g.request_id = given  # from here on errors carry it
    return value


# -- answers --------------------------------------------------------------------------------------


def _answer(service: WorkerService, ticket: Ticket) -> dict[str, Any]:
    job = ticket.job
    assert job.completions is not None
    work = job.work
    answer = answers.sample_response(work.request_id, work.request.model_id, job.completions)
    service.metrics.tokens.inc(answer["usage"]["completion_tokens"] or 0)
    service.metrics.seconds.observe(job.ended - job.started)
    return answer


class _Events:
    """A body of server-sent events; gives up its ticket however it ends."""

    def __init__(self, service: WorkerService, ticket: Ticket) -> None:
        self._service, self._ticket = service, ticket
        self._deltas = ticket.deltas()
        self._first = next(self._deltas, None)

    def __iter__(self) -> Iterator[bytes]:
        try:
            if self._first is not None:
                yield _event("delta", vars(self._first))
            for delta in self._deltas:
                yield _event("delta", vars(delta))
            yield _event("done", _answer(self._service, self._ticket))
        except TinkError as error:
            self._service.metrics.errors.labels(error.code).inc()
            body = body_of(error.code, error.message, self._ticket.job.work.request_id)
            yield b"event: error\ndata: " + body + b"\n\n"
        finally:
            self.close()

    def close(self) -> None:
        self._ticket.leave()


def _streamed(service: WorkerService, ticket: Ticket, headers: dict[str, str]) -> Response:
    """Events, once the first is there: what fails before it fails with its HTTP status."""
    try:
        events = _Events(service, ticket)
    except BaseException:
        ticket.leave()
        raise
    response = Response(events, content_type="text/event-stream", headers=headers)
    response.headers["X-Accel-Buffering"] = "no"
    return _secured(response)


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {_dump(data)}\n\n".encode()


def _dump(data: dict[str, Any]) -> str:
    try:
        return json.dumps(data, allow_nan=False)
    except ValueError as error:
        raise errors.BackendError(
            "the backend answered with logprobs that are not finite; is the adapter sane?"
        ) from error


def _json(
    data: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return _secured(
        Response(_dump(data), status=status, headers=headers, content_type="application/json")
    )


def _secured(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _problem(error: TinkError, service: WorkerService) -> Response:
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(math.ceil(error.details.get("retry_after_s", 1)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _error(error.status, error.code, error.message, service, headers)


def _http_problem(error: HTTPException, service: WorkerService) -> Response:
    status = error.code or 500
    kept = {k: v for k, v in error.get_headers() if k.lower() == "allow"}
    message = error.description or error.name
    return _error(status, code_of(status), message, service, kept)


def _crash(error: Exception, service: WorkerService) -> Response:
    if isinstance(error, HTTPException):
        return _http_problem(error, service)
    _LOG.error("%s %s failed", request.method, printable(request.path), exc_info=error)
    text = f"internal error ({type(error).__name__}); the worker's log has more"
    return _error(500, "internal", text, service, {})


def _error(
    status: int, code: str, message: str, service: WorkerService, headers: dict[str, str]
) -> Response:
    service.metrics.errors.labels(code).inc()
    body = body_of(code, message, g.get("request_id") or new_request_id())
    return _secured(Response(body, status=status, headers=headers, content_type="application/json"))
