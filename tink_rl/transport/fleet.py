"""Several servers as one: every replica stages, then every replica commits.

A `Replica` holds one server's channel, lease and incarnation; a `Fleet` does one thing on all of them
at once and names the replica in the error.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.errors import TinkError
from tink_rl.loopback import is_local
from tink_rl.transport.outgoing import Outgoing
from tink_rl.transport.shared_memory import Segment, Shelf
from tink_rl.transport.vllm_client import CHUNK_BYTES, VLLMClient
from tink_rl.types import PROTOCOL_VERSION, ServerStatus, Transport

if TYPE_CHECKING:
    import torch

    from tink_rl.transport.communicator import Channel

logger = logging.getLogger("tink_rl")
T = TypeVar("T")
_PROBE_BYTES = 64
_HTTP_SLACK_S = 5.0


class Replica:
    """One server, as its publisher sees it."""

    def __init__(self, client: VLLMClient, config: SyncConfig, *, writer: str) -> None:
        self.client = client
        self.url = client.base_url
        self.last_version = 0
        self._config, self._writer = config, writer
        self._channel: Channel | None = None
        self._joined: dict[str, Any] | None = None
        self._transport = Transport(config.transport)
        self.shelf = Shelf()
        """Shared memory that packets are packed into; a fleet's replicas have one."""
        self._segment: Segment | None = None
        """Shared memory for packets that lie elsewhere, and to find out whether it is shared."""
        self._stop_heartbeat: threading.Event | None = None

    @property
    def incarnation(self) -> str | None:
        """The server's life with which the channel was opened; None while there is no channel."""
        return self._joined["incarnation"] if self._joined else None

    def status(self) -> ServerStatus:
        """See `VLLMClient.status`."""
        return self.client.status()

    # -- channel ----------------------------------------------------------------------------------

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
            if joined["transport"] not in (Transport.HTTP, Transport.SHM):
                self._channel = self._dial(joined)
        except BaseException:
            self._leave(joined["epoch"])
            raise
        self._joined = joined
        # A restarted server knows of none; its earlier life's numbers stay taken.
        self.last_version = max(self.last_version, int(joined["last_version"]))
        self._start_heartbeat(joined)

    def _join(self) -> dict[str, Any]:
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

    def _take_lease(self, transport: Transport) -> dict[str, Any]:
        deadline = time.monotonic() + self._config.lease_wait_s
        body = {
            "protocol": PROTOCOL_VERSION,
            "policy": self._config.policy,
            "writer": self._writer,
            "transport": transport,
            "timeout_s": self._config.join_timeout_s,
        }
        if transport is Transport.SHM and self._segment is not None:
            body["segment"] = vars(self._segment.spec)
        while True:
            try:
                return self._control("join", body, self._config.join_timeout_s)
            except errors.LeaseHeld as error:
                # A writer that died leaves a lease that nobody renews: wait for it, but no longer.
                if time.monotonic() > deadline:
                    raise
                time.sleep(min(1.0, float(error.details.get("expires_in_s", 1.0)) + 0.05))

    def _dial(self, joined: dict[str, Any]) -> Channel:
        from tink_rl.transport import communicator

        timeout_s = self._config.join_timeout_s
        store = communicator.dial_store(joined["host"], joined["port"], timeout_s)
        channel = communicator.Channel(
            store,
            nonce=joined["nonce"],
            rank=joined["rank"],
            world_size=joined["world_size"],
            host=communicator.local_address(joined["host"], joined["port"]),
            timeout_s=timeout_s,
        )
        body = {"policy": self._config.policy, "epoch": joined["epoch"], "timeout_s": timeout_s}
        self._control("joined", body, timeout_s)
        return channel

    def _start_heartbeat(self, joined: dict[str, Any]) -> None:
        stop = self._stop_heartbeat = threading.Event()
        body = {"policy": self._config.policy, "epoch": joined["epoch"]}
        client, every_s = self.client, joined["lease_s"] / 4

        def beat() -> None:
            while not stop.wait(every_s):
                # A lost lease or server is found, with its reason, by the next publish.
                with contextlib.suppress(TinkError):
                    client.control("heartbeat", body, timeout_s=5.0)

        threading.Thread(target=beat, daemon=True, name="tink-heartbeat").start()

    def forget_channel(self) -> None:
        """Drop the channel without asking the server; the next publish opens a fresh one."""
        if self._stop_heartbeat is not None:
            self._stop_heartbeat.set()
        if self._channel is not None:
            self._channel.close()
        self._channel = self._joined = self._stop_heartbeat = self._segment = None

    def close(self) -> None:
        """Give lease and channel back; never raises."""
        if self._joined is not None:
            self._leave(self._joined["epoch"])
        self.forget_channel()

    def _leave(self, epoch: int) -> None:
        with contextlib.suppress(TinkError):
            self._control("leave", {"policy": self._config.policy, "epoch": epoch}, 5.0)

    def _control(
        self,
        action: str,
        body: dict[str, Any],
        timeout_s: float,
        when_sent: Callable[[], Any] | None = None,
    ) -> dict[str, Any]:
        timeout_s += _HTTP_SLACK_S
        return self.client.control(action, body, timeout_s=timeout_s, when_sent=when_sent)

    # -- one publish ------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Epoch of the open channel."""
        return int(self._opened["epoch"])

    @property
    def _opened(self) -> dict[str, Any]:
        """What the server answered when the channel was opened."""
        if self._joined is None:
            raise errors.ChannelLost("there is no channel; call ensure_channel() first")
        return self._joined

    def stage(self, outgoing: Outgoing) -> str:
        """Send header, bytes and digest; the stage's id once every worker has checked them.

        Raises:
            TinkError: what is wrong; the server serves what it served before.
        """
        stage_id = self.send(outgoing)
        self._check(stage_id, outgoing.digest(), self._config.stage_timeout_s)
        return stage_id

    def send(self, outgoing: Outgoing, update_id: str | None = None) -> str:
        """Send header and bytes; the stage's id. They are checked when the digest follows.

        Raises:
            TinkError: what is wrong with the header; the server serves what it served before.
        """
        buffer, transport = outgoing.buffer, Transport(self._opened["transport"])
        segment = self._segment_with(buffer) if transport is Transport.SHM else None
        stage_id = self._send_header(outgoing, segment, update_id)
        outgoing.start_digest()
        # The header was accepted and every worker is receiving: only now do bytes travel.
        if transport is Transport.HTTP:
            self._send_chunks(stage_id, buffer, self._config.stage_timeout_s)
        elif segment is None:
            self._broadcast(stage_id, buffer, self._config.stage_timeout_s)
        return stage_id

    def announce(self, outgoing: Outgoing, when_sent: Callable[[], Any]) -> str:
        """Send the header of a packet that is being packed into `shelf`'s memory; the stage's id.

        Workers copy as it is filled. `when_sent` is called when the header is on its way.

        Raises:
            TinkError: what is wrong with the header; the server serves what it served before.
        """
        segment = self.shelf.holding(outgoing.buffer)
        return self._send_header(outgoing, segment, None, when_sent)

    def end_announcement(self, outgoing: Outgoing, stage_id: str) -> None:
        """Forget the stage of a packet that is not packed to its end; never raises."""
        self.discard(stage_id)
        segment = self.shelf.holding(outgoing.buffer)
        if segment is not None:
            segment.fill(outgoing.buffer.numel())  # workers wait for it

    def _send_header(
        self,
        outgoing: Outgoing,
        segment: Segment | None,
        update_id: str | None,
        when_sent: Callable[[], Any] | None = None,
    ) -> str:
        header, timeout_s = outgoing.header, self._config.stage_timeout_s
        body = {
            "header": header.named(header.policy, header.version, self.epoch).to_json(),
            "transport": self._opened["transport"],
            "timeout_s": timeout_s,
            "update_id": update_id,
            "segment": None if segment is None else vars(segment.spec),
        }
        return str(self._control("stage", body, timeout_s, when_sent)["stage_id"])

    def _check(self, stage_id: str, digest: str, timeout_s: float) -> None:
        body = {
            "stage_id": stage_id,
            "digest": digest,
            "timeout_s": self._config.stage_timeout_s,
        }
        self._control("staged", body, timeout_s)

    @property
    def shares_memory(self) -> bool:
        """Whether packets go to this server through shared memory."""
        return self._joined is not None and self._joined["transport"] == Transport.SHM

    def do_without_shared_memory(self, error: TinkError) -> None:
        """Let the next channel be one that needs none; raises `error` if it was asked for."""
        self._take_gloo(error)
        self.close()

    def _segment_with(self, buffer: torch.Tensor) -> Segment:
        """The packet in shared memory: where it was packed, else copied to a segment of our own.

        Raises:
            SegmentUnreachable: there is no room for it; gloo is taken from now on (`auto`).
        """
        packed_in = self.shelf.holding(buffer)
        if packed_in is not None:
            packed_in.fill(buffer.numel())
            return packed_in
        if self._segment is None or self._segment.buffer.numel() < buffer.numel():
            try:
                self._segment = Segment.create(buffer.numel())
            except errors.SegmentUnreachable as error:
                self.do_without_shared_memory(error)
                raise
        self._segment.buffer[: buffer.numel()].copy_(buffer)
        self._segment.fill(buffer.numel())
        return self._segment

    def _broadcast(self, stage_id: str, buffer: torch.Tensor, timeout_s: float) -> None:
        from tink_rl.transport.communicator import transfer

        assert self._channel is not None and self._joined is not None
        src, moved = self._joined["rank"], buffer.cpu()
        try:
            for _ in transfer(self._channel, moved, src=src, timeout_s=timeout_s):
                pass
        except errors.ChannelLost:
            self.discard(stage_id)
            self.close()
            raise

    def _send_chunks(self, stage_id: str, buffer: torch.Tensor, timeout_s: float) -> None:
        data = buffer.numpy().data
        for offset in range(0, len(data), CHUNK_BYTES):
            self.client.control(
                f"stage/{stage_id}/chunk",
                timeout_s=timeout_s,
                content=bytes(data[offset : offset + CHUNK_BYTES]),
                params={"offset": offset},
            )

    def discard(self, stage_id: str) -> None:
        """Forget a stage; never raises."""
        with contextlib.suppress(TinkError):
            self._control("discard", {"stage_id": stage_id}, 5.0)

    def commit(
        self, stage_id: str, retire: Sequence[str] = (), digest: str | None = None
    ) -> dict[str, Any]:
        """Serve a stage, and stop serving the slot versions `retire` of the same policy.

        Args:
            stage_id: What `stage` gave; with `digest`, what `send` gave.
            retire: Names of versions.
            digest: Check the packet first; for a replica that nobody has to wait for.

        Returns:
            `{"digest", "held_seconds"}` as the workers hold it then, and `full`: whose whole tensors are
            in place of the base.

        Raises:
            TinkError: the packet is refused; the server serves what it served before.
            DrainTimeout, CommitFailed, WorkersDiffer.
        """
        config = self._config
        body = {
            "stage_id": stage_id,
            "retire": list(retire),
            "digest": digest,
            "timeout_s": config.stage_timeout_s,
            "drain_timeout_s": config.drain_timeout_s,
            "on_running": config.on_running,
        }
        timeout_s = config.commit_timeout_s + config.drain_timeout_s
        return self._control("commit", body, timeout_s + config.stage_timeout_s)

    def drop(self, name: str) -> None:
        """Stop serving `name`; a version that is not served is fine."""
        config = self._config
        body = {
            "name": name,
            "epoch": self.epoch,
            "drain_timeout_s": config.drain_timeout_s,
            "on_running": config.on_running,
        }
        with contextlib.suppress(errors.UnknownVersion):
            self._control("drop", body, config.commit_timeout_s + config.drain_timeout_s)

    # -- one full update --------------------------------------------------------------------------

    def layout(self) -> list[list[str]]:
        """Names of the served checkpoint's tensors, by group that must be sent whole.

        Raises:
            ModeUnavailable: the server does not offer full mode.
        """
        found: list[list[str]] = self.client.control("layout", timeout_s=30.0)["groups"]
        return found

    def begin_update(
        self, *, version: int, base_fingerprint: str, plan: list[dict[str, Any]] | None
    ) -> str:
        """Let the server check what will be sent, and hold its requests; the update's id.

        Raises:
            TinkError: what is wrong; nothing has changed.
        """
        config = self._config
        body = {
            "policy": config.policy,
            "version": version,
            "epoch": self.epoch,
            "base_fingerprint": base_fingerprint,
            "plan": plan,
            "timeout_s": config.stage_timeout_s,
            "drain_timeout_s": config.drain_timeout_s,
            "on_running": config.on_running,
        }
        timeout_s = config.commit_timeout_s + config.drain_timeout_s
        return str(self._control("begin", body, timeout_s)["update_id"])

    def send_bucket(self, update_id: str, outgoing: Outgoing) -> None:
        """Send one bucket of a full update; returns once it is checked and written.

        Raises:
            TinkError: what is wrong; the update has ended.
        """
        config = self._config
        stage_id = self.send(outgoing, update_id)
        self._check(stage_id, outgoing.digest(), config.stage_timeout_s + config.commit_timeout_s)

    def finish_update(self, update_id: str, digest: str) -> dict[str, Any]:
        """Serve what was sent; `{"digest", "held_seconds"}` as the workers hold it then.

        Raises:
            IncompleteGroup, DigestMismatch, CommitFailed, WorkersDiffer.
        """
        body = {"update_id": update_id, "digest": digest}
        return self._control("finish", body, self._config.commit_timeout_s)

    def abort_update(self, update_id: str, reason: str) -> None:
        """End a full update early; never raises."""
        with contextlib.suppress(TinkError):
            self._control("abort", {"update_id": update_id, "reason": reason}, 30.0)


class Fleet:
    """Several replicas that serve the same policy."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        if not replicas:
            raise errors.ConfigError("no vLLM server was given; set SyncConfig(servers=(URL,))")
        self.replicas = list(replicas)
        self._shelf = Shelf()
        for replica in self.replicas:
            replica.shelf = self._shelf
        self._pool: ThreadPoolExecutor | None = None

    def each(self, work: Callable[[Replica], T]) -> list[T]:
        """`work(replica)` on all at once, in order of the replicas.

        Raises:
            TinkError: the first that failed, with the replica's URL in its details, after all ended.
        """
        if len(self.replicas) == 1:
            return [_named(work, self.replicas[0])]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(len(self.replicas), thread_name_prefix="tink-fleet")
        futures = [self._pool.submit(_named, work, replica) for replica in self.replicas]
        failures = [f.exception() for f in futures]
        for failure in failures:
            if failure is not None:
                raise failure
        return [future.result() for future in futures]

    def room(self, num_bytes: int, spare: torch.Tensor | None = None) -> torch.Tensor:
        """Memory for a packet, `[>= num_bytes] uint8`: `spare` where it still serves, else new memory.

        Shared with the servers on this machine, so that what is packed into it needs no further copy.
        Where there is none a sharing replica's channel is closed, and its next one is another.

        Raises:
            SegmentUnreachable: there is none, and `transport="shm"` was asked for.
        """
        import torch

        sharing = [replica for replica in self.replicas if replica.shares_memory]
        serves = spare is not None and (not sharing or self._shelf.holding(spare) is not None)
        if spare is not None and serves and spare.numel() >= num_bytes:
            return spare
        try:
            if sharing:
                return self._shelf.new(num_bytes)
        except errors.SegmentUnreachable as error:
            for replica in sharing:
                replica.do_without_shared_memory(error)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def announce(self, outgoing: Outgoing) -> Callable[[int], None] | None:
        """Send the header of a packet that is still to be packed, where nobody waits for another replica.

        Returns:
            To be called with the number of bytes that are packed; None: nothing was announced.
        """
        segment = self._shelf.holding(outgoing.buffer)
        if segment is None or len(self.replicas) > 1 or not self.replicas[0].shares_memory:
            return None
        segment.fill(0)
        outgoing.announce(self.replicas[0])
        return segment.fill

    def drop_room(self, room: torch.Tensor) -> None:
        """Let go of memory that `room` gave and that nobody packs into again."""
        self._shelf.drop(room)

    def statuses(self) -> list[ServerStatus]:
        """Status of every replica; raises if one is NOT READY only when it is published to."""
        return self.each(lambda replica: replica.status())

    def check_alike(self) -> ServerStatus:
        """The facts that all replicas share.

        Raises:
            ConfigError: they differ in base, dtype, modes, slots or logprobs.
        """
        statuses = self.statuses()
        alike = ("base_fingerprint", "dtype", "adapter_dtype", "modes", "max_lora_rank")
        for name in (*alike, "logprobs_mode", "no_full_logprobs"):
            values = {str(getattr(status, name)) for status in statuses}
            if len(values) > 1:
                raise errors.ConfigError(
                    f"the servers differ in {name}: {sorted(values)}; start all of them alike"
                )
        return statuses[0]

    def close_channels(self) -> None:
        """Give all leases back; the next publish joins again."""
        for replica in self.replicas:
            replica.close()

    def close(self) -> None:
        """Give all leases and threads back; what is asked later takes them anew."""
        self.close_channels()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)


def _named(work: Callable[[Replica], T], replica: Replica) -> T:
    try:
        return work(replica)
    except TinkError as error:
        error.details.setdefault("replica", replica.url)
        raise
