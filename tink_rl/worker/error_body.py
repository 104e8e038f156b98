"""The one form of every error on the wire: `{"error": {"code", "message", "request_id"}}`."""

from __future__ import annotations

import json
import random
import re

_CODES = {
    400: "bad_request",
    401: "bad_token",
    403: "wrong_scope",
    404: "not_found",
    405: "method_not_allowed",
    408: "client_too_slow",
    413: "body_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
    501: "not_implemented",
}
_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")


def code_of(status: int) -> str:
    """The code of an error that HTTP itself, not a route, raised."""
    return _CODES.get(status, "internal" if status >= 500 else "bad_request")


def body_of(code: str, message: str, request_id: str) -> bytes:
    """The JSON body."""
    error = {"code": code, "message": message, "request_id": request_id}
    return json.dumps({"error": error}).encode()


def new_request_id() -> str:
    """An id for a request that came without one. No secret: only an id that a client gave can be joined."""
    return f"req-{random.getrandbits(64):016x}"


def printable(text: str) -> str:
    """`text` as it may stand in a log line."""
    return _NOT_PRINTABLE.sub("", text)[:128]
