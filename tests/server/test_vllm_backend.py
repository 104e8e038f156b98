"""`tink_rl.vllm_backend` on a real server with the plugin: two LoRA slots, many adapters."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.policies import (
    LONG_TOKENS,
    NUM_LONG,
    NUM_TOKENS,
    PeftTwin,
    WholeTwin,
    sync_to,
    under_way,
)
from tink_rl import errors, vllm_backend
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.vllm_backend import VLLMBackend
from tink_rl.worker.backends.vllm import VLLMSampler

pytestmark = pytest.mark.server
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def goldens(golden_adapters):
    return golden_adapters


@pytest.fixture
def server(servers):
    return servers.get("qwen3", mode="adapter", max_loras=2, max_cpu_loras=4)


@pytest.fixture
def backend(server, tmp_path, goldens):
    with make_backend(server, tmp_path / "store") as backend:
        yield backend
        drop_everything(backend)


def make_backend(server, store, **settings):
    return VLLMBackend(
        {
            "base_url": server.url,
            "tink_token_file": str(server.token_file),
            "tink_store_dir": str(store),
            **settings,
        }
    )


def drop_everything(backend):
    for item in backend.list():
        backend.unregister(item["adapter_id"])
    backend._cache.settle()


def ask(backend, name, prompt):
    [[completion]] = backend.generate(list(prompt), name, **GREEDY)
    return completion


def test_completion_names_tokens_text_logprobs_and_the_version_that_sampled_it(backend, goldens):
    golden = goldens[0]
    registered = backend.register("mine", golden.path)
    prompts = [list(prompt) for prompt in golden.cases]
    rows = backend.generate(prompts, "mine", logprobs=2, **GREEDY)
    for i, (row, expected) in enumerate(zip(rows, golden.cases.values(), strict=True)):
        [found] = row
        assert (found.prompt_index, found.index, found.token_ids) == (i, 0, expected)
        assert found.prompt_token_ids == prompts[i] and found.finish_reason == "length"
        assert len(found.text) > 0 and len(found.logprobs) == len(expected)
        assert all(found.top_logprobs[t][expected[t]] == found.logprobs[t] for t in range(8))
        assert (found.model_id, found.version, found.digest) == ("mine", 1, registered.digest)
    [[base]] = backend.generate(prompts[0], **GREEDY)
    assert (base.version, base.digest) == (None, None) and base.token_ids != rows[0][0].token_ids


def test_n_completions_of_each_prompt_come_in_order(backend):
    rows = backend.generate(["12=", "345="], n=3, max_tokens=4, seed=7, top_k=5, stop=["Z"])
    assert [[(c.prompt_index, c.index) for c in row] for row in rows] == [
        [(0, 0), (0, 1), (0, 2)],
        [(1, 0), (1, 1), (1, 2)],
    ]
    assert len({tuple(c.token_ids) for c in rows[0]}) > 1


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.long)])
def test_32_adapters_on_2_slots_from_64_threads_each_get_their_own_answer(
    server, goldens, tmp_path, times
):
    with make_backend(server, tmp_path / "store", tink_max_resident_adapters=12) as backend:
        for golden in goldens:
            backend.register(golden.name, golden.path)
        asked = [(g, *case) for g in goldens for case in g.cases.items()] * times
        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(lambda one: ask(backend, one[0].name, one[1]), asked))
        wrong = [
            golden.name
            for (golden, _, expected), answer in zip(asked, answers, strict=True)
            if answer.token_ids != expected or answer.model_id != golden.name
        ]
        assert wrong == []
        backend._cache.settle()
        assert len(backend._cache.resident()) <= 12
        assert len(server.client().status().served) <= 12
        drop_everything(backend)
    assert server.client().status().served == {}


def test_request_under_way_ends_on_the_bytes_that_it_began_with(backend, server, goldens):
    old, new = goldens[0], goldens[1]
    backend.register("math", old.path)
    [prompt, *_] = old.cases
    long = {"temperature": 0.0, "max_tokens": LONG_TOKENS, "ignore_eos": True}
    [[expected]] = backend.generate(list(prompt), "math", **long)
    answers, prompts = [], [list(prompt)] * NUM_LONG
    with under_way(server, lambda: answers.extend(backend.generate(prompts, "math", **long))):
        assert backend.register("math", new.path).version == 2
        [new_prompt, *_] = new.cases
        assert ask(backend, "math", new_prompt).token_ids == new.cases[new_prompt]
        backend.unregister("math")
    assert [row[0].token_ids for row in answers] == [expected.token_ids] * NUM_LONG
    assert {row[0].version for row in answers} == {1}
    with pytest.raises(errors.UnknownAdapter, match="'math' is neither"):
        ask(backend, "math", prompt)
    backend._cache.settle()
    assert server.client().status().served == {}


def test_version_can_be_named_and_the_same_bytes_keep_theirs(backend, goldens):
    old, new = goldens[2], goldens[3]
    assert [backend.register("m", g.path).version for g in (old, new, new)] == [1, 2, 2]
    for name, golden, version in (("m@1", old, 1), ("m@2", new, 2), ("m", new, 2)):
        for prompt, expected in golden.cases.items():
            found = ask(backend, name, prompt)
            assert (found.token_ids, found.version) == (expected, version)
    with pytest.raises(errors.UnknownAdapter):
        ask(backend, "m@3", [5, 6])


@pytest.mark.parametrize("times", [10, pytest.param(30, marks=pytest.mark.long)])
def test_hot_adapters_answer_right_while_others_come_and_go(backend, goldens, times):
    hot, stop, wrong = goldens[:2], threading.Event(), []
    for golden in hot:
        backend.register(golden.name, golden.path)

    def churn():
        while not stop.is_set():
            for golden in goldens[4:8]:
                backend.register("cold", golden.path)
                [prompt, *_] = golden.cases
                if ask(backend, "cold", prompt).token_ids != golden.cases[prompt]:
                    wrong.append("cold")
                backend.unregister("cold")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(times):
            for golden in hot:
                for prompt, expected in golden.cases.items():
                    if ask(backend, golden.name, prompt).token_ids != expected:
                        wrong.append(golden.name)
    finally:
        stop.set()
        thread.join()
    assert wrong == []


def test_another_process_sees_what_was_registered_and_both_may_load_it(
    backend, server, goldens, tmp_path
):
    golden = goldens[5]
    backend.register("shared", golden.path)
    [prompt, *_] = golden.cases
    code = (
        "import vllm_backend\n"
        f"print([a['adapter_id'] for a in vllm_backend.list_lora_adapters()])\n"
        f"answer = vllm_backend.generate_with_vllm({list(prompt)}, 'shared', {NUM_TOKENS}, 0.0, "
        "ignore_eos=True)\nprint(answer[0][0]['token_ids'])\n"
        "vllm_backend.register_lora_adapter('theirs', "
        f"{str(golden.path)!r})\n"
    )
    env = {
        "PYTHONPATH": str(Path(vllm_backend.__file__).parents[1]),
        "VLLM_BASE_URL": server.url,
        "TINK_STORE_DIR": str(tmp_path / "store"),
        "TINK_TOKEN_FILE": str(server.token_file),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['shared']", str(golden.cases[prompt])]
    assert [row["adapter_id"] for row in backend.list()] == ["shared", "theirs"]
    assert ask(backend, "theirs", prompt).token_ids == golden.cases[prompt]
    assert ask(backend, "shared", prompt).token_ids == golden.cases[prompt]


def test_adapter_that_another_process_dropped_is_loaded_again(backend, server, goldens):
    golden = goldens[6]
    backend.register("mine", golden.path)
    [prompt, *_] = golden.cases
    ask(backend, "mine", prompt)
    [name] = backend._cache.resident()
    backend._cache._loader.drop(name)
    assert server.client().status().served == {}
    assert ask(backend, "mine", prompt).token_ids == golden.cases[prompt]


def test_source_may_be_deleted_after_registering(backend, goldens, tmp_path):
    golden = goldens[7]
    copy = tmp_path / "copy"
    shutil.copytree(golden.path, copy)
    backend.register("gone", copy)
    for file in copy.iterdir():
        file.unlink()
    for prompt, expected in golden.cases.items():
        assert ask(backend, "gone", prompt).token_ids == expected


def test_two_keys_in_the_list_and_more_with_details(backend, goldens):
    backend.register("a", goldens[0].path)
    assert backend.list() == [{"adapter_id": "a", "lora_path": str(goldens[0].path)}]
    [row] = backend.list(details=True)
    assert row["version"] == 1 and row["resident"] is False and len(row["digest"]) == 64


def test_info_says_what_serves(backend, server):
    found = backend.info()
    assert found["reachable"] and found["plugin"] and found["missing"] == []
    assert found["base_model"] == server.client().status().base_model
    assert found["settings"]["vllm_timeout"] == 5.0 and found["modes"] == ["adapter", "full"]


def test_ids_outside_the_vocabulary_never_reach_the_server(backend):
    for prompts, more in (
        ([[5, 64]], {}),
        ([[5, -1]], {}),
        ([[True, 3]], {}),
        (["a", ""], {}),
        ([], {}),
        (["a"], {"stop_token_ids": [64]}),
        (["a"], {"logit_bias": {64: 1.0}}),
        (["a"], {"logit_bias": {3: float("nan")}}),
        (["a"], {"chat_template": "x"}),
        (["a"], {"temperature": float("nan")}),
        (["a"], {"max_tokens": 0}),
    ):
        with pytest.raises(errors.SamplingRefused):
            backend.generate(prompts, **more)
    [[found]] = backend.generate(["a"], logit_bias={7: 100.0}, max_tokens=2, temperature=0.0)
    assert found.token_ids == [7, 7]


def test_worker_backend_samples_streams_and_checks_in_one_loop(backend, goldens):
    for golden in goldens[:6]:
        backend.register(golden.name, golden.path)

    async def run():
        sampler = VLLMSampler(backend)
        params = SamplingParams(**GREEDY, logprobs=0)
        await sampler.canary(5.0)

        async def one(golden, stream):
            deltas = []
            prompts = [list(prompt) for prompt in golden.cases]
            admitted = sampler.admit(prompts, golden.name, params)
            found = await sampler.sample(
                admitted,
                timeout_s=60.0,
                on_delta=deltas.append if stream else None,
            )
            assert [c.token_ids for c in found] == list(golden.cases.values())
            assert {c.model_id for c in found} == {golden.name}
            for i, completion in enumerate(found if stream else []):
                mine = [d for d in deltas if d.prompt_index == i]
                assert "".join(d.text for d in mine) == completion.text
                assert [t for d in mine for t in d.token_ids] == completion.token_ids
                assert [v for d in mine for v in d.logprobs] == completion.logprobs
            return found

        for stream in (False, True):
            await asyncio.gather(*(one(g, stream) for g in goldens[:6] * 4))
        models = await sampler.models()
        assert models[0].kind == "base"
        assert [m.model_id for m in models[1:]] == sorted(g.name for g in goldens[:6])
        with pytest.raises(errors.UnknownAdapter):
            await sampler.sample(sampler.admit([[5]], "nobody", params), timeout_s=10.0)
        with pytest.raises(errors.DeadlineExceeded):
            await sampler.sample(
                sampler.admit([[5, 6]] * 8, None, SamplingParams(max_tokens=200)), timeout_s=0.05
            )
        await sampler.close()

    asyncio.run(run())


def test_admitted_request_is_answered_by_what_was_registered_when_it_came(backend, goldens):
    old, new = goldens[0], goldens[1]
    backend.register("m", old.path)

    async def run():
        sampler = VLLMSampler(backend)
        params = SamplingParams(**GREEDY)
        [prompt, *_] = old.cases
        admitted = sampler.admit([list(prompt)], "m", params)
        backend.register("m", new.path)
        backend.unregister("m")
        [found] = await sampler.sample(admitted, timeout_s=60.0)
        assert (found.token_ids, found.version) == (old.cases[prompt], 1)
        with pytest.raises(errors.UnknownAdapter):
            await sampler.sample(sampler.admit([list(prompt)], "m", params), timeout_s=10.0)
        await sampler.close()

    asyncio.run(run())


def test_cancelled_sample_ends_on_the_server_too(backend, server):
    async def run():
        sampler, client = VLLMSampler(backend), server.client()
        params = SamplingParams(max_tokens=240, ignore_eos=True, n=4)
        task = asyncio.create_task(
            sampler.sample(sampler.admit([[5, 6, 7]] * 64, None, params), timeout_s=120.0)
        )
        while not (await asyncio.to_thread(client.control, "status", timeout_s=5))["running"]:
            assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while client.control("status", timeout_s=5)["running"]:
            await asyncio.sleep(0.05)
        await sampler.close()

    asyncio.run(run())


def test_updated_weights_answer_as_the_base_and_adapters_add_to_them(
    backend, server, model_dir, goldens, tmp_path
):
    golden, whole = goldens[8], WholeTwin(model_dir("qwen3"))
    backend.register("mine", golden.path)
    [prompt, *_] = golden.cases
    assert ask(backend, "mine", prompt).token_ids == golden.cases[prompt]
    whole.shake_base(3)
    base_cases = whole.base_cases()
    updated = whole.model.unload()
    updated.save_pretrained(tmp_path / "updated")
    beside = PeftTwin(tmp_path / "updated")
    beside.randomise(8)  # the weights of golden 8
    backend.init_communicator("cpu")
    try:
        record = backend.update_model_weights(updated)
        assert backend.server.view(fresh=True).base == record.name == f"weights@{record.version}"
        answers = ((None, base_cases, record.version), ("mine", beside.clear_cases(2), 1))
        for adapter_id, cases, version in answers:
            for prompt, expected in cases.items():
                found = ask(backend, adapter_id, prompt)
                assert found.token_ids == expected, adapter_id
                assert found.version == version
        assert ask(backend, None, prompt).digest == record.digest
        pairs = iter(WholeTwin(model_dir("qwen3")).tensors().items())
        assert backend.update_model_weights(pairs).name == f"weights@{record.version + 1}"
        for prompt, expected in golden.cases.items():
            assert ask(backend, "mine", prompt).token_ids == expected
    finally:
        backend.close_communicator()
        with sync_to(server, model_dir("qwen3"), "full", policy="weights"):
            pass  # drops what was published, so that the next test finds the base
    assert ask(backend, None, [5, 6]).version is None


def test_prefix_cache_is_reset_once_running_requests_have_ended(backend, server):
    answers = []
    long = {"temperature": 0.0, "max_tokens": LONG_TOKENS, "ignore_eos": True}
    prompts, client = [[5, 6]] * NUM_LONG, server.client()
    with under_way(server, lambda: answers.extend(backend.generate(prompts, **long))):
        backend.reset_prefix_cache()
        assert not client.control("status", timeout_s=5)["running"]
    assert [len(row[0].token_ids) for row in answers] == [LONG_TOKENS] * NUM_LONG
