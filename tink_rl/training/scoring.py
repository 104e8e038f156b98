"""Where rollouts meet their rewards: around TRL's `_generate_and_score_completions`.

TRL generates a batch (with tools: turn by turn) and scores it in that one method. Around it, a rollout
is pinned to the version it began with; after it, rollouts, rewards and advantages go into the log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils import gather_object

from tink_rl.training import metrics
from tink_rl.training.generation import PolicyGeneration
from tink_rl.training.offpolicy import FEW_EFFECTIVE, OffPolicyAccount
from tink_rl.training.policy_publisher import PolicyPublisher
from tink_rl.training.rollout_log import RolloutLog, scores_of
from tink_rl.training.rollouts import RolloutBatch
from tink_rl.training.trl_names import RolloutTrainer

_SHOWN = 8
"""Rollouts of a batch that are kept for the completions table."""


class RolloutRecorder:
    """Stands in front of `_generate_and_score_completions` and `_calculate_rewards` of one trainer."""

    def __init__(
        self,
        trainer: RolloutTrainer,
        generation: PolicyGeneration,
        link: PolicyPublisher,
        log: RolloutLog,
        *,
        account: OffPolicyAccount | None = None,
        every: int = 1,
    ) -> None:
        """Store; `install` puts it in place.

        Args:
            trainer: Whose methods these are.
            generation: Samples its rollouts.
            link: Knows the versions that did.
            log: Where rollouts go, with their rewards.
            account: Looks at every batch that is scored; None: no row is older than the policy.
            every: Every k-th step is logged; 0: none.
        """
        self._trainer, self._generation, self._link = trainer, generation, link
        self._log, self._account, self._every = log, account, every
        self._generate: Callable[[Any], dict[str, Any]] = trainer._generate_and_score_completions
        self._score: Callable[..., Any] | None = getattr(trainer, "_calculate_rewards", None)
        self._rewards_BF: Any = None
        self._last: tuple[str, int] = ("", -1)
        self._draw = 0
        self.shown: list[dict[str, Any]] = []
        """The first rows of the last batch that was logged."""

    def install(self) -> None:
        """Let the trainer call this instead of its own two methods."""
        self._trainer._generate_and_score_completions = self.generate_and_score
        if self._score is not None:
            self._trainer._calculate_rewards = self._remember_rewards

    def begin_log(self, step: int) -> None:
        """Training begins at `step`."""
        if self._every:
            self._log.begin(step)

    def generate_and_score(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch of rollouts, all turns from one version; logged."""
        self._rewards_BF = None
        with self._generation.rollout(self._batch()) as batch:
            output = self._generate(inputs)
        if self._account is None or batch.phase != "train":
            _note_sequence_gap(self._trainer, batch, output)
        if self._every and batch.step % self._every == 0:
            digest = self._link.digest_of(batch.model)
            self.shown = self._log.write(batch, digest, self._scores(batch, output))[:_SHOWN]
        if self._account is not None:
            self._account.look(batch, output)
            if self._account.wants_fresh and self._generation.ahead is not None:
                self._generation.ahead.next_fresh(FEW_EFFECTIVE)
        return output

    def _batch(self) -> RolloutBatch:
        trainer = self._trainer
        phase = "train" if trainer.model.training else "eval"
        key = (phase, trainer.state.global_step)
        self._draw = self._draw + 1 if key == self._last else 0
        self._last = key
        return self.new_batch(*key, self._draw)

    def new_batch(self, phase: str, step: int, draw: int) -> RolloutBatch:
        """An empty batch of this rank; see `RolloutBatch`."""
        trainer = self._trainer
        name = "num_generations" if phase == "train" else "num_generations_eval"
        return RolloutBatch(
            run_seed=trainer.args.seed,
            phase=phase,
            step=step,
            draw=draw,
            rank=trainer.accelerator.process_index,
            num_generations=getattr(trainer, name, 1),
            gather=gather_object if trainer.accelerator.num_processes > 1 else list,
        )

    def _remember_rewards(self, *args: object, **kwargs: object) -> Any:
        assert self._score is not None, "only installed where the trainer has rewards"
        self._rewards_BF = self._score(*args, **kwargs)
        return self._rewards_BF

    def _scores(self, batch: RolloutBatch, output: dict[str, Any]) -> list[dict[str, Any]]:
        """Reward and advantage of this rank's rows; nothing where the trainer has none."""
        num_rows = len(batch.turns)
        if self._rewards_BF is None:
            return [{} for _ in range(num_rows)]
        first = batch.rank * num_rows  # rewards are gathered over all ranks, advantages are not
        rewards_BF = self._rewards_BF[first : first + num_rows].tolist()
        weights = self._trainer.reward_weights.tolist()
        scores = scores_of(self._trainer.reward_func_names, weights, rewards_BF)
        advantages_B = output["advantages"].tolist()
        return [{**s, "advantage": a} for s, a in zip(scores, advantages_B, strict=True)]


def _note_sequence_gap(
    trainer: RolloutTrainer, batch: RolloutBatch, output: dict[str, Any]
) -> None:
    """RLOO compares whole sequences only: the largest |trainer - sampler| of their logprobs, on any rank."""
    if "old_logps" not in output:
        return
    gaps = [
        abs(ours - sum(turns[0].logprobs or ()))
        for ours, mask, turns in zip(
            output["old_logps"].tolist(),
            output["completion_mask"].tolist(),
            batch.turns,
            strict=True,
        )
        if any(mask) and turns[0].logprobs is not None
    ]
    if trainer.accelerator.num_processes > 1:
        gaps = gather_object(gaps)
    if gaps:
        metrics.add(trainer._metrics[batch.phase], {"rollout/sequence_logprob_gap": max(gaps)})
