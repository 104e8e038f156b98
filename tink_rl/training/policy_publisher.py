"""The link between one trainer and its servers: start, publish after each step, recover, stop.

Every rank has a `PolicyPublisher` and runs the same lines: each collects and probes (collectives, where the
model is sharded), rank 0 publishes, and its record or its error is every rank's.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.policy.adapter import Adapter, AdapterCollector, active_adapter
from tink_rl.policy.collect import LiveModel, collector_for
from tink_rl.policy.live_check import check_frozen, check_live_base
from tink_rl.policy.model_dir import place_in_hub
from tink_rl.policy.peft_dir import POLICY_FILE
from tink_rl.policy.peft_names import PeftModel
from tink_rl.policy.sharded import Sharding, refuse_flat_parameters
from tink_rl.publish.modes import check_fits, check_slots
from tink_rl.publish.publisher import WeightSync
from tink_rl.publish.stopwatch import Stopwatch
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.training.probe import Prober
from tink_rl.training.ranks import Ranks
from tink_rl.training.trl_names import Accelerator
from tink_rl.transport.replica import Replica
from tink_rl.types import Phase, PublishRecord, ServerStatus, SyncMode

logger = logging.getLogger("tink_rl")
_POLL_S = 0.2


class PolicyPublisher:
    """Keeps the servers at the trainer's current policy."""

    def __init__(
        self,
        model: PeftModel,
        accelerator: Accelerator,
        *,
        clients: list[VLLMClient],
        config: SyncConfig,
        base_model: str,
        prober: Prober,
        ranks: Ranks,
        tokenizer: object = None,
    ) -> None:
        """Find the adapter in `model`; speaks to no server yet.

        Args:
            model: The PEFT model, without the wrappers of accelerate.
            accelerator: The trainer's, for rank and number of processes.
            clients: One per server.
            config: Settings.
            base_model: Directory (or cached hub id) of the base.
            prober: Of the same model.
            ranks: The processes of the run.
            tokenizer: The trainer's, to be compared with the served vocabulary.

        Raises:
            UnsupportedAdapter: the adapter cannot be published.
            SecondPublisher: the model has a publisher already.
        """
        self.ranks = ranks
        self.collector = collector_for(model, base_model or None)
        check_fits(config.wanted_mode, self.collector.needs)
        self.sync = WeightSync(clients, base_model=base_model, config=config)
        self.sync.claim(model)
        self.records: list[PublishRecord] = []
        """Every publish that sent something, in order; the same on every rank."""
        self.resumed_from: Path | None = None
        """The checkpoint that `train` was told to resume from, where it was told."""
        self.first_step: int | None = None
        """Optimizer steps that were done when training began; None: it has not."""
        self.is_training = False
        """Whether `train` is under way: it gives the lease back when it ends."""
        self._model, self._accelerator, self._prober = model, accelerator, prober
        self._config, self._base_model, self._tokenizer = config, base_model, tokenizer
        self._current = ""
        self._mode: SyncMode | None = None
        self._digests: dict[str, str] = {}
        self._started = self._base_compared = False
        self._proven_on: str | None = None

    @property
    def current(self) -> str:
        """Name of the version that new rollouts sample from.

        Raises:
            ConfigError: nothing was published yet.
        """
        if not self._current:
            raise errors.ConfigError("nothing was published yet; call trainer.train() first")
        return self._current

    @property
    def replaces_in_place(self) -> bool:
        """Whether the next publish takes the current version away; known on every rank."""
        return self._mode in (SyncMode.MERGED, SyncMode.FULL)

    def start(self, check: Callable[[ServerStatus], None]) -> None:
        """Open channels, prove by a synthetic adapter that versions are applied; idempotent.

        Every rank must call it.

        Raises:
            BaseMismatch: the trainer's base, as it is in memory on any rank, is not what is served.
            ProbeFailed: the server does not apply what is published.
            TinkError: a server is missing, holds another base, is taken, ...
        """
        if self._started:
            self._compare_base_once()
            return
        refuse_flat_parameters(self._model)
        _warn_if_fsdp_was_left_out(self._accelerator)

        self.ranks.on_leader(lambda: check(self.sync.open()))
        self._compare_base_once()
        self.ranks.on_leader(self._settle_mode)
        self._prober.self_test(self.sync, self.collector)
        self._proven_on = self.sync.base_taken_by
        if self.ranks.is_leader and self._config.probe_every and self._is_partitioned:
            logger.info(
                "ZeRO-3: only the first version is probed; rollout/logprob_gap goes on comparing"
            )
        self._started = True

    def _settle_mode(self) -> None:
        mode = self.sync.settle(self.collector.needs)
        if mode is SyncMode.ADAPTER:
            check_slots(self._config.max_staleness, self.sync.status)
        # A sharded model's tensors do not show their shapes; its adapter is folded from the checkpoint.
        if mode is SyncMode.FULL and self.collector.sharding() is Sharding.WHOLE:
            self.sync.check_whole(self._model)

    @property
    def _is_partitioned(self) -> bool:
        return self.collector.sharding() is Sharding.ZERO3

    def expect_other_base(self) -> None:
        """Let the next `start` compare the base again: it may have been changed since the last one."""
        self._base_compared = False

    def _compare_base_once(self) -> None:
        if not self._base_compared:
            self.ranks.each(self._check_base)
            self._base_compared = True

    def publish(self) -> PublishRecord:
        """Publish what the model holds now; every rank gets the record.

        Every rank must call it.

        Raises:
            ConfigError: a rollout is under way, and in this mode it would go on with another policy.
            BaseMismatch: another run has put its whole tensors in place of the base since the start.
            TinkError: see `WeightSync.publish`.
        """

        watch = Stopwatch()
        with watch.naming_phase(), watch(Phase.COLLECT):
            policy = self.ranks.each(lambda: self.collector.collect(live=True))
        if self._probes_now():
            self.ranks.on_leader(self._check_no_rollout)
            record = self._prober.publish(self.sync, policy, watch)
            self.ranks.on_leader(lambda: self._check_base_is_there(record.name))
        else:
            data = self.ranks.on_leader(lambda: self._publish_unprobed(policy, watch))
            record = PublishRecord.from_json(data)
        self._current, self._mode = record.name, record.mode
        self._digests[record.name] = record.digest
        if record.published:
            self.records.append(record)
        return record

    def _publish_unprobed(self, policy: Adapter | LiveModel, watch: Stopwatch) -> dict[str, Any]:
        self._check_no_rollout()
        record = self.sync.publish(policy, watch=watch)
        self._check_base_is_there(record.name)
        return asdict(record)

    def _check_no_rollout(self) -> None:
        pinned = self.sync.versions.pinned
        if pinned and self.sync.mode is not SyncMode.ADAPTER:
            raise errors.ConfigError(
                f"publish() in the middle of a rollout that {pinned} samples: in "
                f"{self.sync.mode.value} mode its next turn would come from another policy; "
                "publish between rollouts, or set SyncConfig(mode='adapter')"
            )

    def _check_base_is_there(self, name: str) -> None:
        now, proven_on = self.sync.base_taken_by, self._proven_on
        if now != proven_on:
            weights, proven = (
                f"the whole tensors of {n!r}" if n else "the base" for n in (now, proven_on)
            )
            raise errors.BaseMismatch(
                f"{name} is a slot on a server that now holds {weights}; this run was proven on {proven}, so "
                "what is sampled is no longer the policy that is trained. Give one of the two runs a server "
                "of its own, or `tink-rl drop URL NAME` that version once its run has ended, then resume"
            )

    def _probes_now(self) -> bool:
        """Whether the next version is the first, or another `probe_every` later.

        Under ZeRO-3 only the first is probed, before the first step: a forward whose modules come in
        another order than in training (TRL fuses the head into the loss) leaves DeepSpeed's prefetching
        with a parameter in flight, and a later step ends the run.
        """
        if self.records and self._is_partitioned:
            return False
        every = self._config.probe_every
        return every > 0 and len(self.records) % every == 0

    def pin(self, name: str | None) -> None:
        """Keep `name` served while a rollout goes on with it; None: it ended."""
        self.sync.versions.pinned = name

    def digest_of(self, name: str) -> str:
        """Digest of a version that this run published; known on every rank."""
        return self._digests[name]

    def _check_base(self) -> None:
        """What no file says: the base in memory, with several processes each its own."""
        if isinstance(self.collector, AdapterCollector):
            check_frozen(self._model)
        tokenizer = self._tokenizer if self.ranks.is_leader else None
        check_live_base(self._model, self._base_model, tokenizer=tokenizer)

    def recover(self) -> bool:
        """See `WeightSync.recover`; rank 0 publishes again, the others wait until it has.

        Raises:
            UnknownVersion: rank 0 did not within the deadlines of a publish.
        """
        if self._accelerator.is_main_process:
            return self.sync.recover()
        config = self._config
        # Rank 0 may join, stage and commit twice.
        each_s = config.join_timeout_s + config.stage_timeout_s + config.commit_timeout_s
        deadline = time.monotonic() + config.lease_wait_s + 2 * (each_s + config.drain_timeout_s)
        while not all(self._serves_current(replica) for replica in self.sync.fleet.replicas):
            if time.monotonic() > deadline:
                raise errors.UnknownVersion(
                    f"a server lost {self._current}, and rank 0 did not publish it again; start the run "
                    "again with --resume_from_checkpoint"
                )
            time.sleep(_POLL_S)
        return True

    def _serves_current(self, replica: Replica) -> bool:
        try:
            return self._current in replica.status().served
        except (errors.ServerUnreachable, errors.RequestTimeout, errors.NotReady):
            return False  # it still starts

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str], *, published: bool = True) -> None:
        """Write which version a checkpoint holds (rank 0).

        Not `published`: what it holds could not be published; it names the last version that was, for
        the numbers to go on from, and no digest.
        """
        record = self.sync.current
        if record is None or not self._accelerator.is_main_process:
            return
        data = {
            "policy": record.policy,
            "version": record.version,
            "last_number": self.sync.versions.last,
            "digest": record.digest if published else None,
            "mode": record.mode.value,
            "base_fingerprint": self.sync.status.base_fingerprint,
            **place_in_hub(self._base_model),
        }
        # PEFT writes an adapter that is not called `default` to a folder of its name.
        named = Path(directory) / active_adapter(self._model)
        for path in [Path(directory) / POLICY_FILE, *([named / POLICY_FILE] * named.is_dir())]:
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(data, indent=1) + "\n")
            partial.replace(path)

    def restore(self, directory: str | os.PathLike[str]) -> None:
        """Number new versions above all that the run had sent by this checkpoint, if it names one.

        Raises:
            ConfigError: what it says of that cannot be read.
        """
        path = Path(directory) / POLICY_FILE
        if not path.is_file():
            return
        try:
            data = json.loads(path.read_text())
            number = int(data.get("last_number") or data["version"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise errors.ConfigError(
                f"{path} does not say which version the checkpoint holds ({error!r}); resume from another "
                "checkpoint, or remove the file: numbers then go on above those that the server knows"
            ) from error
        self.sync.start_after(number)

    def close(self) -> None:
        """Give the lease back; what was published stays served."""
        self.ranks.close()
        self.sync.close()


def _warn_if_fsdp_was_left_out(accelerator: Accelerator) -> None:
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and getattr(accelerator.distributed_type, "value", None) != "FSDP":
        logger.warning(
            "the accelerate config asks for FSDP, and accelerate runs %s: it takes FSDP on GPUs only, and "
            "says nothing. Every process holds the whole model",
            getattr(accelerator.distributed_type, "value", accelerator.distributed_type),
        )
