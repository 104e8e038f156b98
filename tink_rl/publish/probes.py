"""Whether the servers compute what the trainer computes: logprobs of a prompt and of what follows it.

A server is asked for the prompt's logprobs and goes on for a few tokens: decoding runs through other
kernels and caches than reading a prompt. The trainer then scores the same tokens, under several *views*
of its model. Here is what is asked and what is concluded; who scores is `training/probe.py`.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.publish.probe_rules import Limits, coarser, largest_gap, limits, share_applied
from tink_rl.transport.fleet import Fleet
from tink_rl.types import PolicyVersion, ServerStatus, SyncMode

logger = logging.getLogger("tink_rl")
NUM_DECODED = 4
"""Tokens that the server adds: the first comes from reading the prompt, the others are decoded."""
EXACT, TRAINED, BASE = "exact", "trained", "base"
"""Views of the trainer's model: without autocast and TF32; as it trains; without its adapter. Any other
view names a format to which every module's answer is rounded at random."""
NUM_ROUNDED = 4
"""How often such a view scores each row; their scatter is the noise."""
_SHARE, _SIGMAS = 0.05, 6.0
"""By how much, and how many times what rounding does at random, the share of the adapter that a server
applies may be off: right ones of four models, five sizes each, showed at most 2.3 times."""
_WELL_EXPLAINED = 3.0
"""A base gap of more noise than this is systematic, and would be taken for a share."""
Answer = tuple[list[int], list[float]]
"""A server's: the prompt and what it added, and the logprob of every token but the first."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The trainer's side of a probe."""

    logprobs_BT: list[list[float]]
    """Of every token but the first."""
    dtype: str
    """The coarsest format in which a module answered."""
    autocast: str | None = None
    """The format of the autocast under which this model trains."""
    quantized: bool = False
    """Whether its base is."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Trainer and servers side by side, under one version."""

    name: str
    gap: float
    """Largest |trainer - server| logprob over all replicas and tokens, in nats."""
    prompt_gap: float
    decode_gap: float
    trainer: Measured
    rows_BT: list[list[int]]
    """What the servers answered, each row once."""
    answers_BT: list[list[float]]
    """One server's logprobs for each of `rows_BT`: the worst one's."""


@dataclass(frozen=True, kw_only=True)
class CloserLook:
    """What the trainer also says of the rows of a finding whose gap needs an explanation."""

    rounds_to: str
    """The coarsest format in which either side computes."""
    rounded: Measured
    """Under the view of that name."""
    base: Measured
    """Without the adapter."""


def distinct_rows(answers: Sequence[Answer]) -> list[list[int]]:
    """The token ids that the servers answered, each row once, for the trainer to score."""
    return [list(row) for row in dict.fromkeys(tuple(ids) for ids, _ in answers)]


def compare(name: str, num_read: int, answers: Sequence[Answer], trainer: Measured) -> Finding:
    """The servers' answers beside what the trainer says of `distinct_rows(answers)`.

    Args:
        name: The version.
        num_read: Logprobs that come from reading the prompt: as many as it has tokens, because the first
            new token does, too.
        answers: One of each replica.
        trainer: Under the EXACT view.
    """
    rows_BT = distinct_rows(answers)
    ours = dict(zip(map(tuple, rows_BT), trainer.logprobs_BT, strict=True))
    read, decoded = [], []
    worst: dict[tuple[int, ...], tuple[float, list[float]]] = {}
    for ids, theirs in answers:
        mine = ours[tuple(ids)]
        read.append(largest_gap(mine[:num_read], theirs[:num_read]))
        decoded.append(largest_gap(mine[num_read:], theirs[num_read:]))
        gap = _largest([read[-1], decoded[-1]])
        if tuple(ids) not in worst or not gap <= worst[tuple(ids)][0]:
            worst[tuple(ids)] = (gap, theirs)
    return Finding(
        name=name,
        gap=_largest(read + decoded),
        prompt_gap=_largest(read),
        decode_gap=_largest(decoded),
        trainer=trainer,
        rows_BT=rows_BT,
        answers_BT=[worst[tuple(row)][1] for row in rows_BT],
    )


class ProbeCheck:
    """Compares the servers with a trainer, within what rounding explains."""

    def __init__(self, fleet: Fleet, config: SyncConfig) -> None:
        self._fleet, self._config = fleet, config
        self.base_gap = 0.0
        """By how much trainer and server differ on the base."""

    def ask(self, prompt_ids: list[int], name: str) -> list[Answer]:
        """One request to each replica: the prompt's logprobs under `name`, and what it adds.

        Raises:
            TinkError: a replica does not answer.
        """
        return self._fleet.each(
            lambda replica: replica.client.continuation(prompt_ids, name, NUM_DECODED)
        )

    def rounds_to(self, trainer: str, status: ServerStatus, mode: SyncMode) -> str:
        """The coarsest format in which either side computes."""
        server = status.dtype
        if server == "float32" and status.device != "cpu":
            server = "tf32"  # vLLM's attention kernels on a GPU multiply fp32 in TF32
        if mode is SyncMode.ADAPTER:
            server = coarser(server, status.adapter_dtype)
        return coarser(trainer, server)

    def limits(self, trainer: Measured, rounds_to: str, noise: float) -> Limits:
        """How far a version may be off; see `probe_rules.limits`."""
        return limits(
            rounds_to,
            noise,
            base_gap=self.base_gap,
            quantized=trainer.quantized,
            tolerance=self._config.probe_tolerance,
        )

    def unexplained(self, found: Finding, status: ServerStatus, mode: SyncMode) -> str | None:
        """The view that explains the gap of `found`, or not; None: it needs no explanation."""
        rounds_to = self.rounds_to(found.trainer.dtype, status, mode)
        is_small = found.gap <= self.limits(found.trainer, rounds_to, 0.0).quiet
        return None if is_small else rounds_to

    def judge(
        self, found: Finding, closer: CloserLook, status: ServerStatus, mode: SyncMode
    ) -> None:
        """Warn of a gap that rounding hardly explains.

        Raises:
            ProbeFailed: no rounding explains it: the server does not serve what was trained.
        """
        noise, typical = scatter(found.trainer, closer.rounded)
        allowed = self.limits(found.trainer, closer.rounds_to, noise)
        if found.gap <= allowed.quiet:
            if not found.trainer.quantized and self.base_gap <= _WELL_EXPLAINED * noise:
                self._warn_of_share(found, closer, typical)
            return
        facts = f"{self.facts(found, status, mode)}; {self._cause(found, closer, mode)}"
        rounding = f"rounding to {closer.rounds_to} moves the trainer's own by {noise:.2g}"
        if found.gap <= allowed.fail:
            logger.warning(
                "%s: trainer and server differ by %.3g nats in a logprob of the probe, and %s: this is "
                "more than rounding usually explains (the run ends above %.3g). %s",
                *(found.name, found.gap, rounding, allowed.fail, facts),
            )
            return
        raise errors.ProbeFailed(
            f"{found.name}: trainer and server differ by {found.gap:.3g} nats in a logprob of the probe, "
            f"allowed is {allowed.fail:.3g} ({rounding}); the server does not serve the policy that is "
            f"trained. {facts}",
            gap=found.gap,
            noise=noise,
        )

    def _warn_of_share(self, found: Finding, closer: CloserLook, typical: float) -> None:
        """Warn if the server applies the adapter too strongly or weakly for what rounding does at random."""
        share, sigmas = share_applied(
            found.trainer.logprobs_BT, found.answers_BT, closer.base.logprobs_BT, typical
        )
        if abs(share - 1) > _SHARE and sigmas > _SIGMAS:
            logger.warning(
                "%s: the server seems to apply %.2f of the adapter: over all tokens of the probe that is "
                "%.0f times what rounding does at random, more than rounding usually explains",
                *(found.name, share, sigmas),
            )

    def facts(self, found: Finding, status: ServerStatus, mode: SyncMode) -> str:
        """Both sides, in words."""
        trains = (
            f", trained under {found.trainer.autocast} autocast" if found.trainer.autocast else ""
        )
        return (
            f"The prompt differs by {found.prompt_gap:.2g}, decoded tokens by {found.decode_gap:.2g}, the "
            f"base by {self.base_gap:.2g}. Trainer: {found.trainer.dtype}{trains}; server: {status.dtype} on "
            f"{status.device}, mode {mode.value}"
        )

    def _cause(self, found: Finding, closer: CloserLook, mode: SyncMode) -> str:
        """What was found to be wrong, or where to look."""
        if (stranger := self.in_place_of_base(mode)) is not None:
            return stranger
        read_well = found.prompt_gap <= max(3 * self.base_gap, found.decode_gap / 10)
        if read_well and not found.decode_gap <= 3 * found.prompt_gap:
            return (
                "the prompt agrees and only decoded tokens do not: what the server derives from its weights, "
                "or caches, is of another version; report it with the server's `tink-rl status`"
            )
        to_base = _largest([*map(largest_gap, closer.base.logprobs_BT, found.answers_BT)])
        if to_base < found.gap / 4:
            return (
                f"the server's logprobs are those of the base without the adapter (within {to_base:.2g}): it "
                "does not apply what it holds"
            )
        return "`tink-rl status URL` says what it serves, `tink-rl doctor URL --model BASE` compares the two"

    def in_place_of_base(self, mode: SyncMode) -> str | None:
        """Which version's whole tensors this run's slots are added to, as the servers say now."""
        if mode is not SyncMode.ADAPTER:
            return None
        for status in self._fleet.statuses():
            if status.full is not None:
                return (
                    f"the server holds the whole tensors of {status.full!r} in place of its base, and slots "
                    "add to those: publish to a server without a full version, or end that run, then "
                    f"`tink-rl drop URL {PolicyVersion.parse(status.full).policy}`"
                )
        return None


def scatter(exact: Measured, rounded: Measured) -> tuple[float, float]:
    """What rounding does to the trainer's own logprobs: at most (the noise), and root mean square."""
    exact_BT = [row for row in exact.logprobs_BT for _ in range(NUM_ROUNDED)]
    moves = [
        a - b
        for ours, theirs in zip(rounded.logprobs_BT, exact_BT, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return _largest(moves), math.sqrt(sum(move * move for move in moves) / len(moves))


def _largest(gaps: Sequence[float]) -> float:
    return largest_gap(gaps, [0.0] * len(gaps))
