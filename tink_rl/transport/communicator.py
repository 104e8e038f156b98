"""One flat buffer from the trainer to every worker of one server, within a deadline.

The server's first worker binds a rendezvous store on an address of its choice; the other workers and
the trainer dial it. Ranks are the workers' own (0 .. world_size - 1); the trainer is the last one.
A channel belongs to one epoch and is never mended: after any error it is closed, and the next publish
opens a fresh one in the same process. Nothing here pickles: a broadcast carries raw bytes, and what
they mean travels in the control request.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tink_rl.errors import ChannelLost, ConfigError
from tink_rl.types import Transport

PIECE_BYTES = 4 * 2**20
"""Both sides of a transfer cut the buffer here."""


def bind_store(host: str, port: int, timeout_s: float) -> tuple[dist.TCPStore, int]:
    """A rendezvous store listening on `host` only, and its port (`port` 0 = any free one).

    Raises:
        ConfigError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # TCPStore would bind every interface; it has no authentication, so it gets a socket
        # that is bound to the interface we chose.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"the channel cannot bind {host}:{port} ({error.strerror}); give another "
            "--channel-port, or 0 for any free one"
        ) from error
    bound = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        bound,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.fileno(),
    )
    listener.detach()  # the store owns the descriptor now
    return store, bound


def dial_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Connect to the store that the server's first worker bound.

    Raises:
        ChannelLost: nobody answers within `timeout_s`.
    """
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=False,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise ChannelLost(
            f"no rendezvous at {host}:{port} within {timeout_s:g} s; is the port open between trainer "
            "and server? Else use SyncConfig(transport='http')"
        ) from error


def local_address(host: str, port: int) -> str:
    """Address of the interface of this machine from which `host` is reached.

    Raises:
        ChannelLost: there is no way to it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ChannelLost(f"no interface of this machine reaches {host}: {error}") from error


class Channel:
    """A joined communicator: gloo over TCP, for buffers on the CPU. One transfer at a time.

    Not NCCL, between GPUs either: two of its ranks cannot share one GPU, its writes are not ordered behind
    the engine's streams, and its watchdog ends the process of whoever lost a peer.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        nonce: str,
        rank: int,
        world_size: int,
        host: str,
        timeout_s: float,
    ) -> None:
        """Rendezvous with all `world_size` ranks; blocks until they are there.

        Args:
            store: Where they meet.
            nonce: Of this channel.
            rank: This side's.
            world_size: Number of ranks.
            host: Address of this machine that the other ranks reach; each rank gives its own.
            timeout_s: For all of them to come.

        Raises:
            ChannelLost: not all ranks came within `timeout_s`, or `host` is not an address of this machine.
        """
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        try:
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        except RuntimeError as error:
            raise ChannelLost(
                f"rank {rank} of {world_size} cannot use {host} as its address: {str(error)[:200]}"
            ) from error
        try:
            self._group: Any = dist.ProcessGroupGloo(
                dist.PrefixStore(f"tink/{nonce}", store), rank, world_size, options
            )
        except RuntimeError as error:
            raise ChannelLost(
                f"rank {rank} of {world_size}: the others did not join within {timeout_s:g} s"
            ) from error
        self._store = store

    def broadcast(
        self,
        buffer: torch.Tensor,
        *,
        src: int,
        timeout_s: float,
    ) -> None:
        """Move `buffer` `[num_bytes] uint8` from rank `src` to all others, in place.

        Every rank must call it with a buffer of the same length.

        Raises:
            ChannelLost: a peer is gone or the deadline passed. Close the channel then.
        """
        _broadcast(self._group, buffer, src, timeout_s)

    def close(self) -> None:
        """End the channel; idempotent, never raises."""
        group, self._group, self._store = self._group, None, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()


def transfer(
    channel: Channel, buffer: torch.Tensor, *, src: int, timeout_s: float
) -> Iterator[torch.Tensor]:
    """Broadcast `buffer` in pieces; gives each once it is through, so that it can be hashed meanwhile.

    Raises:
        ChannelLost: a peer is gone or `timeout_s` passed for the whole.
    """
    deadline = time.monotonic() + timeout_s
    for piece in torch.split(buffer, PIECE_BYTES):
        left_s = max(0.001, deadline - time.monotonic())
        channel.broadcast(piece, src=src, timeout_s=left_s)
        yield piece


def _broadcast(group: Any, buffer: torch.Tensor, src: int, timeout_s: float) -> None:
    if group is None:
        raise ChannelLost("this channel was closed; the next publish opens a fresh one")
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = src, 0
    options.timeout = timedelta(seconds=timeout_s)
    try:
        # Not wait(timeout): gloo's work ends by itself at the deadline of its options.
        group.broadcast([buffer], options).wait()
    except RuntimeError as error:
        raise _lost(buffer, timeout_s, error) from error


def _lost(buffer: torch.Tensor, timeout_s: float, why: object) -> ChannelLost:
    return ChannelLost(
        f"{buffer.numel()} bytes did not get through within {timeout_s:g} s; the peer of this "
        f"channel is gone or too slow: {str(why)[:200]}"
    )


def choose_transport(wanted: Transport, *, same_machine: bool) -> Transport:
    """What carries the bytes: shared memory on one machine, else gloo, unless said otherwise."""
    if wanted is not Transport.AUTO:
        return wanted
    return Transport.SHM if same_machine else Transport.GLOO
