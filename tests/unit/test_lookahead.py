"""What is sampled ahead: which batches, when, for whom, and what becomes of it; on a server of seeds."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from tests.unit.test_rollouts import SeededServer
from tink_rl import PolicySyncCallback, SyncConfig, errors
from tink_rl.training import lookahead
from tink_rl.training.batch_feed import BatchFeed
from tink_rl.training.generation import PolicyGeneration, SamplingSettings
from tink_rl.training.lookahead import LookAhead
from tink_rl.training.rollouts import RolloutBatch


class Loop:
    """The part of a trainer that draws batches: `steps` optimizer steps over `epochs` of the same data."""

    def __init__(self, *, per_step=1, per_generation=1, num_iterations=1, length=8, max_steps=100):
        self.args = SimpleNamespace(
            gradient_accumulation_steps=per_step, steps_per_generation=per_generation
        )
        self.num_iterations = num_iterations
        self.state = SimpleNamespace(global_step=0, max_steps=max_steps)
        self._step = 0
        self.length = length
        self.train = lambda: None

    def get_batch_samples(self, source, count, device):
        taken = []
        for _ in range(count):
            try:
                taken.append(next(source))
            except StopIteration:
                break
        return taken, None

    @staticmethod
    def _tokenize_prompts(prompts):
        return [[prompt, prompt] for prompt in prompts], None, {}

    def epoch(self, first=0):
        """Each generation batch stands there as often as it is trained on, as TRL's samplers repeat it."""
        every = self.args.steps_per_generation * self.num_iterations
        return iter([[{"prompt": first + i // every}] * 2 for i in range(self.length)])


def begin_step(loop, source):
    return loop.get_batch_samples(source, loop.args.gradient_accumulation_steps, None)[0]


def end_step(loop, batches):
    loop._step += len(batches)
    loop.state.global_step += 1


def upcoming(feed, last_step):
    return [(u.step, u.draw, u.inputs[0]["prompt"]) for u in feed.upcoming(last_step)]


def test_feed_names_each_batch_as_the_trainer_will_and_hands_all_out_in_order():
    loop = Loop()
    feed = BatchFeed(loop)
    source = loop.epoch()
    assert upcoming(feed, 3) == []  # no epoch has begun
    seen = begin_step(loop, source)
    assert upcoming(feed, 2) == [(0, 0, 0), (1, 0, 1), (2, 0, 2)]
    end_step(loop, seen)
    assert upcoming(feed, 2) == [(0, 0, 0), (1, 0, 1), (2, 0, 2)]
    for _ in range(7):
        batches = begin_step(loop, source)
        end_step(loop, batches)
        seen += batches
    assert [rows[0]["prompt"] for rows in seen] == list(range(8))
    assert begin_step(loop, source) == [] and upcoming(feed, 20) == []
    assert begin_step(loop, loop.epoch(first=50)) == [[{"prompt": 50}] * 2]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # two generation batches in one step: the second is draw 1 of it
        ({"per_step": 2}, [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]),
        # one that lasts for two steps, and one that is trained on twice
        ({"per_generation": 2}, [(0, 0, 0)]),
        ({"num_iterations": 2}, [(0, 0, 0)]),
        ({"per_step": 2, "per_generation": 2}, [(0, 0, 0), (1, 0, 1)]),
        # it begins in the middle of a step
        ({"per_step": 3, "per_generation": 2}, [(0, 0, 0), (0, 1, 1), (1, 0, 2)]),
        # the last, short step of an epoch
        ({"per_step": 2, "length": 3}, [(0, 0, 0), (0, 1, 1), (1, 0, 2)]),
    ],
)
def test_feed_counts_as_trl_does(shape, expected):
    loop = Loop(**shape)
    feed = BatchFeed(loop)
    begin_step(loop, loop.epoch())
    assert upcoming(feed, 1) == expected


class Server(SeededServer):
    """Can hold its answers back, and fail."""

    request_timeout_s = 5.0

    def __init__(self):
        super().__init__()
        self.go_on = threading.Event()
        self.go_on.set()
        self.fails_with = None
        self.is_aborted = False

    def generate(self, *args, **kwargs):
        assert self.go_on.wait(5.0)
        if self.fails_with is not None:
            raise self.fails_with
        return super().generate(*args, **kwargs)

    def abort(self):
        self.is_aborted = True
        self.fails_with = errors.ServerUnreachable("aborted")
        self.go_on.set()


class Run:
    """A trainer of one rank: `step()` is one optimizer step with a publish, as the callbacks make it."""

    def __init__(self, monkeypatch, *, k=1, ranks=(), **shape):
        self.loop, self.server, self.ahead_server = Loop(**shape), Server(), Server()
        monkeypatch.setattr(
            lookahead.AbortableClient, "like", classmethod(lambda cls, client: self.ahead_server)
        )
        self.version = 0
        self.other_ranks = ranks
        self.generation = PolicyGeneration(
            [self.server],
            SamplingSettings(max_completion_length=8),
            current=lambda: f"p@{self.version}",
            sync=lambda: None,
            recover=lambda: False,
        )
        self.generation.ahead = self.ahead = LookAhead(
            self.loop,
            [self.server],
            max_staleness=k,
            new_batch=self.new_batch,
            clock=self.generation.clock,
        )
        self.source = self.loop.epoch()
        self.sampled = []

    def new_batch(self, phase, step, draw):
        return RolloutBatch(
            run_seed=7,
            phase=phase,
            step=step,
            draw=draw,
            num_generations=2,
            gather=lambda mine: [*mine, *self.other_ranks],
        )

    def generate(self, prompts, draw=0, phase="train"):
        batch = self.new_batch(phase, self.loop.state.global_step, draw)
        batch.gather = list
        with self.generation.rollout(batch):
            rows = self.generation.generate(prompts, None, 2)[1]
        self.sampled.append((batch.step, batch.model, rows))
        return batch

    def begin(self):
        batches = begin_step(self.loop, self.source)
        self.generate([[row["prompt"]] * 2 for rows in batches[:1] for row in rows])
        return batches

    def end(self, batches):
        end_step(self.loop, batches)
        self.version += 1
        self.generation.look_ahead()

    def step(self):
        self.end(self.begin())


@pytest.fixture
def new_run(monkeypatch):
    """Makes runs, and ends their threads."""
    runs = []

    def make(**shape):
        runs.append(Run(monkeypatch, **shape))
        return runs[-1]

    yield make
    for run in runs:
        run.ahead.close()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_are_k_versions_old_and_those_that_the_version_gives_whenever_it_is_asked(new_run, k):
    run = new_run(k=k)
    for _ in range(6):
        run.step()
    assert [model for _, model, _ in run.sampled] == [f"p@{max(0, s - k)}" for s in range(6)]
    for step, model, rows in run.sampled:
        batch = run.new_batch("train", step, 0)
        batch.gather = list
        [ask] = batch.plan([[step, step]] * 2)
        assert rows == [SeededServer.sample([step, step], model, ask.seed + i) for i in (0, 1)]
    assert len(run.server.requests) == 1  # the first step's


def test_nothing_is_asked_for_beyond_the_last_step_and_the_last_batch(new_run):
    run = new_run(k=2, max_steps=3)
    for _ in range(3):
        run.step()
    run.ahead.wait_for_rows()
    assert len(run.server.requests) + len(run.ahead_server.requests) == 3
    short = new_run(k=2, length=2)
    for _ in range(2):
        short.step()
    assert begin_step(short.loop, short.source) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: [[9, 9], [9, 9]], "prompts are not those"),
        (lambda run: [[1, 1]], "number of rows"),
        (
            lambda run: (
                setattr(
                    run.generation,
                    "settings",
                    SamplingSettings(max_completion_length=8, temperature=0.5),
                )
                or [[1, 1], [1, 1]]
            ),
            "sampling options",
        ),
    ],
)
def test_what_was_changed_since_is_sampled_now_from_the_current_version(
    new_run, caplog, change, said
):
    caplog.set_level("INFO", "tink_rl")
    run = new_run()
    run.step()
    begin_step(run.loop, run.source)
    batch = run.generate(change(run))
    assert batch.model == "p@1"
    assert said in caplog.text
    assert run.ahead.step_metrics()["overlap/hit_share"] == 0.0


def test_evaluation_in_the_middle_samples_the_current_version_and_takes_nothing(new_run):
    run = new_run()
    run.step()
    assert run.generate([[5, 5], [5, 5]], phase="eval").model == "p@1"
    run.step()
    assert [model for _, model, _ in run.sampled] == ["p@0", "p@1", "p@0"]


def test_what_fails_ahead_is_sampled_again_if_that_may_help_else_raised_at_its_turn(
    new_run, caplog
):
    run = new_run()
    run.ahead_server.fails_with = errors.UnknownVersion("the server was restarted")
    run.step()
    run.step()
    assert run.sampled[1][1] == "p@1" and "restarted" in caplog.text
    refused = new_run()
    refused.ahead_server.fails_with = errors.SamplingRefused("too long")
    refused.step()
    with pytest.raises(errors.SamplingRefused, match="too long") as caught:
        refused.step()
    assert any(entry.name == "_ask" for entry in caught.traceback)


def test_error_of_ours_in_the_thread_is_raised_with_its_own_trace(new_run):
    run = new_run()
    run.ahead_server.fails_with = ZeroDivisionError("a bug")
    run.step()
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        run.step()
    assert any(entry.name == "_ask" for entry in caught.traceback)


def test_rows_that_never_come_end_the_wait_at_the_deadline(new_run, monkeypatch):
    run = new_run()
    run.step()
    run.ahead.wait_for_rows()
    monkeypatch.setattr(lookahead, "_END_S", 0.05)
    run.ahead_server.request_timeout_s = 0.05
    run.ahead_server.go_on.clear()
    run.step()
    run.step()
    with pytest.raises(errors.RequestTimeout, match="step 3, sampled ahead"):
        run.step()


@pytest.mark.parametrize("ending", [None, ValueError("in a reward"), KeyboardInterrupt()])
def test_end_of_a_training_however_it_ends_leaves_no_request_and_no_thread(new_run, ending):
    run = new_run()

    def train():
        run.ahead_server.go_on.clear()
        run.step()
        if ending is not None:
            raise ending

    ended = run.ahead._ending_with(train)
    if ending is None:
        ended()
    else:
        with pytest.raises(type(ending)):
            ended()
    assert run.ahead_server.is_aborted
    deadline = time.monotonic() + 5.0
    while [t for t in threading.enumerate() if t.name.startswith("tink-ahead")]:
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.01)


def test_weights_are_replaced_only_when_nothing_samples_them_any_more(new_run):
    run = new_run()
    run.ahead_server.go_on.clear()
    run.step()
    threading.Timer(0.2, run.ahead_server.go_on.set).start()
    run.generation.settle_rows(are_replaced=True)
    assert len(run.ahead_server.requests) == 2
    assert run.ahead.step_metrics()["overlap/idle_trainer_s"] > 0.1


def test_next_batch_can_be_asked_for_fresh(new_run, caplog):
    caplog.set_level("INFO", "tink_rl")
    run = new_run()
    run.step()
    run.ahead.next_fresh("the effective sample size is 0.1")
    run.step()
    run.step()
    assert [model for _, model, _ in run.sampled] == ["p@0", "p@1", "p@1"]
    assert "effective sample size" in caplog.text


@pytest.mark.parametrize("other", [{}, {(1, 0): None}], ids=["has no more data", "cannot prepare"])
def test_batch_that_another_rank_cannot_ask_for_is_asked_for_by_none(new_run, other):
    run = new_run(ranks=[other])
    run.step()
    run.step()
    assert run.ahead_server.requests == [] and run.sampled[1][1] == "p@1"


def test_prompt_that_another_rank_holds_too_has_a_seed_of_its_own(new_run):
    same = RolloutBatch.keys_of([[1, 1], [1, 1]])
    run = new_run(ranks=[{(1, 0): same}])
    run.step()
    run.ahead.wait_for_rows()
    [request] = run.ahead_server.requests
    batch = run.new_batch("train", 1, 0)
    batch.gather = lambda keys: [*keys, *same]
    assert request["seed"] == batch.plan([[1, 1], [1, 1]])[0].seed


def test_prompts_that_cannot_be_prepared_ahead_are_left_to_the_trainer(new_run, caplog):
    caplog.set_level("INFO", "tink_rl")
    run = new_run()
    source = iter([[{"prompt": 0}] * 2, [{"text": "no prompt"}] * 2])
    run.source = source
    run.step()
    assert run.ahead_server.requests == [] and "KeyError: 'prompt'" in caplog.text


def test_callback_of_a_trainer_that_does_not_train_on_what_it_samples_refuses_it():
    with pytest.raises(errors.ConfigError, match="max_staleness=1: this trainer does"):
        PolicySyncCallback(SimpleNamespace(processing_class=None), sync=SyncConfig(max_staleness=1))
