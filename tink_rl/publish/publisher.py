"""`WeightSync.publish()`: one policy version from the trainer to every replica, verified.

collect -> normalise -> pack -> (join) -> stage on all -> commit on all -> verify -> point.
A refused or failed stage leaves the served policy untouched; a version becomes current only after
every replica has answered that it serves it, with its digest.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.errors import TinkError
from tink_rl.policy.adapter import check_packed
from tink_rl.policy.peft_names import PeftModel, is_peft_model
from tink_rl.policy.support import Needs
from tink_rl.publish import owners
from tink_rl.publish.base import TrainedBase
from tink_rl.publish.base_content import check_content
from tink_rl.publish.full import FullPath, FullTransfer
from tink_rl.publish.modes import ModeInUse
from tink_rl.publish.preparation import Preparation, Transfer
from tink_rl.publish.probes import ProbeCheck
from tink_rl.publish.recovery import forget_where_lost, may_pass, publish_failed
from tink_rl.publish.stopwatch import Stopwatch
from tink_rl.publish.versions import Versions
from tink_rl.transport.fleet import Fleet
from tink_rl.transport.replica import Replica
from tink_rl.transport.sampling_client import SamplingClient
from tink_rl.types import Phase, PolicyVersion, PublishRecord, ServerStatus, SyncMode

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("tink_rl")


@dataclass(kw_only=True)
class _Sent:
    """A version that every replica serves and no rollout samples from yet."""

    transfer: Transfer
    record: PublishRecord
    watch: Stopwatch


class WeightSync:
    """Publishes one policy to one or more servers. Not thread-safe: one publish at a time.

    Example:
        with WeightSync("http://127.0.0.1:8000", base_model="models/base") as sync:
            record = sync.publish(peft_model)          # PeftModel, Adapter or PEFT directory
            client.generate(prompts, model=record.name)
    """

    def __init__(
        self,
        servers: str | SamplingClient | Sequence[str | SamplingClient],
        *,
        base_model: str | Path,
        config: SyncConfig | None = None,
        writer: str | None = None,
    ) -> None:
        """Store; `open` (or the first publish) speaks to the servers.

        Args:
            servers: URL(s) or client(s) of the servers that serve the same policy.
            base_model: Directory (or cached hub id) of the base that the adapter is trained on.
            config: Settings; the default is one policy called "policy".
            writer: Who publishes; another writer of the same policy name is refused.
        """
        self.config = config or SyncConfig()
        given = [servers] if isinstance(servers, (str, SamplingClient)) else list(servers)
        self.writer = writer or f"writer-{uuid.uuid4().hex[:12]}"
        clients = [s if isinstance(s, SamplingClient) else self._client(s) for s in given]
        self.fleet = Fleet([Replica(c, self.config, writer=self.writer) for c in clients])
        self.probes = ProbeCheck(self.fleet, self.config)
        # Rows of as many earlier versions may be under way, on any rank, when the next one is sent.
        keep = max(self.config.keep_versions, self.config.max_staleness + 1)
        self.versions = Versions(self.config.policy, keep=keep)
        self._modes = ModeInUse(self.config.wanted_mode, self.config.policy)
        self._base = TrainedBase(str(base_model))
        self._full = FullPath(self.fleet, self.config, self._base)
        self._preparation = Preparation(self.fleet, self._base, self._full)
        self._status: ServerStatus | None = None
        self._sent: _Sent | None = None
        self._served: Transfer | None = None
        """What the current version was sent as; None: its stream cannot be read again."""
        self.current: PublishRecord | None = None
        """The version that new rollouts sample from."""
        self.base_taken_by: str | None = None
        """Whose whole tensors a server held in place of its base at the last commit of a packet."""

    def _client(self, url: str) -> SamplingClient:
        return SamplingClient(
            url,
            token=self.config.read_token(),
            api_key=self.config.read_api_key(),
            ca_file=self.config.ca_file,
            request_timeout_s=self.config.request_timeout_s,
        )

    def __enter__(self) -> WeightSync:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- start and end ----------------------------------------------------------------------------

    def open(self) -> ServerStatus:
        """Check that the servers are alike, hold this base and offer the mode; join their channels.

        Raises:
            ServerUnreachable, PluginMissing, BadToken, BaseMismatch, ModeUnavailable, LeaseHeld.
        """
        if self._status is None:
            status = self.fleet.check_alike()
            self._modes.open(status)
            self._base.check_served(status)
            check_content(self.fleet, self._base.directory)
            self._status = status
            self._replace_full()
        self._join()
        return self._status

    def _replace_full(self) -> None:
        """With mode "auto", end what an earlier run left of this policy in full mode: slots exclude it."""
        full, auto = self.status.full, self.config.wanted_mode == "auto"
        if auto and full and PolicyVersion.parse(full).policy == self.config.policy:
            self._join()
            self._drop(full)
            self._status = self.fleet.check_alike()
            self._modes.open(self._status)

    def _join(self) -> None:
        self.fleet.each(lambda replica: replica.ensure_channel())

    @property
    def status(self) -> ServerStatus:
        """The servers' facts as of `open`."""
        if self._status is None:
            raise errors.ConfigError("the servers were not asked yet; call open() first")
        return self._status

    @property
    def mode(self) -> SyncMode:
        """The mode in use; known after `open`."""
        return self._modes.mode

    def settle(self, needed: Needs) -> SyncMode:
        """Choose the mode for an adapter that needs `needed`; see `ModeInUse.settle`.

        Raises:
            UnsupportedAdapter, ModeUnavailable: none can be taken.
        """
        return self._modes.settle(needed, self.status, self.current)

    def use_mode(self, mode: SyncMode) -> None:
        """Publish in `mode` from now on (before the first version only)."""
        self._modes.use(mode, self.current)

    def start_after(self, version: int) -> None:
        """Number the next publish above `version` (a checkpoint's)."""
        self.versions.take(version)

    def claim(self, model: object) -> None:
        """Say that this is the one publisher of `model` in this process.

        Raises:
            SecondPublisher: another one is.
        """
        owners.claim(model, self.versions)

    def close(self) -> None:
        """Give lease and channel back. What was published stays served."""
        self.fleet.close()
        owners.release(self.versions)

    # -- publish ----------------------------------------------------------------------------------

    def publish(
        self, source: object, *, synthetic: bool = False, watch: Stopwatch | None = None
    ) -> PublishRecord:
        """Make `source` the current version on every replica.

        Args:
            source: An `Adapter`, a live PEFT model, or a PEFT directory.
            synthetic: Publish as version 0, which is not a version of the policy: for a probe that is
                dropped again before the first one.
            watch: Of a publish that began outside, with its collecting.

        Returns:
            The record; `published` is False if this very digest is current already.

        Raises:
            PublishFailed: it failed twice; details name phase and replica.
            TinkError: the packet was refused (with the reason), or another phase, which its details
                name, failed; what was served stays served.
        """
        record = self.send(source, synthetic=synthetic, watch=watch)
        return self.point() if record.published else record

    def send(
        self, source: object, *, synthetic: bool = False, watch: Stopwatch | None = None
    ) -> PublishRecord:
        """All of `publish` but its last step: every replica serves `source`, and it is not current yet.

        Args:
            source: As `publish` takes it.
            synthetic: As `publish` takes it.
            watch: As `publish` takes it.

        Raises:
            TinkError: see `publish`.
        """
        watch = watch or Stopwatch()
        with watch.naming_phase():
            with watch(Phase.JOIN):
                self.open()
            with watch(Phase.COLLECT):
                needed = self._preparation.needs_of(source)
                if needed is not None:
                    self.settle(needed)
                policy = self._preparation.collect(source)
            with watch(Phase.NORMALISE):
                policy = policy.to(_wire_dtype(self.mode, self.status))
            with watch(Phase.PACK):
                version = 0 if synthetic else self._next_version()
                transfer = self._preparation.pack(
                    policy,
                    PolicyVersion(policy=self.config.policy, version=version),
                    mode=self.mode,
                    dtype=self.status.dtype,
                    served=self._served if self.current is not None else None,
                )
            if transfer is None:
                assert self.current is not None
                return _unchanged(self.current, watch)
            return self._deliver(transfer, watch)

    def _deliver(self, transfer: Transfer, watch: Stopwatch, *, tries: int = 2) -> PublishRecord:
        """Join, stage, commit, verify; once more on fresh channels, where that may help."""
        try:
            held_s = self._with_tries(transfer, watch, self.versions.superseded(), tries)
        except TinkError:
            if transfer.version == self.versions.last and transfer.mode is SyncMode.ADAPTER:
                # It may be served; the next commit drops it.
                self.versions.add_uncertain(self.versions.name(transfer.version))
            if transfer.packed is not None:
                # Whatever else went wrong: broken weights are not a checkpoint to resume from.
                check_packed(transfer.packed.header, transfer.packed.buffer)
            raise
        record = PublishRecord(
            policy=self.config.policy,
            version=transfer.version,
            digest=transfer.digest,
            mode=transfer.mode,
            num_bytes=transfer.num_bytes,
            seconds=watch.total,
            held_seconds=held_s,
            phase_seconds=watch.seconds,
        )
        self._sent = _Sent(transfer=transfer, record=record, watch=watch)
        return record

    def _with_tries(
        self, transfer: Transfer, watch: Stopwatch, retire: Sequence[str] = (), tries: int = 2
    ) -> float:
        try:
            return self._attempt(transfer, watch, retire)
        except TinkError as error:
            if not may_pass(error):
                raise
            self.fleet.close_channels()  # whatever is published next joins again
            name = self.versions.name(transfer.version)
            if tries == 1:
                raise publish_failed(name, watch.phase, error) from error
            logger.warning("publish of %s failed in %s, trying again: %s", name, watch.phase, error)
        if isinstance(transfer, FullTransfer) and transfer.may_have_changed:
            transfer.version = self._number_of_next_attempt(transfer.version)
        try:
            return self._attempt(transfer, watch, retire)
        except TinkError as error:
            name = self.versions.name(transfer.version)
            raise publish_failed(name, watch.phase, error) from error

    def _number_of_next_attempt(self, number: int) -> int:
        # Whose commit was sent is not given to what may be other weights.
        return self._next_version() if 0 < number <= self.versions.last else number

    def _attempt(self, transfer: Transfer, watch: Stopwatch, retire: Sequence[str]) -> float:
        """Every replica serves it, with its digest, and `retire` no more; the longest hold in seconds."""
        with watch(Phase.JOIN):
            self._join()
        with watch(Phase.STAGE):
            transfer.stage()
        with watch(Phase.COMMIT):
            self.versions.take(transfer.version)  # it may not be heard of again
            answers = transfer.commit(retire)
        with watch(Phase.VERIFY):
            for replica, answer in zip(self.fleet.replicas, answers, strict=True):
                if answer.digest != transfer.digest:
                    raise errors.DigestMismatch(
                        f"{replica.url} holds {answer.digest}, sent was {transfer.digest}",
                        replica=replica.url,
                    )
        self.versions.discard(retire)
        self.base_taken_by = next((a.full for a in answers if a.full), None)
        return max(answer.held_seconds for answer in answers)

    def point(self, probe_gap: float | None = None) -> PublishRecord:
        """Make what was sent last the current version, and drop what it supersedes; its record.

        Args:
            probe_gap: By how much its logprobs differ from the trainer's, if that was compared.
        """
        assert self._sent is not None
        sent, self._sent = self._sent, None
        with sent.watch.naming_phase(), sent.watch(Phase.POINT):
            self.current = replace(sent.record, probe_gap=probe_gap)
            self._serve(sent.transfer)
            if sent.transfer.mode is SyncMode.ADAPTER:
                for old in self.versions.add(self.current.name):
                    self._drop(old)
            if sent.transfer.mode is SyncMode.FULL:
                self.versions.discard(self.versions.kept)  # the policy's slots ended with it
        return replace(self.current, seconds=sent.watch.total, phase_seconds=sent.watch.seconds)

    def _next_version(self) -> int:
        return self.versions.next(replica.last_version for replica in self.fleet.replicas)

    # -- full -------------------------------------------------------------------------------------

    def publish_full(self, source: object) -> PublishRecord:
        """Make the whole tensors of `source` the current version on every replica.

        The version is the served checkpoint with what was sent in place of its own: tensors that an
        earlier version changed and this one does not send are the checkpoint's again. Requests are
        held from the first byte to the last. Always sends; there is no cheap way to see that nothing
        changed.

        Args:
            source: A transformers model; a PEFT model (merged on the fly, in fp32, into temporaries;
                only the tensors that its adapter changes are sent, as whole fused groups); a mapping
                of names to tensors; or any iterable of (name, tensor) pairs with the checkpoint's
                names, as Megatron-Bridge's `export_hf_weights` yields them (read once, never held
                whole).

        Raises:
            UnknownModules, ShapeMismatch, IncompleteGroup, ...: refused. What was served stays served
                if `source` is a model or a mapping, whose plan is checked before the first byte; a
                stream can be found wrong midway, and the servers are then NOT READY.
            PublishFailed: it failed twice (a stream: once); details name phase and replica.
        """
        watch = Stopwatch()
        with watch.naming_phase():
            with watch(Phase.JOIN):
                self.open()
            with watch(Phase.COLLECT):
                if is_peft_model(source):
                    sent = self._full.tensors_of(source).entries or ()
                    self._base.check_live(source, travels={entry.name for entry in sent})
            transfer = FullTransfer(
                self._full, source, version=self._next_version(), dtype=self.status.dtype
            )
            self._deliver(transfer, watch, tries=1 if transfer.is_stream else 2)
            return self.point()

    def check_whole(self, model: PeftModel) -> None:
        """Raise unless the whole tensors of `model` fit the served checkpoint; sends nothing.

        Raises:
            UnknownModules, UnsupportedAdapter.
        """
        self._full.tensors_of(model)

    # -- what is served ---------------------------------------------------------------------------

    def _serve(self, transfer: Transfer | None) -> None:
        self._preparation.exchange(self._served, transfer)
        self._served = transfer

    def _drop(self, name: str) -> None:
        self.fleet.each(lambda replica: replica.drop(name))

    def drop_current(self) -> None:
        """Stop serving the current version (merged, full: the base comes back); used after a probe."""
        if self.current is None:
            return
        name = self.current.name
        self._drop(name)
        self.versions.discard([name])
        self._serve(None)
        self.current = None

    def recover(self) -> bool:
        """Publish the current version again to replicas that lost it (a restart); True if any did.

        Raises:
            PublishFailed: a replica does not take it.
        """
        if self.current is None or self._served is None:
            return False
        again = self._served.again()
        if again is None or not forget_where_lost(self.fleet, self.current.name):
            return False
        self._with_tries(again, Stopwatch())
        return True


def _unchanged(current: PublishRecord, watch: Stopwatch) -> PublishRecord:
    return replace(
        current,
        published=False,
        num_bytes=0,
        seconds=watch.total,
        held_seconds=0.0,
        phase_seconds=watch.seconds,
    )


def _wire_dtype(mode: SyncMode, status: ServerStatus) -> torch.dtype:
    import torch

    # Folded weights are rounded once, at the fold, so their adapter stays fp32.
    dtype: torch.dtype = getattr(
        torch, status.adapter_dtype if mode is SyncMode.ADAPTER else "float32"
    )
    return dtype
