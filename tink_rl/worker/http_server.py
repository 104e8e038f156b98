"""waitress, with the limits of this API: JSON errors, slow clients, ambiguous headers, clean ends.

A body over its limit is answered before it was read, and the rest of it is drained for a moment: a
connection closed with unread bytes resets, and the client would see that and not the answer.
"""

from __future__ import annotations

import errno
import logging
import resource
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher
from waitress.utilities import Error
from waitress.wasyncore import close_all

from tink_rl.errors import ConfigError, LaunchFailed
from tink_rl.loopback import http_url
from tink_rl.serve_options import port_holder
from tink_rl.worker.error_body import body_of, code_of, new_request_id
from tink_rl.worker.schemas import MAX_BODY_BYTES

MAX_HEADER_BYTES = 16 * 2**10
MAX_HEADER_FIELDS = 100
HEADER_S = 10.0
"""A request's headers must be there this long after its first byte."""
BODY_S = 60.0
"""... and all of it this long after."""
STALL_S = 60.0
"""A client that takes nothing of its answer for this long is gone."""
_IDLE_S = 75
_MAX_CONNECTIONS = 4096
_MAX_FILES = 65_536
_LINGER_S = 2.0
_LINGER_BYTES = 64 * 2**20
_ONCE = (b"content-length", b"authorization", b"host", b"content-type", b"transfer-encoding")


class RequestTimeout(Error):
    code, reason = 408, "Request Timeout"


class _Parser(HTTPRequestParser):
    """Refuses what two readers could read in two ways."""

    def parse_header(self, header_plus: bytes) -> None:
        names = [
            line.partition(b":")[0].strip().lower()
            for line in header_plus.split(b"\r\n")[1:]
            if line
        ]
        if len(names) > MAX_HEADER_FIELDS:
            raise ParsingError(f"more than {MAX_HEADER_FIELDS} header fields")
        for name in _ONCE:
            if names.count(name) > 1:
                raise ParsingError(f"the header {name.decode()} comes more than once")
        if b"transfer-encoding" in names and b"content-length" in names:
            raise ParsingError("both Transfer-Encoding and Content-Length are given")
        super().parse_header(header_plus)
        if "TRANSFER_ENCODING" in self.headers:
            raise ParsingError("Transfer-Encoding needs HTTP/1.1")


class _ErrorTask(ErrorTask):
    """What waitress itself has to say, as our JSON."""

    def execute(self) -> None:
        error = self.request.error
        self.status = f"{error.code} {error.reason}"
        message = f"{error.reason}: {error.body}" if error.body else error.reason
        body = body_of(code_of(error.code), message, new_request_id())
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(HTTPChannel):
    parser_class = _Parser
    error_task_class = _ErrorTask
    request: Any
    will_close: bool
    close_when_flushed: bool
    timed_request: Any = None
    request_began = 0.0
    stalled_at: tuple[float, float] | None = None
    """Since when (monotonic) part of an answer waits with this `last_activity`."""
    lingers_until: float | None = None
    lingered_bytes = 0

    def received(self, data: bytes) -> bool:
        if self.lingers_until is not None:
            self.lingered_bytes += len(data)
            self.will_close = self.will_close or self.lingered_bytes > _LINGER_BYTES
            return False
        taken: bool = super().received(data)
        if self.request is not self.timed_request:
            self.timed_request, self.request_began = self.request, time.monotonic()
        return taken

    def readable(self) -> bool:
        if self.lingers_until is not None:
            return not self.will_close
        return bool(super().readable())

    def handle_write(self) -> None:
        closes = self.close_when_flushed
        if closes:
            self.close_when_flushed = False  # only send: we decide on the end
        super().handle_write()
        if closes and self.connected:
            if self.total_outbufs_len:
                self.close_when_flushed = True
            elif self.lingers_until is None:
                self._linger()

    def _linger(self) -> None:
        self.lingers_until = time.monotonic() + _LINGER_S
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:  # the client is gone already
            self.will_close = True

    def check_patience(self, now: float) -> None:
        """Called in the main thread every second."""
        if self.lingers_until is not None:
            self.will_close = self.will_close or now > self.lingers_until
        elif self._is_stalled(now):
            # Now: `will_close` waits for a socket that can be written to, and this client's never can.
            self.handle_close()
        elif self.request is not None and not self.requests:
            limit = BODY_S if self.request.headers_finished else HEADER_S
            if now - self.request_began > limit:
                self._give_up(limit)

    def _is_stalled(self, now: float) -> bool:
        """Whether the client took nothing for long. By checks, not by `last_activity` alone: that is
        old when a long generation's answer has just been written."""
        if not self.total_outbufs_len or self.stalled_at is None:
            self.stalled_at = (self.last_activity, now) if self.total_outbufs_len else None
        elif self.stalled_at[0] != self.last_activity:
            self.stalled_at = (self.last_activity, now)
        return self.stalled_at is not None and now - self.stalled_at[1] > STALL_S

    def _give_up(self, limit: float) -> None:
        request, self.request = self.request, None
        if not request.headers_finished:
            request.parse_header(b"GET / HTTP/1.0\r\n")  # an answer needs a request line
        request.error = RequestTimeout(f"the request was not complete after {limit:g} s")
        with self.requests_lock:
            self.requests.append(request)
        self.server.add_task(self)


class _Server(TcpWSGIServer):
    channel_class = _Channel

    def maintenance(self, now: float) -> None:
        super().maintenance(now)
        for channel in list(self.active_channels.values()):
            channel.check_patience(time.monotonic())


def bind(host: str, port: int) -> socket.socket:
    """A listening address, taken before anything slow is loaded.

    Raises:
        LaunchFailed: another process has it.
        ConfigError: it is not an address of this machine, or not for us.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen(1)  # two sockets may share an address until one listens
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise LaunchFailed(
                f"port {port} on {host} is in use{port_holder(port)}; stop that process or give "
                f"another --port ({error.strerror})",
                code="port_taken",
            ) from error
        raise ConfigError(
            f"cannot listen on --host {host} --port {port}: {error.strerror}; take an address of this "
            "machine, and a port above 1023 unless you are root"
        ) from error
    return taken


def raise_file_limit() -> None:
    """Let this process open as many files as it may: each connection is one, here and at the backend."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, _MAX_FILES) if hard != resource.RLIM_INFINITY else _MAX_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class HttpServer:
    """A WSGI application behind a bound socket; `run` serves until `stop`."""

    def __init__(
        self, application: Callable[..., Any], taken: socket.socket, *, num_threads: int
    ) -> None:
        """Start the threads and accept connections (they are served once `run` is called)."""
        for name in ("waitress.queue", "waitress"):
            logging.getLogger(name).setLevel(logging.ERROR)  # a full queue is not news here
        host, self.port = taken.getsockname()[:2]
        self.url = http_url(host, self.port)
        self._map: dict[int, Any] = {}
        self._dispatcher = ThreadedTaskDispatcher()
        self._dispatcher.set_thread_count(num_threads)
        self._server = _Server(
            application,
            map=self._map,
            _sock=taken,
            dispatcher=self._dispatcher,
            adj=_adjustments(taken),
            sockinfo=(taken.family, taken.type, taken.proto, taken.getsockname()),
            bind_socket=False,
        )
        self._ended = threading.Event()

    @property
    def num_connections(self) -> int:
        """Clients whose connection is open."""
        return len(self._server.active_channels)

    def run(self) -> None:
        """Serve; returns after `stop`."""
        try:
            self._server.run()
        finally:
            self._dispatcher.shutdown()
            self._ended.set()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Send what is answered already, close all connections, let `run` return."""
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and any(
            channel.requests or channel.total_outbufs_len
            for channel in list(self._server.active_channels.values())
        ):
            time.sleep(0.01)
        self._server.trigger.pull_trigger(lambda: close_all(self._map))
        self._ended.wait(timeout_s)


def _adjustments(taken: socket.socket) -> Adjustments:
    return Adjustments(
        sockets=[taken],
        ident="tink-rl",
        max_request_body_size=MAX_BODY_BYTES + 1,
        max_request_header_size=MAX_HEADER_BYTES,
        connection_limit=_connection_limit(),
        channel_timeout=_IDLE_S,
        cleanup_interval=1,
        channel_request_lookahead=1,  # else a client that goes away is seen only afterwards
        asyncore_use_poll=True,
        log_socket_errors=False,
    )


def _connection_limit() -> int:
    """As many as there are descriptors for, with some left for the backend and files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_CONNECTIONS if soft < 0 else max(16, min(_MAX_CONNECTIONS, soft // 3))
