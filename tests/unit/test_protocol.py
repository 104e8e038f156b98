"""Every message of `/tink/v1`: which field is wrong is said, and what is ours to mend is a 500."""

from __future__ import annotations

import copy
import json

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tink_rl import errors, protocol
from tink_rl.server import routes
from tink_rl.types import PROTOCOL_VERSION

TOKEN = "t" * 20
LEASE = {"policy": "p", "epoch": 3}
SEGMENT = {"pid": 1, "handle": 2, "nonce": "0" * 64, "num_bytes": 64}
HEADER = {
    "protocol": PROTOCOL_VERSION,
    "mode": "adapter",
    "base_fingerprint": "f",
    "rank": 4,
    "tensors": [{"name": "a", "shape": [2, 2], "dtype": "float32", "offset": 0}],
    "num_bytes": 64,
    "digest": "",
    "policy": "p",
    "version": 1,
    "epoch": 3,
}
ENDING = {"drain_timeout_s": 5, "on_running": "drain"}
PLAN = [{"name": "a", "shape": [2], "dtype": "bfloat16"}]
MESSAGES = {
    "join": {
        "protocol": PROTOCOL_VERSION,
        "policy": "p",
        "writer": "w",
        "lasting": True,
        "transport": "shm",
        "timeout_s": 1.5,
        "segment": SEGMENT,
    },
    "joined": {**LEASE, "timeout_s": 1},
    "heartbeat": LEASE,
    "leave": LEASE,
    "stage": {
        "header": HEADER,
        "transport": "http",
        "timeout_s": 1,
        "update_id": "u",
        "segment": SEGMENT,
    },
    "staged": {"stage_id": "s", "digest": "d", "timeout_s": 1},
    "discard": {"stage_id": "s"},
    "commit": {"stage_id": "s", "timeout_s": 1, "retire": ["p@1"], "digest": "d", **ENDING},
    "drop": {"name": "p@1", "epoch": 3, **ENDING},
    "begin": {
        **LEASE,
        "version": 2,
        "base_fingerprint": "f",
        "timeout_s": 1,
        "plan": PLAN,
        **ENDING,
    },
    "finish": {"update_id": "u", "digest": "d"},
    "abort": {"update_id": "u", "reason": "why"},
    "base": {},
    "forget_prefixes": {"timeout_s": 1},
}
MAY_BE_MISSING = {
    *("join segment", "stage segment", "stage update_id", "commit retire", "commit digest"),
    *("begin plan", "abort reason", "join lasting"),
}
WRONG = [[[]]]
"""Of no field's type."""


class _Server:
    """Every handler answers with the message that it was given; `fails` is what it raises instead."""

    def __init__(self):
        self.given, self.fails = [], None

    def __getattr__(self, name):
        return self

    async def __call__(self, *given):
        if self.fails is not None:
            raise self.fails
        self.given.append(given)
        return protocol.Empty()


@pytest.fixture
def server():
    return _Server()


@pytest.fixture
def http(server):
    app = FastAPI()
    app.include_router(routes.router)
    app.state.tink_token, app.state.tink = TOKEN, server
    headers = {"authorization": f"Bearer {TOKEN}"}
    return TestClient(app, headers=headers, raise_server_exceptions=False)


def _fields(message, path=()):
    """The path of every field, and of those of the objects in it."""
    items = message.items() if isinstance(message, dict) else enumerate(message)
    for key, value in items:
        if isinstance(message, dict):
            yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from _fields(value, (*path, key))


def _changed(message, path, change):
    message = copy.deepcopy(message)
    inner = message
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return message


FIELDS = [(action, path) for action, message in MESSAGES.items() for path in _fields(message)]


def _named(field):
    return f"{field[0]} {'.'.join(map(str, field[1]))}"


def _check_refused(response, path):
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "bad_request", error
    assert error["details"]["field"].startswith(".".join(map(str, path)))
    assert ".".join(map(str, path)) in error["message"]


def test_every_route_has_an_example_here():
    assert {route.action for route in protocol.ROUTES} == set(MESSAGES)
    assert {route.path for route in routes.router.routes} == {
        *(f"/tink/v1/{action}" for action in MESSAGES),
        *("/tink/v1/status", "/tink/v1/layout", "/tink/v1/stage/{stage_id:path}/chunk"),
    }


@pytest.mark.parametrize("route", protocol.ROUTES, ids=lambda route: route.action)
def test_message_reaches_its_handler_as_it_was_sent(route, http, server):
    message = MESSAGES[route.action]
    assert http.post(f"/tink/v1/{route.action}", json=message).status_code == 200
    ((given,),) = server.given
    assert type(given) is route.request
    assert json.loads(given.to_json()) == message


@pytest.mark.parametrize("field", FIELDS, ids=_named)
def test_missing_field_is_named(field, http, server):
    action, path = field
    message = _changed(MESSAGES[action], path, lambda inner, key: inner.pop(key))
    response = http.post(f"/tink/v1/{action}", json=message)
    if _named(field) == "join segment":  # which shared memory needs
        assert response.status_code == 400 and "segment" in response.json()["error"]["message"]
    elif _named(field) in MAY_BE_MISSING:
        assert response.status_code == 200 and server.given
    else:
        _check_refused(response, path)
        assert not server.given


@pytest.mark.parametrize("field", FIELDS, ids=_named)
def test_field_of_the_wrong_type_is_named(field, http, server):
    action, path = field
    message = _changed(MESSAGES[action], path, lambda inner, key: inner.update({key: WRONG}))
    _check_refused(http.post(f"/tink/v1/{action}", json=message), path)
    assert not server.given


@pytest.mark.parametrize(
    ("action", "change"),
    [
        ("join", {"policy": "a/b"}),
        ("join", {"transport": "pigeon"}),
        ("joined", {"epoch": "3"}),
        ("joined", {"epoch": True}),
        ("joined", {"timeout_s": "1"}),
        ("commit", {"on_running": "wait"}),
        ("commit", {"retire": ["p"]}),
        ("drop", {"name": "p@x"}),
        ("begin", {"version": -1}),
    ],
)
def test_value_that_no_sender_of_ours_sends_is_named(action, change, http, server):
    response = http.post(f"/tink/v1/{action}", json={**MESSAGES[action], **change})
    _check_refused(response, tuple(change))
    assert not server.given


DEEP = 20_000


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"{", b"3", b"\xff"),
        pytest.param(b"[" * DEEP + b"]" * DEEP, id="deep lists"),
        pytest.param(b'{"header":' * DEEP + b"1" + b"}" * DEEP, id="deep objects"),
    ],
)
@pytest.mark.parametrize("action", MESSAGES)
def test_body_that_is_no_json_object_is_a_bad_request(action, body, http, server):
    response = http.post(f"/tink/v1/{action}", content=body)
    assert response.status_code == 400 and response.json()["error"]["code"] == "bad_request"
    assert not server.given


@pytest.mark.parametrize("offset", ["", "x", "1.5"])
def test_chunk_at_no_offset_is_a_bad_request_in_the_form_of_all(offset, http, server):
    response = http.post(f"/tink/v1/stage/s/chunk?offset={offset}", content=b"1")
    error = errors.from_wire(response.json(), response.status_code)
    assert type(error) is errors.BadRequest and "offset" in error.message
    assert response.status_code == 400 and not server.given


@pytest.mark.parametrize("action", ["join", "stage"])
def test_other_protocol_is_said_before_anything_else_is_read(action, http):
    other = {"protocol": PROTOCOL_VERSION + 1}
    message = other if action == "join" else {**MESSAGES[action], "header": other}
    response = http.post(f"/tink/v1/{action}", json=message)
    assert type(errors.from_wire(response.json(), response.status_code)) is errors.ProtocolMismatch


@pytest.mark.parametrize("action", ["status", "layout", *MESSAGES])
def test_wrong_token_is_said_before_the_body_is_read(action, http, server):
    headers = {"authorization": "Bearer another"}
    if action in ("status", "layout"):
        response = http.get(f"/tink/v1/{action}", headers=headers)
    else:
        response = http.post(f"/tink/v1/{action}", content=b"{", headers=headers)
    assert type(errors.from_wire(response.json(), response.status_code)) is errors.BadToken
    assert not server.given


@pytest.mark.parametrize("fault", [KeyError("x"), TypeError("x"), ValueError("x")], ids=repr)
@pytest.mark.parametrize("action", MESSAGES)
def test_fault_of_the_server_is_a_500_and_no_bad_request(action, fault, http, server):
    server.fails = fault
    assert http.post(f"/tink/v1/{action}", json=MESSAGES[action]).status_code == 500


def test_refusal_of_the_server_arrives_as_it_was_raised(http, server):
    server.fails = errors.LeaseHeld("another writer", writer="w", expires_in_s=2.0)
    response = http.post("/tink/v1/join", json=MESSAGES["join"])
    found = errors.from_wire(response.json(), response.status_code)
    assert type(found) is errors.LeaseHeld and found.details["expires_in_s"] == 2.0


def test_answer_that_lacks_a_field_names_it():
    with pytest.raises(errors.ProtocolMismatch, match=r"the answer to 'stage'\.stage_id"):
        protocol.STAGE.read_answer({})
    answer = {"epoch": 1, "incarnation": "i", "lease_s": 15, "last_version": 0, "transport": "shm"}
    found = protocol.JOIN.read_answer({**answer, "a_field_of_a_newer_server": 1})
    assert json.loads(found.to_json()) == answer


def test_status_that_lacks_a_field_names_it():
    with pytest.raises(errors.ProtocolMismatch, match=r"the answer to 'status'\.protocol"):
        protocol.read_status({"state": "odd"})
