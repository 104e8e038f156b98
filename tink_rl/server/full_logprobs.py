"""Logprobs over the whole vocabulary, for requests that ask for them.

vLLM's `processed_logprobs` are taken last: of a token with logit z they are log(p / S), where
p = softmax(z / T) and S is the mass that top-k, top-p, min-p, a grammar, `bad_words`, ... left (penalties
and biases move z before). A trainer computes log p, so each token's importance ratio would be S
(huggingface/trl issue 6789): a product of small numbers over a completion. A request with
`vllm_xargs={"tink_full_logprobs": 1}` gets log p of the tokens that are told: like with like. Every
other request gets what stock vLLM gives.

Both of vLLM's model runners are wrapped as they stand in the worker, by `install`; what is leaned on is
held by `tests/unit/test_vllm_contract.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tink_rl.types import FULL_LOGPROBS

_GREEDY = 1e-5
"""vLLM's bound: below this temperature it takes the likeliest token, and divides by nothing."""
_ROWS_AT_ONCE = 64
"""Rows of logits that are copied to float32 together."""


def install(runner: Any) -> str | None:
    """Let the model runner `runner` answer such requests; None, or why it cannot."""
    if runner.speculative_config is not None:
        return "it decodes speculatively"
    if hasattr(runner, "_sample"):
        _wrap_v1(runner)
    elif runner.sampler is not None:  # of a pipeline's ranks, the last computes logits
        if type(runner.sampler).__name__ != "Sampler":
            return f"its tokens are drawn by a {type(runner.sampler).__name__}"
        _wrap_v2(runner)
    return None


def _asks(params: Any) -> bool:
    return bool(params is not None and (params.extra_args or {}).get(FULL_LOGPROBS))


class _Kept:
    """The logits [N, V] of one step as the model made them, for the rows that ask."""

    def __init__(
        self, logits_NV: torch.Tensor, temperatures: Mapping[int, float], *, is_masked: bool
    ) -> None:
        """Keep.

        Args:
            logits_NV: One row per request.
            temperatures: Row -> temperature, of those that ask.
            is_masked: A grammar writes into the logits before they are sampled.
        """
        # vLLM works on a float32 copy; logits that are float32 already it may change in place.
        is_changed = is_masked or logits_NV.dtype == torch.float32
        self._rows = list(temperatures)
        self._temperatures = [t if t >= _GREEDY else 1.0 for t in temperatures.values()]
        self._logits_KV = logits_NV[self._rows] if is_changed else None
        self._logits_NV = logits_NV

    def put(self, output: Any) -> None:
        """Write the logprobs of the tokens that `output` carries: the sampled one, then the likeliest.

        All of them: vLLM keeps one value per token, and the sampled one may be among the likeliest.
        """
        tensors = output.logprobs_tensors
        if tensors is None:
            return
        for start in range(0, len(self._rows), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            rows = self._rows[some]
            logits_KV = (
                self._logits_NV[rows] if self._logits_KV is None else self._logits_KV[some]
            ).float()
            temperatures_K1 = logits_KV.new_tensor(self._temperatures[some])[:, None]
            tokens_KT = tensors.logprob_token_ids[rows].long()
            logprobs_KV = (logits_KV / temperatures_K1).log_softmax(-1)
            found_KT = logprobs_KV.gather(-1, tokens_KT.clamp(min=0))
            tensors.logprobs[rows] = torch.where(tokens_KT < 0, tensors.logprobs[rows], found_KT)


# -- the runner of most platforms --------------------------------------------------------------------


def _wrap_v1(runner: Any) -> None:
    """`sample_tokens` masks the logits by the grammars, then samples in `_sample`."""
    sample_tokens, sample = runner.sample_tokens, runner._sample
    kept: list[_Kept] = []

    @functools.wraps(sample_tokens)
    def sample_tokens_and_keep(grammar_output: Any) -> Any:
        kept[:] = _keep_v1(runner, is_masked=grammar_output is not None)
        try:
            return sample_tokens(grammar_output)
        finally:
            kept.clear()

    @functools.wraps(sample)
    def sample_and_put(logits: Any, spec_decode_metadata: Any) -> Any:
        output = sample(logits, spec_decode_metadata)
        for one in kept:
            one.put(output)
        return output

    runner.sample_tokens, runner._sample = sample_tokens_and_keep, sample_and_put


def _keep_v1(runner: Any, *, is_masked: bool) -> Sequence[_Kept]:
    state, batch = runner.execute_model_state, runner.input_batch
    if state is None or batch.sampling_metadata.max_num_logprobs is None:
        return []
    found = ((row, runner.requests[name].sampling_params) for row, name in enumerate(batch.req_ids))
    temperatures = {row: params.temperature for row, params in found if _asks(params)}
    if not temperatures:
        return []
    with torch.inference_mode():
        return [_Kept(state.logits, temperatures, is_masked=is_masked)]


# -- vLLM's second runner, of GPUs -------------------------------------------------------------------


def _wrap_v2(runner: Any) -> None:
    """A worker masks the logits by the grammars, then `Sampler.__call__` samples."""
    sampler, grammars = runner.sampler, runner.structured_outputs_worker
    by_request: dict[int, float] = {}
    """The runner's index of a request that asks -> its temperature."""
    kept: list[_Kept] = []

    def keep(logits: torch.Tensor, batch: Any, *, is_masked: bool) -> None:
        indices = enumerate(batch.idx_mapping_np.tolist())
        rows = {row: by_request[index] for row, index in indices if index in by_request}
        if rows and len(batch.idx_mapping_np) == logits.shape[0]:
            kept[:] = [_Kept(logits, rows, is_masked=is_masked)]

    add_request = sampler.add_request

    @functools.wraps(add_request)
    def add_and_remember(req_idx: int, sampling_params: Any) -> None:
        by_request.pop(req_idx, None)
        if _asks(sampling_params):
            by_request[req_idx] = sampling_params.temperature
        add_request(req_idx, sampling_params)

    class FullLogprobsSampler(type(sampler)):  # type: ignore[misc]
        """vLLM's, which is called as an object."""

        def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
            if not kept:
                keep(logits, input_batch, is_masked=False)
            try:
                output = super().__call__(logits, input_batch)
                for one in kept:
                    one.put(output)
            finally:
                kept.clear()
            return output

    sampler.add_request, sampler.__class__ = add_and_remember, FullLogprobsSampler
    if grammars is None:
        return
    mask = grammars.apply_grammar_bitmask

    @functools.wraps(mask)
    def keep_and_mask(logits: torch.Tensor, input_batch: Any, *args: Any) -> None:
        keep(logits, input_batch, is_masked=True)
        mask(logits, input_batch, *args)

    grammars.apply_grammar_bitmask = keep_and_mask
