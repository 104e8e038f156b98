"""The Megatron backend: over the release's real resources with a stub engine, and over the contract."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.unit.megatron_servers import EOD, ContractServer, LossyTokenizer, continuation, logprob
from tink_rl import errors
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.worker.backends.megatron.backend import MegatronBackend
from tink_rl.worker.backends.megatron.contract import Kind, refused_parameters

TOKENIZER = LossyTokenizer()
FOUR = SamplingParams(max_tokens=4)


def run(backend, prompts, params=FOUR, *, model_id=None, timeout_s=20.0, **kwargs):
    async def once():
        try:
            return await backend.sample(
                backend.admit(prompts, model_id, params), timeout_s=timeout_s, **kwargs
            )
        finally:
            await backend.close()

    return asyncio.run(once())


def expected(prompt, max_tokens=4):
    ids = TOKENIZER.tokenize(prompt) if isinstance(prompt, str) else prompt
    return ids, continuation(ids, max_tokens)


@pytest.fixture(scope="module")
def real():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.megatron_servers"],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL},
    )
    static, dynamic = json.loads(process.stdout.readline())
    yield {"static": static, "dynamic": dynamic}
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


@pytest.fixture
def contract():
    started = []

    def start(kind):
        started.append(ContractServer(kind))
        return started[-1]

    yield start
    for server in started:
        server.close()


class Vanishing(BaseHTTPRequestHandler):
    """A static server that answers the probe, and ends the connection at every other request."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body:
            self.server.bodies.append(body)
            self.close_connection = True
            return
        answer = json.dumps("prompts argument required").encode()
        self.send_response(400)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def vanishing():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Vanishing)
    server.bodies = []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


# -- the release's own resources ------------------------------------------------------------------


def test_real_static_server_gives_generated_tokens_text_and_logprobs(real):
    prompts = ["12+34=", "Straße", "quit"]
    found = run(MegatronBackend(real["static"]), prompts, SamplingParams(max_tokens=4, logprobs=0))
    for prompt, one in zip(prompts, found, strict=True):
        ids, new = expected(prompt)
        assert (one.prompt_token_ids, one.token_ids) == (ids, new)
        assert one.text == TOKENIZER.detokenize(new)
        assert one.logprobs == [logprob(len(ids) - 1 + i) for i in range(len(new))]
        assert one.finish_reason == ("stop" if new[-1] == EOD else "length")
        assert (one.model_id, one.version, one.digest) == (None, None, None)


def test_real_static_server_takes_copies_for_n_prompt_major(real):
    found = run(MegatronBackend(real["static"]), ["ab", "cd"], SamplingParams(max_tokens=2, n=3))
    assert [(c.prompt_index, c.index) for c in found] == [(p, i) for p in (0, 1) for i in range(3)]
    assert [c.text for c in found] == ["ba"] * 3 + ["dc"] * 3


def test_real_static_server_is_sent_more_than_128_prompts_in_chunks(real):
    prompts = [f"{i}=" for i in range(300)]
    found = run(MegatronBackend(real["static"]), prompts)
    assert [c.text for c in found] == [TOKENIZER.detokenize(expected(p)[1]) for p in prompts]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=2, temperature=0.0),
        SamplingParams(max_tokens=2, temperature=0.7, top_p=0.5),
        SamplingParams(max_tokens=2, top_k=5),
        SamplingParams(max_tokens=2, top_p=1.0, temperature=2),
    ],
    ids=["greedy", "top_p", "top_k", "temperature"],
)
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_real_servers_take_what_is_not_refused(real, kind, params):
    assert run(MegatronBackend(real[kind]), ["ab"], params)[0].text == "ba"


def test_words_of_a_200_with_a_string_are_the_error(real):
    with pytest.raises(errors.SamplingRefused, match="prompt too long for the engine"):
        run(MegatronBackend(real["static"]), ["engine refuses"])


def test_exception_in_the_static_engine_is_a_backend_error(real):
    with pytest.raises(errors.BackendError, match=r"HTTP 500.*look into the server's log"):
        run(MegatronBackend(real["static"]), ["engine fails"])


def test_real_dynamic_server_takes_text_and_token_ids_in_one_call(real):
    prompts = ["12+34=", [97, 98, 99], "quit"]
    backend = MegatronBackend(real["dynamic"])
    found = run(backend, prompts, SamplingParams(max_tokens=4, logprobs=0, n=2))
    assert backend.describe()["server"] == "dynamic"
    for row, one in enumerate(found):
        new = expected(prompts[row // 2])[1]
        assert one.text == TOKENIZER.detokenize(new)
        assert one.logprobs == [logprob(i) for i in range(len(new))]
        assert one.finish_reason == ("stop" if new[-1] == EOD else "length")
        assert one.token_ids is None  # this release does not say


def test_finish_reason_is_left_out_where_nothing_tells_it(real):
    assert run(MegatronBackend(real["dynamic"]), ["ab"])[0].finish_reason is None


@pytest.mark.parametrize("change", [{"stop": ("\n",)}, {"ignore_eos": True}], ids=str)
def test_parameters_that_the_old_dynamic_server_ignores_are_refused(real, change):
    with pytest.raises(
        errors.NotSupportedByBackend, match=rf"too old to honour {next(iter(change))}"
    ):
        run(MegatronBackend(real["dynamic"]), ["ab"], SamplingParams(max_tokens=2, **change))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_canary_comes_back_from_both(real, kind):
    async def once():
        backend = MegatronBackend(real[kind])
        try:
            await backend.canary(10.0)
            return await backend.models()
        finally:
            await backend.close()

    (model,) = asyncio.run(once())
    assert (model.model_id, model.kind) == ("megatron", "base")


# -- what is refused, and by which name -----------------------------------------------------------

BOTH = {
    **{"seed": 7, "min_p": 0.1, "min_tokens": 2, "stop_token_ids": (3,), "logit_bias": {3: 1.0}},
    **{"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    **{"logprobs": 2, "top_p": 0.0, "max_tokens": 0},
}
STATIC_ONLY = {"stop": ("\n",), "ignore_eos": True, "temperature": 100.5, "top_k": 1001}


@pytest.mark.parametrize("name", [*BOTH, *STATIC_ONLY])
def test_ignored_parameter_is_refused_by_name(name):
    # unchecked: Megatron's own limits hold wherever the parameters come from
    params = SamplingParams.model_construct(**{name: (BOTH | STATIC_ONLY)[name]})
    assert list(refused_parameters(Kind.STATIC, params)) == [name]
    assert list(refused_parameters(Kind.DYNAMIC, params)) == ([name] if name in BOTH else [])
    assert list(refused_parameters(None, params)) == ([name] if name in BOTH else [])


def test_every_sampling_parameter_is_either_sent_or_refused():
    honoured = {"max_tokens", "temperature", "top_p", "top_k", "n", "logprobs"}
    judged = honoured | set(BOTH) | set(STATIC_ONLY)
    assert set(SamplingParams.model_fields) == judged


def test_top_k_with_top_p_is_refused_before_anything_is_sent(contract):
    server = contract("dynamic")
    with pytest.raises(errors.NotSupportedByBackend, match="either top_k or top_p"):
        MegatronBackend(server.url).admit(["a"], None, SamplingParams(top_k=5, top_p=0.9))
    assert server.seen == []


def test_model_id_is_refused_with_the_reason_and_the_way_out():
    backend = MegatronBackend("http://127.0.0.1:9")
    with pytest.raises(errors.NotSupportedByBackend, match=r"'math'.*merge the adapter.*USE_VLLM"):
        backend.admit(["a"], "math", FOUR)
    backend.admit(["a"], "megatron", FOUR)  # the name that `models` gives


def test_token_ids_are_refused_by_the_static_server(contract):
    server = contract("static")
    with pytest.raises(errors.NotSupportedByBackend, match="takes no token ids"):
        run(MegatronBackend(server.url), [[1, 2]])
    assert server.bodies() == []


@pytest.mark.parametrize("prompts", [[], [""], ["a", []]], ids=str)
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(errors.SamplingRefused, match="empty prompt"):
        MegatronBackend().admit(prompts, None, FOUR)


# -- the contract: what the installed release does not show ---------------------------------------


def test_static_server_without_token_ids_is_sliced_by_its_segments(contract):
    params = SamplingParams(max_tokens=4, logprobs=0)
    (one,) = run(MegatronBackend(contract("static").url), ["Straße"], params)
    ids, new = expected("Straße")
    assert (one.text, one.token_ids) == (TOKENIZER.detokenize(new), None)
    assert one.logprobs == [logprob(len(ids) - 1 + i) for i in range(4)]
    assert one.finish_reason == "length"


def test_static_payload_says_only_what_is_honoured(contract):
    server = contract("static")
    run(MegatronBackend(server.url), ["ab"], SamplingParams(max_tokens=2, temperature=0.0))
    run(MegatronBackend(server.url), ["ab"], SamplingParams(max_tokens=2, top_p=0.5))
    score = {"prompts": ["ab"], "tokens_to_generate": 0, "logprobs": True, "no_log": True}
    asked = {"prompts": ["ab"], "tokens_to_generate": 2, "logprobs": False, "no_log": True}
    assert server.bodies() == [
        *(score, {**asked, "top_k": 1}),
        *(score, {**asked, "temperature": 1.0, "top_p": 0.5}),
    ]


def test_prompt_is_scored_once(contract):
    server = contract("static")

    async def twice():
        backend = MegatronBackend(server.url)
        for _ in range(2):
            await backend.sample(backend.admit(["ab"], None, FOUR), timeout_s=10)
        await backend.close()

    asyncio.run(twice())
    assert [body["tokens_to_generate"] for body in server.bodies()] == [0, 4, 4]


def test_dynamic_server_gives_ids_and_reasons_in_the_order_of_the_prompts(contract):
    server = contract("dynamic")
    prompts, params = (
        ["ab", "quit"],
        SamplingParams(max_tokens=4, n=2, stop=("x",), ignore_eos=True),
    )
    found = run(MegatronBackend(server.url), prompts, params)
    assert [one.token_ids for one in found] == [expected(p)[1] for p in prompts for _ in range(2)]
    assert [one.finish_reason for one in found] == ["length"] * 2 + ["stop"] * 2
    (body,) = server.bodies()
    assert body == {
        **{"prompt": ["ab", "ab", "quit", "quit"], "max_tokens": 4, "temperature": 1.0, "top_k": 0},
        **{"top_p": 1.0, "logprobs": None, "stop": ["x"], "ignore_eos": True},
    }


def test_plain_text_500_of_the_dynamic_server_is_a_backend_error(contract):
    with pytest.raises(errors.BackendError, match="transient engine error"):
        run(MegatronBackend(contract("dynamic").url), ["busy"])


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (("Invalid sampling parameter: x", 400), errors.SamplingRefused, "Invalid sampling"),
        (("warming up", 503), errors.EngineUnavailable, "warming up"),
        (({"choices": []}, 200), errors.BackendError, "no completion"),
        (({"choices": [{"index": 0}]}, 200), errors.BackendError, "no completion"),
        (({"choices": [{"index": 5, "text": "a"}]}, 200), errors.BackendError, "no completion"),
        (("<html>proxy</html>", 200), errors.BackendError, "proxy"),
    ],
    ids=["refused", "unready", "too-few", "no-text", "wrong-index", "no-json"],
)
def test_wrong_answers_of_the_dynamic_server_are_told_apart(contract, fault, error, words):
    server = contract("dynamic")
    server.fault = fault
    with pytest.raises(error, match=words):
        run(MegatronBackend(server.url), ["ab"])


@pytest.mark.parametrize(
    "fault",
    [
        {"text": ["a"]},
        {"text": ["a"], "segments": [["a"]], "logprobs": [[]]},
        {"text": ["a", "b"], "segments": [["a"], ["b"]]},
        {"text": "a", "segments": [["a"]]},
    ],
    ids=["no-tokens", "short-logprobs", "too-many", "no-list"],
)
def test_wrong_answers_of_the_static_server_are_no_completions(contract, fault):
    server = contract("static")

    async def once():
        backend = MegatronBackend(server.url)
        params = SamplingParams(max_tokens=4, logprobs=0)
        try:
            await backend.sample(backend.admit(["ab"], None, params), timeout_s=10)
            server.fault = fault
            await backend.sample(backend.admit(["ab"], None, params), timeout_s=10)
        finally:
            await backend.close()

    with pytest.raises(errors.BackendError, match="no completion"):
        asyncio.run(once())


def test_what_is_no_megatron_server_is_said_to_be_none(contract):
    with pytest.raises(errors.BackendError, match=r"is no Megatron .*MEGATRON_SERVER_URL"):
        run(MegatronBackend(contract("none").url), ["ab"])


def test_unreachable_server_is_named_with_the_setting_to_correct():
    with pytest.raises(errors.EngineUnavailable, match=r"127\.0\.0\.1:9 .*MEGATRON_SERVER_URL"):
        run(MegatronBackend("http://127.0.0.1:9"), ["ab"])


def test_request_whose_connection_ends_is_not_sent_again(vanishing):
    backend = MegatronBackend(f"http://127.0.0.1:{vanishing.server_port}")
    with pytest.raises(errors.EngineUnavailable, match="ServerDisconnectedError"):
        run(backend, ["ab"])
    assert len(vanishing.bodies) == 1


def test_another_kind_of_server_at_the_same_url_is_probed_again(contract):
    static, dynamic = contract("static"), contract("dynamic")

    async def twice():
        backend = MegatronBackend(static.url)
        before = await backend.sample(backend.admit(["ab"], None, FOUR), timeout_s=10)
        backend._client.base_url = dynamic.url  # as if the other server took over the port
        after = await backend.sample(backend.admit(["ab"], None, FOUR), timeout_s=10)
        await backend.close()
        return before[0].token_ids, after[0].token_ids, backend.describe()["server"]

    assert asyncio.run(twice()) == (None, expected("ab")[1], "dynamic")


def test_deadline_ends_a_call_that_the_server_holds(contract):
    server = contract("static")
    server.hold.clear()
    with pytest.raises(errors.DeadlineExceeded, match=r"within 0\.5 s"):
        run(MegatronBackend(server.url), ["ab"], timeout_s=0.5)
    server.hold.set()


async def held_request(server, backend):
    """A request of a backend that has been answered before; the server holds it."""
    await backend.sample(backend.admit(["ab"], None, FOUR), timeout_s=10)
    server.hold.clear()
    server.arrived.clear()
    held = asyncio.create_task(backend.sample(backend.admit(["ab"], None, FOUR), timeout_s=30))
    await asyncio.to_thread(server.arrived.wait, 10)
    return held


def test_canary_that_waits_for_a_request_of_ours_forgets_nothing(contract):
    server = contract("static")

    async def canary_behind_a_request():
        backend = MegatronBackend(server.url)
        held = await held_request(server, backend)
        with pytest.raises(errors.DeadlineExceeded):
            await backend.canary(0.1)
        server.hold.set()
        await held
        await backend.sample(backend.admit(["ab"], None, FOUR), timeout_s=10)
        await backend.close()

    asyncio.run(canary_behind_a_request())
    assert [body for _, _, body in server.seen].count({}) == 1  # the probe
    assert [body["tokens_to_generate"] for body in server.bodies()] == [0, 4, 4, 4]


def test_cancelled_call_leaves_the_turn_to_the_next(contract):
    server = contract("static")

    async def cancel_then_sample():
        backend = MegatronBackend(server.url)
        held = await held_request(server, backend)
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held
        server.hold.set()
        found = await backend.sample(backend.admit(["ab"], None, FOUR), timeout_s=10)
        await backend.close()
        return found[0].text

    assert asyncio.run(cancel_then_sample()) == "baba"


def test_each_completion_is_one_delta(contract):
    seen = []
    params = SamplingParams(max_tokens=2, n=2)
    run(MegatronBackend(contract("dynamic").url), ["ab"], params, on_delta=seen.append)
    assert [(d.prompt_index, d.index, d.text) for d in seen] == [(0, 0, "ba"), (0, 1, "ba")]
