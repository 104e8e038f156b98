"""The report as a browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.browser import measure, screenshot
from tink_rl.cli import main
from tink_rl.tools.report import write_report
from tink_rl.tools.report.figures import BLUE, _timeline, draw
from tink_rl.tools.report.page import render
from tink_rl.tools.report.run import load_run

DEMO_RUN = Path(__file__).parent / "demo_run"
FIGURES = {
    *("reward", "heldout", "sync_phases", "step_shares", "tokens_per_second", "bytes"),
    *("logprob_gap", "staleness", "completion_length", "timeline"),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = Path(shutil.copytree(DEMO_RUN, tmp_path_factory.mktemp("run") / "demo"))
    rows = [
        {"version": v, "prompt": f"{p}173=", "completion": answer, "reward": reward}
        for v, answer, reward in ((1, "<b>13</b>", 0.0), (40, "1347", 1.0))
        for p in range(3)
    ]
    (directory / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def page(run_dir):
    assert main(["report", str(run_dir)]) == 0
    return run_dir / "report.html"


@pytest.fixture
def words_only(monkeypatch):
    """Seconds of drawing that a test of the page's words need not wait for."""
    monkeypatch.setattr("tink_rl.tools.report.draw", lambda run: [])


def test_page_and_pngs_hold_every_figure(page):
    assert {path.stem for path in (page.parent / "report").glob("*.png")} == FIGURES
    for path in (page.parent / "report").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert set(re.findall(r'<figure class="card" id="(\w+)"', text)) == FIGURES
    assert "0.47 → 0.97" in text and "finished after 80 steps" in text


def test_page_loads_nothing_from_elsewhere(page):
    text = page.read_text()
    loaded = re.findall(r'(?:src|href)\s*=\s*"(?!#)([^"]+)"', text) + re.findall(r"@import", text)
    assert loaded == ["data:,"]
    assert "<script" not in text


def test_completions_are_shown_as_text(page):
    text = page.read_text()
    assert "&lt;b&gt;13&lt;/b&gt;" in text and "<b>13</b>" not in text
    assert text.index("version 1<") < text.index("version 40<")


@pytest.mark.parametrize("width", [500, 1240])
def test_browser_shows_all_figures_inside_the_window(page, tmp_path, width):
    boxes = "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect())"
    script = (
        f"[document.documentElement.scrollWidth <= innerWidth, {boxes}.length, "
        f"Math.min(...{boxes}.map(b => b.width)) > 300, Math.min(...{boxes}.map(b => b.height)) > 150]"
    )
    assert measure(page, script, tmp_path, width=width) == f"true,{len(FIGURES)},true,true"


def test_screenshot_shows_the_curves(page, tmp_path):
    from matplotlib import colors, image

    pixels = image.imread(screenshot(page, tmp_path / "page.png"))[..., :3]
    assert pixels.shape == (2400, 1240, 3)
    blue = (abs(pixels - colors.to_rgb(BLUE)) < 0.02).all(axis=-1)
    # reward top left, publish phases at the right of the first two rows, shares below
    for rows, columns in (
        ((450, 800), (0, 620)),
        ((450, 1150), (620, 1240)),
        ((800, 1150), (0, 620)),
    ):
        assert blue[slice(*rows), slice(*columns)].sum() > 200


def test_running_run_says_so_and_refreshes_itself(run_dir, tmp_path, words_only):
    directory = Path(shutil.copytree(run_dir, tmp_path / "live"))
    path = directory / "metrics.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:21]) + "\n")
    text = write_report(directory, refresh_s=7).read_text()
    assert 'content="7"' in text and "running: step 40 of 80" in text
    run = load_run(directory)
    late = render(run, [], now=run.updated + 3600)
    assert "nothing new for 60 min, it may have stopped" in late


def test_run_without_a_step_yet_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "begin", "step": 0, "max_steps": 5}\n')
    text = write_report(tmp_path).read_text()
    assert "No step was logged yet" in text and "Not logged by this run: Reward" in text


def test_rows_that_are_zero_or_single_are_drawn(tmp_path):
    row = {"step": 1, "loss": 0.0, "reward": 0.0, "rollout/logprob_gap": 0.0, "sync/bytes": 0.0}
    row |= {"sync/seconds": 0.1, "sync/phase/stage": 0.1, "rollout/staleness": 0.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    names = {figure.name for figure in draw(load_run(tmp_path))}
    assert names == {"reward", "sync_phases", "bytes", "logprob_gap", "staleness"}


def test_run_that_samples_ahead_shows_age_beside_the_reward_and_both_sides_at_once(tmp_path):
    row = {
        "loss": 0.0,
        "reward": 0.5,
        "step_seconds": 1.0,
        "sync/seconds": 0.1,
        "share/sampling": 0.2,
    }
    row |= {"overlap/idle_trainer_s": 0.2, "overlap/idle_sampler_s": 0.3, "overlap/hit_share": 0.75}
    row |= {"offpolicy/age_max": 1.0, "offpolicy/ess": 0.9}
    rows = [row | {"step": step} for step in range(1, 12)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert re.findall(r'<figure class="card" id="(\w+)"', page)[:2] == ["reward", "offpolicy"]
    assert "rows sampled ahead</span><b>75%</b>" in page


def bars(row, tmp_path):
    """`(side, start, length)` of the bars that the timeline draws of one step."""
    from matplotlib.figure import Figure

    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    axis = Figure().subplots()
    assert _timeline(axis, load_run(tmp_path))
    sides = ("sampler", "trainer")
    drawn = [(sides[round(p.get_y() + 0.275)], p.get_x(), p.get_width()) for p in axis.patches]
    return [bar for bar in drawn if bar[2]]


def test_timeline_puts_sampling_beside_training_where_rows_were_sampled_ahead(tmp_path):
    row = {"step": 1, "loss": 0.0, "step_seconds": 2.0, "share/sampling": 0.5, "sync/seconds": 0.25}
    alone = [("trainer", 1.0, 0.75), ("trainer", 1.75, 0.25), ("sampler", 0.0, 1.0)]
    assert bars(row, tmp_path) == alone
    ahead = row | {"overlap/idle_trainer_s": 0.25, "overlap/idle_sampler_s": 0.5}
    beside = [("trainer", 0.25, 1.5), ("trainer", 1.75, 0.25), ("sampler", 0.0, 1.5)]
    assert bars(ahead, tmp_path) == beside


def test_watch_stops_once_a_run_has_been_silent_for_too_long(
    run_dir, tmp_path, words_only, monkeypatch, capsys
):
    directory = Path(shutil.copytree(run_dir, tmp_path / "dead"))
    path = directory / "metrics.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:21]) + "\n")
    slept = []

    def an_hour_later(seconds):
        slept.append(seconds)
        for file in directory.glob("*.json*"):
            os.utime(file, (0, time.time() - 3600))

    for file in directory.glob("*.json*"):
        os.utime(file)
    monkeypatch.setattr("tink_rl.cli.report.time.sleep", an_hour_later)
    assert main(["report", str(directory), "--watch", "5"]) == 1
    said = capsys.readouterr().err
    assert slept == [5] and "nothing new for 60 min since step 40" in said
    assert "it may have stopped" in (directory / "report.html").read_text()


def test_run_that_failed_is_watched_no_longer_and_says_why(run_dir, tmp_path, words_only, capsys):
    directory = Path(shutil.copytree(run_dir, tmp_path / "failed"))
    path = directory / "metrics.jsonl"
    end = {"event": "end", "step": 40, "error": "ChannelLost: the server is gone"}
    path.write_text("\n".join([*path.read_text().splitlines()[:21], json.dumps(end)]) + "\n")
    assert main(["report", str(directory), "--watch", "5"]) == 0
    assert "the run failed: ChannelLost" in capsys.readouterr().err
    text = (directory / "report.html").read_text()
    assert "failed after step 40 of 80: ChannelLost: the server is gone" in text
    assert "width: 50.0%" in text and "status done" not in text


def test_watch_writes_until_the_run_ends(page, capsys):
    assert main(["report", str(page.parent), "--watch", "1"]) == 0
    assert "http-equiv" not in page.read_text()
    assert "report.html" in capsys.readouterr().err


def test_output_names_another_folder_and_a_missing_run_is_one_line(run_dir, tmp_path, capsys):
    assert main(["report", str(run_dir), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file() and (tmp_path / "report" / "reward.png").is_file()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
