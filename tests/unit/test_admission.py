"""Clients that stop halfway, at the middleware: whom a commit waits for, and whom it does not."""

from __future__ import annotations

import asyncio
import json

import pytest

from tink_rl.server.admission import GateMiddleware
from tink_rl.server.gate import Gate
from tink_rl.server.state import ServedState

ROUTES = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/responses"]
JSON_BODY = b'{"model": "policy@3", "prompt": "1"}'


class Client:
    """One request: its messages as the test sends them, the answer as far as it reads."""

    def __init__(self, path="/v1/completions", content_type=b"application/json", reads=True):
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "client": ("10.0.0.7", 51234),
            "headers": [(b"content-type", content_type)],
        }
        self.sent, self.answer = asyncio.Queue(), []
        self.reads = asyncio.Event()
        if reads:
            self.reads.set()

    def say(self, body=b"", more=False):
        self.sent.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self):
        self.sent.put_nowait({"type": "http.disconnect"})

    async def take(self, message):
        await self.reads.wait()
        self.answer.append(message)

    @property
    def status(self):
        return self.answer[0]["status"]

    @property
    def error(self):
        return json.loads(self.answer[1]["body"])["error"]


class Server:
    """The gate before a handler that works until the test, or its client's end, lets it end."""

    def __init__(self, body_s=60.0, parts=()):
        self.gate, self.finish, self.parts = Gate(), asyncio.Event(), parts
        self.bodies, self.tasks = [], []
        self.middleware = GateMiddleware(self.handle, self.gate, body_s)

    async def handle(self, scope, receive, send):
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        left = asyncio.ensure_future(receive())
        done = asyncio.ensure_future(self.finish.wait())
        await asyncio.wait({left, done}, return_when=asyncio.FIRST_COMPLETED)
        for part in self.parts:  # a stream
            start = (
                [] if self.parts.index(part) else [{"type": "http.response.start", "status": 200}]
            )
            for message in (
                *start,
                {"type": "http.response.body", "body": part, "more_body": True},
            ):
                await send(message)
        if self.parts:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        length = [(b"Content-Length", b"4")]  # also `null`, as vLLM's wrapper answers who has left
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"null"})

    async def serve(self, client):
        task = asyncio.create_task(self.middleware(client.scope, client.sent.get, client.take))
        self.tasks.append(task)
        await settle()
        return task


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def run(test):
    asyncio.run(asyncio.wait_for(test(), 20))


@pytest.mark.parametrize("path", ROUTES)
def test_request_counts_from_the_end_of_its_body_on_every_route(path):
    async def test():
        server, client = Server(), Client(path)
        task = await server.serve(client)
        client.say(b'{"model": ', more=True)
        await settle()
        assert server.gate.num_running == 0 and await server.gate.drained(0.0)
        [seen] = server.gate.pending()
        assert (seen.state, seen.what, seen.address) == (
            *("receiving", f"POST {path}", "10.0.0.7:51234"),
        )
        client.say(b'"policy@3"}')  # chunked, or in several packets
        await settle()
        assert server.gate.num_running == 1 and not await server.gate.drained(0.01)
        assert server.bodies == [b'{"model": "policy@3"}']
        server.finish.set()
        await task
        assert server.gate.num_running == 0 and not server.gate.pending()
        assert client.status == 200

    run(test)


def test_body_has_a_deadline_however_slowly_it_trickles():
    async def test():
        server, client = Server(body_s=0.05), Client()
        task = await server.serve(client)
        while not task.done():
            client.say(b"1", more=True)
            await asyncio.sleep(0.005)
        await task
        assert client.status == 408 and client.error["code"] == "body_timeout"
        assert "after 0.05 s" in client.error["message"]
        assert (b"connection", b"close") in client.answer[0]["headers"]
        assert not server.bodies and not server.gate.pending()

    run(test)


def test_client_that_leaves_in_its_body_is_forgotten():
    async def test():
        server, client = Server(), Client()
        task = await server.serve(client)
        client.say(b"{", more=True)
        client.leave()
        await task
        assert client.answer == [] and not server.gate.pending() and not server.bodies

    run(test)


def test_body_that_ends_while_a_commit_writes_is_held():
    async def test():
        server, client = Server(), Client()
        server.gate.close()
        task = await server.serve(client)
        client.say(JSON_BODY)
        await settle()
        assert [p.state for p in server.gate.pending()] == ["held"] and not server.bodies
        server.gate.open()
        server.finish.set()
        await task
        assert client.status == 200

    run(test)


@pytest.mark.parametrize("parts", [(), (b"data: 1", b"data: 2", b"data: [DONE]")])
def test_answer_that_nobody_reads_has_ended(parts):
    async def test():
        server, client = Server(parts=parts), Client(reads=False)
        client.say(JSON_BODY)
        task = await server.serve(client)
        assert server.gate.num_running == 1
        server.finish.set()
        await settle()
        assert await server.gate.drained(0.0) and not task.done()
        client.reads.set()
        await task
        body = b"".join(m.get("body", b"") for m in client.answer)
        assert body == (b"".join(parts) or b"null")
        assert not client.answer[-1].get("more_body", False)

    run(test)


def test_handler_that_fails_in_a_stream_nobody_reads_has_ended_and_its_client_is_told():
    async def fails(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        raise RuntimeError("the engine died")

    async def test():
        gate, client = Gate(), Client(reads=False)
        client.say(JSON_BODY)
        middleware = GateMiddleware(fails, gate)
        task = asyncio.create_task(middleware(client.scope, client.sent.get, client.take))
        await settle()
        assert gate.num_running == 0
        client.reads.set()
        with pytest.raises(RuntimeError, match="engine died"):
            await task
        assert client.status == 200

    run(test)


class _Engine:
    """Ends nothing: what runs never reached it."""

    async def pause_generation(self, *, mode, clear_cache):
        assert mode == "abort"

    async def resume_generation(self):
        pass


@pytest.mark.parametrize("reads", [True, False])
def test_abort_ends_what_never_reached_the_engine_and_whoever_reads_is_told(reads):
    async def test():
        server, client = Server(), Client(reads=reads)
        state = object.__new__(ServedState)
        state.gate, state.engine = server.gate, _Engine()
        client.say(JSON_BODY)
        task = await server.serve(client)
        await state.hold(1.0, "abort")
        assert server.gate.num_running == 0
        client.reads.set()
        await task
        assert client.status == 503 and client.error["code"] == "engine_unavailable"

    run(test)


def test_abort_lets_a_stream_that_has_begun_break_off():
    async def streams(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"data: 1", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    async def test():
        gate, client = Gate(), Client()
        client.say(JSON_BODY)
        middleware = GateMiddleware(streams, gate)
        task = asyncio.create_task(middleware(client.scope, client.sent.get, client.take))
        await settle()
        gate.cut()
        await task
        assert [m.get("more_body") for m in client.answer] == [None, True]

    run(test)


def test_websocket_is_held_refused_and_cut_as_a_request_is():
    async def talks(scope, receive, send):
        while (await receive())["type"] != "websocket.disconnect":
            await send({"type": "websocket.send", "text": "1"})

    async def test():
        gate, client = Gate(), Client()
        client.scope = {"type": "websocket", "path": "/v1/realtime", "client": None, "headers": []}
        client.sent.put_nowait({"type": "websocket.connect"})
        middleware = GateMiddleware(talks, gate)
        gate.close()
        task = asyncio.create_task(middleware(client.scope, client.sent.get, client.take))
        await settle()
        assert [p.state for p in gate.pending()] == ["held"]
        gate.open()
        await settle()
        assert gate.num_running == 1 and len(client.answer) == 1
        gate.cut()
        await task
        assert gate.num_running == 0

    run(test)


@pytest.mark.parametrize(
    ("body", "kind", "waits"),
    [
        (JSON_BODY, b"application/json", True),
        (b'{"model": "policy@2"}', b"application/json; charset=utf-8", False),
        (b'{"model": "other@3", "prompt": [1, 2]}', b"application/json", False),
        (b'{"prompt": "no model: the base"}', b"application/json", False),
        (b'{"model": "policy\\u00403"}', b"application/json", True),
        ('{"model": "policy@3"}'.encode("utf-16"), b"application/json", True),
        (b"model=policy%403", b"multipart/form-data; boundary=x", True),
    ],
)
def test_replaced_version_waits_for_requests_that_may_name_it_alone(body, kind, waits):
    async def test():
        server, client = Server(), Client(content_type=kind)
        client.say(body)
        task = await server.serve(client)
        assert server.gate.num_running == 1
        assert bool(server.gate.running("policy@3")) is waits
        server.finish.set()
        await task

    run(test)
