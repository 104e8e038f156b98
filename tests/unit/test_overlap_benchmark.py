"""What the benchmark of sampling ahead makes of its runs, and the sampler that it simulates."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from benchmarks import grpo_run, learning, overlap
from benchmarks.slow_sampler import SlowSampler, running


def step(seconds, **parts):
    return {"step": seconds, **parts}


def test_routes_are_held_against_trl_and_against_each_side_alone():
    found = {
        "trl, 8 tokens": step(2.0),
        "each side alone, 8 tokens": step(5.0, rollout=2.0),
        "max_staleness=0, 8 tokens": step(3.0),
        "max_staleness=1, 8 tokens": step(3.3),
        "max_staleness=0, sampler elsewhere": step(5.0, rollout=2.0),
        "max_staleness=1, sampler elsewhere": step(3.6),
        "max_staleness=0, uneven sampler elsewhere": step(1.4, rollout=0.8),
        "max_staleness=2, uneven sampler elsewhere": step(1.0),
    }
    assert overlap.ratios(found) == pytest.approx(
        {
            "max_staleness=0 / TRL, 8 tokens": 1.5,
            "max_staleness=1 / TRL, 8 tokens": 1.65,
            "max_staleness=1 / max(sample, train + publish), 8 tokens": 1.1,
            "max_staleness=0 / max(sample, train + publish), sampler elsewhere": 5 / 3,
            "max_staleness=1 / max(sample, train + publish), sampler elsewhere": 1.2,
            "max_staleness=0 / max(sample, train + publish), uneven sampler elsewhere": 1.75,
            "max_staleness=2 / max(sample, train + publish), uneven sampler elsewhere": 1.25,
        }
    )
    assert overlap.ratios({}) == {}


def test_part_that_fails_is_named_and_the_others_are_measured(capsys):
    kept = []
    parts = overlap.Parts(lambda: kept.append((dict(parts.found), list(parts.failed))))

    def fails():
        raise RuntimeError("no such setting")

    parts.add("one", fails)
    parts.add("other", step, 1.0)
    assert kept == [({}, ["one"]), ({"other": {"step": 1.0}}, ["one"])]
    text = "\n".join(
        overlap.render({"steps": parts.found, "failed": parts.failed, "ratios": {"a / b": 1.5}})
    )
    assert "| other | 1.00 |" in text and "| a / b | 1.50 |" in text
    assert "Not measured: one (RuntimeError: no such setting)" in text
    assert "FAILED one" in capsys.readouterr().out


@pytest.fixture
def simulated(monkeypatch):
    """Runs and servers that take no time; the route that was measured of each run."""
    runs = []

    @contextmanager
    def server_of(mode, environment=None):
        if mode == "adapter":
            raise RuntimeError("no server today")
        yield {"url": "http://s", "token_file": "t"}

    def measure(run, environment=None):
        runs.append(run)
        return step(2.0, rollout=1.0, rewards=[0.5, 1.0])

    monkeypatch.setattr(grpo_run, "measure", measure)
    monkeypatch.setattr(overlap, "running", lambda slow: nullcontext("http://slow"))
    monkeypatch.setattr(learning, "ensure_tiny_base", lambda: None)
    for module in (overlap, learning):
        monkeypatch.setattr(module, "server_of", server_of)
    return runs


def test_every_route_is_kept_when_it_is_measured_and_a_lost_server_costs_only_its_own(simulated):
    kept = []
    overlap.measure(lambda found: kept.append(json.loads(json.dumps(found))))
    assert [len(found["steps"]) for found in kept] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert list(kept[-1]["failed"]) == ["server adapter"] and len(kept[-1]["ratios"]) == 7
    counted = [run.num_steps - run.num_warm_up for run in simulated]
    assert min(counted) == 10 and sorted(counted)[1] >= 20  # each side alone, and all others
    far = [run for run in simulated if run.url == "http://slow"]
    assert [(run.max_staleness, run.train_s) for run in far] == [
        (k, overlap.ELSEWHERE_S) for k in (0, 1)
    ]


def test_seeds_on_two_servers_are_kept_side_by_side(simulated):
    kept = []
    learning.measure(lambda found: kept.append(json.loads(json.dumps(found))))
    assert len(kept[-1]["learning"]) == 6 and list(kept[-1]["failed"]) == ["server adapter"]
    assert kept[-1]["learning"]["max_staleness=1, seed 2"]["reward_last5"] == 0.75


def test_placements_are_measured_on_a_server_of_each(simulated):
    kept = []
    overlap.measure_placements(kept.append)
    assert len(kept[-1]["steps"]) == 6 * len(overlap.PLACEMENTS) and not kept[-1]["failed"]


@pytest.mark.parametrize(
    ("rewards", "steps"),
    [([0.5] * 3 + [0.95] * 9, 8), ([1.0] * 5, 5), ([1.0, 0.5] * 9, None), ([1.0] * 4, None)],
)
def test_samples_until_five_steps_in_a_row_are_as_good_as_asked(rewards, steps):
    found = learning.samples_to_hold(rewards, 128)
    assert found == (None if steps is None else 128 * steps)


def test_table_of_learning_has_a_row_for_each_staleness():
    run = {"reward_last5": 0.97, "samples_to_hold": 5120}
    text = learning.render(
        {"learning": {"max_staleness=0, seed 0": run, "max_staleness=0, seed 1": run}}
    )
    assert "| 0 | 0.970, 0.970 | 5120, 5120 |" in text and "| 2 |" in text


@pytest.fixture
def target():
    """URL of a server that answers at once, and the paths that it was asked for."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.path, self.headers["x-token"], body))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def _seconds(url, path, body):
    start = time.monotonic()
    answer = httpx.post(url + path, json=body, headers={"x-token": "t"}, timeout=60)
    assert answer.json() == body
    return time.monotonic() - start


def test_tokens_of_a_sampler_elsewhere_take_their_time_and_nothing_else_does(target):
    url, seen = target
    with running(SlowSampler(target=url, token_s=0.1, spread=0.5)) as slow:
        assert _seconds(slow, "/v1/completions", {"max_tokens": 20}) >= 3.0
        assert _seconds(slow, "/v1/completions", {"max_tokens": 20}) >= 1.0
        _seconds(slow, "/tink/v1/commit", {"version": 2})
    assert [(path, token) for path, token, _ in seen] == [
        ("/v1/completions", "t"),
        ("/v1/completions", "t"),
        ("/tink/v1/commit", "t"),
    ]
