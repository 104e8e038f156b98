"""JSON from strangers: one meaning per body, and a bound on what parsing it may cost."""

from __future__ import annotations

import json
import re
from typing import Any

from tink_rl import strict_json
from tink_rl.errors import BadRequest

MAX_DEPTH = 8
MAX_NODES = 1024
"""Keys, and lists or objects; a full request has about 400."""
MAX_STRINGS = 4096

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(body: bytes) -> Any:
    """The value of a JSON body.

    Raises:
        BadRequest: no UTF-8, no JSON, a duplicate key, NaN or Infinity, a lone surrogate, or deeper
            or with more parts than any request of this API.
    """
    _check_structure(body)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"the body is not UTF-8 (byte {error.start})", code="invalid_json"
        ) from error
    try:
        value = strict_json.loads(text)
    except strict_json.DuplicateKey as error:
        raise BadRequest(
            f"the key {error.key[:80]!r} comes twice in one object", code="invalid_json"
        ) from error
    except ValueError as error:
        raise BadRequest(
            f"the body is not JSON: {str(error)[:200]}", code="invalid_json"
        ) from error
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _check_structure(body: bytes) -> None:
    """Bounds on the parts, found without building them: a list of a million lists is 60 MB."""
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') > 2 * MAX_STRINGS:
        raise BadRequest(f"the body has more than {MAX_STRINGS} strings", code="invalid_json")
    skeleton = b"".join(unescaped.split(b'"')[::2])  # what stands outside strings
    brackets = skeleton.translate(None, _NO_BRACKETS)
    num_nodes = brackets.count(b"[") + brackets.count(b"{")
    if num_nodes > MAX_NODES or skeleton.count(b":") > MAX_NODES:
        raise BadRequest(
            f"the body has more than {MAX_NODES} keys, lists and objects", code="invalid_json"
        )
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    if brackets:
        raise BadRequest(
            f"the body is no JSON, or nested deeper than {MAX_DEPTH} levels", code="invalid_json"
        )


def _check_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(
            "a string holds half of a surrogate pair; send whole characters", code="invalid_json"
        ) from error
