"""What the client makes of answers, and what it refuses before it asks."""

from __future__ import annotations

import httpx
import pytest

from tink_rl import errors
from tink_rl.publish.vllm_client import VLLMClient


def _client(handler):
    return VLLMClient("http://server", token="t" * 20, transport=httpx.MockTransport(handler))


def test_server_without_plugin_is_told_from_one_that_refuses():
    plain = _client(lambda request: httpx.Response(404, json={"detail": "Not Found"}))
    with pytest.raises(errors.PluginMissing, match="tink-rl serve"):
        plain.status()
    body = errors.UnknownVersion("gone").to_wire()
    with pytest.raises(errors.UnknownVersion):
        _client(lambda request: httpx.Response(404, json=body)).status()


def test_server_with_a_key_of_its_own_says_which_variable_to_set():
    client = _client(lambda request: httpx.Response(401, json={"error": "Unauthorized"}))
    for ask in (
        client.models,
        lambda: client.generate([[1]], model="base"),
        lambda: client.load_lora("a", "somewhere"),
        lambda: client.unload_lora("a"),
    ):
        with pytest.raises(errors.BadToken, match=r"wants its own --api-key.*set VLLM_API_KEY or"):
            ask()


def test_completion_of_another_version_is_not_taken():
    answer = {"model": "p@2", "choices": []}
    client = _client(lambda request: httpx.Response(200, json=answer))
    with pytest.raises(errors.UnknownVersion, match="answered as 'p@2'"):
        client.generate([[1]], model="p@1")


def test_deadline_and_missing_server_are_errors_with_a_remedy():
    def slow(request):
        raise httpx.ReadTimeout("slow", request=request)

    with pytest.raises(errors.RequestTimeout, match="not answered within"):
        _client(slow).status()
    with pytest.raises(ConnectionError, match="The vLLM server can't be reached at http://127"):
        VLLMClient("http://127.0.0.1:9", token="t").status()


def test_closed_client_says_that_it_is_closed():
    client = _client(lambda request: httpx.Response(200, json={}))
    client.close()
    with pytest.raises(errors.ConfigError, match="was closed; make a new"):
        client.status()


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.generate([], model="m"),
        lambda c: c.generate([[1]], features=[{}], model="m"),
        lambda c: c.generate([[1]], model="m", generation_kwargs={"chat_template": "x"}),
        lambda c: c.chat([[{}]], model="m", chat_template="x"),
    ],
)
def test_what_the_client_cannot_do_is_refused_before_a_request(call):
    def never(request):
        raise AssertionError("a request was sent")

    with pytest.raises(errors.TinkError):
        call(_client(never))
