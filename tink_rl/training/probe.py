"""The probe: does the server compute the trainer's policy? Asked before the first rollout.

A fresh LoRA has B = 0 and equals its base, so a server that drops every adapter would look right. The
first probe is therefore made with a synthetic adapter that is nowhere zero: it must agree with the
trainer *and* differ from the base, and is dropped before version 1.

Before it, an adapter of zeros shows whether both sides hold the same base at all.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial

import torch

from tink_rl.errors import BaseMismatch, ProbeFailed
from tink_rl.policy.adapter import Adapter
from tink_rl.policy.collect import Collector, LiveModel
from tink_rl.policy.peft_names import PeftModel
from tink_rl.publish.modes import fitting_modes
from tink_rl.publish.probe_rules import AGREES, coarser, largest_base_gap, largest_gap
from tink_rl.publish.probes import (
    BASE,
    EXACT,
    NUM_DECODED,
    NUM_ROUNDED,
    TRAINED,
    CloserLook,
    Finding,
    Measured,
    compare,
    distinct_rows,
    scatter,
)
from tink_rl.publish.publisher import WeightSync
from tink_rl.publish.stopwatch import Stopwatch
from tink_rl.training import precision
from tink_rl.training.ranks import Ranks
from tink_rl.types import Phase, PublishRecord, SyncMode

logger = logging.getLogger("tink_rl")
_SMALLEST_EFFECT = 4.0
"""The synthetic adapter must move a logprob by this many times what is allowed, or the probe shows
nothing."""
_MERGED_GAP_FACTOR, _MERGED_GAP_SLACK = 2.0, 0.01
"""`auto` leaves merged for a slot if merged's gap exceeds factor x the slot's + slack (nats)."""
_PROBE_TOKENS = 24

_ALONE = Ranks(0, 1, timeout_s=0.0)


@dataclass(frozen=True)
class _Synthetic:
    """A policy of the trainer's shape that was never trained."""

    collector: Collector
    seed: int
    std: float

    @property
    def policy(self) -> Adapter | LiveModel:
        """What is published of it."""
        return self.collector.random_like(self.seed, self.std)


class Prober:
    """Computes the trainer's logprobs of a prompt and of what a server adds to it.

    Every rank of a run has one and calls it alike: each scores (a forward is a collective where the model
    is sharded), rank 0 asks the servers and decides.
    """

    def __init__(self, model: PeftModel, *, vocab_size: int, ranks: Ranks = _ALONE) -> None:
        """Store; the prompt is a fixed pseudo-random sequence over the vocabulary."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab_size, (_PROBE_TOKENS,), generator=generator)
        self._model, self._ranks = model, ranks
        self.prompt_ids: list[int] = ids.tolist()

    # -- the trainer's side -----------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, rows_BT: list[list[int]], view: str) -> Measured:
        """The trainer's logprobs of rows of one length under the weights it holds now, in eval mode.

        Every rank must call it if the model is sharded: a forward is a collective there.

        Args:
            rows_BT: Token ids.
            view: See `tink_rl.publish.probes`; a format scores every row `NUM_ROUNDED` times.
        """
        model = self._model
        rounded = view not in (EXACT, TRAINED, BASE)
        ids_BT = torch.tensor(rows_BT, device=next(model.parameters()).device)
        if rounded:
            ids_BT = ids_BT.repeat_interleave(NUM_ROUNDED, dim=0)
        was_training = model.training
        model.eval()
        try:
            with ExitStack() as stack:
                autocast: list[str] = []
                if view == BASE:
                    stack.enter_context(model.disable_adapter())
                if view != TRAINED:
                    autocast = stack.enter_context(precision.full_precision(model))
                if rounded:
                    stack.enter_context(precision.rounding(model, view))
                dtype = stack.enter_context(precision.noting_dtype(model))
                logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
        finally:
            model.train(was_training)
        return Measured(
            logprobs_BT=[
                _logprobs(row_TV, ids_T) for row_TV, ids_T in zip(logits_BTV, ids_BT, strict=True)
            ],
            dtype=dtype[0] if dtype else "bfloat16",
            autocast=autocast[0] if autocast else None,
            quantized=bool(getattr(model.get_base_model(), "is_quantized", False)),
        )

    def logprobs(self) -> list[float]:
        """The trainer's logprobs of the prompt."""
        return self.measure([self.prompt_ids], EXACT).logprobs_BT[0]

    def _scores(
        self, rows_BT: list[list[int]], view: str, synthetic: _Synthetic | None = None
    ) -> Measured:
        """`measure` on every rank, with the synthetic policy in the model's place, if one is given."""

        def score() -> Measured:
            if synthetic is None:
                return self.measure(rows_BT, view)
            with synthetic.collector.swapped(synthetic.policy):
                return self.measure(rows_BT, view)

        return self._ranks.each(score)

    # -- one version ------------------------------------------------------------------------------

    def publish(
        self,
        sync: WeightSync,
        policy: Adapter | LiveModel | PeftModel,
        watch: Stopwatch | None = None,
    ) -> PublishRecord:
        """Publish `policy`, which the model holds; it becomes current only if the servers compute it.

        Args:
            sync: Where to publish.
            policy: As `WeightSync.publish` takes it.
            watch: Of a publish that began outside, with its collecting.

        Raises:
            ProbeFailed: they compute something else.
            TinkError: see `WeightSync.publish`.
        """
        watch = watch or Stopwatch()
        record = PublishRecord.from_json(
            self._ranks.on_leader(lambda: asdict(sync.send(policy, watch=watch)))
        )
        if not record.published:
            return record
        with watch.naming_phase(), watch(Phase.VERIFY):
            gap = self.check(sync, record.name)
        return PublishRecord.from_json(self._ranks.on_leader(lambda: asdict(sync.point(gap))))

    def check(self, sync: WeightSync, name: str, synthetic: _Synthetic | None = None) -> float:
        """Largest |trainer - server| logprob of the probe under `name`, in nats.

        Raises:
            ProbeFailed: no rounding explains it.
        """
        found = self.compare(sync, name, synthetic)
        view = self._ranks.on_leader(lambda: sync.probes.unexplained(found, sync.status, sync.mode))
        if view is not None:
            closer = CloserLook(
                rounds_to=view,
                rounded=self._scores(found.rows_BT, view, synthetic),
                base=self._scores(found.rows_BT, BASE, synthetic),
            )
            self._ranks.on_leader(lambda: sync.probes.judge(found, closer, sync.status, sync.mode))
        return found.gap

    def compare(self, sync: WeightSync, name: str, synthetic: _Synthetic | None = None) -> Finding:
        """Ask every replica, then score what they answered."""
        answers = self._ranks.on_leader(lambda: sync.probes.ask(self.prompt_ids, name))
        trainer = self._scores(distinct_rows(answers), EXACT, synthetic)
        return compare(name, len(self.prompt_ids), answers, trainer)

    # -- before the first version -----------------------------------------------------------------

    def self_test(self, sync: WeightSync, collector: Collector) -> None:
        """Publish a synthetic adapter, compare, drop it; with mode "auto", choose by the gap.

        Args:
            sync: Where to publish.
            collector: The model's adapter, for its shape.

        Raises:
            BaseMismatch: the server computes another base.
            ProbeFailed: the server does not apply the adapter, or computes something else.
        """
        longest = self._ranks.on_leader(lambda: sync.status.max_model_len) - NUM_DECODED
        self.prompt_ids = self.prompt_ids[: max(2, longest)]
        self._compare_bases(sync, collector)
        synthetic = self._distinguishable_adapter(sync, collector)
        if sync.config.mode == "auto":
            self._compare_modes(sync, synthetic)
        else:
            self._publish_and_drop(sync, synthetic)

    def _compare_bases(self, sync: WeightSync, collector: Collector) -> None:
        """Set how far trainer and server differ on the base.

        Raises:
            BaseMismatch, ProbeFailed: further than one base can.
        """
        zeros = _Synthetic(collector, 0, 0.0)
        name = self._publish_synthetic(sync, zeros)
        try:
            found = self.compare(sync, name, zeros)
        finally:
            self._ranks.on_leader(sync.drop_current)
        rounds_to = self._rounds_to(sync, found.trainer)
        rounded = self._scores(found.rows_BT, rounds_to, zeros)
        self._ranks.on_leader(lambda: _judge_base(sync, found, rounded, rounds_to))
        # Training under autocast is what the servers do not see: its cost is said, where it has one.
        autocast = self._ranks.on_leader(lambda: _autocast_that_costs(sync, found))
        if autocast is not None:
            trained = self._scores(found.rows_BT, TRAINED, zeros)
            self._ranks.on_leader(lambda: _warn_of_autocast(sync, found, trained))

    def _rounds_to(self, sync: WeightSync, trainer: Measured) -> str:
        return self._ranks.on_leader(
            lambda: sync.probes.rounds_to(trainer.dtype, sync.status, sync.mode)
        )

    def _distinguishable_adapter(self, sync: WeightSync, collector: Collector) -> _Synthetic:
        """A synthetic adapter that moves the prompt's logprobs well past what is allowed.

        Raises:
            ProbeFailed: none does.
        """
        rows_BT, std = [self.prompt_ids], 0.02
        zeros = self._scores(rows_BT, EXACT, _Synthetic(collector, 0, 0.0))
        for _ in range(8):
            synthetic = _Synthetic(collector, 1, std)
            exact = self._scores(rows_BT, EXACT, synthetic)
            rounds_to = self._rounds_to(sync, exact)
            rounded = self._scores(rows_BT, rounds_to, synthetic)
            effect, needed, said = self._ranks.on_leader(
                partial(_effect, sync, zeros, exact, rounded, rounds_to)
            )
            if effect > needed:
                return synthetic
            std *= 2
        if effect == 0.0:
            raise ProbeFailed(
                "a synthetic adapter changes no logprob of the probe prompt in the trainer's own model; the "
                "probe would show nothing. The adapted modules take no part in its forward pass; choose "
                "other target_modules"
            )
        raise ProbeFailed(
            f"a synthetic adapter moves a logprob of the probe prompt by {effect:.3g} nats and {needed:.3g} "
            f"are needed; the probe would show nothing, because {said}; adapt more modules, or compute more "
            "exactly on the coarser side"
        )

    def _publish_synthetic(self, sync: WeightSync, synthetic: _Synthetic) -> str:
        return self._ranks.on_leader(lambda: sync.publish(synthetic.policy, synthetic=True).name)

    def _publish_and_drop(self, sync: WeightSync, synthetic: _Synthetic) -> float:
        name = self._publish_synthetic(sync, synthetic)
        try:
            return self.check(sync, name, synthetic)
        finally:
            self._ranks.on_leader(sync.drop_current)

    def _compare_modes(self, sync: WeightSync, synthetic: _Synthetic) -> None:
        """Prove the mode that `auto` takes; below fp32 it is the better one of merged and a slot."""
        modes = self._ranks.on_leader(lambda: _modes_to_compare(sync, synthetic.collector))
        gaps = self._gaps(sync, [SyncMode(mode) for mode in modes], synthetic)
        self._ranks.on_leader(lambda: _take_better_mode(sync, gaps))

    def _gaps(
        self, sync: WeightSync, modes: list[SyncMode], synthetic: _Synthetic
    ) -> dict[SyncMode, float]:
        """The logprob gap of each of `modes` that passes the probe.

        Raises:
            ProbeFailed: none does.
        """
        gaps: dict[SyncMode, float] = {}
        for mode in modes:
            self._ranks.on_leader(partial(sync.use_mode, mode))
            try:
                gaps[mode] = self._publish_and_drop(sync, synthetic)
            except ProbeFailed as error:
                if mode is modes[-1] and not gaps:
                    raise
                if self._ranks.is_leader:
                    logger.warning("mode auto leaves out %s: %s", mode.value, error)
        return gaps


def _logprobs(logits_TV: torch.Tensor, ids_T: torch.Tensor) -> list[float]:
    logprobs_TV = logits_TV.float().log_softmax(-1)
    found: list[float] = logprobs_TV.gather(-1, ids_T[1:, None])[:, 0].tolist()
    return found


def _judge_base(sync: WeightSync, found: Finding, rounded: Measured, rounds_to: str) -> None:
    """Keep how far trainer and server differ on the base, and say it where that is much.

    Raises:
        BaseMismatch, ProbeFailed: further than one base can.
    """
    sync.probes.base_gap = found.gap
    noise, _ = scatter(found.trainer, rounded)
    allowed = largest_base_gap(rounds_to, quantized=found.trainer.quantized)
    if sync.config.probe_tolerance is not None:
        allowed = sync.config.probe_tolerance
    if not found.gap <= allowed:
        raise _another_base(sync, found, allowed)
    if found.trainer.quantized:
        logger.warning(
            "the trainer's base is quantised and the server's is not: on the base itself they differ by "
            "%.2g nats in a logprob of the probe prompt, which the importance ratio carries",
            found.gap,
        )
    elif found.gap > max(AGREES, 3 * noise):
        logger.warning(
            "trainer and server differ by %.2g nats in a logprob of the probe on the base itself, and "
            "rounding to %s explains about %.2g; the importance ratio carries that gap. %s; compare the "
            "model that is trained with the one that is served: `tink-rl doctor URL --model BASE`",
            *(found.gap, rounds_to, noise, sync.probes.facts(found, sync.status, sync.mode)),
        )


def _autocast_that_costs(sync: WeightSync, found: Finding) -> str | None:
    """The autocast under which this model trains, if the server computes more exactly."""
    autocast, server = found.trainer.autocast, sync.status.dtype
    return None if autocast is None or coarser(autocast, server) == server else autocast


def _warn_of_autocast(sync: WeightSync, found: Finding, trained: Measured) -> None:
    cost = max(map(largest_gap, trained.logprobs_BT, found.trainer.logprobs_BT))
    logger.warning(
        "training computes under %s autocast and the server in %s: on the base that moves a logprob "
        "of the probe by %.2g nats, which the importance ratio carries (probes compare without "
        "autocast); bf16=False and fp16=False train as exactly as the server samples",
        *(found.trainer.autocast, sync.status.dtype, cost),
    )


def _effect(
    sync: WeightSync, zeros: Measured, exact: Measured, rounded: Measured, rounds_to: str
) -> tuple[float, float, str]:
    """By how much a synthetic adapter moves a logprob, by how much it must, and why so much."""
    effect = largest_gap(exact.logprobs_BT[0], zeros.logprobs_BT[0])
    noise, _ = scatter(exact, rounded)
    needed = _SMALLEST_EFFECT * sync.probes.limits(exact, rounds_to, noise).quiet
    said = (
        f"trainer and server differ by {sync.probes.base_gap:.3g} on the "
        f"base{' (quantised here)' if exact.quantized else ''} and rounding to {rounds_to} moves the "
        f"trainer's own logprobs by {noise:.3g}"
    )
    return effect, needed, said


def _modes_to_compare(sync: WeightSync, collector: Collector) -> list[SyncMode]:
    rounds = sync.status.dtype != "float32"
    slots = SyncMode.ADAPTER in fitting_modes(sync.status, collector.needs)
    if rounds and slots and sync.mode is SyncMode.MERGED:
        return [sync.mode, SyncMode.ADAPTER]
    return [sync.mode]


def _take_better_mode(sync: WeightSync, gaps: dict[SyncMode, float]) -> None:
    merged, slot = gaps.get(SyncMode.MERGED), gaps.get(SyncMode.ADAPTER)
    if merged is not None and slot is not None:
        worse = merged > _MERGED_GAP_FACTOR * slot + _MERGED_GAP_SLACK
        sync.use_mode(SyncMode.ADAPTER if worse else SyncMode.MERGED)
        reason = f"logprob gap merged {merged:.2g}, slot {slot:.2g}"
    else:
        [(mode, gap)] = gaps.items()
        sync.use_mode(mode)
        reason = f"logprob gap {gap:.2g}"
    logger.info("mode auto took %s on a %s server (%s)", sync.mode.value, sync.status.dtype, reason)


def _another_base(sync: WeightSync, found: Finding, allowed: float) -> BaseMismatch | ProbeFailed:
    """What is known of a base that the server computes otherwise."""
    text = (
        f"trainer and server differ by {found.gap:.3g} nats in a logprob of the probe on the base itself, "
        f"allowed is {allowed:.3g}. {sync.probes.facts(found, sync.status, sync.mode)}; "
    )
    stranger = sync.probes.in_place_of_base(sync.mode)
    if stranger is not None:
        return BaseMismatch(text + stranger, gap=found.gap)
    if found.trainer.quantized:
        return ProbeFailed(
            text + "the trainer's base is quantised: load it without, or in more bits",
            gap=found.gap,
        )
    if found.prompt_gap <= allowed:
        return ProbeFailed(
            text
            + "the prompt agrees and only decoded tokens do not: the server's decoding contradicts its own "
            "prefill; start it with other attention settings, and report it",
            gap=found.gap,
        )
    return BaseMismatch(
        text
        + "that is no rounding: the model that is trained is not the one that is served. Save it "
        "(save_pretrained) and serve that directory",
        gap=found.gap,
    )
