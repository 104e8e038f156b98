"""What a client knows of a server before it sends: asked once, from the plugin or from the files."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.fake_vllm import FakeVLLM
from tink_rl import errors
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.transport.payloads import NO_LIMITS, Limits


@pytest.fixture
def base(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 64}))
    return str(tmp_path)


def fake(root, monkeypatch, **facts):
    monkeypatch.setattr("tests.fake_vllm.base_fingerprint", lambda _: "f" * 32)
    monkeypatch.setattr("tests.fake_vllm.checkpoint_index", lambda _: {})
    made = FakeVLLM(root, plugin=bool(facts))
    if facts:
        status = made._status
        made._status = lambda body: {**status(body), **facts}
    return made


def test_plugin_says_them_and_is_asked_once(base, monkeypatch):
    server = fake(base, monkeypatch, vocab_size=10, max_prompts=2)
    with VLLMClient("http://server", transport=server.transport()) as client:
        for _ in range(3):
            client.generate([[9]], model="base", logprobs=None)
            with pytest.raises(errors.SamplingRefused, match="holds 10"):
                client.generate([[10]], model="base")
    assert server.count("/tink/v1/status") == 1 and len(server.generated) == 3


def test_stock_servers_are_read_from_the_files_of_its_base(base, monkeypatch):
    server = fake(base, monkeypatch)
    with VLLMClient("http://server", transport=server.transport()) as client:
        assert client.limits() == Limits(vocab_size=64, max_model_len=256)
        with pytest.raises(errors.SamplingRefused, match=r"holds 64; .* from 0 to 63"):
            client.generate([[64]], model="base")


def test_restarted_server_is_asked_again(base, monkeypatch):
    server = fake(base, monkeypatch, vocab_size=10)
    with VLLMClient("http://server", transport=server.transport()) as client:
        assert client.limits().vocab_size == 10
        with pytest.raises(errors.UnknownVersion):
            client.generate([[1]], model="gone@1")
        client.generate([[1]], model="base", logprobs=None)
    assert server.count("/tink/v1/status") == 2


@pytest.mark.parametrize(
    ("answer", "looks"),
    [(httpx.Response(200, json={"nothing": 1}), 1), (httpx.ConnectError("away"), 2)],
    ids=["no words of ours", "nobody"],
)
def test_server_that_says_nothing_bounds_nothing(answer, looks):
    seen = []

    def handle(request):
        seen.append(request.url.path)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with VLLMClient("http://server", transport=httpx.MockTransport(handle)) as client:
        assert client.limits() == client.limits() == NO_LIMITS
    assert seen.count("/tink/v1/status") == looks  # who does not answer now may do so later


def test_more_prompts_than_the_server_takes_are_split_and_answered_in_order(base, monkeypatch):
    server = fake(base, monkeypatch, max_prompts=2, vocab_size=64)
    with VLLMClient("http://server", transport=server.transport()) as client:
        found = client.generate([[1], [2], [3], [4], [5]], n=2, model="base", logprobs=None)
    assert len(found["completion_ids"]) == 10 and len(found["prompt_ids"]) == 5
    assert server.count("/v1/completions") == 3


@pytest.mark.parametrize("one", ["12=", [5, 6, 7]], ids=str)
def test_one_prompt_may_stand_alone(base, monkeypatch, one):
    server = fake(base, monkeypatch, vocab_size=10)
    with VLLMClient("http://server", transport=server.transport()) as client:
        found = client.generate(one, model="base", logprobs=None, n=2)
        assert len(found["completion_ids"]) == 2
        assert client.generate(one, model="base", logprobs=None, n=None)["completion_ids"]


def test_one_conversation_alone_is_told_to_be_a_list(base, monkeypatch):
    server = fake(base, monkeypatch, vocab_size=10)
    with (
        VLLMClient("http://server", transport=server.transport()) as client,
        pytest.raises(errors.SamplingRefused, match="a list of messages for each conversation"),
    ):
        client.chat([{"role": "user", "content": "1+1"}], model="base")
