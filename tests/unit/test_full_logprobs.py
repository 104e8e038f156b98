"""Logprobs over the whole vocabulary, on stand-ins of both model runners of vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tink_rl.server import full_logprobs
from tink_rl.types import FULL_LOGPROBS

VOCAB = 16
TOP_K = 3


def params(temperature=0.7, asks=True):
    return SimpleNamespace(temperature=temperature, extra_args={FULL_LOGPROBS: 1} if asks else None)


def sampled(logits_NV, temperatures):
    """As vLLM: scaled and cut to the top k in place (in a copy, below float32), the likeliest drawn.

    What it tells is the token that was drawn, then the likeliest ones, of which that is one.
    """
    logits_NV = logits_NV.to(torch.float32)
    logits_NV /= torch.tensor(temperatures)[:, None].clamp_min(1e-5)
    rest_NV = logits_NV.argsort(-1, descending=True)[:, TOP_K:]
    logits_NV.scatter_(-1, rest_NV, -torch.inf)
    tokens_N1 = logits_NV.argmax(-1, keepdim=True)
    tokens_NT = torch.cat([tokens_N1, logits_NV.topk(2).indices], dim=-1)
    logprobs_NT = logits_NV.log_softmax(-1).gather(-1, tokens_NT)
    tensors = SimpleNamespace(logprob_token_ids=tokens_NT.int(), logprobs=logprobs_NT)
    return SimpleNamespace(logprobs_tensors=tensors)


class FirstRunner:
    """What is leaned on of `vllm.v1.worker.gpu_model_runner.GPUModelRunner`."""

    speculative_config = None

    def __init__(self, requests, *, wants_logprobs=True):
        self.requests = {
            f"r{i}": SimpleNamespace(sampling_params=request) for i, request in enumerate(requests)
        }
        metadata = SimpleNamespace(max_num_logprobs=0 if wants_logprobs else None)
        self.input_batch = SimpleNamespace(req_ids=list(self.requests), sampling_metadata=metadata)
        self.execute_model_state = None
        full_logprobs.install(self)

    def step(self, logits_NV, grammar=None):
        self.execute_model_state = SimpleNamespace(logits=logits_NV)
        return self.sample_tokens(grammar).logprobs_tensors

    def sample_tokens(self, grammar_output):
        logits_NV, self.execute_model_state = self.execute_model_state.logits, None
        if grammar_output is not None:
            logits_NV[:, grammar_output] = -torch.inf
        return self._sample(logits_NV, None)

    def _sample(self, logits, spec_decode_metadata):
        temperatures = [r.sampling_params.temperature for r in self.requests.values()]
        return sampled(logits, temperatures)


class Sampler:
    """What is leaned on of `vllm.v1.worker.gpu.sample.sampler.Sampler`."""

    def __init__(self):
        self.temperatures = {}

    def add_request(self, req_idx, sampling_params):
        self.temperatures[req_idx] = sampling_params.temperature

    def __call__(self, logits, input_batch):
        return sampled(logits, [self.temperatures[i] for i in input_batch.idx_mapping_np])


class SecondRunner:
    """What is leaned on of `vllm.v1.worker.gpu.model_runner.GPUModelRunner`."""

    speculative_config = None

    def __init__(self, requests):
        self.sampler = Sampler()
        self.structured_outputs_worker = SimpleNamespace(apply_grammar_bitmask=self._mask)
        full_logprobs.install(self)
        self.add(requests)

    def add(self, requests):
        """Their places in the runner are the reverse of those in the batch."""
        places = list(range(len(requests)))[::-1]
        for place, request in zip(places, requests, strict=True):
            self.sampler.add_request(place, request)
        self._batch = SimpleNamespace(idx_mapping_np=np.array(places))

    def _mask(self, logits, input_batch, grammar_req_ids, grammar_bitmask):
        logits[:, grammar_bitmask] = -torch.inf

    def step(self, logits_NV, grammar=None):
        if grammar is not None:
            worker = self.structured_outputs_worker
            worker.apply_grammar_bitmask(logits_NV, self._batch, [], grammar)
        return self.sampler(logits_NV, self._batch).logprobs_tensors


RUNNERS = [FirstRunner, SecondRunner]


def logits_of(num_rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(num_rows, VOCAB, generator=generator)).to(dtype)


def wanted(logits_NV, temperatures, tensors):
    scaled_NV = logits_NV.float() / torch.tensor(temperatures)[:, None]
    return scaled_NV.log_softmax(-1).gather(-1, tensors.logprob_token_ids.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grammar", [None, [1, 2, 3]])
@pytest.mark.parametrize("runner", RUNNERS)
def test_logprob_is_that_of_all_tokens_at_the_request_s_temperature(runner, grammar, dtype):
    temperatures = [0.6, 1.0, 1.3]
    logits_NV = logits_of(3, dtype)
    tensors = runner([params(t) for t in temperatures]).step(logits_NV.clone(), grammar)
    torch.testing.assert_close(tensors.logprobs, wanted(logits_NV, temperatures, tensors))


@pytest.mark.parametrize("runner", RUNNERS)
def test_requests_that_do_not_ask_get_what_vllm_gives(runner):
    logits_NV = logits_of(4)
    stock = sampled(logits_NV.clone(), [0.7] * 4).logprobs_tensors.logprobs
    mixed = [params(asks=i in (1, 2)) for i in range(4)]
    tensors = runner(mixed).step(logits_NV.clone())
    assert torch.equal(tensors.logprobs[[0, 3]], stock[[0, 3]])
    right = wanted(logits_NV, [0.7] * 4, tensors)
    torch.testing.assert_close(tensors.logprobs[[1, 2]], right[[1, 2]])


@pytest.mark.parametrize("runner", RUNNERS)
def test_more_rows_than_are_copied_at_once(runner, monkeypatch):
    monkeypatch.setattr(full_logprobs, "_ROWS_AT_ONCE", 2)
    logits_NV = logits_of(5)
    tensors = runner([params(0.5)] * 5).step(logits_NV.clone(), [0])
    torch.testing.assert_close(tensors.logprobs, wanted(logits_NV, [0.5] * 5, tensors))


@pytest.mark.parametrize("runner", RUNNERS)
def test_greedy_request_is_divided_by_nothing(runner):
    logits_NV = logits_of(1)
    tensors = runner([params(0.0)]).step(logits_NV.clone())
    torch.testing.assert_close(tensors.logprobs, wanted(logits_NV, [1.0], tensors))


@pytest.mark.parametrize("runner", RUNNERS)
def test_each_step_is_measured_by_its_own_logits(runner):
    instance = runner([params(0.7)] * 2)
    instance.step(logits_of(2).clone(), [1])
    logits_NV = -logits_of(2)
    tensors = instance.step(logits_NV.clone())
    torch.testing.assert_close(tensors.logprobs, wanted(logits_NV, [0.7] * 2, tensors))


def test_place_of_a_request_that_asked_may_go_to_one_that_does_not():
    runner = SecondRunner([params(0.7)] * 2)
    runner.add([params(0.7, asks=False)] * 2)
    logits_NV = logits_of(2)
    stock = sampled(logits_NV.clone(), [0.7] * 2).logprobs_tensors.logprobs
    assert torch.equal(runner.step(logits_NV.clone()).logprobs, stock)


def test_batch_without_logprobs_and_an_idle_rank_are_left_alone():
    runner = FirstRunner([params()], wants_logprobs=False)
    logits_NV = logits_of(1)
    stock = sampled(logits_NV.clone(), [0.7]).logprobs_tensors.logprobs
    assert torch.equal(runner.step(logits_NV.clone()).logprobs, stock)
    idle = FirstRunner([params()])
    idle.execute_model_state = None
    assert full_logprobs._keep_v1(idle, is_masked=False) == []


class OtherSampler(Sampler):
    """A model's own."""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"speculative_config": object()}, "speculatively"),
        ({"sampler": OtherSampler()}, "OtherSampler"),
    ],
)
def test_runner_that_draws_its_tokens_elsewhere_says_so(change, expected):
    runner = SimpleNamespace(**{"speculative_config": None, "sampler": Sampler(), **change})
    assert expected in full_logprobs.install(runner)
    assert not hasattr(runner, "sample_tokens")


def test_earlier_rank_of_a_pipeline_has_nothing_to_wrap():
    last_only = SimpleNamespace(speculative_config=None, sampler=None)
    assert full_logprobs.install(last_only) is None
