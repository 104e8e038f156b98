"""A client whose requests can be ended from another thread: what nobody waits for any more.

A server drops a completion when its connection is gone. Closing an httpx client does not end a read that
another thread is blocked in; shutting its socket down does.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

import httpx

from tink_rl.transport.sampling_client import SamplingClient


class AbortableClient(SamplingClient):
    """One vLLM server, over connections that no other client shares."""

    def __init__(self, base_url: str, **settings: Any) -> None:
        """As `ServerClient`."""
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_aborted = False
        super().__init__(base_url, **settings)

    @classmethod
    def like(cls, client: SamplingClient) -> AbortableClient:
        """One of the same server, with the same settings."""
        return cls(client.base_url, **client.settings)

    def _send(self, method: str, path: str, *, timeout_s: float, **kwargs: Any) -> httpx.Response:
        kwargs.setdefault("extensions", {})["trace"] = self._remember_socket
        return super()._send(method, path, timeout_s=timeout_s, **kwargs)

    def _remember_socket(self, event: str, info: dict[str, Any]) -> None:
        if event != "connection.connect_tcp.complete":
            return
        opened: socket.socket = info["return_value"].get_extra_info("socket")
        with self._lock:
            self._sockets.append(opened)
            if self._is_aborted:
                _shut(opened)

    def abort(self) -> None:
        """End all requests under way, each with `ServerUnreachable`, and close; idempotent."""
        with self._lock:
            self._is_aborted = True
            for opened in self._sockets:
                _shut(opened)
            self._sockets.clear()
        self.close()


def _shut(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the server closed it before
        opened.shutdown(socket.SHUT_RDWR)
