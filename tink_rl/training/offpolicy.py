"""The account of what is off-policy, kept where rows may be older than the policy that they train.

After TRL has scored a batch, a sample of its rows is scored once more under the version that sampled
them, so that the log-ratio to the sampler splits in two (`log_ratio.py`). The sample is every eighth row,
moved on by one each step: it costs an eighth of TRL's own scoring forward, and two copies of what is
trained. Rows of the version that the trainer holds are all looked at, for nothing.

A forward is a collective where the model is sharded. So all ranks gather first which versions sampled
their rows, then score under each older one of these together, on the main thread.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from trl.models.utils import disable_gradient_checkpointing

from tink_rl.config import SyncConfig
from tink_rl.errors import ProbeFailed
from tink_rl.publish.probe_rules import AGREES, Limits, limits
from tink_rl.training import metrics
from tink_rl.training.kept_versions import KeptVersions
from tink_rl.training.log_ratio import Logprobs, pooled, split
from tink_rl.training.ratio import LEAST_ESS
from tink_rl.training.rollouts import RolloutBatch
from tink_rl.training.trl_names import RolloutTrainer
from tink_rl.types import PolicyVersion

logger = logging.getLogger("tink_rl")
_EVERY_ROW = 8
FEW_EFFECTIVE = "the importance weights of older rows leave too little of a batch (offpolicy/ess)"
"""Why the next rows are sampled by the newest version."""


class OffPolicyAccount:
    """Remembers versions, says how far the rows of each step are from the policy, raises the alarms."""

    def __init__(
        self, trainer: RolloutTrainer, kept: KeptVersions, *, tolerance: float | None = None
    ) -> None:
        """Store.

        Args:
            trainer: Whose batches are looked at, and whose metrics they go into.
            kept: `max_staleness + 1` versions of its model.
            tolerance: The user's own limit of the numerics gap; None: what rounding explains.
        """
        self._trainer, self._kept, self._tolerance = trainer, kept, tolerance
        self._proven: float | None = None
        self._is_loud = False
        self._current = ""
        self.wants_fresh = False
        """The next rows are to be sampled by the newest version; alike on every rank."""

    @classmethod
    def of(cls, trainer: RolloutTrainer, sync: SyncConfig) -> OffPolicyAccount:
        """The account of a built trainer, whose model is published as `sync` says."""
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        return cls(
            trainer, KeptVersions(model, sync.max_staleness + 1), tolerance=sync.probe_tolerance
        )

    def remember(self, name: str) -> None:
        """The version `name`, which the model holds now, was published; every rank must call it."""
        self._kept.remember(name)
        self._current = name

    def look(self, batch: RolloutBatch, output: dict[str, Any]) -> None:
        """Add what a scored batch shows to the metrics; every rank must call it.

        Args:
            batch: Its rows, and which version sampled them.
            output: What TRL's `_generate_and_score_completions` gave back.

        Raises:
            ProbeFailed: another policy than the one that is named has sampled the rows.
        """
        if batch.phase != "train":
            return
        names = batch.gather([batch.model])
        ages = [_number(self._current) - _number(name) for name in names]
        found = {
            "offpolicy/age_mean": sum(ages) / len(ages),
            "offpolicy/age_max": float(max(ages)),
        }
        logprobs = Logprobs.of(batch, output)
        if logprobs is not None:
            older = sorted(set(names) - {self._current}, key=_number)
            rows, then = self._rescored(batch, output, logprobs, older)
            parts = batch.gather([split(logprobs, rows, then)])
            found |= pooled(parts, is_sequence=logprobs.is_sequence)
        metrics.add(self._trainer._metrics["train"], found)
        self._judge_gap(batch, found)
        self._judge_ess(batch, found)

    # -- once more, under the version that sampled --------------------------------------------------

    def _rescored(
        self,
        batch: RolloutBatch,
        output: dict[str, Any],
        logprobs: Logprobs,
        older: Sequence[str],
    ) -> tuple[Sequence[int], torch.Tensor | None]:
        """The rows that are looked at, and their logprobs under the version that sampled them.

        None in their place: the trainer holds it. `older` are the versions of all ranks, in order.
        """
        num_rows = len(logprobs.mask)
        rows = sample_of(num_rows, batch.step)
        then = None
        for name in older:
            scored_ST = self._scored_under(name, output, rows)
            if name == batch.model:
                then = logprobs.comparable(scored_ST, output["completion_mask"][rows])
        return (range(num_rows), None) if then is None else (rows, then)

    @torch.no_grad()
    def _scored_under(self, name: str, output: dict[str, Any], rows: list[int]) -> torch.Tensor:
        """Logprobs [S, T] of `rows` under the kept version `name`, as TRL scores them."""
        trainer, args = self._trainer, self._trainer.args
        ids, mask = (
            torch.cat([output[f"prompt_{what}"][rows], output[f"completion_{what}"][rows]], dim=1)
            for what in ("ids", "mask")
        )
        length = output["completion_ids"].shape[1]
        with (
            disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs),
            self._kept.swapped(name),
        ):
            scored_ST, *_ = trainer._get_per_token_logps_and_entropies(
                *(trainer.model, ids, mask, length), batch_size=args.per_device_train_batch_size
            )
        found: torch.Tensor = scored_ST
        return found

    # -- alarms -------------------------------------------------------------------------------------

    def _judge_gap(self, batch: RolloutBatch, found: dict[str, float]) -> None:
        """Compare the numerics part with that of the first batch, whose version a probe has just proven.

        Raises:
            ProbeFailed: it is larger than rounding can be.
        """
        gap = found.get("offpolicy/numerics_gap")
        if gap is None:
            return
        if self._proven is None:
            self._proven = gap
        allowed = _limits(self._proven, self._tolerance)
        if not gap <= allowed.fail:
            _refuse(batch, gap, allowed.fail, self._proven)
        is_loud = gap > allowed.quiet
        if is_loud and not self._is_loud and batch.rank == 0:
            logger.warning(
                "step %d: rows that %s sampled differ from the trainer under that version by %.2g nats "
                "(root mean square; %.2g in the first step), more than %.2g: above %.2g the run ends. "
                "The importance ratio carries it; compare the dtypes: `tink-rl doctor URL --model BASE`",
                *(batch.step, batch.model, gap, self._proven, allowed.quiet, allowed.fail),
            )
        self._is_loud = is_loud

    def _judge_ess(self, batch: RolloutBatch, found: dict[str, float]) -> None:
        """Ask for fresh rows where the older ones' weights leave too little of the batch."""
        ess = found.get("offpolicy/ess", 1.0)
        is_low = ess < LEAST_ESS and found["offpolicy/age_max"] > 0
        if is_low and not self.wants_fresh and batch.rank == 0:
            logger.warning(
                "step %d: the importance weights of rows up to %.0f versions old are worth %.0f%% of the "
                "batch (effective sample size), less than %.0f%%: the next rows are sampled by the newest "
                "version",
                *(batch.step, found["offpolicy/age_max"], 100 * ess, 100 * LEAST_ESS),
            )
        self.wants_fresh = is_low


def _number(name: str) -> int:
    return PolicyVersion.parse(name).version


def sample_of(num_rows: int, step: int) -> list[int]:
    """Every eighth of the rows, beginning with another one each step."""
    return [k for k in range(num_rows) if k % _EVERY_ROW == step % min(_EVERY_ROW, num_rows)]


def _limits(proven: float, tolerance: float | None) -> Limits:
    """As of a probe, with the first batch's gap for what rounding does."""
    rounds_to = "float32" if proven <= AGREES else "bfloat16"
    return limits(rounds_to, 0.0 if math.isnan(proven) else proven, tolerance=tolerance)


def _refuse(batch: RolloutBatch, gap: float, bound: float, proven: float) -> NoReturn:
    raise ProbeFailed(
        f"{batch.model}: the server does not serve the policy that is trained: at step {batch.step} the "
        f"logprobs of its rows differ from the trainer's under that very version by {gap:.2g} nats (root "
        f"mean square; {proven:.2g} in the first step), and {bound:.2g} is the most that rounding explains, "
        "so other weights have sampled them. See what is served: `tink-rl status URL`; restart the server, "
        "then resume",
        version=batch.model,
        step=batch.step,
        gap=gap,
        bound=bound,
        ranks="all",  # the gap is of all ranks: each raises it, and a checkpoint can be left
    )
