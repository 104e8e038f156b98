"""When a policy is published: on train begin and after optimizer steps; and what is logged of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback

from tink_rl.errors import NonFiniteWeights, RankFailed, SamplingRefused, StorageFull, TinkError
from tink_rl.training.policy_publisher import PolicyPublisher
from tink_rl.training.trl_names import Arguments, State, Trainer
from tink_rl.types import PublishRecord

_NO_CHECKPOINT = (NonFiniteWeights, RankFailed, StorageFull)
"""Broken weights are to be resumed from an earlier step; saving needs every rank, and room."""


@contextmanager
def leaving_checkpoint(trainer: Trainer, link: PolicyPublisher) -> Iterator[None]:
    """What ends a training in its middle leaves a checkpoint of the steps done, and says where.

    Saving needs every rank: what ended one rank alone of several leaves none.

    Raises:
        TinkError: as it was raised inside, with the checkpoint named.
    """
    try:
        yield
    except _NO_CHECKPOINT:
        raise
    except TinkError as error:
        is_everywhere = link.ranks.count == 1 or error.details.get("ranks") == "all"
        has_steps = link.first_step is not None and trainer.state.global_step > link.first_step
        if "checkpoint" in error.details or not (is_everywhere and has_steps):
            raise
        published = isinstance(error, SamplingRefused)  # what refuses a request took its version
        raise _with_checkpoint(trainer, link, error, published=published) from error


def _with_checkpoint(
    trainer: Trainer, link: PolicyPublisher, error: TinkError, *, published: bool
) -> TinkError:
    """Save the state of the last step, on every rank; `error`, and how to go on from there."""
    step = trainer.state.global_step
    trainer._save_checkpoint(trainer.model, trial=None)
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    link.save(checkpoint, published=published)
    return error.restated(
        f"{error.message}; the state of step {step} was saved: resume with "
        f"--resume_from_checkpoint {checkpoint}",
        checkpoint=str(checkpoint),
    )


class PublishCallback(TrainerCallback):
    """Publishes on train begin and after every k-th optimizer step; closes the link at the end."""

    def __init__(
        self, trainer: Trainer, link: PolicyPublisher, sync: Callable[[], None], *, every: int = 1
    ) -> None:
        """Store.

        Args:
            trainer: Saves the checkpoint that a failed publish leaves behind.
            link: What `sync` publishes through.
            sync: Publishes what the model holds now and logs it; every rank calls it.
            every: k.
        """
        self._trainer, self._link, self._sync, self._every = trainer, link, sync, every

    def on_train_begin(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Prove the servers, restore the version number, publish what was loaded."""
        if state.global_step:
            own = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._link.restore(self._link.resumed_from or own)
        self._link.first_step = state.global_step
        self._link.expect_other_base()
        self._sync()

    def on_step_end(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Publish the policy that this optimizer step made.

        Raises:
            PublishFailed: it failed twice.
            TinkError: the servers did not take it, or do not compute it.
            In either case a checkpoint of this step was written, unless its weights are broken or a rank
            is gone.
        """
        if state.global_step % self._every:
            return
        try:
            self._sync()
        except _NO_CHECKPOINT:
            raise
        except TinkError as error:
            raise _with_checkpoint(self._trainer, self._link, error, published=False) from error

    def on_save(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Write version and digest beside the checkpoint, published first if this step was not."""
        if state.global_step % self._every:
            self._sync()
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if checkpoint.is_dir():
            self._link.save(checkpoint)

    def on_train_end(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Write which version the run ended with; give the lease back, it stays served."""
        if Path(args.output_dir).is_dir():
            self._link.save(args.output_dir)
        self._link.close()


def metrics_of(record: PublishRecord, link: PolicyPublisher) -> dict[str, float]:
    """The `sync/*` metrics of one publish through `link`; none if nothing had to be sent."""
    if not record.published:
        return {}
    metrics = {
        "sync/seconds": record.seconds,
        "sync/held_seconds": record.held_seconds,
        "sync/bytes": float(record.num_bytes),
        "sync/bytes_total": float(sum(record.num_bytes for record in link.records)),
        "sync/policy_version": float(record.version),
    }
    metrics |= {f"sync/phase/{phase}": s for phase, s in record.phase_seconds.items()}
    if record.probe_gap is not None:
        metrics["sync/probe_gap"] = record.probe_gap
    return metrics
