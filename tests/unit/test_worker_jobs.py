"""The queue: who is admitted, whose turn it is, how a request ends, what a retry gets."""

from __future__ import annotations

import json
import threading

import pytest

from tests.fakes import FakeBackend, answer_of
from tests.refusals import refused
from tests.worker_rig import in_threads, wait_until, worker
from tink_rl import errors
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.worker import replay
from tink_rl.worker.backends import Admitted
from tink_rl.worker.fair_queue import FairQueue
from tink_rl.worker.jobs import JobQueue
from tink_rl.worker.ledger import ENDS, RequestLedger, State
from tink_rl.worker.work import Work


def _work(model_id=None, request_id="r", **fields):
    params = SamplingParams(**fields.pop("params", {}))
    prompts = fields.pop("prompts", ["hi"])
    request = Admitted(prompts=prompts, model_id=model_id, params=params)
    return Work(request_id=request_id, request=request, **{"timeout_s": 20.0, **fields})


@pytest.fixture
def queue():
    made = []

    def make(backend=None, **limits):
        backend = backend or FakeBackend(["a", "b"])
        ledger = RequestLedger()
        settings = {"max_running": 4, "max_queued": 8, "max_waiting": 100, "replay_s": 60.0}
        jobs = JobQueue(backend, ledger, **{**settings, **limits})
        jobs.start()
        made.append(jobs)
        return jobs, backend, ledger

    yield make
    for jobs in made:
        jobs.drain(2.0)
        jobs.close()


# -- fairness -------------------------------------------------------------------------------------


def test_a_flood_for_one_key_does_not_delay_another_keys_request():
    fair = FairQueue()
    for i in range(100):
        fair.push("flood", f"flood{i}", 10.0)
    fair.push("small", "small", 10.0)
    order = [fair.pop() for _ in range(3)]
    assert "small" in order[:2]


def test_shares_are_of_cost_not_of_requests():
    fair = FairQueue()
    for i in range(40):
        fair.push("long", ("long", i), 100.0)
        fair.push("short", ("short", i), 10.0)
    first = [fair.pop()[0] for _ in range(22)]
    assert first.count("short") == 20


def test_an_idle_key_saves_no_credit():
    fair = FairQueue()
    for _ in range(50):
        fair.push("busy", "busy", 1.0)
    for _ in range(40):
        fair.pop()
    for _ in range(10):
        fair.push("late", "late", 1.0)
    assert 4 <= [fair.pop() for _ in range(10)].count("late") <= 6


def test_removed_items_are_gone_and_counted():
    fair = FairQueue()
    fair.push("a", item := object(), 1.0)
    assert fair.remove("a", item) and not fair.remove("a", item)
    assert len(fair) == 0 and fair.peek() is None
    with pytest.raises(IndexError, match="nothing waits"):
        fair.pop()


def test_forgotten_keys_leave_nothing_behind():
    fair = FairQueue()
    for i in range(5000):
        fair.push(f"key{i}", i, 1.0)
        fair.pop()
    assert len(fair._served) <= 1025


def test_models_take_turns_at_the_backend(queue):
    backend = FakeBackend(["a", "b"])
    jobs, _, _ = queue(backend, max_running=1, max_queued=100)
    gate = threading.Event()
    backend.changes = lambda found: found * gate.wait(10)  # holds the loop
    tickets = [jobs.submit(_work("a", f"a{i}")) for i in range(10)]
    tickets += [jobs.submit(_work("b", f"b{i}")) for i in range(10)]
    gate.set()
    for ticket in tickets:
        ticket.result()
    assert backend.order[:4] == ["a", "b", "a", "b"]
    assert abs(backend.order[:12].count("a") - 6) <= 1


# -- admission ------------------------------------------------------------------------------------


def test_the_queue_is_bounded_and_says_when_to_come_back(queue):
    backend = FakeBackend(latency_s=0.2)
    jobs, _, ledger = queue(backend, max_running=2, max_queued=3)
    tickets = [jobs.submit(_work(request_id=f"r{i}")) for i in range(5)]
    with pytest.raises(errors.QueueFull, match="3 requests are queued") as caught:
        jobs.submit(_work(request_id="r5"))
    assert caught.value.details["retry_after_s"] >= 1
    assert [len(t.result()) for t in tickets] == [1] * 5
    assert ledger.num_admitted == 5 and ledger.ends[State.DONE] == 5
    assert backend.most_running == 2


def test_every_free_place_is_used_before_anyone_is_refused(queue):
    jobs, _, ledger = queue(FakeBackend(latency_s=0.1), max_running=64, max_queued=1)
    tickets = [jobs.submit(_work(request_id=f"r{i}")) for i in range(65)]
    assert all(t.result() for t in tickets)
    assert ledger.ends[State.DONE] == 65


def test_sequences_not_requests_are_limited_and_a_large_request_runs_alone(queue):
    backend = FakeBackend(latency_s=0.05)
    jobs, _, _ = queue(backend, max_running=4)
    large = jobs.submit(_work(request_id="large", prompts=["x"] * 3, params={"n": 2}))
    small = [jobs.submit(_work(request_id=f"s{i}")) for i in range(4)]
    assert len(large.result()) == 6 and all(t.result() for t in small)
    assert backend.most_running <= 4


def test_waiting_clients_are_bounded_too(queue):
    jobs, backend, _ = queue(FakeBackend(latency_s=0.3), max_waiting=3)
    tickets = [jobs.submit(_work(fingerprint="f")) for _ in range(3)]
    with pytest.raises(errors.QueueFull, match="wait for answers"):
        jobs.submit(_work(fingerprint="f"))
    assert {t.result()[0].text for t in tickets} and backend.num_calls == 1


# -- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "state", "seen"),
    [
        (errors.SamplingRefused("no"), State.REJECTED, errors.SamplingRefused),
        (errors.EngineUnavailable("gone"), State.FAILED, errors.EngineUnavailable),
        (errors.DeadlineExceeded("late"), State.EXPIRED, errors.DeadlineExceeded),
        (RuntimeError("secret"), State.FAILED, errors.TinkError),
    ],
)
def test_what_the_backend_raises_is_one_end_and_the_clients_error(queue, raised, state, seen):
    backend = FakeBackend()
    backend.fails_with = raised
    jobs, _, ledger = queue(backend)
    with pytest.raises(seen) as caught:
        jobs.submit(_work()).result()
    assert "secret" not in str(caught.value)
    assert dict(ledger.ends) == {state: 1}


@pytest.mark.parametrize("change", [lambda f: f[:-1], lambda f: f[::-1], lambda f: f + f])
def test_missing_doubled_or_shuffled_completions_are_no_answer(queue, change):
    backend = FakeBackend()
    backend.changes = change
    jobs, _, ledger = queue(backend)
    with pytest.raises(errors.BackendError, match="2 x 2"):
        jobs.submit(_work(prompts=["x", "y"], params={"n": 2})).result()
    assert ledger.ends[State.FAILED] == 1


def test_a_deadline_ends_running_and_queued_requests(queue):
    backend = FakeBackend(latency_s=5.0)
    jobs, _, ledger = queue(backend, max_running=1)
    tickets = [jobs.submit(_work(request_id=f"r{i}", timeout_s=0.3)) for i in range(3)]
    for ticket in tickets:
        with pytest.raises(errors.DeadlineExceeded, match=r"0\.3 s"):
            ticket.result()
    assert ledger.ends[State.EXPIRED] == 3
    wait_until(lambda: backend.running == 0)
    assert backend.num_cancelled == backend.num_calls


def test_a_deadline_that_is_over_in_the_queue_does_not_wait_for_a_turn(queue):
    jobs, backend, ledger = queue(FakeBackend(latency_s=5.0), max_running=1)
    running = jobs.submit(_work(request_id="long"))
    waiting = jobs.submit(_work(request_id="short", timeout_s=0.3))
    wait_until(lambda: ledger.ends[State.EXPIRED] == 1, 3.0)
    with pytest.raises(errors.DeadlineExceeded):
        waiting.result()
    assert backend.num_calls == 1 and not running.job.is_over
    running.leave()


def test_a_client_that_leaves_cancels_its_request_wherever_it_is(queue):
    backend = FakeBackend(latency_s=5.0)
    jobs, _, ledger = queue(backend, max_running=1)
    running, queued = jobs.submit(_work(request_id="r0")), jobs.submit(_work(request_id="r1"))
    wait_until(lambda: backend.running == 1)
    queued.leave()
    running.leave()
    wait_until(lambda: ledger.ends[State.CANCELLED] == 2)
    assert (backend.num_calls, backend.num_cancelled) == (1, 1)


@pytest.mark.parametrize("end", ["leaves", "expires"])
def test_a_queued_request_that_ends_lets_a_smaller_one_behind_it_start(queue, end):
    backend = FakeBackend(latency_s=5.0)
    jobs, _, ledger = queue(backend, max_running=4)
    jobs.submit(_work(request_id="running", prompts=["x"] * 3))
    seconds = 0.3 if end == "expires" else 20.0
    large = jobs.submit(_work(request_id="large", prompts=["x"] * 4, timeout_s=seconds))
    small = jobs.submit(_work(request_id="small"))
    assert small.job.state is State.QUEUED
    if end == "leaves":
        large.leave()
    wait_until(lambda: backend.running == 2, 3.0)
    assert small.job.state is State.RUNNING
    assert ledger.ends == {State.EXPIRED if end == "expires" else State.CANCELLED: 1}


def test_ledger_of_two_lives_tells_their_jobs_apart(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for _ in range(2):  # the second one after a kill -9: nothing was closed
        life = RequestLedger(path)
        life.admitted(1, "r")
        life.ended(1, "r", State.DONE)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in found] == ["admitted", "done"] * 2
    lives = [line["life"] for line in found]
    assert lives[0] == lives[1] != lives[2] == lives[3]


def test_a_client_that_vanishes_is_noticed_and_its_place_given_on(queue):
    backend = FakeBackend(latency_s=5.0)
    jobs, _, ledger = queue(backend, max_running=1)
    gone = threading.Event()
    with pytest.raises(errors.RequestCancelled), jobs.submit(_work(), gone.is_set) as ticket:
        gone.set()
        ticket.result()
    wait_until(lambda: ledger.ends[State.CANCELLED] == 1 and backend.running == 0)


def test_a_request_cancelled_before_its_task_ran_still_ends(queue):
    jobs, _, ledger = queue()
    for i in range(200):
        jobs.submit(_work(request_id=f"r{i}")).leave()
    wait_until(lambda: sum(ledger.ends.values()) == 200)
    assert jobs.depth() == {"queued": 0, "running": 0, "running_sequences": 0, "connections": 0}


# -- retries --------------------------------------------------------------------------------------


def test_a_retry_joins_the_running_request_and_gets_the_finished_one(queue):
    backend = FakeBackend(latency_s=0.2)
    jobs, _, ledger = queue(backend)
    both = [jobs.submit(_work(fingerprint="f")) for _ in range(2)]
    first, second = (t.result() for t in both)
    late = jobs.submit(_work(fingerprint="f"))
    assert first is second and late.result() is first
    assert [t.is_joined for t in (*both, late)] == [False, True, True]
    assert backend.num_calls == 1 and ledger.num_admitted == 1


def test_another_body_under_the_same_id_is_refused_running_or_finished(queue):
    jobs, backend, _ = queue(FakeBackend(latency_s=0.1))
    running = jobs.submit(_work(fingerprint="f"))
    for _ in range(2):
        with refused("request_id_reused", match="'r'"):
            jobs.submit(_work(fingerprint="g"))
        running.result()
    assert backend.num_calls == 1


def test_a_client_that_leaves_lets_a_request_with_an_id_run_for_its_retry(queue):
    backend = FakeBackend(latency_s=0.2)
    jobs, _, _ = queue(backend)
    jobs.submit(_work(fingerprint="f")).leave()
    retry = jobs.submit(_work(fingerprint="f"))
    assert retry.is_joined and retry.result()[0].token_ids == answer_of(None, "hi")
    assert backend.num_cancelled == 0 and backend.num_calls == 1


def test_a_failed_request_runs_again_on_retry(queue):
    backend = FakeBackend()
    backend.fails_with = errors.EngineUnavailable("gone")
    jobs, _, ledger = queue(backend)
    with pytest.raises(errors.EngineUnavailable):
        jobs.submit(_work(fingerprint="f")).result()
    backend.fails_with = None
    retry = jobs.submit(_work(fingerprint="f"))
    assert retry.result() and not retry.is_joined
    assert ledger.ends == {State.FAILED: 1, State.DONE: 1}


def test_answers_are_kept_only_for_a_while(queue):
    jobs, backend, _ = queue(replay_s=0.0)
    jobs.submit(_work(fingerprint="f")).result()
    wait_until(lambda: not jobs._kept)
    assert jobs.submit(_work(fingerprint="f")).result() and backend.num_calls == 2


def test_kept_answers_are_bounded_in_number_and_weight(queue, monkeypatch):
    monkeypatch.setattr(replay, "_MAX_JOBS", 3)
    jobs, backend, _ = queue()
    for i in range(5):
        jobs.submit(_work(request_id=f"r{i}", fingerprint="f")).result()
    assert len(jobs._kept) == 3 and jobs._kept.get("r4") and not jobs._kept.get("r0")
    monkeypatch.setattr(replay, "_MAX_WEIGHT", 20)
    jobs.submit(_work(request_id="r5", fingerprint="f")).result()
    assert len(jobs._kept) == 1 and backend.num_calls == 6


def test_a_joined_stream_gets_every_piece_from_the_first_on(queue):
    backend = FakeBackend(latency_s=0.1)
    jobs, _, _ = queue(backend)
    first = jobs.submit(_work(fingerprint="f", stream=True))
    pieces = first.deltas()
    head = [next(pieces) for _ in range(3)]
    second = jobs.submit(_work(fingerprint="f", stream=True))
    assert [d.text for d in second.deltas()] == [d.text for d in [*head, *pieces]]
    assert len(list(jobs.submit(_work(fingerprint="f", stream=True)).deltas())) == 8


# -- the end --------------------------------------------------------------------------------------


def test_draining_lets_requests_finish_and_refuses_new_ones(queue):
    backend = FakeBackend(latency_s=0.3)
    jobs, _, ledger = queue(backend, max_running=2)
    tickets = [jobs.submit(_work(request_id=f"r{i}")) for i in range(6)]
    threading.Timer(0.05, jobs.begin_shutdown).start()
    wait_until(lambda: jobs.is_closing)
    with refused("shutting_down"):
        jobs.submit(_work(request_id="late"))
    assert jobs.drain(10.0) == 0
    assert all(t.result() for t in tickets) and ledger.ends[State.DONE] == 6


def test_draining_cuts_off_what_takes_too_long(queue):
    jobs, _, ledger = queue(FakeBackend(latency_s=60.0), max_running=1)
    tickets = [jobs.submit(_work(request_id=f"r{i}")) for i in range(3)]
    assert jobs.drain(0.1) == 3
    for ticket in tickets:
        with refused("shutting_down"):
            ticket.result()
    assert ledger.ends[State.CANCELLED] == 3


def test_the_backend_is_closed_with_the_queue():
    backend = FakeBackend()
    with worker(backend=backend) as rig:
        assert rig.sample().status_code == 200
    assert backend.is_closed


# -- ledger -------------------------------------------------------------------------------------


def test_the_ledger_has_each_request_once_admitted_and_once_ended(tmp_path):
    path = tmp_path / "ledger.jsonl"
    backend = FakeBackend(["a"], latency_s=0.01)
    with worker(backend=backend, ledger=str(path), max_queued=4, max_running=2) as rig:
        statuses = in_threads(30, lambda i: rig.sample(request_id=f"r{i}").status_code)
        backend.fails_with = errors.EngineUnavailable("gone")
        assert rig.sample(request_id="broken").status_code == 503
        ledger = rig.service.ledger
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    admitted = [line["job"] for line in lines if line["event"] == "admitted"]
    ended = {line["job"]: line["event"] for line in lines if line["event"] in ENDS}
    assert sorted(admitted) == sorted(ended) and len(admitted) == ledger.num_admitted
    assert len(lines) == 2 * len(admitted)
    assert set(statuses) <= {200, 429}
    assert list(ended.values()).count("done") == statuses.count(200) == ledger.ends[State.DONE]
    assert [line["request_id"] for line in lines if line["event"] == "failed"] == ["broken"]


def test_a_ledger_whose_disk_is_full_stops_no_answer():
    with worker(ledger="/dev/full") as rig:
        assert [rig.sample().status_code for _ in range(3)] == [200] * 3
        assert rig.service.ledger.ends[State.DONE] == 3


def test_a_ledger_that_cannot_be_written_is_said_at_start(tmp_path):
    with pytest.raises(errors.ConfigError, match="--ledger"):
        RequestLedger(tmp_path / "missing" / "ledger")
