"""The worker behind a real socket: bytes that no client library would send, and clients that leave."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest

from tests.fakes import FakeBackend, answer_of
from tests.worker_rig import ADMIN, SAMPLE, in_threads, wait_until, worker
from tink_rl.worker import http_server
from tink_rl.worker.ledger import State
from tink_rl.worker.schemas import MAX_BODY_BYTES

BODY = b'{"prompts": ["x"]}'
GOOD = b"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(BODY)


@pytest.fixture(scope="module")
def rig():
    with worker(socket=True) as found:
        yield found


def _http(rig):
    # without TLS: its setup takes longer than most of these requests
    return httpx.Client(base_url=rig.url, timeout=30, verify=False)


def _connect(rig, timeout_s=15.0):
    url = httpx.URL(rig.url)
    return socket.create_connection((url.host, url.port), timeout=timeout_s)


def _read(connection):
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def _exchange(rig, raw):
    """What the server answers to `raw` until it closes: status, headers, body."""
    with _connect(rig) as connection:
        connection.sendall(raw)
        received = _read(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body


def _post(headers=GOOD, body=BODY, line=b"POST /api/v1/sample HTTP/1.1"):
    return line + b"\r\n" + headers + b"Connection: close\r\n\r\n" + body


def _assert_problem(body):
    error = json.loads(body)["error"]
    assert set(error) == {"code", "message", "request_id"}
    return error


def test_a_good_request_written_by_hand_is_answered(rig):
    status, _, body = _exchange(rig, _post())
    assert status == 200
    assert json.loads(body)["completions"][0]["token_ids"] == answer_of(None, "x")


_RAW = {
    "both lengths": (_post(GOOD + b"Transfer-Encoding: chunked\r\n"), 400),
    "length twice": (_post(GOOD + b"Content-Length: 5\r\n"), 400),
    "same length twice": (_post(GOOD + b"Content-Length: %d\r\n" % len(BODY)), 400),
    "negative length": (_post(b"Host: 127.0.0.1\r\nContent-Length: -1\r\n"), 400),
    "length with a sign": (_post(b"Host: 127.0.0.1\r\nContent-Length: +18\r\n"), 400),
    "two hosts": (_post(GOOD + b"Host: y\r\n"), 400),
    "two tokens": (_post(GOOD + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"), 400),
    "two types": (_post(GOOD + b"Content-Type: text/plain\r\n"), 400),
    "unknown coding": (_post(b"Host: 127.0.0.1\r\nTransfer-Encoding: gzip\r\n"), 501),
    "chunked and gzip": (_post(b"Host: 127.0.0.1\r\nTransfer-Encoding: gzip, chunked\r\n"), 501),
    "coding in 1.0": (
        _post(b"Transfer-Encoding: chunked\r\n", line=b"POST /api/v1/sample HTTP/1.0"),
        400,
    ),
    "bad chunk": (
        _post(b"Host: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n", b"zz\r\nxx\r\n"),
        400,
    ),
    "space before colon": (_post(GOOD + b"X : y\r\n"), 400),
    "folded first line": (_post(b" folded: x\r\n" + GOOD), 400),
    "bare newline": (_post(GOOD + b"X: a\nY: b\r\n"), 400),
    "bare return": (_post(GOOD + b"X: a\rY: b\r\n"), 400),
    "nul in header": (_post(GOOD + b"X: a\x00b\r\n"), 400),
    "huge header": (_post(GOOD + b"X: " + b"a" * 65536 + b"\r\n"), 431),
    "many headers": (_post(GOOD + b"".join(b"X%d: y\r\n" % i for i in range(200))), 400),
    "no request line": (b"hello\r\n\r\n", 400),
    "bad version": (b"GET /livez HTTP/9.9.9\r\n\r\n", 400),
    "binary": (bytes(range(256)) + b"\r\n\r\n", 400),
    "tls hello": (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n",
        400,
    ),
    "method": (_post(line=b"TRACE /api/v1/sample HTTP/1.1"), 405),
    "put": (_post(line=b"PUT /api/v1/sample HTTP/1.1"), 405),
    "override": (
        _post(GOOD + b"X-HTTP-Method-Override: POST\r\n", line=b"GET /api/v1/sample HTTP/1.1"),
        405,
    ),
    "options": (_post(line=b"OPTIONS /api/v1/sample HTTP/1.1"), 405),
    "gzip body": (_post(GOOD + b"Content-Encoding: gzip\r\n", b"\x1f\x8b" + b"\x00" * 16), 415),
    "over the limit": (
        _post(b"Host: 127.0.0.1\r\nContent-Length: 1073741824\r\n", b"x" * 1000),
        413,
    ),
    "expecting": (_post(GOOD + b"Expect: 200-maybe\r\n"), 200),
}


@pytest.mark.parametrize("name", _RAW)
def test_bytes_that_could_be_read_in_two_ways_are_refused_as_our_json(rig, name):
    raw, expected = _RAW[name]
    before = rig.backend.num_calls
    status, head, body = _exchange(rig, raw)
    assert status == expected, body
    if expected != 200:
        assert b"application/json" in head
        _assert_problem(body)
        assert rig.backend.num_calls == before
    assert httpx.get(f"{rig.url}/livez").status_code == 200


def test_a_client_sees_413_though_it_was_still_sending(rig):
    response = httpx.post(
        f"{rig.url}/api/v1/sample",
        content=b"x" * (MAX_BODY_BYTES + 2**20),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 413
    assert _assert_problem(response.content)["code"] == "body_too_large"


def test_an_endless_chunked_body_ends_at_the_limit(rig):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 2**30:
            sent += 2**16
            yield b"x" * 2**16

    response = httpx.post(
        f"{rig.url}/api/v1/sample", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413 and sent < 2**28


def _rest(connection):
    """What comes until the server is done: head and body may arrive apart."""
    connection.settimeout(5.0)
    pieces = []
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize(
    "drip",
    [b"POST /api/v1/sample HTTP/1.1\r\nX: ", _post(GOOD.replace(b"18", b"9999"), b"")],
    ids=["headers", "body"],
)
def test_a_client_that_sends_a_byte_at_a_time_is_told_to_hurry(monkeypatch, drip):
    monkeypatch.setattr(http_server, "HEADER_S", 0.5)
    monkeypatch.setattr(http_server, "BODY_S", 0.5)
    with worker(socket=True) as found, _connect(found) as connection:
        connection.sendall(drip)
        received = b""
        connection.settimeout(0.05)
        for _ in range(300):
            try:
                connection.sendall(b"a")
                received += connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if received:
                received += _rest(connection)
                break
        assert received.startswith(b"HTTP/1.0 408") or received.startswith(b"HTTP/1.1 408")
        assert _assert_problem(received.partition(b"\r\n\r\n")[2])["code"] == "client_too_slow"
        assert found.backend.num_calls == 0


def test_slow_clients_do_not_hold_up_others(rig):
    slow = [_connect(rig) for _ in range(50)]
    for connection in slow:
        connection.sendall(b"POST /api/v1/sample HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
    with _http(rig) as client:
        for i in range(20):
            response = client.post("/api/v1/sample", json={"prompts": [f"p{i}"]})
            assert response.json()["completions"][0]["token_ids"] == answer_of(None, f"p{i}")
    for connection in slow:
        connection.close()


def test_many_clients_on_kept_connections_each_get_their_own_answers(rig):
    def client(c):
        with _http(rig) as http:
            for i in range(10):
                prompt, model = f"{c}-{i}", "ab"[(c + i) % 2]
                answer = http.post("/api/v1/sample", json={"prompts": [prompt], "model_id": model})
                [completion] = answer.json()["completions"]
                assert completion["token_ids"] == answer_of(model, prompt)
        return 10

    assert sum(in_threads(20, client)) == 200


def test_pipelined_requests_are_answered_in_order(rig):
    first = b"POST /api/v1/sample HTTP/1.1\r\n" + GOOD + b"\r\n" + BODY
    second = _post(GOOD.replace(b"18", b"18"), b'{"prompts": ["y"]}')
    with _connect(rig) as connection:
        connection.sendall(first + second)
        received = _read(connection)
    answers = [
        json.loads(part.partition(b"\r\n\r\n")[2]) for part in received.split(b"HTTP/1.1 ")[1:]
    ]
    tokens = [answer["completions"][0]["token_ids"] for answer in answers]
    assert tokens == [answer_of(None, "x"), answer_of(None, "y")]


def test_five_hundred_arrivals_are_answered_or_refused_and_nothing_else():
    backend = FakeBackend(["a"], latency_s=0.02)
    with worker(backend=backend, socket=True, max_running=16, max_queued=64) as found:

        def client(c):
            with _http(found) as http:
                return [
                    http.post("/api/v1/sample", json={"prompts": [f"{c}-{i}"], "model_id": "a"})
                    for i in range(5)
                ]

        responses = [r for batch in in_threads(100, client) for r in batch]
        statuses = [r.status_code for r in responses]
        assert statuses.count(200) + statuses.count(429) == 500
        assert all("Retry-After" in r.headers for r in responses if r.status_code == 429)
        ends = found.service.ledger.ends
        assert statuses.count(200) == ends[State.DONE] == found.service.ledger.num_admitted
        assert httpx.get(f"{found.url}/livez").status_code == 200


# -- clients that leave ---------------------------------------------------------------------------


def _ask_and_leave(rig, body, after_s=0.05):
    content = json.dumps(body).encode()
    head = b"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(
        content
    )
    with _connect(rig) as connection:
        connection.sendall(b"POST /api/v1/sample HTTP/1.1\r\n" + head + b"\r\n" + content)
        time.sleep(after_s)


def test_a_client_that_closes_its_connection_cancels_its_generation():
    backend = FakeBackend(latency_s=30.0)
    with worker(backend=backend, socket=True, max_running=4) as found:
        in_threads(
            20, lambda i: _ask_and_leave(found, {"prompts": [f"p{i}"], "stream": i % 2 == 1})
        )
        ends = found.service.ledger.ends
        wait_until(lambda: ends[State.CANCELLED] == found.service.ledger.num_admitted > 0, 5.0)
        assert backend.running == 0 and backend.num_cancelled == backend.num_calls
        assert found.service.queue.depth()["connections"] == 0


def test_a_stream_that_is_left_in_the_middle_is_cancelled():
    backend = FakeBackend(latency_s=3.0)
    with worker(backend=backend, socket=True) as found:
        with (
            _http(found) as http,
            http.stream(
                "POST", "/api/v1/sample", json={"prompts": ["x"], "stream": True}
            ) as answer,
        ):
            assert next(answer.iter_lines()) == "event: delta"
        wait_until(lambda: found.service.ledger.ends[State.CANCELLED] == 1, 5.0)
        assert backend.running == 0


def test_a_client_that_reads_nothing_is_dropped(monkeypatch):
    monkeypatch.setattr(http_server, "STALL_S", 0.5)
    backend = FakeBackend()
    backend.changes = lambda found: [replace(c, text="x" * 2**25) for c in found]
    with worker(backend=backend, socket=True) as found, _connect(found) as connection:
        connection.sendall(b"POST /api/v1/sample HTTP/1.1\r\n" + GOOD + b"\r\n" + BODY)
        wait_until(lambda: found.service.ledger.ends[State.DONE] == 1)
        wait_until(lambda: found.server.num_connections == 0, 60.0)
        received = 0
        with suppress(ConnectionError):
            while data := connection.recv(2**20):
                received += len(data)
        assert received < 2**25


def test_a_request_with_an_id_outlives_its_client_and_answers_its_retry():
    backend = FakeBackend(latency_s=0.6)
    with worker(backend=backend, socket=True) as found:
        body = {"prompts": ["x"], "request_id": "mine"}
        _ask_and_leave(found, body)
        retry = httpx.post(f"{found.url}/api/v1/sample", json=body)
        assert retry.status_code == 200 and retry.headers["Tink-Replayed"] == "true"
        assert backend.num_calls == 1 and backend.num_cancelled == 0
        assert found.service.ledger.ends[State.DONE] == 1


def test_a_request_with_an_id_whose_client_never_returns_ends_at_its_deadline():
    backend = FakeBackend(latency_s=30.0)
    with worker(backend=backend, socket=True) as found:
        _ask_and_leave(found, {"prompts": ["x"], "request_id": "mine", "timeout_s": 0.8})
        assert backend.running == 1
        wait_until(lambda: found.service.ledger.ends[State.EXPIRED] == 1, 5.0)
        assert backend.running == 0


# -- the end --------------------------------------------------------------------------------------


def test_a_stopping_server_answers_what_is_under_way_and_then_is_gone():
    backend = FakeBackend(latency_s=1.0)
    with worker(backend=backend, socket=True) as found:

        def client(i):
            if i == 8:
                wait_until(lambda: backend.running == 8)
                found.service.stop()
                return None
            return httpx.post(f"{found.url}/api/v1/sample", json={"prompts": [f"p{i}"]})

        responses = in_threads(9, client)[:8]
        assert [r.status_code for r in responses] == [200] * 8
        late = httpx.post(f"{found.url}/api/v1/sample", json={"prompts": ["late"]})
        assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down"


def test_tokens_are_asked_for_over_the_wire_too():
    with worker(socket=True, sample_token=SAMPLE) as found:
        raw = _post(GOOD + b"Host-Override: livez\r\n")
        assert _exchange(found, raw)[0] == 401
        assert _exchange(found, raw.replace(b"Host: 127.0.0.1", b"Host: x/livez?"))[0] == 401
        assert _exchange(found, raw.replace(b"/api/v1/sample", b"//api/v1/sample"))[0] == 401
        assert _exchange(found, raw.replace(b"/api/v1/sample", b"/api%2fv1/sample"))[0] == 401
        with_token = GOOD + b"Authorization: Bearer %s\r\n" % ADMIN.encode()
        assert _exchange(found, _post(with_token))[0] == 200
