"""The link between one trainer and its servers: start, publish after each step, recover, stop.

Every rank has a `PolicyLink`; rank 0 publishes and tells the others the version, or the error, so
that all go on together or all stop with the same reason.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.errors import TinkError
from tink_rl.policy.adapter import AdapterCollector
from tink_rl.training.probe import Prober
from tink_rl.transport.vllm_client import VLLMClient
from tink_rl.types import PublishRecord, ServerStatus, SyncMode
from tink_rl.weight_sync import WeightSync

logger = logging.getLogger("tink_rl")
CHECKPOINT_FILE = "tink_policy.json"


class PolicyLink:
    """Keeps the servers at the trainer's current policy."""

    def __init__(
        self,
        model: Any,
        accelerator: Any,
        *,
        clients: list[VLLMClient],
        config: SyncConfig,
        base_model: str,
        prober: Prober,
    ) -> None:
        """Find the adapter in `model`; speaks to no server yet.

        Raises:
            UnsupportedAdapter: the adapter cannot be published.
            SecondPublisher: the model has a publisher already.
        """
        self.collector = AdapterCollector(model)
        self.sync = WeightSync(clients, base_model=base_model, config=config)
        self.sync.claim(model)
        self.records: list[PublishRecord] = []
        """Every publish that sent something, in order (rank 0)."""
        self._accelerator, self._prober = accelerator, prober
        self._config = config
        self._current = ""
        self._digests: dict[str, str] = {}
        self._started = False

    @property
    def current(self) -> str:
        """Name of the version that new rollouts sample from.

        Raises:
            ConfigError: nothing was published yet.
        """
        if not self._current:
            raise errors.ConfigError("nothing was published yet; call trainer.train() first")
        return self._current

    def start(self, check: Callable[[ServerStatus], None]) -> None:
        """Open channels, prove by a synthetic adapter that versions are applied; idempotent.

        Raises:
            ProbeFailed: the server does not apply what is published.
            TinkError: a server is missing, holds another base, is taken, ...
        """
        if self._started:
            return

        def work() -> None:
            check(self.sync.open())
            self._prober.prove(self.sync, self.collector)

        self._on_rank_0(work)
        self._started = True

    def publish(self) -> PublishRecord:
        """Publish what the model holds now; every rank gets the record.

        Every rank must call it.

        Raises:
            ConfigError: a rollout is under way, and in this mode it would go on with another policy.
            TinkError: see `WeightSync.publish`.
        """

        def work() -> PublishRecord:
            if self.sync.pinned and self.sync.mode is not SyncMode.ADAPTER:
                raise errors.ConfigError(
                    f"publish() in the middle of a rollout that {self.sync.pinned} samples: in "
                    f"{self.sync.mode.value} mode its next turn would come from another policy; "
                    "publish between rollouts, or set SyncConfig(mode='adapter')"
                )
            probing = self._config.probe_every and len(self.records) % self._config.probe_every == 0
            probe = self._prober.probe() if probing else None
            return self.sync.publish(partial(self.collector.collect, live=True), probe=probe)

        record: PublishRecord = self._on_rank_0(work)
        self._current = record.name
        self._digests[record.name] = record.digest
        if record.published:
            self.records.append(record)
        return record

    def pin(self, name: str | None) -> None:
        """Keep `name` served while a rollout goes on with it; None: it ended."""
        self.sync.pinned = name

    def digest_of(self, name: str) -> str:
        """Digest of a version that this run published; known on every rank."""
        return self._digests[name]

    def recover(self) -> bool:
        """See `WeightSync.recover`; only rank 0 can."""
        return self._accelerator.is_main_process and self.sync.recover()

    def _on_rank_0(self, work: Callable[[], Any]) -> Any:
        """`work()` on rank 0; every rank gets its result, or raises what it raised."""
        outcome: list[Any] = [None, None]
        if self._accelerator.is_main_process:
            try:
                outcome = [work(), None]
            except TinkError as error:
                if self._accelerator.num_processes == 1:
                    raise
                outcome = [None, error.to_wire()]
        if self._accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(outcome, from_process=0)
            if outcome[1] is not None:
                raise errors.from_wire(outcome[1], 500)
        return outcome[0]

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write which version a checkpoint holds (rank 0)."""
        record = self.sync.current
        if record is None or not self._accelerator.is_main_process:
            return
        data = {
            "policy": record.policy,
            "version": record.version,
            "digest": record.digest,
            "mode": record.mode.value,
        }
        path = Path(directory) / CHECKPOINT_FILE
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        partial.replace(path)

    def restore(self, directory: str | os.PathLike[str]) -> None:
        """Number new versions above the checkpoint's, if it names one."""
        path = Path(directory) / CHECKPOINT_FILE
        if path.is_file():
            self.sync.start_after(int(json.loads(path.read_text())["version"]))

    def close(self) -> None:
        """Give the lease back; what was published stays served."""
        self.sync.close()


def device_of(model: Any) -> torch.device:
    """Where the model's parameters lie."""
    device: torch.device = next(model.parameters()).device
    return device
