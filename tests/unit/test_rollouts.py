"""Rollouts: seeds by place, turns of one version, the log; with a fake server that samples by seed."""

from __future__ import annotations

import json
import math
import random

import pytest

from tink_rl import errors
from tink_rl.publish.versions import Versions
from tink_rl.training.generation import PolicyGeneration, SamplingSettings
from tink_rl.training.rollout_log import RolloutLog, _turn_json, scores_of
from tink_rl.training.rollouts import Ask, RolloutBatch, derive_seed, read_rollouts, requests_of
from tink_rl.training.sampler import _requests
from tink_rl.transport.payloads import Limits

CALL, ANSWER, EOS = 7, 8, 9


class SeededServer:
    """As vLLM: child k of a request samples from seed + k; an answer depends on version, prompt, seed."""

    def __init__(self):
        self.requests = []
        self.max_tokens = []
        self.max_model_len = None

    def limits(self):
        return Limits(max_model_len=self.max_model_len)

    def generate(self, prompts, *, n, model, generation_kwargs=None, **_):
        asked = generation_kwargs or {}
        seed = asked.get("seed")
        self.requests.append({"prompts": prompts, "n": n, "model": model, "seed": seed})
        self.max_tokens.append(asked.get("max_tokens"))
        rows = [self.sample(p, model, seed + k) for p in prompts for k in range(n)]
        logprobs = [[[-0.5]] * len(row) for row in rows]
        return {"completion_ids": rows, "logprobs": logprobs, "logprob_token_ids": None}

    @staticmethod
    def sample(prompt, model, seed):
        rng = random.Random(f"{prompt}{model}{seed}")
        return [rng.randrange(7) for _ in range(4)] + [EOS]


class Letters:
    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(97 + i) for i in ids if not (skip_special_tokens and i == EOS))


def generation(server, versions=("p@1",), num_clients=1):
    names = iter(versions)
    current = {"name": next(names)}

    def publish():
        current["name"] = next(names)

    made = PolicyGeneration(
        [server] * num_clients,
        SamplingSettings(max_completion_length=8),
        current=lambda: current["name"],
        sync=publish,
        recover=lambda: False,
    )
    return made, publish


def test_later_turn_asks_for_what_is_left_where_a_whole_completion_would_not_fit():
    server = SeededServer()
    made, _ = generation(server)
    server.max_model_len = 16
    with made.rollout(RolloutBatch(run_seed=0)) as batch:
        _, [one, other], *_ = made.generate([[1] * 8, [2] * 2], None, 1)
        grown = [[1] * 8 + one + [ANSWER], [2] * 2 + other + [ANSWER]]
        made.generate(grown, None, 1)
    # 8 tokens a completion: of the first rollout 6 are there, and 16 - 14 fit; the other has room for all.
    assert sorted(server.max_tokens[-2:], key=str) == [2, None]
    first, second = batch.turns[0][1], batch.turns[1][1]
    assert (first.max_tokens, second.max_tokens) == (2, None)
    row = {"prompt_ids": [1] * 8, "policy": "p", "version": 1, "sampling": {"max_tokens": 8}}
    row["turns"] = [_turn_json(batch.turns[0][0], first)]
    assert requests_of(row)[0]["generation_kwargs"]["max_tokens"] == 2


def test_seed_of_a_request_is_ours_whatever_else_is_given():
    server = SeededServer()
    settings = SamplingSettings(max_completion_length=8, generation_kwargs={"seed": None})
    made = PolicyGeneration(
        [server], settings, current=lambda: "p@1", sync=list, recover=lambda: False
    )
    with made.rollout(RolloutBatch(run_seed=0)):
        made.generate([[1]], None, 1)
    assert server.requests[0]["seed"] is not None


def first_turn(rank=0, prompts=None, **key):
    server = SeededServer()
    made, _ = generation(server)
    prompts = prompts or [[1], [1], [2], [2], [3], [3], [4], [4]]
    batch = RolloutBatch(run_seed=0, num_generations=2, rank=rank, **key)
    with made.rollout(batch):
        made.generate(prompts, None, 2)
    return batch, server


def seeds(batch):
    return [turns[0].seed for turns in batch.turns]


def tokens(batch):
    return [turns[-1].completion_ids for turns in batch.turns]


def test_group_has_distinct_seeds_that_any_run_finds_again():
    batch, _ = first_turn()
    again, _ = first_turn()
    assert seeds(batch) == seeds(again) and tokens(batch) == tokens(again)
    assert len(set(seeds(batch))) == len(batch.turns)
    for change in ({"step": 1}, {"phase": "eval"}, {"draw": 1}):
        other, _ = first_turn(**change)
        assert not set(seeds(other)) & set(seeds(batch)), change


def seeds_of_two_ranks(prompts):
    """Each has one half of the batch, and hears of the other's prompts."""
    half = len(prompts) // 2
    everywhere = [hash(tuple(prompt)) for prompt in prompts]
    found = []
    for rank, mine in enumerate((prompts[:half], prompts[half:])):
        batch, _ = first_turn(rank=rank, prompts=mine, gather=lambda _: everywhere)
        found += seeds(batch)
    return found


@pytest.mark.parametrize(
    "prompts",
    [
        [[1], [1], [2], [2], [3], [3], [4], [4]],
        pytest.param([[1], [1], [2], [2], [3], [3]], id="ranks share a group"),
        pytest.param([[1], [1], [2], [2], [3], [3], [1], [1]], id="ranks share a prompt"),
    ],
)
def test_two_ranks_draw_what_one_process_draws_and_nothing_twice(prompts):
    whole, _ = first_turn(prompts=prompts)
    assert seeds_of_two_ranks(prompts) == seeds(whole)
    assert len(set(seeds(whole))) == len(prompts)


def test_same_prompt_in_two_neighbouring_groups_is_two_groups():
    batch, server = first_turn(prompts=[[1], [1], [1], [1]])
    assert len(set(seeds(batch))) == 4
    assert sorted(len(r["prompts"]) for r in server.requests) == [1, 1]


def test_prompt_of_many_groups_is_never_sampled_twice_under_one_seed():
    made, _ = generation(SeededServer())
    with made.rollout(RolloutBatch(run_seed=0, num_generations=2)) as batch:
        made.generate([[1]] * 40, None, 2)
        histories = [[1, *turns[0].completion_ids, ANSWER] for turns in batch.turns]
        first = seeds(batch)
        made.generate(histories, None, 2)
    second = [turns[1].seed for turns in batch.turns]
    assert len(set(first)) == len(set(second)) == 40


def test_completions_come_back_in_the_order_of_the_prompts_over_any_number_of_replicas():
    prompts = [[i // 2] for i in range(40)]
    found = []
    for num_clients in (1, 3):
        server = SeededServer()
        made, _ = generation(server, num_clients=num_clients)
        with made.rollout(RolloutBatch(run_seed=0, num_generations=2)) as batch:
            _, completions, _, _ = made.generate(prompts, None, 2)
        assert completions == tokens(batch)
        found.append(completions)
    assert found[0] == found[1]
    expected = [
        SeededServer.sample(p, "p@1", s) for p, s in zip(prompts, seeds(batch), strict=True)
    ]
    assert found[0] == expected


def test_prompts_of_one_seed_and_size_travel_together():
    def ask(prompt, num_rows, seed):
        return Ask(prompt_ids=[prompt], rows=list(range(num_rows)), seed=seed)

    asks = [ask(1, 4, 10), ask(2, 4, 20), ask(3, 4, 10), ask(4, 2, 10)]
    assert [[i for i, _ in items] for _, items in _requests(asks, 1)] == [[0, 2], [1], [3]]
    shares = _requests(asks, 2)
    assert sorted(i for _, items in shares for i, _ in items) == [0, 1, 2, 3]
    assert {client for client, _ in shares} == {0, 1}


def two_turns(made, publish=lambda: None):
    """Rows 1 and 3 of four call a tool; then row 3 again."""
    with made.rollout(RolloutBatch(run_seed=0, num_generations=2)) as batch:
        _, first, _, _ = made.generate([[1], [1], [2], [2]], None, 2)
        publish()
        second_prompts = [[1, *first[1], ANSWER], [2, *first[3], ANSWER]]
        _, second, _, _ = made.generate(second_prompts, None, 1)
        publish()
        made.generate([[*second_prompts[1], *second[1], ANSWER]], None, 1)
    return batch


def test_every_turn_is_sampled_from_the_version_its_rollout_began_with():
    server = SeededServer()
    made, publish = generation(server, versions=("p@1", "p@2", "p@3"))
    batch = two_turns(made, publish)
    assert {request["model"] for request in server.requests} == {"p@1"}
    assert [len(turns) for turns in batch.turns] == [1, 2, 1, 3]
    with made.rollout(RolloutBatch(run_seed=0)) as later:
        made.generate([[1]], None, 1)
    assert later.model == "p@3"


def test_rollouts_with_equal_histories_go_on_with_different_seeds():
    batch = RolloutBatch(run_seed=0, num_generations=4)
    asks = batch.plan([[1]] * 4)
    same = {"completion_ids": [CALL, EOS], "logprobs": None}
    batch.add(asks, [[same] * 4])
    asks = batch.plan([[1, CALL, EOS, ANSWER]] * 4)
    assert [ask.rows for ask in asks] == [[0], [1], [2], [3]]
    assert len({ask.seed for ask in asks}) == 4


def test_turn_belongs_to_the_longest_history_that_begins_it():
    batch = RolloutBatch(run_seed=0, num_generations=2)
    asks = batch.plan([[1], [1]])
    ended = {"completion_ids": [CALL], "logprobs": None}
    calling = {"completion_ids": [CALL, CALL], "logprobs": None}
    batch.add(asks, [[ended, calling]])
    assert [ask.rows for ask in batch.plan([[1, CALL, CALL, ANSWER]])] == [[1]]


def test_turn_that_continues_no_rollout_is_refused():
    batch = RolloutBatch(run_seed=0)
    batch.add(batch.plan([[1]]), [[{"completion_ids": [2], "logprobs": None}]])
    with pytest.raises(errors.TinkError, match="continues no rollout"):
        batch.plan([[1, 3, 4]])


def test_rollout_inside_a_rollout_is_refused():
    made, _ = generation(SeededServer())
    with (
        made.rollout(RolloutBatch()),
        pytest.raises(errors.ConfigError, match="under way"),
        made.rollout(RolloutBatch()),
    ):
        pass


def test_logged_rollout_says_how_each_of_its_turns_is_sampled_again(tmp_path):
    made, _ = generation(SeededServer())
    batch = two_turns(made)
    sampling = made.settings.as_request()
    log = RolloutLog(tmp_path, Letters(), rank=0, sampling=sampling)
    log.write(batch, "digest", [{"reward": 1.0}] * 4)
    rows = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    assert [(row["group"], row["index"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(row["policy"], row["version"], row["digest"]) for row in rows} == {("p", 1, "digest")}
    server = SeededServer()
    for row, turns in zip(rows, batch.turns, strict=True):
        again = [server.generate(**request) for request in requests_of(row)]
        assert [a["completion_ids"][0] for a in again] == [t.completion_ids for t in turns]
        assert [turn["logprobs"] for turn in row["turns"]] == [t.logprobs for t in turns]
    assert rows[3]["completion"].count(chr(97 + ANSWER)) == 2


def test_fresh_run_begins_its_log_anew_and_a_resumed_one_goes_on(tmp_path):
    def write(step):
        log = RolloutLog(tmp_path, Letters(), rank=0, sampling={})
        log.begin(step)
        log.write(first_turn(step=step)[0], "d", [{}] * 8)

    write(0)
    write(0)
    assert len(list(read_rollouts(tmp_path / "rollouts.jsonl"))) == 8
    write(3)
    path = tmp_path / "rollouts.jsonl"
    assert len(list(read_rollouts(path))) == 16
    evaluated = {"step": 2, "phase": "eval"}  # before the checkpoint of its step was saved
    with path.open("a") as file:
        file.write(json.dumps(evaluated) + "\n")
        file.write('{"step": 3, "pro')  # killed here, to be resumed from that checkpoint
    write(2)
    rows = list(read_rollouts(path))
    assert [row["step"] for row in rows] == [0] * 8 + [2] * 9 and rows[8] == evaluated


def test_evaluation_before_training_takes_nothing_from_the_log_and_stays_in_it(tmp_path):
    def evaluate_then(step):
        log = RolloutLog(tmp_path, Letters(), rank=0, sampling={})
        log.write(first_turn(phase="eval")[0], "d", [{}] * 8)
        evaluated = phases()
        log.begin(step)
        log.write(first_turn(step=step)[0], "d", [{}] * 8)
        return evaluated

    def phases():
        rows = read_rollouts(tmp_path / "rollouts.jsonl")
        return [(row["step"], row["phase"]) for row in rows][::8]

    evaluate_then(0)
    assert phases() == [(0, "eval"), (0, "train")]
    assert evaluate_then(3) == [(0, "eval"), (0, "train"), (0, "eval")]
    assert phases() == [(0, "eval"), (0, "train"), (0, "eval"), (3, "train")]
    evaluate_then(0)
    assert phases() == [(0, "eval"), (0, "train")]


def test_line_that_a_killed_run_left_half_written_ends_the_log(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps({"step": 0}) + "\n" + '{"step": 1, "pro')
    assert list(read_rollouts(path)) == [{"step": 0}]


def test_rank_writes_its_own_file(tmp_path):
    assert RolloutLog(tmp_path, Letters(), rank=1, sampling={}).path.name == "rollouts-rank1.jsonl"


def test_reward_is_the_weighted_sum_of_what_scored_the_completion():
    scores = scores_of(["a", "b"], [1.0, 0.5], [[1.0, 2.0], [math.nan, 2.0], [math.nan, math.nan]])
    assert [score["reward"] for score in scores] == [2.0, 1.0, None]
    assert scores[1]["rewards"] == {"a": None, "b": 2.0}


def test_seed_is_exact_in_json_and_depends_on_every_part():
    assert derive_seed(0, "train", 1) < 2**53
    assert (
        len({derive_seed(0, "train", 1), derive_seed(0, "train", 2), derive_seed(0, "t", 1)}) == 3
    )


def test_version_that_a_rollout_goes_on_with_is_not_dropped_by_a_commit():
    versions = Versions("p", keep=2)
    versions.kept = ["p@1", "p@2", "p@3"]
    assert versions.superseded() == ["p@1", "p@2"]
    versions.pinned = "p@1"
    assert versions.superseded() == ["p@2"]
