"""The connection of one publisher to one server: lease, channel, heartbeat."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.errors import TinkError
from tink_rl.loopback import is_local
from tink_rl.protocol import (
    HEARTBEAT,
    JOIN,
    JOINED,
    LEAVE,
    A,
    JoinAnswer,
    JoinedRequest,
    JoinRequest,
    LeaseRequest,
    Q,
    Route,
)
from tink_rl.transport.sampling_client import SamplingClient
from tink_rl.transport.shared_memory import Segment
from tink_rl.types import PROTOCOL_VERSION, ServerStatus, Transport

if TYPE_CHECKING:
    from tink_rl.transport.communicator import Channel

logger = logging.getLogger("tink_rl")
_PROBE_BYTES = 64
_HTTP_SLACK_S = 5.0


class Connection:
    """The right to publish to one server, and what carries the bytes there."""

    def __init__(
        self, client: SamplingClient, config: SyncConfig, *, writer: str, lasting: bool = False
    ) -> None:
        self.client = client
        self.url = client.base_url
        self.last_version = 0
        self._config, self._writer, self._lasting = config, writer, lasting
        self._channel: Channel | None = None
        self._joined: JoinAnswer | None = None
        self._transport = Transport(config.transport)
        self._segment: Segment | None = None
        """Shared memory for packets that lie elsewhere, and to find out whether it is shared."""
        self._stop_heartbeat: weakref.finalize[..., Connection] | None = None
        """Ends the heartbeat; called too when nobody has this connection any more."""

    @property
    def incarnation(self) -> str | None:
        """The server's life with which the channel was opened; None while there is no channel."""
        return self._joined.incarnation if self._joined else None

    def status(self) -> ServerStatus:
        """See `ServerClient.status`."""
        return self.client.status()

    def ensure_channel(self) -> None:
        """Open a channel if there is none: lease, rendezvous, heartbeat.

        Raises:
            LeaseHeld: another writer's lease did not expire within `lease_wait_s`.
            ProtocolMismatch, ServerUnreachable, PluginMissing, ChannelLost.
        """
        if self._joined is not None:
            return
        joined = self._join()
        try:
            if joined.transport not in (Transport.HTTP, Transport.SHM):
                self._channel = self._dial(joined)
        except BaseException:
            self._leave(joined.epoch)
            raise
        self._joined = joined
        # A restarted server knows of none; its earlier life's numbers stay taken.
        self.last_version = max(self.last_version, joined.last_version)
        self._start_heartbeat(joined)

    def _join(self) -> JoinAnswer:
        from tink_rl.transport.communicator import choose_transport

        local = is_local(self.client.base_url)
        transport = choose_transport(self._transport, same_machine=local)
        if transport is not Transport.SHM:
            return self._take_lease(transport)
        try:
            self._segment = Segment.create(_PROBE_BYTES)
            return self._take_lease(transport)
        except errors.SegmentUnreachable as error:
            # A forwarded port or a container: loopback, and yet another machine's memory.
            self._take_gloo(error)
            return self._take_lease(Transport.GLOO)

    def _take_gloo(self, error: TinkError) -> None:
        """Do without shared memory from now on; raises `error` if it was asked for."""
        if self._transport is Transport.SHM:
            raise error
        logger.info("%s: no shared memory with the server (%s): gloo", self.url, error)
        self._transport, self._segment = Transport.GLOO, None

    def _take_lease(self, transport: Transport) -> JoinAnswer:
        deadline = time.monotonic() + self._config.lease_wait_s
        segment = self._segment if transport is Transport.SHM else None
        request = JoinRequest(
            protocol=PROTOCOL_VERSION,
            policy=self._config.policy,
            writer=self._writer,
            lasting=self._lasting,
            transport=transport,
            timeout_s=self._config.join_timeout_s,
            segment=None if segment is None else segment.spec,
        )
        while True:
            try:
                return self._control(JOIN, request, self._config.join_timeout_s)
            except errors.LeaseHeld as error:
                # A writer that died leaves a lease that nobody renews: wait for it, but no longer.
                if time.monotonic() > deadline:
                    raise
                time.sleep(min(1.0, float(error.details.get("expires_in_s", 1.0)) + 0.05))

    def _dial(self, joined: JoinAnswer) -> Channel:
        from tink_rl.transport import communicator

        timeout_s = self._config.join_timeout_s
        store = communicator.dial_store(joined.host, joined.port, timeout_s)
        channel = communicator.Channel(
            store,
            nonce=joined.nonce,
            rank=joined.rank,
            world_size=joined.world_size,
            host=communicator.local_address(joined.host, joined.port),
            timeout_s=timeout_s,
        )
        request = JoinedRequest(policy=self._config.policy, epoch=joined.epoch, timeout_s=timeout_s)
        self._control(JOINED, request, timeout_s)
        return channel

    def _start_heartbeat(self, joined: JoinAnswer) -> None:
        stop = threading.Event()
        self._stop_heartbeat = weakref.finalize(self, stop.set)
        request = LeaseRequest(policy=self._config.policy, epoch=joined.epoch)
        client, every_s = self.client, joined.lease_s / 4

        def beat() -> None:
            while not stop.wait(every_s):
                # A lost lease or server is found, with its reason, by the next publish.
                with contextlib.suppress(TinkError):
                    client.ask(HEARTBEAT, request, timeout_s=5.0)

        threading.Thread(target=beat, daemon=True, name="tink-heartbeat").start()

    def forget_channel(self) -> None:
        """Drop the channel without asking the server; the next publish opens a fresh one."""
        if self._stop_heartbeat is not None:
            self._stop_heartbeat()
        if self._channel is not None:
            self._channel.close()
        self._channel = self._joined = self._stop_heartbeat = self._segment = None

    def close(self) -> None:
        """Give lease and channel back; never raises."""
        if self._joined is not None:
            self._leave(self._joined.epoch)
        self.forget_channel()

    def _leave(self, epoch: int) -> None:
        with contextlib.suppress(TinkError):
            self._control(LEAVE, LeaseRequest(policy=self._config.policy, epoch=epoch), 5.0)

    def _control(self, route: Route[Q, A], message: Q, timeout_s: float) -> A:
        return self.client.ask(route, message, timeout_s=timeout_s + _HTTP_SLACK_S)

    @property
    def epoch(self) -> int:
        """Epoch of the open channel."""
        return self._opened.epoch

    @property
    def _opened(self) -> JoinAnswer:
        """What the server answered when the channel was opened."""
        if self._joined is None:
            raise errors.ChannelLost("there is no channel; call ensure_channel() first")
        return self._joined

    @property
    def shares_memory(self) -> bool:
        """Whether packets go to this server through shared memory."""
        return self._joined is not None and self._joined.transport == Transport.SHM

    def do_without_shared_memory(self, error: TinkError) -> None:
        """Let the next channel be one that needs none; raises `error` if it was asked for."""
        self._take_gloo(error)
        self.close()
