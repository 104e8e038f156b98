"""`WeightSync.publish()`: one policy version from the trainer to every replica, verified.

collect -> normalise -> pack -> (join) -> stage on all -> commit on all -> verify -> point.
A refused or failed stage leaves the served policy untouched; a version becomes current only after
every replica has answered that it serves it, with its digest.
"""

from __future__ import annotations

import logging
import uuid
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.errors import Retry, TinkError
from tink_rl.policy import packet
from tink_rl.policy.adapter import Adapter, check_packed, from_peft_dir
from tink_rl.policy.collect import Collector, LiveModel, collector_for
from tink_rl.policy.fingerprint import base_fingerprint, checkpoint_index
from tink_rl.policy.live_check import check_live_base
from tink_rl.policy.shapes import BaseShapes
from tink_rl.policy.support import WHOLE, Needs
from tink_rl.policy.whole import WholeSource, whole_source
from tink_rl.publish.base_content import check_content
from tink_rl.publish.modes import choose_mode
from tink_rl.publish.probes import Probe, ProbeCheck
from tink_rl.publish.stopwatch import Stopwatch
from tink_rl.transport.fleet import Fleet
from tink_rl.transport.outgoing import Outgoing
from tink_rl.transport.replica import Replica
from tink_rl.transport.sampling_client import SamplingClient
from tink_rl.transport.whole_update import WholeUpdate
from tink_rl.types import Phase, PublishRecord, ServerStatus, SyncMode

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("tink_rl")

_PUBLISHED_MODELS: weakref.WeakValueDictionary[int, WeightSync] = weakref.WeakValueDictionary()


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
        self._base_model = str(base_model)
        self._fingerprint: str | None = None
        self._mode: SyncMode | None = None
        self._status: ServerStatus | None = None
        self._version = 0
        self.probes = ProbeCheck(self.fleet, self.config)
        self._kept: list[str] = []
        self.pinned: str | None = None
        """A version that stays served beyond `keep_versions`, because a rollout goes on with it."""
        self._last: tuple[packet.PacketHeader, torch.Tensor] | None = None
        self._collector: tuple[Any, Collector] | None = None
        self._compared: weakref.WeakSet[Any] = weakref.WeakSet()
        """Live models whose base was found to be the checkpoint's."""
        self._live_digest = ""
        """Of what was trained in the current full version, if a live PEFT model gave it."""
        self._said: str | None = None
        self._groups: list[list[str]] | None = None
        self._shapes: BaseShapes | None = None
        """Of the base, once an adapter's files were to be read."""
        self._resend: Callable[[], WholeSource] | None = None
        """Gives the tensors of the current full version again, if it can."""
        self._spare: torch.Tensor | None = None
        """A buffer that holds no version any more, to pack the next one into."""
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
            self._fingerprint = base_fingerprint(self._base_model)
            self._mode = choose_mode(self.config.mode, status, policy=self.config.policy).mode
            self._check_base(status)
            check_content(self.fleet, self._base_model)
            self._status = status
        self.fleet.each(lambda replica: replica.ensure_channel())
        return self._status

    def _check_base(self, status: ServerStatus) -> None:
        if status.base_fingerprint != self._fingerprint:
            commit = f" at {status.base_revision[:12]}" if status.base_revision else ""
            raise errors.BaseMismatch(
                f"the trainer's base {self._base_model!r} is not the one that is served "
                f"({status.base_model!r}{commit}); serve the directory that the trainer loads",
                given=self._fingerprint,
                expected=status.base_fingerprint,
            )

    @property
    def mode(self) -> SyncMode:
        """The mode in use; known after `open`."""
        if self._mode is None:
            raise errors.ConfigError("the mode is not known yet; call open() first")
        return self._mode

    def settle(self, needed: Needs) -> SyncMode:
        """Choose the mode for an adapter that needs `needed`, and say in one line which and why.

        Raises:
            UnsupportedAdapter: the mode that was asked for cannot express it.
            ModeUnavailable: the server offers none that can.
        """
        if self.current is not None:
            if self.mode not in needed.modes:
                raise errors.UnsupportedAdapter(
                    f"{self.current.name} is published in {self.mode.value} mode, which cannot express "
                    f"{', '.join(needed.because)}"
                )
            return self.mode
        if self.mode not in needed.modes or self._said is None:
            choice = choose_mode(self.config.mode, self.status, needed, policy=self.config.policy)
            if self._said is None or choice.mode is not self._mode:
                logger.info("mode %s: %s: %s", self.config.mode, choice.mode.value, choice.reason)
            self._mode, self._said = choice.mode, choice.reason
        return self.mode

    def use_mode(self, mode: SyncMode) -> None:
        """Publish in `mode` from now on (before the first version only)."""
        if self.current is not None:
            raise errors.ConfigError(f"{self.current.name} is published in {self._mode}; too late")
        self._mode = mode

    @property
    def status(self) -> ServerStatus:
        """The servers' facts as of `open`."""
        if self._status is None:
            raise errors.ConfigError("the servers were not asked yet; call open() first")
        return self._status

    def start_after(self, version: int) -> None:
        """Number the next publish above `version` (a checkpoint's)."""
        self._version = max(self._version, version)

    @property
    def last_number(self) -> int:
        """The highest version whose commit was ever sent, whatever became of it."""
        return self._version

    def close(self) -> None:
        """Give lease and channel back. What was published stays served."""
        self.fleet.close()
        for key in [key for key, sync in _PUBLISHED_MODELS.items() if sync is self]:
            del _PUBLISHED_MODELS[key]

    def claim(self, model: object) -> None:
        """Say that this is the one publisher of `model` in this process.

        Raises:
            SecondPublisher: another one is.
        """
        other = _PUBLISHED_MODELS.get(id(model))
        if other is not None and other is not self:
            raise errors.SecondPublisher(
                f"this model is already published as policy {other.config.policy!r}; use one trainer, "
                "callback or attach() per model, or close() the other one"
            )
        _PUBLISHED_MODELS[id(model)] = self

    # -- publish ----------------------------------------------------------------------------------

    def publish(
        self,
        source: Adapter | Any | Callable[[], Adapter],
        *,
        probe: Probe | None = None,
        synthetic: bool = False,
    ) -> PublishRecord:
        """Make `source` the current version on every replica.

        Args:
            source: An `Adapter`, a live PEFT model, a PEFT directory, or a function that collects.
            probe: Compare the server's logprobs with these before the version becomes current.
            synthetic: Publish as version 0, which is no version of the policy: for a probe that is
                dropped again before the first one.

        Returns:
            The record; `published` is False if this very digest is current already.

        Raises:
            PublishFailed: it failed twice; details name phase and replica.
            TinkError: the packet was refused (with the reason), or another phase, which its details
                name, failed; what was served stays served.
        """
        watch = Stopwatch()
        with watch.naming_phase():
            return self._publish(source, watch, probe, synthetic=synthetic)

    def _publish(
        self, source: Any, watch: Stopwatch, probe: Probe | None, *, synthetic: bool
    ) -> PublishRecord:
        with watch(Phase.JOIN):
            self.open()
        with watch(Phase.COLLECT):
            found = self._collect(source)
        if isinstance(found, LiveModel):
            return self._publish_live(found, watch, probe, synthetic=synthetic)
        with watch(Phase.NORMALISE):
            adapter = found.to(self._wire_dtype())
        version = 0 if synthetic else self._next_version()
        with watch(Phase.PACK):
            header = packet.layout(
                adapter.tensors,
                mode=self.mode,
                base_fingerprint=self._fingerprint or "",
                rank=adapter.rank,
            ).named(self.config.policy, version, 0)
            if self.current is not None and self._is_last(header, adapter):
                return self._unchanged(self.current, watch)
            outgoing = self._pack(header, adapter)
        if self.mode is SyncMode.FULL:
            with watch(Phase.NORMALISE):  # before the first byte of a whole update is written
                check_packed(header, outgoing.buffer)
            # The packed copy: the live one may have changed when a lost server asks for it again.
            packed = Adapter(tensors=packet.unpack(header, outgoing.buffer), rank=adapter.rank)
            old = self._last
            record = self._publish_whole(lambda: self._whole(packed), version, watch, probe)
            self._spare = old[1] if old is not None else None
            self._last = (header, outgoing.buffer)
            return record
        return self._publish_packet(outgoing, watch, probe)

    def _pack(self, header: packet.PacketHeader, adapter: Adapter) -> Outgoing:
        """The adapter as a packet; its header may be on its way already."""
        outgoing = Outgoing(header, self._room(header.num_bytes))
        try:
            progress = None if self.mode is SyncMode.FULL else self.fleet.announce(outgoing)
            packet.fill(header, outgoing.buffer, adapter.tensors, progress)
        except BaseException:
            self.fleet.withdraw(outgoing)
            raise
        return outgoing

    def _room(self, num_bytes: int) -> torch.Tensor:
        # Kept at once: a publish that fails, or has nothing new, leaves it to the next one.
        self._spare = self.fleet.room(num_bytes, self._spare)
        return self._spare[:num_bytes]

    def _unchanged(self, current: PublishRecord, watch: Stopwatch) -> PublishRecord:
        return replace(
            current,
            published=False,
            num_bytes=0,
            seconds=watch.total,
            held_seconds=0.0,
            phase_seconds=watch.seconds,
        )

    # -- full -------------------------------------------------------------------------------------

    def publish_full(self, source: Any, *, probe: Probe | None = None) -> PublishRecord:
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
            probe: Compare the server's logprobs with these before the version becomes current.

        Raises:
            UnknownModules, ShapeMismatch, IncompleteGroup, ...: refused. What was served stays served
                if `source` is a model or a mapping, whose plan is checked before the first byte; a
                stream can be found wrong midway, and the servers are then NOT READY.
            PublishFailed: it failed twice (a stream: once); details name phase and replica.
        """
        watch = Stopwatch()
        once = isinstance(source, Iterator)
        with watch.naming_phase():
            with watch(Phase.JOIN):
                self.open()
            if hasattr(source, "get_base_model"):
                sent = self._whole(source).entries or ()
                self._check_live(source, travels={entry.name for entry in sent})
            record = self._publish_whole(
                lambda: self._whole(source), self._next_version(), watch, probe, once=once
            )
        self._resend = None if once else lambda: self._whole(source)
        return record

    def _collect(self, source: Any) -> Adapter | LiveModel:
        """What `source` holds now, and the mode settled that it needs."""
        if isinstance(source, (str, Path)):
            if self._shapes is None:
                self._shapes = BaseShapes.from_model_dir(self._base_model)
            return from_peft_dir(source, base=self._shapes)
        if hasattr(source, "get_base_model"):
            if self._collector is None or self._collector[0] is not source:
                self._collector = (source, collector_for(source, self._base_model))
                self._check_live(source)
            collector = self._collector[1]
            self.settle(collector.needs)
            return collector.collect(live=True)  # packed before it can change
        found: Any = source() if callable(source) else source
        if isinstance(found, LiveModel):
            self.settle(Needs(modes=WHOLE, because=("a model that no adapter describes",)))
        elif not isinstance(found, Adapter):
            raise errors.UnsupportedAdapter(
                f"publish() got {type(source).__name__}; expected a PEFT model, a PEFT directory or an "
                "Adapter (publish_full() takes whole models)"
            )
        taken: Adapter | LiveModel = found
        return taken

    def _check_live(self, model: Any, travels: Collection[str] = ()) -> None:
        """Compare the base of a live PEFT model with what is served, once a model.

        Raises:
            BaseMismatch: it was changed in memory.
        """
        if model not in self._compared:
            check_live_base(model, self._base_model, travels=travels)
            self._compared.add(model)

    def _publish_live(
        self, live: LiveModel, watch: Stopwatch, probe: Probe | None, *, synthetic: bool
    ) -> PublishRecord:
        digest = live.digest()
        if self.current is not None and digest == self._live_digest:
            return self._unchanged(self.current, watch)

        version = 0 if synthetic else self._next_version()
        with live.changed():
            record = self._publish_whole(lambda: self._whole(live.model), version, watch, probe)
        self._live_digest = digest
        return record

    def check_whole(self, model: Any) -> None:
        """Raise unless the whole tensors of `model` fit the served checkpoint; sends nothing.

        Raises:
            UnknownModules, UnsupportedAdapter.
        """
        self._whole(model)

    def _whole(self, source: Any) -> WholeSource:
        if self._groups is None:
            self._groups = self.fleet.replicas[0].layout()
        return whole_source(source, self._groups, checkpoint_index(self._base_model))

    def _publish_whole(
        self,
        make: Callable[[], WholeSource],
        version: int,
        watch: Stopwatch,
        probe: Probe | None,
        *,
        once: bool = False,
        digest: str | None = None,
    ) -> PublishRecord:
        """Send whole tensors as `version`; with `digest` only if they are the ones that it names."""
        name = f"{self.config.policy}@{version}"
        update: WholeUpdate | None = None

        def send() -> float:
            nonlocal update, version, name
            with watch(Phase.JOIN):
                self.fleet.each(lambda replica: replica.ensure_channel())
            with watch(Phase.COLLECT):
                source = make()
            if digest is None and update is not None and 0 < version <= self._version:
                # The second try: what `make` reads may have changed since the first one's end was sent.
                version = self._next_version()
                name = f"{self.config.policy}@{version}"
            update = self._new_update(version, digest)
            return self._send_whole(update, source, watch)

        held_s = self._twice(name, watch, send, tries=1 if once else 2)
        assert update is not None
        record = PublishRecord(
            policy=self.config.policy,
            version=version,
            digest=update.digest,
            mode=SyncMode.FULL,
            num_bytes=update.num_bytes,
            seconds=watch.total,
            held_seconds=held_s,
            phase_seconds=watch.seconds,
        )
        if probe is not None:
            with watch(Phase.VERIFY):
                record = replace(
                    record, probe_gap=self.probes.check(probe, name, self.status, self.mode)
                )
        self.current, self._last, self._resend = record, None, make
        self._live_digest = ""
        self._kept = []  # slots of this policy ended with the full version
        return replace(record, seconds=watch.total, phase_seconds=watch.seconds)

    def _new_update(self, version: int, digest: str | None) -> WholeUpdate:
        return WholeUpdate(
            self.fleet,
            policy=self.config.policy,
            version=version,
            base_fingerprint=self._fingerprint or "",
            dtype=self.status.dtype,
            bucket_bytes=int(self.config.bucket_mib * 2**20),
            expected=digest,
        )

    def _send_whole(self, update: WholeUpdate, source: WholeSource, watch: Stopwatch) -> float:
        """Begin, every tensor, finish; the longest hold in seconds."""
        with watch(Phase.STAGE):
            update.begin(source.plan(self.status.dtype))
            update.add_all(source.pairs())
        with watch(Phase.COMMIT):
            self._take(update.version)
            return update.finish()

    # -- packets ----------------------------------------------------------------------------------

    def _is_last(self, header: packet.PacketHeader, adapter: Adapter) -> bool:
        """Whether these very bits are current; a rollout asks after each step, and nothing is packed then."""
        if self._last is None or not self._last[0].same_weights(header):
            return False
        last, buffer = self._last
        # After an optimizer step the first tensor differs already, and the rest need not be read.
        return all(
            packet.same_bits(packet.view(buffer, spec), adapter.tensors[spec.name])
            for spec in last.tensors
        )

    def _publish_packet(
        self,
        outgoing: Outgoing,
        watch: Stopwatch,
        probe: Probe | None,
    ) -> PublishRecord:
        version = outgoing.header.version
        name = f"{self.config.policy}@{version}"
        retire = self._superseded()
        try:
            held_s = self._twice(name, watch, lambda: self._send(outgoing, watch, retire))
        except TinkError:
            if version == self._version and outgoing.header.mode is SyncMode.ADAPTER:
                self._kept.insert(0, name)  # it may be served; the next commit drops it
            # Whatever else went wrong: broken weights are no checkpoint to resume from.
            check_packed(outgoing.header, outgoing.buffer)
            raise
        self._kept = [kept for kept in self._kept if kept not in retire]
        named = replace(outgoing.header, digest=outgoing.digest())
        gap = None
        if probe is not None:
            with watch(Phase.VERIFY):
                gap = self.probes.check(probe, name, self.status, self.mode)
        record = PublishRecord(
            policy=self.config.policy,
            version=version,
            digest=named.digest,
            mode=self.mode,
            num_bytes=named.num_bytes,
            seconds=watch.total,
            held_seconds=held_s,
            phase_seconds=watch.seconds,
            probe_gap=gap,
        )
        with watch(Phase.POINT):
            self.current = record
            self._spare = self._last[1] if self._last is not None else None
            self._last = (named, outgoing.buffer)
            self._retire(name)
        return replace(record, seconds=watch.total, phase_seconds=watch.seconds)

    def _next_version(self) -> int:
        return max(self._version, *(r.last_version for r in self.fleet.replicas)) + 1

    def _take(self, version: int) -> None:
        """Never give `version` to other weights: its commit is being sent, and may not be heard of again."""
        self._version = max(self._version, version)

    def _wire_dtype(self) -> torch.dtype:
        import torch

        # Folded weights are rounded once, at the fold, so their adapter stays fp32.
        wanted = self.status.adapter_dtype if self.mode is SyncMode.ADAPTER else "float32"
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype

    def _twice(
        self, name: str, watch: Stopwatch, work: Callable[[], float], *, tries: int = 2
    ) -> float:
        try:
            return work()
        except TinkError as error:
            if error.retry not in (Retry.RECONNECT, Retry.RESEND):
                raise
            if tries == 1:
                self.fleet.close_channels()  # the next publish joins again
                raise self._failed(name, watch, error) from error
            logger.warning("publish of %s failed in %s, trying again: %s", name, watch.phase, error)
        self.fleet.close_channels()
        try:
            return work()
        except TinkError as error:
            raise self._failed(name, watch, error) from error

    def _failed(self, name: str, watch: Stopwatch, error: TinkError) -> errors.PublishFailed:
        return errors.PublishFailed(
            f"{name} could not be published: phase {watch.phase!r}, replica "
            f"{error.details.get('replica')}: {error.message}",
            phase=watch.phase,
            replica=error.details.get("replica"),
            cause=error.code,
        )

    def _send(
        self,
        outgoing: Outgoing,
        watch: Stopwatch,
        retire: Sequence[str] = (),
    ) -> float:
        """Stage on all, then commit on all and drop `retire`; the longest hold in seconds.

        No replica commits before all have found the packet right. One alone checks it as it commits.
        """
        stages: dict[str, str] = {}
        alone = len(self.fleet.replicas) == 1

        def stage(replica: Replica) -> None:
            stages[replica.url] = replica.send(outgoing) if alone else replica.stage(outgoing)

        def commit(replica: Replica) -> dict[str, Any]:
            return replica.commit(stages[replica.url], retire, outgoing.digest() if alone else None)

        with watch(Phase.JOIN):
            self.fleet.each(lambda replica: replica.ensure_channel())
        try:
            with watch(Phase.STAGE):
                self.fleet.each(stage)
        except TinkError:
            for replica in self.fleet.replicas:
                if replica.url in stages:
                    replica.discard(stages[replica.url])
            raise
        with watch(Phase.COMMIT):
            self._take(outgoing.header.version)
            answers = self.fleet.each(commit)
        self.base_taken_by = next((a["full"] for a in answers if a.get("full")), None)
        with watch(Phase.VERIFY):
            for replica, answer in zip(self.fleet.replicas, answers, strict=True):
                if answer["digest"] != outgoing.digest():
                    raise errors.DigestMismatch(
                        f"{replica.url} holds {answer['digest']}, sent was {outgoing.digest()}",
                        replica=replica.url,
                    )
        return max(float(answer["held_seconds"]) for answer in answers)

    def _superseded(self) -> list[str]:
        """Slot versions that a commit may drop.

        Not the current one, which stays until the next is proven, nor one that a rollout goes on with.
        """
        old = self._kept[: -max(1, self.config.keep_versions - 1)]
        return [name for name in old if name != self.pinned]

    def _retire(self, name: str) -> None:
        if self.mode is not SyncMode.ADAPTER:
            return
        self._kept.append(name)
        for old in self._kept[: -self.config.keep_versions]:
            if old != self.pinned:
                self._kept.remove(old)
                self._drop(old)

    def _drop(self, name: str) -> None:
        self.fleet.each(lambda replica: replica.drop(name))

    def drop_current(self) -> None:
        """Stop serving the current version (merged, full: the base comes back); used after a probe."""
        if self.current is None:
            return
        name = self.current.name
        self._drop(name)
        self._kept = [kept for kept in self._kept if kept != name]
        if self._last is not None:
            self._spare = self._last[1]
        self.current = self._last = self._resend = None
        self._live_digest = ""

    # -- trust ------------------------------------------------------------------------------------

    def recover(self) -> bool:
        """Publish the current version again to replicas that lost it (a restart); True if any did.

        Raises:
            PublishFailed: a replica does not take it.
        """
        if self.current is None or (self._last is None and self._resend is None):
            return False
        name = self.current.name
        lost = [r for r in self.fleet.replicas if name not in r.status().served]
        if not lost:
            return False
        for replica in lost:
            logger.warning("%s lost %s (restarted?); publishing it again", replica.url, name)
            replica.forget_channel()
        if self._resend is not None:
            self._resend_whole(self._resend)
            return True
        assert self._last is not None
        header, buffer = self._last
        self._twice(
            name,
            Stopwatch(),
            lambda: self._send(Outgoing(header, buffer), Stopwatch()),
        )
        return True

    def _resend_whole(self, make: Callable[[], WholeSource]) -> None:
        assert self.current is not None
        record, last = self.current, self._last
        self._publish_whole(make, record.version, Stopwatch(), None, digest=record.digest)
        self._last = last
