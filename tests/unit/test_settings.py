"""Settings: the known names and defaults, precedence, bad values, and that `.env.example` is true."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tink_rl import cli, launch
from tink_rl.cli import serve
from tink_rl.config import SyncConfig
from tink_rl.errors import ConfigError
from tink_rl.settings import Settings
from tink_rl.tokens import vllm_api_key
from tink_rl.worker.options import WorkerOptions

EXAMPLE = Path(__file__).parents[2] / ".env.example"
SEED_DEFAULTS = {
    "vllm_base_url": "http://localhost:8000",
    "vllm_host": "0.0.0.0",
    "vllm_port": 8000,
    "vllm_group_port": 51216,
    "vllm_timeout": 5.0,
    "vllm_enable_lora": True,
    "vllm_max_loras": 4,
    "vllm_max_lora_rank": 64,
    "use_megatron": False,
    "megatron_server_url": "http://localhost:5000",
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_defaults_are_the_known_ones():
    settings = Settings.load()
    assert {name: getattr(settings, name) for name in SEED_DEFAULTS} == SEED_DEFAULTS
    assert settings.url == "http://localhost:8000"


def test_environment_as_in_the_page(monkeypatch):
    for line in (
        "USE_VLLM=true",
        "VLLM_BASE_URL=http://localhost:8123",
        "VLLM_GROUP_PORT=51217",
        "VLLM_TIMEOUT=2.5",
        "VLLM_ENABLE_LORA=false",
        "VLLM_MAX_LORAS=8",
        "VLLM_MAX_LORA_RANK=128",
        "USE_MEGATRON=true",
        "MEGATRON_SERVER_URL=http://localhost:5001/",
    ):
        monkeypatch.setenv(*line.split("="))
    settings = Settings.load()
    assert (settings.url, settings.vllm_timeout, settings.vllm_enable_lora) == (
        "http://localhost:8123",
        2.5,
        False,
    )
    assert settings.megatron_server_url == "http://localhost:5001"
    assert settings.samples_with == "vllm"


def test_code_wins_over_the_environment_and_that_over_defaults(monkeypatch):
    monkeypatch.setenv("VLLM_PORT", "8100")
    monkeypatch.setenv("VLLM_MAX_LORAS", "9")
    settings = Settings.load({"VLLM_PORT": 8200})
    assert (settings.vllm_port, settings.vllm_max_loras, settings.vllm_group_port) == (
        8200,
        9,
        51216,
    )
    assert Settings.load(settings) is settings
    assert settings.set_value("vllm_max_loras") == 9
    assert settings.set_value("vllm_group_port") is None


@pytest.mark.parametrize(
    ("environment", "code", "url"),
    [
        ({"VLLM_HOST": "10.0.0.7"}, {}, "http://10.0.0.7:8000"),
        ({"VLLM_HOST": "0.0.0.0", "VLLM_PORT": "9"}, {}, "http://127.0.0.1:9"),
        ({"VLLM_PORT": "9"}, {}, "http://127.0.0.1:9"),
        ({"VLLM_HOST": "::"}, {}, "http://[::1]:8000"),
        ({"VLLM_HOST": "::1"}, {}, "http://[::1]:8000"),
        ({"VLLM_HOST": "[::1]"}, {}, "http://[::1]:8000"),
        ({}, {"host": "2001:db8::1", "port": 9}, "http://[2001:db8::1]:9"),
        ({"VLLM_HOST": "a", "VLLM_BASE_URL": "http://b:1"}, {}, "http://b:1"),
        ({"VLLM_BASE_URL": "http://b:1"}, {"host": "a"}, "http://a:8000"),
        ({"VLLM_BASE_URL": "http://b:1"}, {"port": 3}, "http://127.0.0.1:3"),
        ({"VLLM_HOST": "a"}, {"base_url": "http://0.0.0.0:3/"}, "http://127.0.0.1:3"),
        ({"VLLM_BASE_URL": ""}, {}, "http://localhost:8000"),
    ],
)
def test_url_wins_over_host_and_port_and_wildcards_are_dialled_as_loopback(
    monkeypatch, environment, code, url
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings.load(code).url == url


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("USE_VLLM", "maybe", "true or false"),
        ("VLLM_ENABLE_LORA", "2", "true or false"),
        ("VLLM_BASE_URL", "localhost:8000", "http://HOST:PORT"),
        ("VLLM_PORT", "0", "from 1 to 65535"),
        ("VLLM_PORT", "eight", "whole number from 1 to 65535"),
        ("VLLM_GROUP_PORT", "70000", "from 0 to 65535"),
        ("VLLM_TIMEOUT", "0", "above 0 to 3600"),
        ("VLLM_TIMEOUT", "nan", "above 0 to 3600"),
        ("VLLM_MAX_LORAS", "0", "from 1 to 1024"),
        ("VLLM_MAX_LORA_RANK", "12", "one of 1, 8, 16, 32, 64, 128, 256, 320, 512"),
        ("VLLM_MAX_LORA_RANK", "abc", "one of 1, 8, 16, 32, 64, 128, 256, 320, 512"),
        ("MEGATRON_SERVER_URL", "ftp://x", "http://HOST:PORT"),
        ("TINK_MAX_RESIDENT_ADAPTERS", "0", "from 1 to 4096"),
        ("TINK_REQUEST_TIMEOUT", "-1", "above 0"),
    ],
)
def test_bad_value_names_the_variable_the_value_and_what_is_allowed(
    monkeypatch, name, value, allowed
):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert str(caught.value).startswith(f"{name}={value!r}: ") and allowed in str(caught.value)


def test_unknown_setting_in_code_is_refused():
    with pytest.raises(ConfigError, match=r"unknown settings \['vllm_prot'\]"):
        Settings.load({"vllm_prot": 8000})


@pytest.mark.parametrize(
    ("use_vllm", "use_megatron", "expected"),
    [
        (None, False, "vllm"),
        (None, True, "megatron"),
        (True, True, "vllm"),
        (True, False, "vllm"),
        (False, True, "megatron"),
    ],
)
def test_backend_follows_the_two_switches(use_vllm, use_megatron, expected):
    given = {"use_megatron": use_megatron, "use_vllm": use_vllm}
    assert Settings.load(given).samples_with == expected


def test_no_backend_at_all_is_an_error():
    with pytest.raises(ConfigError, match="nothing can sample"):
        _ = Settings.load({"use_vllm": False}).samples_with


def test_vllms_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    assert Settings.load({"tink_vllm_api_key_file": str(file)}).api_key() == "s3cret"
    monkeypatch.setenv("VLLM_API_KEY", "other")
    assert Settings.load({"tink_vllm_api_key_file": str(file)}).api_key() == "s3cret"
    assert Settings.load().api_key() == SyncConfig().read_api_key() == "other"
    monkeypatch.setenv("TINK_VLLM_API_KEY_FILE", str(file))
    assert Settings.load().api_key() == SyncConfig().read_api_key() == "s3cret"
    assert SyncConfig(api_key="given").read_api_key() == "given"
    file.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        vllm_api_key(file=str(file))
    with pytest.raises(ConfigError, match=r"TINK_VLLM_API_KEY_FILE=.* cannot be read"):
        vllm_api_key(file=str(tmp_path / "none"))


def test_adapter_roots_are_a_list():
    joined = os.pathsep.join(("/a", "/b c"))
    assert Settings.load({"tink_adapter_roots": joined}).adapter_roots == (
        Path("/a"),
        Path("/b c"),
    )
    assert Settings.load().adapter_roots == ()


def _example() -> dict[str, str]:
    return dict(re.findall(r"^# ([A-Z][A-Z_]+)=(.*)$", EXAMPLE.read_text(), flags=re.MULTILINE))


def test_env_example_names_every_setting_with_its_default_and_nothing_else():
    models = {"": Settings, "TINK_WORKER_": WorkerOptions}
    expected = {}
    for prefix, model in models.items():
        for name, field in model.model_fields.items():
            default = "" if field.default is None else field.default
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            expected[f"{prefix}{name.upper()}"] = shown
    assert _example() == expected


def test_env_example_works_as_it_stands_once_the_marks_are_taken_away(monkeypatch):
    for name, value in _example().items():
        monkeypatch.setenv(name, value)
    assert Settings.load().model_dump() == Settings.model_construct().model_dump()


def test_none_of_our_variables_reaches_a_server_that_we_launch(tmp_path):
    ours = {name.upper(): "1" for name in Settings.model_fields}
    env = launch.environment(
        launch.ServerOptions(model="m"),
        {**ours, "TINK_WORKER_PORT": "1", "TINK_TOKEN": "s", "PATH": "p"},
        token_file=tmp_path / "token",
        server_binding=None,
        waits_asleep="engine",
        has_gpu=False,
    )
    leaked = {name for name in env if name.startswith(("TINK_", "USE_", "MEGATRON_"))}
    assert {name for name in leaked if not name.startswith("TINK_SERVER_")} == set()
    assert not set(ours) & set(env) and env["PATH"] == "p"


# -- tink-rl serve ----------------------------------------------------------------------------------


class _NoServer:
    def __init__(self, options, on_wait):
        type(self).options = options

    def prepare(self):
        raise ConfigError("not in this test")

    def stop(self):
        pass


@pytest.fixture
def served(monkeypatch):
    """`served("...")`: the `ServerOptions` that a command line means."""
    monkeypatch.setattr(serve, "VLLMServer", _NoServer)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)

    def run(line):
        assert cli.main(line.split()) == 1
        return _NoServer.options

    return run


def test_seeds_flags_start_our_server(served):
    flags = "--enable-lora --max-loras 4 --max-lora-rank 64 --port 8000"
    for line in (
        f"serve --model base {flags}",
        f"serve base {flags}",
        f"serve --model=base {flags}",
    ):
        options = served(f"{line} --mode adapter --seed 3")
        assert (options.model, options.mode) == ("base", "adapter")
        assert (options.max_loras, options.max_lora_rank, options.port) == (4, 64, 8000)
        assert options.extra_args == ("--seed", "3")


def test_serve_takes_its_defaults_from_the_environment_if_it_names_them(served, monkeypatch):
    plain = served("serve base")
    assert (plain.port, plain.max_loras, plain.max_lora_rank, plain.channel_port) == (
        8000,
        4,
        32,
        0,
    )
    for name, value in (
        ("VLLM_PORT", "8005"),
        ("VLLM_MAX_LORAS", "8"),
        ("VLLM_MAX_LORA_RANK", "128"),
        ("VLLM_GROUP_PORT", "51216"),
    ):
        monkeypatch.setenv(name, value)
    named = served("serve base --max-loras 2")
    assert (named.port, named.max_loras) == (8005, 2)
    assert (named.max_lora_rank, named.channel_port) == (128, 51216)
    monkeypatch.setenv("VLLM_PORT", "many")
    assert cli.main(["serve", "base"]) == 1


def test_enable_lora_contradicts_merged_mode(served, capsys):
    assert cli.main(["serve", "base", "--mode", "merged", "--enable-lora"]) == 1
    assert "--enable-lora with --mode merged" in capsys.readouterr().err
