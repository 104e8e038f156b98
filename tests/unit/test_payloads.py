"""What travels to vLLM for a sample and how its answer is read; and both over a real socket, in a loop."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import asynccontextmanager

import numpy as np
import pytest
import torch
from aiohttp import web

from tink_rl import errors
from tink_rl.sampling import completions
from tink_rl.sampling.async_sampler import AsyncSampler
from tink_rl.transport import payloads
from tink_rl.transport.sampling_params import SamplingParams

URL = "http://server:1"


def choice(index=0, **changes):
    """One choice as vLLM writes it."""
    return {
        "index": index,
        "text": "ab",
        "token_ids": [7, 9],
        "prompt_token_ids": [1],
        "finish_reason": "length",
        "logprobs": {
            "tokens": ["token_id:7", "token_id:9"],
            "token_logprobs": [-0.5, None],
            "top_logprobs": [{"token_id:7": -0.5, "token_id:3": -0.1}, {"token_id:9": None}],
        },
        **changes,
    }


# -- asking -------------------------------------------------------------------------------------------


def test_payload_carries_every_parameter_under_vllms_name_and_a_salt_per_model():
    params = SamplingParams(
        **{"max_tokens": 5, "min_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 3},
        **{"min_p": 0.1, "n": 2, "stop": ("x",), "stop_token_ids": (4,), "seed": 1, "logprobs": 2},
        **{"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.2},
        **{"ignore_eos": True, "logit_bias": {5: -1.0}},
    )
    assert set(params.changed()) == set(SamplingParams.model_fields)
    found = completions.completion_payload([(1, 2), "text"], "math@1", params)
    for name in params.changed():
        assert name in found, name
    assert found["prompt"] == [[1, 2], "text"] and found["logit_bias"] == {"5": -1.0}
    assert found["cache_salt"] != payloads.salt("math@2") and "stream" not in found
    json.dumps(found)


BASE = {"model": "m", "prompt": [[1, 2]], "n": 1, "max_tokens": 4}
LIMITS = payloads.Limits(vocab_size=64, max_model_len=8, max_prompts=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: {"x": 1}}, name) for name in ("chat_template", "extra_args", "vllm_xargs")),
        ({"echo": True}, "echo"),
        ({"stream": True}, "stream"),
        ({"no_such": 1}, "no_such"),
        ({"prompt": [[1], [63, 64]]}, r"prompts\[1\] holds 64; the served vocabulary .* 0 to 63"),
        ({"prompt": [[-1]]}, "holds -1"),
        ({"prompt": [64]}, "holds 64"),
        ({"prompt": [[]]}, "is empty"),
        ({"prompt": []}, "prompts is empty"),
        ({"prompt": ["fine", "no \ud83d"]}, r"prompts\[1\] holds half a surrogate pair"),
        ({"logit_bias": {"64": 1.0}}, "logit_bias holds 64"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias holds 'x'"),
        ({"stop_token_ids": [64]}, "stop_token_ids holds 64"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids holds -1"),
        (
            {"max_tokens": 7},
            r"prompts\[0\] has 2 tokens, and max_tokens=7 .* takes 8 .*--max-model-len",
        ),
        ({"stop": ["\ud83d"]}, "stop cannot be sent"),
        ({"user": "\udc00"}, "user cannot be sent"),
        ({"structured_outputs": {"regex": {1, 2}}}, "structured_outputs cannot be sent"),
    ],
    ids=str,
)
def test_what_a_server_must_not_get_is_refused_by_name(change, message):
    payloads.check_payload(BASE, LIMITS)
    with pytest.raises(errors.SamplingRefused, match=message):
        payloads.check_payload({**BASE, **change}, LIMITS)


def test_what_fits_to_the_last_token_is_sent_as_it_is():
    found = {**BASE, "prompt": [[63] * 4, "\U0001f600\x00"], "logit_bias": {"63": 1.0}}
    assert json.loads(payloads.check_payload(found, LIMITS)) == found
    assert payloads.check_payload({**BASE, "prompt": [[2**31 - 1]]})  # of an unknown vocabulary


@pytest.mark.parametrize(
    "given",
    [
        *([np.int64(5), np.int64(6)], np.array([5, 6]), torch.tensor([5, 6])),
        *([[np.int32(5), 6]], np.array([[5, 6]]), torch.tensor([[5, 6]]), [np.array([5, 6])]),
        *([list(torch.tensor([5, 6]))], ((5, 6),)),
    ],
    ids=str,
)
def test_prompts_of_numpy_and_torch_are_token_ids_too(given):
    assert payloads.as_prompts(given) == [[5, 6]]


@pytest.mark.parametrize("given", [np.array([[5.0]]), [torch.tensor([True])]], ids=str)
def test_arrays_of_other_things_than_whole_numbers_are_no_token_ids(given):
    with pytest.raises(errors.SamplingRefused, match="token ids"):
        payloads.check_prompts(payloads.as_prompts(given), 64)


def test_output_of_a_tokenizer_as_it_is_is_no_list_of_prompts():
    with pytest.raises(errors.SamplingRefused, match=r"give \['input_ids'\]"):
        payloads.as_prompts({"input_ids": [[5]], "attention_mask": [[1]]})


def test_settings_of_numpy_and_torch_are_sent_as_numbers():
    found = payloads.sampling_fields(
        temperature=np.float32(0.5),
        n=None,
        generation_kwargs={
            "max_tokens": np.int64(3),
            "stop_token_ids": np.array([3, 4]),
            "logit_bias": {np.int64(7): torch.tensor(2.0)},
        },
    )
    expected = {"stop_token_ids": [3, 4], "logit_bias": {7: 2.0}}
    assert found == {"temperature": 0.5, "max_tokens": 3, **expected}
    assert completions.as_params(
        {"max_tokens": np.int64(3), "logit_bias": {"7": 2}}
    ).logit_bias == {7: 2}


@pytest.mark.parametrize("given", [{}, {"regex": None}, {"regex": None, "choice": None}], ids=str)
def test_grammar_that_says_nothing_is_left_out(given):
    assert payloads.sampling_fields(generation_kwargs={"structured_outputs": given}) == {}


@pytest.mark.parametrize(
    "given", [{"stop": 5}, {"stop_token_ids": 5}, {"logit_bias": [5]}], ids=str
)
def test_parameter_of_another_type_is_named(given):
    with pytest.raises(errors.SamplingRefused, match=f"{next(iter(given))}=.*: expected"):
        completions.as_params(given)


def test_prompts_are_split_in_order_by_what_a_server_takes():
    parts = payloads.split({**BASE, "prompt": ["a", [1], "b"]}, 2)
    assert [part["prompt"] for part in parts] == [["a", [1]], ["b"]]
    for whole in (["a", "b"], [1, 2, 3], "abc"):
        assert payloads.split({**BASE, "prompt": whole}, 2) == [{**BASE, "prompt": whole}]


@pytest.mark.parametrize(
    "bad",
    [
        *({"max_tokens": v} for v in (0, -1, 1.5, True, 2**31, "5")),
        *({"n": v} for v in (0, True)),
        *({"temperature": v} for v in (-0.1, math.nan, math.inf, "1")),
        *({"top_p": v} for v in (0.0, 1.1, math.nan)),
        *({"logprobs": v} for v in (-1, True, 1.0)),
        {"min_p": -0.1},
        {"top_k": -2},
        {"seed": 2**64},
        {"min_tokens": 17},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"stop": ("",)},
        {"stop": (5,)},
        {"stop_token_ids": (64,)},
        {"stop_token_ids": (-1,)},
        {"logit_bias": {64: 0.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: 101.0}},
        {"temperature": 0.0, "n": 2},
    ],
    ids=str,
)
def test_bad_parameter_is_refused_before_anything_is_sent(bad):
    with pytest.raises(errors.SamplingRefused) as caught:
        completions.check_fits(["x"], completions.as_params(bad), payloads.Limits(vocab_size=64))
    assert next(iter(bad)) in str(caught.value) or "temperature" in str(caught.value)


def test_ids_need_a_known_vocabulary():
    completions.check_vocabulary(SamplingParams(), None)
    for named in ({"stop_token_ids": (1,)}, {"logit_bias": {1: 1.0}}):
        completions.check_vocabulary(SamplingParams(**named), 64)
        with pytest.raises(errors.SamplingRefused, match="TINK_BASE_MODEL"):
            completions.check_vocabulary(SamplingParams(**named), None)


@pytest.mark.parametrize(
    "bad", [[], [""], [[]], [[1, 64]], [[-1]], [[True]], [[1.0]], ["fine", [2**63]]], ids=str
)
def test_bad_prompt_is_refused_and_named(bad):
    with pytest.raises(errors.SamplingRefused, match="prompts"):
        payloads.check_prompts(bad, 64)


def test_one_prompt_may_stand_without_a_list_around_it():
    assert payloads.as_prompts("12=") == ["12="]
    assert payloads.as_prompts([1, 2]) == [[1, 2]]
    assert payloads.as_prompts(["a", (1, 2)]) == ["a", [1, 2]]
    with pytest.raises(errors.SamplingRefused, match=r"prompts\[1\]=None"):
        payloads.as_prompts(["a", None])


def test_keywords_become_parameters_and_unknown_ones_are_named():
    found = completions.as_params({"stop": "x", "seed": None, "stop_token_ids": [3]})
    assert (found.stop, found.seed, found.stop_token_ids) == (("x",), None, (3,))
    with pytest.raises(errors.SamplingRefused, match=r"unknown parameters \['chat_template'\]"):
        completions.as_params({"chat_template": "x"})


# -- the answer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "data", "expected"),
    [
        (404, {"error": {"message": "no"}}, errors.UnknownVersion),
        (400, {"error": {"message": "bad top_p"}}, errors.SamplingRefused),
        (401, {"error": "Unauthorized"}, errors.BadToken),
        (500, {"error": {"message": "EngineDeadError"}}, errors.EngineUnavailable),
        (503, errors.NotReady("folding").to_wire(), errors.NotReady),
        (200, "<html>", errors.BackendError),
        (200, {"model": "m"}, errors.BackendError),
        (200, {"model": "other", "choices": [1]}, errors.UnknownVersion),
        (200, {"model": "m", "choices": [1, 2]}, errors.BackendError),
    ],
)
def test_answer_that_cannot_be_trusted_is_an_error(status, data, expected):
    with pytest.raises(expected):
        payloads.read_answer(status, data, model="m", url=URL, expected=1)


def test_completions_carry_logprobs_of_their_own_tokens():
    params = SamplingParams(n=2, logprobs=1)
    found = completions.as_completions([choice(i) for i in range(4)], params, model_id="m")
    assert [(c.prompt_index, c.index) for c in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found[0].logprobs[0] == -0.5 and math.isnan(found[0].logprobs[1])
    assert list(found[0].top_logprobs[0].items()) == [(3, -0.1), (7, -0.5)]
    only = completions.as_completions([choice()], SamplingParams(logprobs=0), model_id="m")
    assert only[0].top_logprobs is None and only[0].logprobs[0] == -0.5
    none = completions.as_completions([choice(logprobs=None)], SamplingParams(), model_id="m")
    assert none[0].logprobs is None
    with pytest.raises(errors.BackendError, match="came back for id 8"):
        completions.as_completions([choice(token_ids=[8, 9])], params, model_id="m")


def test_aborted_completion_is_no_completion():
    with pytest.raises(errors.EngineUnavailable, match="aborted a completion of 'm'"):
        completions.as_completions([choice(finish_reason="abort")], SamplingParams(), model_id="m")


def test_streamed_pieces_become_the_whole_answer():
    whole = completions.StreamedChoices(2)
    first, second = choice(0), choice(1)
    for full in (second, first):
        for t in range(2):
            piece = {
                "index": full["index"],
                "text": full["text"][t],
                "token_ids": [full["token_ids"][t]],
                "prompt_token_ids": [1] if t == 0 else None,
                "finish_reason": "length" if t == 1 else None,
                "logprobs": {key: [value[t]] for key, value in full["logprobs"].items()},
            }
            whole.add(piece)
    found = completions.as_completions(whole.finished(), SamplingParams(logprobs=1))
    assert str(found) == str(
        completions.as_completions([first, second], SamplingParams(logprobs=1))
    )
    with pytest.raises(errors.BackendError, match=r"completions \[0\] had not"):
        completions.StreamedChoices(1).finished()


def test_lines_of_a_stream():
    assert completions.event_data(": comment") is None
    assert completions.event_data("data: [DONE]") == "[DONE]"
    assert completions.event_data('data: {"choices": []}') == {"choices": []}
    for broken in ('data: {"error": {"message": "dead"}}', "data: {"):
        with pytest.raises(errors.BackendError, match="broke off"):
            completions.event_data(broken)


# -- over a socket ------------------------------------------------------------------------------------


@asynccontextmanager
async def sampler_of(handler):
    """An `AsyncSampler` of a server whose /v1/completions is `handler`."""
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    sampler = AsyncSampler(f"http://127.0.0.1:{port}", api_key="k", connect_timeout_s=1.0)
    try:
        yield sampler
    finally:
        await sampler.close()
        await runner.cleanup()


def asked(**more):
    return {**completions.completion_payload(["a"], "m", SamplingParams()), **more}


def test_answer_comes_through_with_the_servers_key():
    async def handler(request):
        assert request.headers["authorization"] == "Bearer k"
        return web.json_response({"model": (await request.json())["model"], "choices": [choice()]})

    async def run():
        async with sampler_of(handler) as sampler:
            data = await sampler.complete(asked(), timeout_s=5.0, expected=1)
            assert data["choices"][0]["text"] == "ab"

    asyncio.run(run())


def test_stream_yields_choices_and_must_end_with_done():
    async def handler(request):
        response = web.StreamResponse()
        await response.prepare(request)
        event = json.dumps({"model": "m", "choices": [choice()]})
        await response.write(f"data: {event}\n\n".encode())
        if (await request.json())["seed"] != 1:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def run():
        async with sampler_of(handler) as sampler:
            pieces = [p async for p in sampler.stream(asked(stream=True), timeout_s=5.0)]
            assert [p["text"] for p in pieces] == ["ab"]
            with pytest.raises(errors.BackendError, match=r"ended without \[DONE\]"):
                async for _ in sampler.stream(asked(stream=True, seed=1), timeout_s=5.0):
                    pass

    asyncio.run(run())


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, errors.UnknownVersion), (400, errors.SamplingRefused), (500, errors.EngineUnavailable)],
)
def test_status_of_a_stream_is_told_before_its_first_piece(status, expected):
    async def handler(request):
        return web.json_response({"error": {"message": "x"}}, status=status)

    async def run():
        async with sampler_of(handler) as sampler:
            with pytest.raises(expected):
                async for _ in sampler.stream(asked(stream=True), timeout_s=5.0):
                    pass
            with pytest.raises(expected):
                await sampler.complete(asked(), timeout_s=5.0)

    asyncio.run(run())


def test_cancelling_closes_the_connection_which_is_how_vllm_aborts():
    async def run():
        began, ended = asyncio.Event(), asyncio.Event()

        async def handler(request):
            began.set()
            while request.transport is not None and not request.transport.is_closing():
                await asyncio.sleep(0.01)
            ended.set()
            return web.Response()

        async with sampler_of(handler) as sampler:
            task = asyncio.create_task(sampler.complete(asked(), timeout_s=30.0))
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(ended.wait(), 5.0)

    asyncio.run(run())


def test_deadline_broken_connection_and_absent_server_are_told_apart():
    async def handler(request):
        if (await request.json())["seed"] == 1:
            request.transport.close()
        await asyncio.sleep(0.5)

    async def run():
        async with sampler_of(handler) as sampler:
            with pytest.raises(errors.DeadlineExceeded, match=r"within 0\.1 s"):
                await sampler.complete(asked(), timeout_s=0.1)
            with pytest.raises(errors.EngineUnavailable, match="broke"):
                await sampler.complete(asked(seed=1), timeout_s=5.0)
        nobody = AsyncSampler("http://127.0.0.1:9", connect_timeout_s=0.5)
        with pytest.raises(ConnectionError, match="The vLLM server can't be reached at http"):
            await nobody.complete(asked(), timeout_s=5.0)
        await nobody.close()

    asyncio.run(run())
