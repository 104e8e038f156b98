"""The HTML page: tiles, findings, figures and samples in one file without any link to outside."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from importlib.resources import files

from tink_rl import __version__
from tink_rl.tools.report.figures import Figure, missing
from tink_rl.tools.report.findings import find, first_and_last
from tink_rl.tools.report.run import Run, Sample

_MAX_VERSIONS = 8
_MAX_TEXT = 400
_PATTERN_ROWS = (
    ("mode", "mode", "{}"),
    ("seed", "seed", "{}"),
    ("train_seconds", "training", "{:.0f} s"),
    ("versions_published", "versions published", "{}"),
)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number: `Tile(label="reward", value="0.51 → 0.96", note="first and last 5 steps")`."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class VersionSamples:
    """A few completions of one policy version."""

    version: int
    samples: list[Sample]
    mean_reward: float | None
    """Over all of its completions, shown or not."""


def render(run: Run, figures: list[Figure], *, refresh_s: int = 0, now: float | None = None) -> str:
    """The page of `run`.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            "jinja2 is not available: the report is a template; pip install 'tink-rl[train]'"
        ) from error
    source = (files("tink_rl.tools.report") / "page.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        title=run.directory.resolve().name,
        subtitle=_subtitle(run),
        status=_status(run, time.time() if now is None else now),
        finished=run.finished and run.error is None,
        percent=_percent(run),
        refresh_s=0 if run.finished else refresh_s,
        tiles=_tiles(run),
        findings=find(run),
        figures=figures,
        missing=missing(figures),
        versions=_versions(run),
        facts=_facts(run),
        tool_version=__version__,
    )


def _subtitle(run: Run) -> str:
    if not run.policy:
        return ""
    name, mode = f"{run.policy['policy']}@{run.policy['version']}", run.policy["mode"]
    return f"last policy {name}, {mode} mode, digest {str(run.policy['digest'])[:12]}"


def _status(run: Run, now: float) -> str:
    of = f" of {run.max_steps}" if run.max_steps else ""
    if run.error is not None:
        return f"failed after step {run.last_step}{of}: {run.error}"
    if run.finished:
        return f"finished after {run.last_step} steps"
    silent = now - run.updated
    if silent > run.patience_s:
        return (
            f"step {run.last_step}{of}; nothing new for {silent / 60:.0f} min, it may have stopped"
        )
    return f"running: step {run.last_step}{of}, last row {silent:.0f} s ago"


def _percent(run: Run) -> float:
    if (run.finished and run.error is None) or not run.max_steps:
        return 100.0
    return min(100.0, 100.0 * run.last_step / run.max_steps)


def _tiles(run: Run) -> list[Tile]:
    tiles = []
    ends = first_and_last(run.values("reward"))
    if ends is not None:
        tiles.append(_arrow("reward", ends, "mean of the first and last steps"))
    before, after = (run.summary.get(f"heldout_{when}") for when in ("before", "after"))
    if before is not None and after is not None:
        tiles.append(_arrow("held-out accuracy", (before, after), "base and last version, sampled"))
    publishes = run.values("sync/seconds")
    if publishes:
        sizes = run.values("sync/bytes")
        note = f"median; {_size(statistics.median(sizes))} each" if sizes else "median"
        tiles.append(Tile(label="publish", value=_ms(statistics.median(publishes)), note=note))
    tiles += [
        tile
        for tile in (
            _median(run, "step_seconds", "one step", "{:.2f} s"),
            _median(run, "rollout/tokens_per_second", "rollout, tokens/s", "{:,.0f}"),
            _median(run, "overlap/hit_share", "rows sampled ahead", "{:.0%}"),
            _worst_gap(run),
        )
        if tile is not None
    ]
    return tiles


def _arrow(label: str, ends: tuple[float, float], note: str) -> Tile:
    return Tile(label=label, value=f"{ends[0]:.2f} → {ends[1]:.2f}", note=note)


def _median(run: Run, key: str, label: str, pattern: str) -> Tile | None:
    values = run.values(key)
    if not values:
        return None
    return Tile(label=label, value=pattern.format(statistics.median(values)), note="median")


def _worst_gap(run: Run) -> Tile | None:
    values = run.values("rollout/logprob_gap")
    if not values:
        return None
    return Tile(label="logprob gap", value=f"{max(values):.1e}", note="largest, trainer to sampler")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _facts(run: Run) -> list[tuple[str, str]]:
    found = [
        (label, pattern.format(run.summary[key]))
        for key, label, pattern in _PATTERN_ROWS
        if key in run.summary
    ]
    rates = run.values("learning_rate")
    if rates:
        found.append(("peak learning rate", f"{max(rates):g}"))
    staleness = run.values("rollout/staleness")
    if staleness:
        found.append(("largest staleness", f"{max(staleness):g} versions"))
    return [*found, ("directory", str(run.directory))]


def _versions(run: Run) -> list[VersionSamples]:
    """First, last, and evenly spread versions between them."""
    known = sorted(run.samples)
    if len(known) > _MAX_VERSIONS:
        last = len(known) - 1
        known = [known[round(i * last / (_MAX_VERSIONS - 1))] for i in range(_MAX_VERSIONS)]
    found = []
    for version in known:
        samples = [
            replace(sample, prompt=_cut(sample.prompt), completion=_cut(sample.completion))
            for sample in run.samples[version]
        ]
        mean = run.rewards.get(version)
        found.append(VersionSamples(version=version, samples=samples, mean_reward=mean))
    return found


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"
