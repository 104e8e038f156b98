"""The report's figures: each as inline SVG for the page and as PNG for everything else."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tink_rl.tools.report.run import Run
from tink_rl.types import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

BLUE, AMBER, GREEN, INK, FAINT = "#2f6fdf", "#e08a1e", "#1f9d74", "#1d2733", "#8a97a6"
_PHASE_COLORS = (
    *("#b9c4d0", "#8fa3b8", "#6c8fc7", "#c9b6e4"),
    *("#2f6fdf", "#e08a1e", "#1f9d74", "#d9667b"),
)
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#c8d0d9",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ecf1",
    "xtick.color": "#5b6773",
    "ytick.color": "#5b6773",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "figure.facecolor": "white",
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One drawn figure."""

    name: str
    """Also the PNG's file name."""
    title: str
    note: str
    """What it shows, in one line."""
    svg: str
    png: bytes


_STEP = "optimizer step"
_STEPS_SHOWN = 8
"""Of the timeline."""


@dataclass(frozen=True)
class _Panel:
    name: str
    title: str
    draw: Callable[[Any, Run], bool]
    """Draws into an axis; False if the run has no such data."""
    note: str
    x: str = _STEP


def draw(run: Run) -> list[Figure]:
    """Every figure for which the run has data.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "matplotlib is not available: the report draws with it; pip install 'tink-rl[train]'"
        ) from error
    from matplotlib.figure import Figure as Canvas

    figures = []
    for panel in _PANELS:
        style: Any = {**_STYLE, "svg.hashsalt": panel.name}  # ids stay apart in one page
        with matplotlib.rc_context(style):
            canvas = Canvas(figsize=(5.6, 2.9), layout="constrained")
            axis = canvas.subplots()
            axis.margins(x=0.01)
            if not panel.draw(axis, run):
                continue
            axis.set_xlabel(panel.x, color="#5b6773")
            if panel.x == _STEP:
                _only_whole_steps(axis)
            figures.append(
                Figure(
                    name=panel.name,
                    title=panel.title,
                    note=panel.note,
                    svg=_svg(canvas, panel.title),
                    png=_png(canvas),
                )
            )
    return figures


def missing(run_figures: list[Figure]) -> list[str]:
    """Titles of the figures that had no data."""
    drawn = {figure.name for figure in run_figures}
    return [panel.title for panel in _PANELS if panel.name not in drawn]


def _svg(canvas: Canvas, title: str) -> str:
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _png(canvas: Canvas) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _only_whole_steps(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _only_decades(axis: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_ylim()
    axis.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    axis.yaxis.set_major_locator(LogLocator(base=10))
    axis.yaxis.set_minor_formatter(NullFormatter())


# -- panels -----------------------------------------------------------------------------------------


def _line(axis: Axes, run: Run, key: str, scale: float = 1.0, **style: Any) -> bool:
    steps, values = run.series(key, scale)
    if steps:
        marker = "o" if len(steps) < 3 else None
        axis.plot(steps, values, marker=marker, markersize=4, **{"linewidth": 1.6, **style})
    return bool(steps)


def _reward(axis: Axes, run: Run) -> bool:
    steps, means = run.series("reward")
    if not steps:
        return False
    std_steps, stds = run.series("reward_std")
    if std_steps == steps:
        low = [mean - std for mean, std in zip(means, stds, strict=True)]
        high = [mean + std for mean, std in zip(means, stds, strict=True)]
        axis.fill_between(steps, low, high, color=BLUE, alpha=0.13, linewidth=0, label="± std")
    _line(axis, run, "reward", color=BLUE, label="mean")
    axis.legend(loc="lower right", ncols=2)
    return True


def _heldout(axis: Axes, run: Run) -> bool:
    drawn = False
    evals = [row for row in run.evaluations if "eval_reward" in row]
    if evals:
        steps, values = ([row[k] for row in evals] for k in ("step", "eval_reward"))
        axis.plot(steps, values, color=GREEN, marker="o", label="evaluation reward")
        drawn = True
    ends = (0, max(run.last_step, 1))
    kinds = (("heldout", "sampled", GREEN, "o", -13), ("heldout_greedy", "greedy", AMBER, "s", 7))
    for key, label, color, marker, shift in kinds:
        before, after = (run.summary.get(f"{key}_{when}") for when in ("before", "after"))
        if before is None or after is None:
            continue
        axis.plot(
            ends, (before, after), color=color, marker=marker, markersize=6, linewidth=1.2,
            linestyle="--", label=label,
        )  # fmt: skip
        for x, y in zip(ends, (before, after), strict=True):
            axis.annotate(
                f"{y:.2f}", (x, y), textcoords="offset points", xytext=(0, shift),
                ha="center", color=color, fontsize=8,
            )  # fmt: skip
        drawn = True
    if drawn:
        axis.set_ylim(-0.05, 1.15)
        axis.legend(loc="lower right")
        axis.margins(x=0.06)
    return drawn


def _phases(axis: Axes, run: Run) -> bool:
    rows = [row for row in run.steps if "sync/seconds" in row]
    if not rows:
        return False
    steps = [row["step"] for row in rows]
    stacks, labels, colors = [], [], []
    for phase, color in zip(Phase, _PHASE_COLORS, strict=True):
        values = [1e3 * float(row.get(f"sync/phase/{phase}", 0.0)) for row in rows]
        if any(values):
            stacks.append(values)
            labels.append(f"{phase}")
            colors.append(color)
    if not stacks:
        return _line(axis, run, "sync/seconds", 1e3, color=BLUE)
    _stack(axis, steps, stacks, labels, colors)
    axis.set_ylabel("ms")
    return True


def _stack(axis: Axes, steps: list[int], stacks: Any, labels: Any, colors: Any) -> None:
    if len(steps) > 1:
        axis.stackplot(steps, stacks, labels=labels, colors=colors, linewidth=0, step="mid")
    else:
        below = 0.0
        for values, label, color in zip(stacks, labels, colors, strict=True):
            axis.bar(steps, values, bottom=below, label=label, color=color, width=0.5)
            below += values[0]
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True, handlelength=1.0)


def _shares(axis: Axes, run: Run) -> bool:
    keys = ("sampling", "syncing", "training")
    rows = [row for row in run.steps if all(f"share/{key}" in row for key in keys)]
    if not rows:
        return False
    stacks = [[100 * row[f"share/{key}"] for row in rows] for key in keys]
    _stack(axis, [row["step"] for row in rows], stacks, keys, (BLUE, AMBER, "#b9c4d0"))
    axis.set_ylim(0, 100)
    axis.set_ylabel("% of the step")
    return True


def _timeline(axis: Axes, run: Run) -> bool:
    """The last steps as bars, one row per side; within a step as the trainer goes: wait, train, publish."""
    rows = [row for row in run.steps if {"step_seconds", "share/sampling"} <= row.keys()]
    start = 0.0
    for row in rows[-_STEPS_SHOWN:]:
        seconds = float(row["step_seconds"])
        # Without look-ahead each side waits while the other one works.
        waiting = float(row.get("overlap/idle_trainer_s", row["share/sampling"] * seconds))
        sampling = seconds - float(row.get("overlap/idle_sampler_s", seconds - waiting))
        publishing = float(row.get("sync/seconds", 0.0))
        done = start + seconds - publishing
        axis.barh(1, done - start - waiting, left=start + waiting, height=0.55, color="#8fa3b8")
        axis.barh(1, publishing, left=done, height=0.55, color=AMBER)
        axis.barh(0, sampling, left=start, height=0.55, color=BLUE)
        axis.axvline(start, color="#c8d0d9", linewidth=0.8, zorder=0)
        axis.annotate(f"{row['step']:.0f}", (start, 1.5), fontsize=8, color=FAINT)
        start += seconds
    axis.set_yticks([0, 1], ["sampler", "trainer"])
    axis.set_ylim(-0.5, 1.75)
    axis.grid(visible=False)
    colors = {"sampling": BLUE, "training": "#8fa3b8", "publishing": AMBER}
    for label, color in colors.items():
        axis.barh(0, 0, color=color, label=label)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.0)
    return bool(rows)


def _offpolicy(axis: Axes, run: Run) -> bool:
    steps, ages = run.series("offpolicy/age_max")
    if not steps:
        return False
    axis.step(steps, ages, where="mid", color=BLUE, linewidth=1.6)
    axis.set_ylim(-0.1, max(1.0, *ages) + 0.2)
    axis.set_yticks(range(int(max(1.0, *ages)) + 1))
    axis.set_ylabel("oldest row, versions", color=BLUE)
    steps, shares = run.series("offpolicy/ess", 100)
    other = axis.twinx()
    other.plot(steps, shares, color=AMBER, linewidth=1.6)
    other.set_ylim(0, 105)
    other.set_ylabel("effective samples, %", color=AMBER)
    other.grid(visible=False)
    return True


def _bytes(axis: Axes, run: Run) -> bool:
    steps, values = run.series("sync/bytes", 2**-20)
    if not steps:
        return False
    axis.bar(steps, values, color=BLUE, width=0.9, label="one publish")
    axis.set_ylabel("MiB, one publish")
    axis.set_ylim(0, 1.25 * max(values) or 1)
    total_steps, totals = run.series("sync/bytes_total", 2**-20)
    if not totals:  # a log of an earlier release, with a row a step
        total_steps, totals = steps, list(itertools.accumulate(values))
    other = axis.twinx()
    other.plot(total_steps, _over_restarts(totals), color=AMBER, linewidth=1.6)
    other.set_ylabel("MiB, all so far", color=AMBER)
    other.set_ylim(bottom=0)
    other.grid(visible=False)
    return True


def _over_restarts(totals: list[float]) -> list[float]:
    """Running totals that a resumed run began again at zero, as one."""
    before, last, found = 0.0, 0.0, []
    for total in totals:
        before += last if total < last else 0.0
        last = total
        found.append(before + total)
    return found


def _tokens(axis: Axes, run: Run) -> bool:
    drawn = _line(axis, run, "rollout/tokens_per_second", color=BLUE)
    if drawn:
        axis.set_ylim(bottom=0)
        axis.set_ylabel("tokens/s")
    return drawn


def _staleness(axis: Axes, run: Run) -> bool:
    steps, values = run.series("rollout/staleness")
    if not steps:
        return False
    axis.step(steps, values, where="mid", color=BLUE, linewidth=1.6)
    axis.set_ylim(-0.1, max(1.0, *values) + 0.2)
    axis.set_ylabel("versions behind")
    return True


_GAPS = ("rollout/logprob_gap", "sync/probe_gap", "sampling/sampling_logp_difference/mean")


def _gap(axis: Axes, run: Run) -> bool:
    drawn = _line(axis, run, _GAPS[0], color=BLUE, label="largest")
    drawn = _line(axis, run, _GAPS[2], color=FAINT, label="mean") or drawn
    if not (_probe(axis, run) or drawn):
        return False
    if any(value > 0 for key in _GAPS for value in run.values(key)):  # else no log scale
        axis.set_yscale("log", nonpositive="clip")
        _only_decades(axis)
    axis.set_ylabel("nats")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return True


def _probe(axis: Axes, run: Run) -> bool:
    steps, values = run.series(_GAPS[1])
    if steps:
        axis.plot(steps, values, "o", color=AMBER, markersize=4, label="probe")
    return bool(steps)


def _length(axis: Axes, run: Run) -> bool:
    drawn = _line(axis, run, "completions/mean_length", color=BLUE, label="mean")
    if drawn:
        _line(axis, run, "completions/max_length", color=FAINT, linewidth=1.0, label="longest")
        axis.set_ylim(bottom=0)
        axis.set_ylabel("tokens")
        axis.legend(loc="lower right", ncols=2)
    return drawn


_PANELS = (
    _Panel("reward", "Reward", _reward,
           "Mean over the step's completions, and their standard deviation."),
    _Panel("offpolicy", "Age and effective sample size", _offpolicy,
           "How many versions old rows are, and what their importance weights leave of a batch."),
    _Panel("heldout", "Held-out accuracy", _heldout,
           "Problems that training never saw, sampled through the server."),
    _Panel("sync_phases", "Publish time by phase", _phases,
           "What it took to make each new policy the served one."),
    _Panel("step_shares", "Where a step's time goes", _shares,
           "Sampling, syncing, and the trainer's own work."),
    _Panel("timeline", "The last steps", _timeline,
           "Who works when; white is waiting. Numbers are steps.", "seconds"),
    _Panel("tokens_per_second", "Rollout speed", _tokens,
           "Completion tokens per second of sampling."),
    _Panel("bytes", "Bytes published", _bytes,
           "To each server: the adapter, never the model."),
    _Panel("logprob_gap", "Trainer-sampler logprob gap", _gap,
           "Near zero: the server samples the policy that is trained."),
    _Panel("staleness", "Staleness", _staleness,
           "How many versions the sampled policy was behind the trained one."),
    _Panel("completion_length", "Completion length", _length,
           "In tokens."),
)  # fmt: skip
