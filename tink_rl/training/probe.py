"""The probe: does the server compute the trainer's policy? Asked before the first rollout.

A fresh LoRA has B = 0 and equals its base, so a server that drops every adapter would look right. The
first probe is therefore made with a synthetic adapter that is nowhere zero: it must agree with the
trainer *and* differ from the base, and is dropped before version 1.

Before it, an adapter of zeros shows whether both sides hold the same base at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from tink_rl.errors import BaseMismatch, ProbeFailed
from tink_rl.policy.adapter import Adapter
from tink_rl.policy.collect import Collector, LiveModel
from tink_rl.publish.modes import fitting_modes
from tink_rl.publish.probe_rules import AGREES, coarser, largest_base_gap, largest_gap
from tink_rl.publish.probes import (
    BASE,
    EXACT,
    NUM_DECODED,
    NUM_ROUNDED,
    TRAINED,
    Finding,
    Measured,
    Probe,
    noise_of,
)
from tink_rl.publish.publisher import WeightSync
from tink_rl.training import precision
from tink_rl.types import SyncMode

logger = logging.getLogger("tink_rl")
_SMALLEST_EFFECT = 4.0
"""The synthetic adapter must move a logprob by this many times what is allowed, or the probe shows
nothing."""
_MERGED_GAP_FACTOR, _MERGED_GAP_SLACK = 2.0, 0.01
"""`auto` leaves merged for a slot if merged's gap exceeds factor x the slot's + slack (nats)."""
_PROBE_TOKENS = 24

MeasureWith = Callable[[int, float, list[list[int]], str], Measured]


class Prober:
    """Computes the trainer's logprobs of a prompt and of what a server adds to it."""

    def __init__(self, model: Any, *, vocab_size: int) -> None:
        """Store; the prompt is a fixed pseudo-random sequence over the vocabulary."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab_size, (_PROBE_TOKENS,), generator=generator)
        self._model = model
        self.prompt_ids: list[int] = ids.tolist()

    @property
    def quantized(self) -> bool:
        """Whether the trainer's base is."""
        return bool(getattr(self._model.get_base_model(), "is_quantized", False))

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
        )

    def measure_with(
        self, collector: Collector, seed: int, std: float, rows_BT: list[list[int]], view: str
    ) -> Measured:
        """As `measure`, under `collector.random_like(seed, std)`."""
        with collector.swapped(collector.random_like(seed, std)):
            return self.measure(rows_BT, view)

    def probe(self, measure: Callable[[list[list[int]], str], Measured] | None = None) -> Probe:
        """The probe of what the model holds; `measure` lets every rank do `self.measure`."""
        return Probe(
            prompt_ids=self.prompt_ids,
            measure=measure or self.measure,
            quantized=self.quantized,
        )

    def logprobs(self) -> list[float]:
        """The trainer's logprobs of the prompt."""
        return self.measure([self.prompt_ids], EXACT).logprobs_BT[0]

    def prove(
        self,
        sync: WeightSync,
        collector: Collector,
        measure_with: MeasureWith | None = None,
    ) -> None:
        """Publish a synthetic adapter, compare, drop it; with mode "auto", choose by the gap.

        Args:
            sync: Where to publish.
            collector: The model's adapter, for its shape.
            measure_with: Lets every rank do `self.measure_with(collector, ...)`; None: only this one.

        Raises:
            BaseMismatch: the server computes another base.
            ProbeFailed: the server does not apply the adapter, or computes something else.
        """
        measure_with = measure_with or partial(self.measure_with, collector)
        self.prompt_ids = self.prompt_ids[: max(2, sync.status.max_model_len - NUM_DECODED)]
        self._compare_bases(sync, collector, measure_with)
        std = self._telling_std(sync, measure_with)
        synthetic = collector.random_like(seed=1, std=std)
        probe = self.probe(partial(measure_with, 1, std))
        if sync.config.mode == "auto":
            self._weigh(sync, collector, synthetic, probe)
        else:
            self._publish_and_drop(sync, synthetic, probe)

    def _compare_bases(
        self, sync: WeightSync, collector: Collector, measure_with: MeasureWith
    ) -> None:
        """Tell `sync` how far trainer and server differ on the base.

        Raises:
            BaseMismatch, ProbeFailed: further than one base can.
        """
        probe = self.probe(partial(measure_with, 0, 0.0))
        record = sync.publish(collector.random_like(std=0.0), synthetic=True)
        try:
            found = sync.probes.compare(probe, record.name)
        finally:
            sync.drop_current()
        sync.probes.base_gap = found.gap
        rounds_to = sync.probes.rounds_to(found.trainer.dtype, sync.status, sync.mode)
        noise = sync.probes.noise(probe, found, rounds_to)
        allowed = largest_base_gap(rounds_to, quantized=probe.quantized)
        if sync.config.probe_tolerance is not None:
            allowed = sync.config.probe_tolerance
        if not found.gap <= allowed:
            raise _another_base(sync, probe, found, allowed)
        if probe.quantized:
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
        self._tell_autocast(sync, probe, found)

    def _tell_autocast(self, sync: WeightSync, probe: Probe, found: Finding) -> None:
        """Say what training under autocast costs where the server computes more exactly."""
        autocast, server = found.trainer.autocast, sync.status.dtype
        if autocast is None or coarser(autocast, server) == server:
            return
        trained_BT = probe.measure(found.rows_BT, TRAINED).logprobs_BT
        cost = max(map(largest_gap, trained_BT, found.trainer.logprobs_BT))
        logger.warning(
            "training computes under %s autocast and the server in %s: on the base that moves a logprob "
            "of the probe by %.2g nats, which the importance ratio carries (probes compare without "
            "autocast); bf16=False and fp16=False train as exactly as the server samples",
            *(autocast, server, cost),
        )

    def _telling_std(self, sync: WeightSync, measure_with: MeasureWith) -> float:
        """Of a synthetic adapter that moves the prompt's logprobs well past what is allowed."""
        rows_BT, std = [self.prompt_ids], 0.02
        [base_T] = measure_with(0, 0.0, rows_BT, EXACT).logprobs_BT
        for _ in range(8):
            probe = self.probe(partial(measure_with, 1, std))
            wanted = probe.measure(rows_BT, EXACT)
            effect = largest_gap(wanted.logprobs_BT[0], base_T)
            rounds_to = sync.probes.rounds_to(wanted.dtype, sync.status, sync.mode)
            noise = noise_of(probe, rows_BT, wanted, rounds_to)
            needed = _SMALLEST_EFFECT * sync.probes.limits(probe, rounds_to, noise).quiet
            if effect > needed:
                return std
            std *= 2
        if effect == 0.0:
            raise ProbeFailed(
                "a synthetic adapter changes no logprob of the probe prompt in the trainer's own model; the "
                "probe would show nothing. The adapted modules take no part in its forward pass; choose "
                "other target_modules"
            )
        raise ProbeFailed(
            f"a synthetic adapter moves a logprob of the probe prompt by {effect:.3g} nats and {needed:.3g} "
            f"are needed; the probe would show nothing, because trainer and server differ by "
            f"{sync.probes.base_gap:.3g} on the base{' (quantised here)' if self.quantized else ''} and "
            f"rounding to {rounds_to} moves the trainer's own logprobs by {noise:.3g}; adapt more modules, "
            "or compute more exactly on the coarser side"
        )

    def _publish_and_drop(self, sync: WeightSync, synthetic: Any, probe: Probe) -> float:
        record = sync.publish(synthetic, synthetic=True)
        try:
            return sync.probes.check(probe, record.name, sync.status, sync.mode)
        finally:
            sync.drop_current()

    def _weigh(self, sync: WeightSync, collector: Collector, synthetic: Any, probe: Probe) -> None:
        """Prove the mode that `auto` takes, and say which; below fp32, weigh merged against a slot."""
        modes = [sync.mode]
        rounds = sync.status.dtype != "float32"
        slots = SyncMode.ADAPTER in fitting_modes(sync.status, collector.needs)
        if rounds and slots and sync.mode is SyncMode.MERGED:
            modes.append(SyncMode.ADAPTER)
        gaps = self._gaps(sync, modes, synthetic, probe)
        merged, slot = gaps.get(SyncMode.MERGED), gaps.get(SyncMode.ADAPTER)
        if merged is not None and slot is not None:
            worse = merged > _MERGED_GAP_FACTOR * slot + _MERGED_GAP_SLACK
            sync.use_mode(SyncMode.ADAPTER if worse else SyncMode.MERGED)
            reason = f"logprob gap merged {merged:.2g}, slot {slot:.2g}"
        else:
            [(mode, gap)] = gaps.items()
            sync.use_mode(mode)
            reason = f"logprob gap {gap:.2g}"
        logger.info(
            "mode auto took %s on a %s server (%s)", sync.mode.value, sync.status.dtype, reason
        )

    def _gaps(
        self, sync: WeightSync, modes: list[SyncMode], synthetic: Adapter | LiveModel, probe: Probe
    ) -> dict[SyncMode, float]:
        """The logprob gap of each of `modes` that passes the probe.

        Raises:
            ProbeFailed: none does.
        """
        gaps: dict[SyncMode, float] = {}
        for mode in modes:
            sync.use_mode(mode)
            try:
                gaps[mode] = self._publish_and_drop(sync, synthetic, probe)
            except ProbeFailed as error:
                if mode is modes[-1] and not gaps:
                    raise
                logger.warning("mode auto leaves out %s: %s", mode.value, error)
        return gaps


def _logprobs(logits_TV: torch.Tensor, ids_T: torch.Tensor) -> list[float]:
    logprobs_TV = logits_TV.float().log_softmax(-1)
    found: list[float] = logprobs_TV.gather(-1, ids_T[1:, None])[:, 0].tolist()
    return found


def _another_base(
    sync: WeightSync, probe: Probe, found: Finding, allowed: float
) -> BaseMismatch | ProbeFailed:
    """What is known of a base that the server computes otherwise."""
    text = (
        f"trainer and server differ by {found.gap:.3g} nats in a logprob of the probe on the base itself, "
        f"allowed is {allowed:.3g}. {sync.probes.facts(found, sync.status, sync.mode)}; "
    )
    stranger = sync.probes.in_place_of_base(sync.mode)
    if stranger is not None:
        return BaseMismatch(text + stranger, gap=found.gap)
    if probe.quantized:
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
