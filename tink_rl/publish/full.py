"""The full path: whole tensors, streamed into the served model in one transaction.

There is no memory to stage a second model in: requests are held from the first byte to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from tink_rl.policy.full import FullSource, full_source
from tink_rl.protocol import CommitAnswer
from tink_rl.publish.full_update import FullUpdate
from tink_rl.types import SyncMode

if TYPE_CHECKING:
    from tink_rl.config import SyncConfig
    from tink_rl.publish.base import TrainedBase
    from tink_rl.transport.fleet import Fleet
    from tink_rl.transport.outgoing import OutgoingPacket


class FullPath:
    """What every full update of one publisher has in common."""

    def __init__(self, fleet: Fleet, config: SyncConfig, base: TrainedBase) -> None:
        self._fleet, self._config, self._base = fleet, config, base
        self._groups: list[list[str]] | None = None

    def tensors_of(self, source: object) -> FullSource:
        """The whole tensors of `source`, as the servers group them.

        Raises:
            UnknownModules, UnsupportedAdapter: they do not fit the served checkpoint.
        """
        if self._groups is None:
            self._groups = self._fleet.replicas[0].layout()
        return full_source(source, self._groups, self._base.index())

    def update(self, version: int, dtype: str, expected: str | None) -> FullUpdate:
        """A full update that has not begun."""
        return FullUpdate(
            self._fleet,
            policy=self._config.policy,
            version=version,
            base_fingerprint=self._base.fingerprint,
            dtype=dtype,
            bucket_bytes=int(self._config.bucket_mib * 2**20),
            expected=expected,
        )


class FullTransfer:
    """Whole tensors on their way to all replicas."""

    mode = SyncMode.FULL

    def __init__(
        self,
        path: FullPath,
        source: object,
        *,
        version: int,
        dtype: str,
        expected: str | None = None,
        packed: OutgoingPacket | None = None,
        live_digest: str | None = None,
        holding: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Store; `stage` reads `source` and speaks to the servers.

        Args:
            path: Of its publisher.
            source: What `full_source` takes.
            version: A fresh number; or, with `expected`, one that these weights had before.
            dtype: The servers'.
            expected: Digest without which nothing is served.
            packed: The adapter that `source` was made of, if it was one.
            live_digest: Of what is trained in a live model, if `source` is one.
            holding: `source` holds what is to be sent inside this block.
        """
        self._path, self._source, self._dtype = path, source, dtype
        self.version, self._expected = version, expected
        self.packed, self.live_digest = packed, live_digest
        self._holding = holding
        self._update: FullUpdate | None = None

    @property
    def is_stream(self) -> bool:
        """Whether it can be read once only."""
        return isinstance(self._source, Iterator)

    @property
    def may_have_changed(self) -> bool:
        """Whether another attempt may read other values than the one before: a live model is trained."""
        return self._expected is None

    @property
    def num_bytes(self) -> int:
        """Sent to each replica."""
        return 0 if self._update is None else self._update.num_bytes

    @property
    def digest(self) -> str:
        """Of all that was sent."""
        return "" if self._update is None else self._update.digest

    def stage(self) -> None:
        """Hold the requests of every replica and send every tensor.

        Raises:
            TinkError: a replica refuses; before the first byte nothing has changed, after it the servers
                are NOT READY.
        """
        with self._holding():
            tensors = self._path.tensors_of(self._source)
            self._update = self._path.update(self.version, self._dtype, self._expected)
            self._update.begin(tensors.plan(self._dtype))
            self._update.add_all(tensors.pairs())

    def commit(self, retire: Sequence[str]) -> list[CommitAnswer]:
        """Serve what was sent on every replica (slots of the policy end); what each holds then.

        Raises:
            TinkError: see `FullUpdate.finish`.
        """
        assert self._update is not None
        return self._update.finish()

    def again(self) -> FullTransfer | None:
        """The same tensors under the same number, for a replica that lost them; None of a stream."""
        if self.is_stream:
            return None
        return FullTransfer(
            self._path,
            self._source,
            version=self.version,
            dtype=self._dtype,
            expected=self.digest,
            packed=self.packed,
            live_digest=self.live_digest,
        )
