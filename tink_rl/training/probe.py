"""The probe: does the server compute the trainer's policy? Asked before the first rollout.

A fresh LoRA has B = 0 and equals its base, so a server that drops every adapter would look right. The
first probe is therefore made with a synthetic adapter that is nowhere zero: it must agree with the
trainer *and* differ from the base, and is dropped before version 1.

How closely they must agree is measured first: an adapter of zeros shows by how much trainer and server
differ on the base itself (rounding: nothing in fp32, tenths of a nat in bf16).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tink_rl.errors import ProbeFailed
from tink_rl.policy.adapter import Adapter
from tink_rl.policy.collect import Collector, LiveModel
from tink_rl.policy.modes import fitting_modes
from tink_rl.transport.probes import Probe, largest_gap
from tink_rl.types import SyncMode
from tink_rl.weight_sync import WeightSync

logger = logging.getLogger("tink_rl")
_SMALLEST_EFFECT = 4.0
"""The synthetic adapter must move a logprob by this many tolerances, or the probe shows nothing."""
_LARGEST_NOISE = 2.0
"""Nats by which trainer and server may differ on the base; beyond, they are not the same model."""
_MERGED_GAP_FACTOR, _MERGED_GAP_SLACK = 2.0, 0.01
"""`auto` leaves merged for a slot if merged's gap exceeds factor x the slot's + slack (nats)."""
_PROBE_TOKENS = 24


class Prober:
    """Computes the trainer's logprobs of one prompt and compares them with the server's."""

    def __init__(self, model: Any, *, vocab_size: int) -> None:
        """Store; the prompt is a fixed pseudo-random sequence over the vocabulary."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab_size, (_PROBE_TOKENS,), generator=generator)
        self._model = model
        self._prompt_ids: list[int] = ids.tolist()

    @torch.no_grad()
    def probe(self) -> Probe:
        """The prompt with the trainer's logprobs under the weights it holds now, in eval mode.

        Every rank must call it if the model is sharded: a forward is a collective there.
        """
        model = self._model
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        try:
            ids_BT = torch.tensor([self._prompt_ids], device=device)
            logits_TV = model(input_ids=ids_BT).logits[0, :-1].float()
        finally:
            model.train(was_training)
        targets_T = ids_BT[0, 1:, None]
        logprobs_T = logits_TV.log_softmax(-1).gather(-1, targets_T)[:, 0]
        return Probe(prompt_ids=self._prompt_ids, logprobs=logprobs_T.tolist())

    def probe_with(self, collector: Collector, seed: int, std: float) -> Probe:
        """The probe under `collector.random_like(seed, std)`; as `probe` a collective if sharded."""
        with collector.swapped(collector.random_like(seed, std)):
            return self.probe()

    def prove(
        self,
        sync: WeightSync,
        collector: Collector,
        probe_with: Callable[[int, float], Probe] | None = None,
    ) -> None:
        """Publish a synthetic adapter, compare, drop it; with mode "auto", choose by the gap.

        Args:
            sync: Where to publish.
            collector: The model's adapter, for its shape.
            probe_with: Lets every rank do `self.probe_with(collector, seed, std)`; None: only this one.

        Raises:
            ProbeFailed: the server does not apply it, or computes something else.
        """
        probe_with = probe_with or partial(self.probe_with, collector)
        base = self._measure_noise(sync, collector, probe_with)
        synthetic, wanted = self._telling_adapter(
            collector, base, sync.probes.tolerance(sync.status.dtype), probe_with
        )
        if sync.config.mode == "auto":
            self._weigh(sync, collector, synthetic, wanted)
        else:
            self._publish_and_drop(sync, synthetic, wanted)

    def _measure_noise(
        self,
        sync: WeightSync,
        collector: Collector,
        probe_with: Callable[[int, float], Probe],
    ) -> Probe:
        """Tell `sync` how far trainer and server differ on the base; the trainer's side of it."""
        nothing = collector.random_like(std=0.0)
        base = probe_with(0, 0.0)
        record = sync.publish(nothing, synthetic=True)
        try:
            noise = sync.probes.gap(base, record.name)
        finally:
            sync.drop_current()
        quantized = bool(getattr(self._model.get_base_model(), "is_quantized", False))
        if quantized:
            logger.warning(
                "the trainer's base is quantised and the server's is not: on the base itself they differ by "
                "%.2g nats in a logprob of the probe prompt, which the importance ratio carries",
                noise,
            )
        if not noise <= _LARGEST_NOISE:
            raise ProbeFailed(
                f"trainer and server differ by {noise:.3g} nats in a logprob of the probe prompt on the "
                f"base itself (dtype {sync.status.dtype!r}); serve the directory that the trainer "
                "loads, without quantisation, in the trainer's dtype",
                gap=noise,
            )
        if noise > sync.probes.tolerance(sync.status.dtype) and not quantized:
            logger.warning(
                "trainer and server differ by %.2g nats in a logprob of the probe prompt on the base "
                "itself (the server computes in %s); the importance ratio carries that noise: load "
                "the trainer's model in the server's dtype, or serve with --dtype float32",
                noise,
                sync.status.dtype,
            )
        sync.probes.noise = noise
        return base

    def _telling_adapter(
        self,
        collector: Collector,
        base: Probe,
        tolerance: float,
        probe_with: Callable[[int, float], Probe],
    ) -> tuple[Adapter | LiveModel, Probe]:
        """A synthetic adapter that moves the probe's logprobs well past `tolerance`."""
        std = 0.02
        for _ in range(8):
            wanted = probe_with(1, std)
            effect = largest_gap(wanted.logprobs, base.logprobs)
            if effect > _SMALLEST_EFFECT * tolerance:
                return collector.random_like(seed=1, std=std), wanted
            std *= 2
        raise ProbeFailed(
            f"a synthetic adapter moves no logprob of the probe prompt by more than {effect:.3g}; "
            "the probe would show nothing. Are the target_modules part of the forward pass?"
        )

    def _publish_and_drop(self, sync: WeightSync, synthetic: Any, wanted: Probe) -> float:
        record = sync.publish(synthetic, synthetic=True)
        try:
            return sync.probes.check(wanted, record.name, sync.status.dtype)
        finally:
            sync.drop_current()

    def _weigh(self, sync: WeightSync, collector: Collector, synthetic: Any, wanted: Probe) -> None:
        """Prove the mode that `auto` takes, and say which; below fp32, weigh merged against a slot."""
        modes = [sync.mode]
        rounds = sync.status.dtype != "float32"
        slots = SyncMode.ADAPTER in fitting_modes(sync.status, collector.needs)
        if rounds and slots and sync.mode is SyncMode.MERGED:
            modes.append(SyncMode.ADAPTER)
        gaps = self._gaps(sync, modes, synthetic, wanted)
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
        self, sync: WeightSync, modes: list[SyncMode], synthetic: Any, wanted: Probe
    ) -> dict[SyncMode, float]:
        """The logprob gap of each of `modes` that passes the probe.

        Raises:
            ProbeFailed: none does.
        """
        gaps: dict[SyncMode, float] = {}
        for mode in modes:
            sync.use_mode(mode)
            try:
                gaps[mode] = self._publish_and_drop(sync, synthetic, wanted)
            except ProbeFailed as error:
                if mode is modes[-1] and not gaps:
                    raise
                logger.warning("mode auto leaves out %s: %s", mode.value, error)
        return gaps
