"""Trainer and sampler mean the same distribution: what is asked for, what is refused, what is watched."""

from __future__ import annotations

import json
import logging
import warnings

import httpx
import pytest
import trl

from benchmarks import grpo_run
from tests.fake_vllm import FakeVLLM
from tests.fakes import status
from tink_rl import SyncConfig, VLLMClient, errors
from tink_rl.training import checks
from tink_rl.training.generation import PolicyGeneration, SamplingSettings
from tink_rl.training.ratio import RATIO, RatioWatch
from tink_rl.training.rollout_log import RolloutLog
from tink_rl.training.rollouts import Ask, RolloutBatch, requests_of
from tink_rl.training.sampler import Sampler as TurnSampler
from tink_rl.transport.fleet import Fleet
from tink_rl.transport.payloads import Limits
from tink_rl.transport.replica import Replica
from tink_rl.types import FULL_LOGPROBS, IDS_ONLY

NARROWED = [
    {"top_k": 20},
    {"top_p": 0.8},
    {"min_p": 0.01},
    {"repetition_penalty": 1.1},
    {"vllm_structured_outputs_regex": "[a-d]{2}"},
    *(
        {"generation_kwargs": extra}
        for extra in (
            {"top_k": 50},
            {"logit_bias": {"5": 20}},
            {"min_tokens": 8},
            {"bad_words": ["1"]},
            {"allowed_token_ids": [3, 4]},
            {"presence_penalty": 0.5},
            {"structured_outputs": {"choice": ["a"]}},
        )
    ),
]
NAMES = {"vllm_structured_outputs_regex": "structured_outputs"}
PLAIN = [
    {},
    {"temperature": 0.6},
    {"top_k": 0, "top_p": 1.0, "min_p": None},
    {"generation_kwargs": {"ignore_eos": True, "stop": ["="], "logit_bias": {}}},
]


def arguments(cls=trl.GRPOConfig, **changes):
    return cls(use_cpu=True, bf16=False, max_completion_length=8, **changes)


@pytest.fixture
def answers():
    """A client, and the bodies of the completions that it asked for."""
    bodies = []
    fake = FakeVLLM("base")

    def answer(request):
        if request.url.path == "/v1/completions":
            bodies.append(json.loads(request.content))
        return fake._handle(request)

    return VLLMClient(transport=httpx.MockTransport(answer)), bodies


@pytest.mark.parametrize("changes", NARROWED, ids=str)
@pytest.mark.parametrize("cls", [trl.GRPOConfig, trl.RLOOConfig])
def test_narrowed_request_asks_for_logprobs_over_the_whole_vocabulary(changes, cls, answers):
    client, bodies = answers
    settings = SamplingSettings.of(arguments(cls, **changes))
    client.generate([[1]], model="base", **{**settings.as_request(), "logprobs": None})
    assert bodies[0]["vllm_xargs"] == {FULL_LOGPROBS: 1}


@pytest.mark.parametrize("changes", PLAIN, ids=str)
def test_request_that_draws_from_the_whole_policy_is_what_it_always_was(changes, answers):
    client, bodies = answers
    settings = SamplingSettings.of(arguments(**changes))
    client.generate([[1]], model="base", **{**settings.as_request(), "logprobs": None})
    assert "vllm_xargs" not in bodies[0] and "full_logprobs" not in settings.as_request()


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.9}], ids=str)
def test_trainer_asks_for_no_texts_whatever_it_draws_from(changes, answers):
    client, bodies = answers
    settings = SamplingSettings.of(arguments(**changes))
    ask = Ask(prompt_ids=[1], rows=[0], seed=3)
    options = {**settings.as_request(), "logprobs": None}
    TurnSampler([client]).sample([ask], model="base", arguments=options)
    assert bodies[0]["vllm_xargs"] == {IDS_ONLY: 1} | ({FULL_LOGPROBS: 1} if changes else {})


class Sampler:
    """Answers one token, and keeps what it was asked."""

    base_url = "http://sampler"

    def __init__(self, logprob=-0.5):
        self.asked, self.logprob = [], logprob

    def limits(self):
        return Limits()

    def generate(self, prompts, *, n=1, **more):
        self.asked.append(more)
        rows = len(prompts) * n
        return {
            "completion_ids": [[7]] * rows,
            "logprobs": [[[self.logprob]]] * rows,
            "logprob_token_ids": None,
        }


def test_every_turn_replica_and_evaluation_asks_alike_and_the_log_asks_again_so(tmp_path):
    samplers = [Sampler(), Sampler()]
    settings = SamplingSettings(max_completion_length=8, top_k=20)
    generation = PolicyGeneration(
        samplers, settings, current=lambda: "p@1", sync=lambda: None, recover=lambda: False
    )
    for phase in ("train", "eval"):
        batch = RolloutBatch(run_seed=0, phase=phase, num_generations=2)
        with generation.rollout(batch):
            generation.generate([[1], [1], [2], [2]], None, 2)
            generation.generate([[1, 7, 8], [2, 7, 8]], None, 2)
    asked = [*samplers[0].asked, *samplers[1].asked]
    assert len(asked) >= 8 and all(more["full_logprobs"] is True for more in asked)
    log = RolloutLog(tmp_path, Letters(), rank=0, sampling=settings.as_request())
    for row in log.write(batch, "d", [{}] * 4):
        assert all(request["full_logprobs"] is True for request in requests_of(row))


class Letters:
    def decode(self, ids, **_):
        return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize("changes", NARROWED, ids=str)
def test_server_that_can_tell_them_is_taken_with_a_line(changes, caplog):
    with caplog.at_level(logging.INFO, "tink_rl"), warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.check_sampling(arguments(**changes), status(no_full_logprobs=None), dropout=0.0)
    (line,) = caplog.messages
    (name,) = changes.get("generation_kwargs", changes)
    assert line.startswith(NAMES.get(name, name)) and "over the whole vocabulary" in line


@pytest.mark.parametrize("changes", NARROWED, ids=str)
def test_server_that_cannot_is_refused_before_the_first_step(changes):
    cannot = status(no_full_logprobs="it decodes speculatively")
    with pytest.raises(errors.ConfigError, match="learn nothing") as caught:
        checks.check_sampling(arguments(**changes), cannot, dropout=0.0)
    for words in ("it decodes speculatively", "vllm_importance_sampling_correction=False"):
        assert words in str(caught.value)


@pytest.mark.parametrize("told", [0.0, -0.0, float("nan")])
def test_server_that_says_it_can_and_does_not_is_found_out(told):
    can = status(no_full_logprobs=None)
    samplers = [Sampler(), Sampler(told)]
    checks.check_sampling(arguments(), can, dropout=0.0, clients=samplers)
    assert samplers[0].asked == samplers[1].asked == []
    with pytest.raises(errors.ConfigError, match="under top_k=1"):
        checks.check_sampling(arguments(top_k=5), can, dropout=0.0, clients=samplers)
    assert [sampler.asked[0]["full_logprobs"] for sampler in samplers] == [True, True]


def test_server_of_an_older_release_is_named_as_one():
    with pytest.raises(errors.ConfigError, match="its tink_rl is older than the trainer's"):
        checks.check_sampling(arguments(top_k=5), status(), dropout=0.0)


def test_off_policy_mask_reads_the_sampler_s_logprobs_too():
    args = arguments(
        top_k=5, vllm_importance_sampling_correction=False, off_policy_mask_threshold=0.5
    )
    with pytest.raises(errors.ConfigError, match="off_policy_mask_threshold=None"):
        checks.check_sampling(args, status(), dropout=0.0)


@pytest.mark.parametrize(
    "args",
    [
        arguments(top_k=5, vllm_importance_sampling_correction=False),
        arguments(trl.RLOOConfig, top_k=5),
    ],
    ids=["correction off", "RLOO"],
)
def test_where_nothing_weighs_by_them_a_warning_says_what_the_log_holds(args):
    with pytest.warns(UserWarning, match="those of the rollout log"):
        checks.check_sampling(args, status(), dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.check_sampling(args, status(no_full_logprobs=None), dropout=0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("no_full_logprobs", "it decodes speculatively"), ("logprobs_mode", "raw_logprobs")],
)
def test_servers_of_a_fleet_must_tell_the_same_logprobs(monkeypatch, name, value):
    statuses = iter(
        [status(no_full_logprobs=None), status(**{"no_full_logprobs": None, name: value})]
    )
    monkeypatch.setattr(Replica, "status", lambda self: next(statuses))
    clients = [VLLMClient(f"http://{host}") for host in "ab"]
    fleet = Fleet([Replica(client, SyncConfig(), writer="w") for client in clients])
    with pytest.raises(errors.ConfigError, match=f"differ in {name}"):
        fleet.check_alike()


# -- the watch over the ratio ------------------------------------------------------------------------


def values(ratio, difference=5.0):
    gaps = {f"sampling/sampling_logp_difference/{kind}": [difference] for kind in ("mean", "max")}
    return {RATIO: [1.0, ratio], **gaps}


def test_ratio_near_zero_is_said_once_with_what_was_measured(caplog):
    watch = RatioWatch()
    for number, ratio in enumerate([1.0, 0.5, 5e-18, 0.0]):
        watch.look(number, values(ratio))
    (line,) = caplog.messages
    assert line.startswith("step 2: mean importance ratio 5e-18")
    assert "next to nothing is learned" in line and "5 nats a token" in line


@pytest.mark.parametrize(
    "metrics", [{}, {RATIO: []}, values(0.1), values(1.0), values(float("nan"))]
)
def test_ratio_that_leaves_a_gradient_or_is_not_there_is_no_news(metrics, caplog):
    RatioWatch().look(1, metrics)
    assert caplog.messages == []


@pytest.mark.parametrize("ratio", [5e-18, 0.9, 1.2, float("nan")])
def test_benchmark_measures_no_run_without_a_gradient(ratio):
    grpo_run.check_learns([{RATIO: 1.0}, {RATIO: 1.01}, {"reward": 0.5}])
    with pytest.raises(SystemExit, match="1 of 2 steps"):
        grpo_run.check_learns([{RATIO: 1.0}, {RATIO: ratio}])
