"""Networks as people have them: private authorities, proxies, paths, and URLs as they are copied."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import pytest

from tests.certificates import Authority
from tests.stub_vllm import BASE, StubVLLM
from tink_rl import errors, urls
from tink_rl.cli import main
from tink_rl.config import SyncConfig
from tink_rl.publish.publisher import WeightSync
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.sampling.async_sampler import AsyncSampler
from tink_rl.settings import Settings
from tink_rl.training.connect import clients_of
from tink_rl.transport.payloads import unreachable
from tink_rl.urls import server_url
from tink_rl.vllm_backend import VLLMBackend
from tink_rl.worker.backends.megatron.client import MegatronClient

LOCAL = "http://127.0.0.1:8000"
PAYLOAD = {"model": BASE, "prompt": [[1]], "n": 1, "max_tokens": 1, "logprobs": None}


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("TINK_CA_FILE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urls, "_said", set())


@pytest.fixture
def secure(authority):
    with StubVLLM(certificate=authority.issue()) as stub:
        yield stub


def by_client(url, ca_file=None):
    with VLLMClient(url, ca_file=ca_file) as client:
        return client.models()


def by_backend(url, ca_file=None):
    given = {"base_url": url} | ({} if ca_file is None else {"tink_ca_file": str(ca_file)})
    with VLLMBackend(given) as backend:
        return backend.client.models()


def by_sampler(url, ca_file=None):
    async def ask():
        sampler = AsyncSampler(url, ca_file=ca_file)
        try:
            return [(await sampler.complete(PAYLOAD, timeout_s=10))["model"]]
        finally:
            await sampler.close()

    return asyncio.run(ask())


def by_publisher(url, ca_file=None):
    config = SyncConfig(token="t" * 20, ca_file=ca_file)
    return WeightSync(url, base_model="b", config=config).fleet.replicas[0].client.models()


EVERYBODY = pytest.mark.parametrize("ask", [by_client, by_backend, by_sampler, by_publisher])


# -- certificates -----------------------------------------------------------------------------------


@EVERYBODY
def test_private_authority_is_trusted_by_a_setting(secure, authority, ask):
    assert ask(secure.url, ca_file=authority.file) == [BASE]


@EVERYBODY
@pytest.mark.parametrize("name", ["TINK_CA_FILE", "SSL_CERT_FILE"])
def test_private_authority_is_trusted_by_the_environment(secure, authority, monkeypatch, ask, name):
    monkeypatch.setenv(name, str(authority.file))
    assert ask(secure.url) == [BASE]


def test_openssls_directory_of_authorities_is_read(secure, authority, monkeypatch, tmp_path):
    import ssl
    import subprocess

    (tmp_path / "ca.pem").write_bytes(authority.file.read_bytes())
    subprocess.run(["openssl", "rehash", tmp_path], check=True)
    assert by_client(secure.url, ca_file=str(tmp_path)) == [BASE]
    assert ssl.get_default_verify_paths().openssl_capath_env == "SSL_CERT_DIR"
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert by_client(secure.url) == [BASE]


@EVERYBODY
def test_directory_of_plain_pem_files_is_read_without_a_rehash(secure, authority, tmp_path, ask):
    (tmp_path / "company.crt").write_bytes(authority.file.read_bytes())
    (tmp_path / "README").write_text("authorities")
    assert ask(secure.url, ca_file=str(tmp_path)) == [BASE]


def test_directory_without_a_certificate_is_said(secure, tmp_path):
    with pytest.raises(errors.ConfigError, match="holds no PEM certificate"):
        by_client(secure.url, ca_file=str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x30\x82\x01\x0a", b"-----BEGIN CERTIFICATE-----\nMII"])
def test_openssls_variable_that_names_no_certificate_is_said(
    secure, monkeypatch, tmp_path, content
):
    (tmp_path / "ca.der").write_bytes(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.der"))
    with pytest.raises(errors.ConfigError, match=r"SSL_CERT_FILE=.* holds no PEM certificate"):
        by_client(secure.url)


@EVERYBODY
def test_certificate_that_is_not_trusted_is_named_with_the_settings(secure, ask):
    with pytest.raises(errors.TinkError, match="is not trusted") as caught:
        ask(secure.url)
    said = caught.value.message
    assert isinstance(caught.value, ConnectionError) and "tink-rl serve" not in said
    assert all(name in said for name in ("TINK_CA_FILE", "ca_file", "SSL_CERT_FILE"))


@pytest.mark.parametrize(
    ("host", "days", "said"),
    [("other.example", 1, "is for another host"), ("127.0.0.1", -1, "expired")],
)
def test_certificate_that_does_not_fit_says_why(authority, host, days, said):
    with (
        StubVLLM(certificate=authority.issue(host, days)) as stub,
        pytest.raises(errors.TLSFailed, match=said) as caught,
    ):
        by_client(stub.url, ca_file=str(authority.file))
    assert "TINK_CA_FILE" not in caught.value.message  # which would not help


@EVERYBODY
def test_https_asked_of_a_server_without_it_is_said(ask):
    with StubVLLM() as stub, pytest.raises(ConnectionError, match=r"speaks no TLS.*http://"):
        ask(stub.url.replace("http://", "https://"))


@pytest.mark.parametrize("ask", [by_client, by_backend, by_publisher])
def test_http_asked_of_a_server_with_tls_is_said(secure, ask):
    with pytest.raises(errors.TLSFailed, match="speaks TLS; give its URL with https"):
        ask(secure.url.replace("https://", "http://"))


def test_broken_certificate_ends_the_wait_for_a_server_at_once(secure):
    with pytest.raises(errors.TLSFailed):
        VLLMClient(secure.url, connection_timeout=3600)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("none.pem", None, "No such file"), ("empty.pem", b"", "no PEM"), ("x.pem", b"no", "no PEM")],
)
def test_ca_file_that_is_none_is_named(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(errors.ConfigError, match=rf"{name}.*{said}.*TINK_CA_FILE"):
        VLLMClient("https://127.0.0.1:9", ca_file=str(path))


def test_variable_of_openssl_that_names_nothing_is_said_and_http_needs_none(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with pytest.raises(errors.ConfigError, match=r"SSL_CERT_FILE='/nowhere/ca.pem' does not exist"):
        VLLMClient("https://127.0.0.1:9")
    VLLMClient("http://127.0.0.1:9").close()


@pytest.mark.parametrize("command", ["status", "doctor"])
def test_commands_take_the_authority_too(secure, authority, tmp_path, capsys, command):
    (tmp_path / "token").write_text("t" * 32)
    line = [command, secure.url, "--token-file", str(tmp_path / "token")]
    assert main(line) == 1
    assert "is not trusted" in "".join(capsys.readouterr())
    assert main([*line, "--ca-file", str(authority.file)]) == 1  # the stub has no plugin
    assert "tink_rl plugin" in "".join(capsys.readouterr()).replace("\n", " ")


def test_megatron_client_trusts_what_the_others_do(secure, authority):
    async def probe(ca_file):
        client = MegatronClient(secure.url, ca_file=ca_file)
        try:
            await client.probe()
        finally:
            await client.close()

    with pytest.raises(errors.EngineUnavailable, match="is not trusted"):
        asyncio.run(probe(None))
    with pytest.raises(errors.BackendError, match="no Megatron text-generation server"):
        asyncio.run(probe(str(authority.file)))


# -- URLs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("http://h:1/v1", "http://h:1"),
        ("http://h:1/v1/", "http://h:1"),
        ("http://h:1/v1/chat/completions", "http://h:1"),
        ("http://h:1/v1/completions", "http://h:1"),
        ("http://h:1/v1/models", "http://h:1"),
        ("http://h:1/tink/v1/status", "http://h:1"),
        ("http://h:1/health", "http://h:1"),
        ("https://h/team-a/llm/v1/", "https://h/team-a/llm"),
        ("http://h:1/v1/team-a", "http://h:1/v1/team-a"),
        ("http://h:1/team-v1", "http://h:1/team-v1"),
        (" http://h:1/ \n", "http://h:1"),
        ("HTTP://h:1", "http://h:1"),
        ("http://0.0.0.0:8000", "http://127.0.0.1:8000"),
        ("http://[::]:8000/v1", "http://[::1]:8000"),
        ("http://[2001:db8::1]:8000", "http://[2001:db8::1]:8000"),
    ],
)
def test_url_is_taken_as_it_is_copied(given, taken):
    assert server_url(given) == taken
    assert VLLMClient(given).base_url == taken
    assert Settings.load({"base_url": given}).url == taken
    assert MegatronClient(given).base_url == taken


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("localhost:8000", "no scheme.*such as http://localhost:8000"),
        ("127.0.0.1", "no scheme"),
        ("", "no scheme"),
        ("http://", "expected http"),
        ("ftp://h", "expected http"),
        ("http://::1:8000", "in brackets"),
        ("http://h:port", "cannot be read"),
        ("http://h:99999", "cannot be read"),
        ("http://h:1/?key=x", "more than a host"),
        ("http://h :1", "expected http"),
    ],
)
def test_what_is_no_url_says_what_was_expected(given, said):
    with pytest.raises(errors.ConfigError, match=said):
        VLLMClient(given)


@pytest.mark.parametrize("url", ["http://me:hunter2@h:1", "https://hunter2@h", "me:hunter2@h:1"])
def test_password_in_a_url_is_refused_and_not_repeated(url):
    for read in (VLLMClient, lambda given: Settings.load({"base_url": given}), MegatronClient):
        with pytest.raises(errors.ConfigError, match="VLLM_API_KEY") as caught:
            read(url)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "given", ["http://h:1", ["http://h:1"], ("http://h:1",), "http://h:1, http://h:2", ()]
)
def test_settings_take_one_url_or_several(given):
    found = [
        client.base_url for client in clients_of(None, SyncConfig(servers=given, token="t"), None)
    ]
    assert found == (
        ["http://h:1", "http://h:2"] if "2" in given else ["http://h:1"] if given else [LOCAL]
    )


@pytest.mark.parametrize("host", ["http://10.0.0.7", "http://10.0.0.7:8000", "10.0.0.7:8000"])
def test_url_in_the_place_of_trls_host_is_said(host):
    args = SimpleNamespace(vllm_server_host=host, vllm_server_port=8000, vllm_server_timeout=0)
    with pytest.raises(errors.ConfigError, match="give a URL with vllm_server_base_url"):
        clients_of(None, SyncConfig(token="t"), args)


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", None])
def test_trls_host_and_port_are_a_url(host):
    args = SimpleNamespace(vllm_server_host=host, vllm_server_port=8000, vllm_server_timeout=0)
    (client,) = clients_of(None, SyncConfig(token="t"), args)
    assert client.base_url == LOCAL


@EVERYBODY
def test_openais_form_of_a_url_is_answered_and_said_once(ask, caplog):
    with StubVLLM(prefix="/team-a/llm") as stub, caplog.at_level(logging.WARNING, "tink_rl"):
        for _ in range(2):
            assert ask(f"{stub.url}/v1") == [BASE]
    said = [r.getMessage() for r in caplog.records if "taken as" in r.getMessage()]
    assert len(said) == 1 and f"taken as {stub.url};" in said[0]


@EVERYBODY
def test_proxies_of_the_environment_are_not_for_our_servers(monkeypatch, ask):
    for name in (
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with StubVLLM(prefix="/llm") as stub:
        assert ask(stub.url) == [BASE]


# -- what answers, and is no server of ours -----------------------------------------------------------


def test_vllm_without_the_plugin_is_told_from_a_path_without_a_vllm():
    with StubVLLM(prefix="/llm") as stub:
        with pytest.raises(errors.PluginMissing, match="runs without the tink_rl plugin"):
            VLLMClient(stub.url).status()
        wrong = stub.url.removesuffix("/llm") + "/lm"
        with pytest.raises(errors.PluginMissing, match=r"neither .* nor /v1/models") as caught:
            VLLMClient(wrong).status()
        assert "without the tink_rl plugin" not in caught.value.message
        for ask in (by_client, by_backend):
            with pytest.raises(errors.ServerUnreachable, match=r"no /v1/models.*Correct the URL"):
                ask(wrong)
        with pytest.raises(errors.ServerUnreachable, match=r"GET /health gave HTTP 404"):
            VLLMClient(wrong, connection_timeout=0.3)


@EVERYBODY
def test_redirect_is_not_followed_with_a_token_but_named(ask):
    to = {"Location": "https://login.example/"}
    answers = {"/v1/models": (302, to, b""), "/v1/completions": (307, to, b"")}
    said = r"redirects .* to https://login\.example/"
    with StubVLLM(answers=answers) as stub, pytest.raises(ConnectionError, match=said):
        ask(stub.url)


def test_page_of_a_proxy_is_no_list_of_models():
    page = (200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
    with StubVLLM(answers={"/v1/models": page, "/tink/v1/status": page}) as stub:
        with pytest.raises(errors.BackendError, match="Please log in"):
            by_client(stub.url)
        with pytest.raises(errors.TinkError, match="Please log in"):
            VLLMClient(stub.url).status()


def test_nobody_there_still_says_how_to_start_one():
    with pytest.raises(errors.ServerUnreachable) as caught:
        by_client("http://127.0.0.1:9/v1")
    assert caught.value.message.startswith(unreachable("http://127.0.0.1:9", "").split("\n")[0])
    assert "tink-rl serve MODEL" in caught.value.message
