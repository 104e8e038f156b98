"""What a starting server shows: its stage from vLLM's log, and a download before it."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from tests.fakes import hub_error
from tests.refusals import refused
from tink_rl import errors
from tink_rl.download import download, is_from_hub
from tink_rl.launch import VLLMServer
from tink_rl.startup_log import stage

# As vLLM 0.31 writes it on a GPU; tqdm's bars renew themselves by carriage returns.
GPU_LOG = [
    ("", "importing vLLM"),
    (
        "(APIServer pid=1) INFO [api_utils.py:286] non-default args: {}\n",
        "reading the model's config",
    ),
    ("INFO [model.py:699] Resolved architecture: Qwen2ForCausalLM\n", "starting the engine"),
    ("INFO [core.py:129] Initializing a V1 LLM engine (v0.31.0)\n", "starting the workers"),
    ("INFO [model_runner.py:375] Loading model from scratch...\n", "loading the model"),
    (
        "\rLoading safetensors checkpoint shards:   0% Completed | 0/4 [00:00<?, ?it/s]",
        "loading the model: 0 %",
    ),
    (
        "\rLoading safetensors checkpoint shards:  50% Completed | 2/4 [00:03<00:03]",
        "loading the model: 50 %",
    ),
    ("\nINFO [default_loader.py:484] Loading weights took 6.1 seconds\n", "loading the model"),
    (
        "INFO [backends.py:1090] Using cache directory: /c for vLLM's torch.compile\n",
        "compiling (torch.compile)",
    ),
    (
        "INFO [backends.py:1151] Dynamo bytecode transform time: 5.20 s\n",
        "compiling (torch.compile)",
    ),
    (
        "INFO [backends.py:391] Compiling a graph for compile range (1, 2048) takes 21.7 s\n",
        "compiling (torch.compile)",
    ),
    ("INFO [monitor.py:53] torch.compile took 31.02 s in total\n", "trying the largest batch"),
    ("INFO [gpu_worker.py:692] Available KV cache memory: 5.9 GiB\n", "sizing the KV cache"),
    ("INFO [kv_cache_utils.py:2464] GPU KV cache size: 221,000 tokens\n", "sizing the KV cache"),
    (
        "\rCapturing CUDA graphs (PIECEWISE):  12%|#2   | 8/67 [00:01<00:09, 6.1it/s]",
        "capturing CUDA graphs: 12 %",
    ),
    (
        "\rCapturing CUDA graphs (FULL): 100%|#####| 35/35 [00:03<00:00]",
        "capturing CUDA graphs: 100 %",
    ),
    ("\nINFO Graph capturing finished in 14 secs, took 0.60 GiB\n", "starting the API server"),
    (
        "INFO [entry.py:136] Starting vLLM server on http://127.0.0.1:8000\n",
        "preparing the receiver",
    ),
    ("INFO:     Application startup complete.\n", "server is up"),
]


@pytest.mark.parametrize("number", range(len(GPU_LOG)))
def test_every_stage_of_a_start_on_a_gpu_is_told(number):
    log = "".join(text for text, _ in GPU_LOG[: number + 1])
    assert stage(log) == GPU_LOG[number][1]


# -- download ---------------------------------------------------------------------------------------


class Hub:
    """Stands in for `snapshot_download`: drives the bars that the Hub makes."""

    def __init__(self, fails_with=None):
        self.fails_with, self.asked = fails_with, {}

    def __call__(self, model, *, tqdm_class, **asked):
        self.asked = {"model": model, **asked}
        if self.fails_with:
            raise self.fails_with
        files = tqdm_class(total=2, desc="Fetching 2 files", mininterval=0)
        wire = tqdm_class(total=1, unit="B", desc="Downloading bytes", mininterval=0)
        disk = tqdm_class(total=0, unit="B", desc="Reconstructing (incomplete)", mininterval=0)
        files.update(1)
        wire.update(7)
        disk.total = 2 * 2**30
        for _ in range(2):
            disk.update(2**30)
        files.update(1)


@pytest.fixture
def fake_hub(monkeypatch):
    def install(**settings):
        found = Hub(**settings)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
        return found

    return install


def test_download_is_shown_in_bytes_and_fetches_one_format(fake_hub):
    shown = []
    asked = fake_hub()
    download("org/model", report=shown.append, revision="v2", cache_dir="/cache")
    assert list(dict.fromkeys(shown)) == [
        "downloading: 0 of 2 files",
        "downloading: 1 of 2 files",
        "downloading: 50 % of 2.00 GiB",
        "downloading: 100 % of 2.00 GiB",
    ]
    assert asked.asked["revision"] == "v2" and asked.asked["cache_dir"] == "/cache"
    assert "*.safetensors" in asked.asked["allow_patterns"]
    assert "consolidated*" in asked.asked["ignore_patterns"]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (hub_error(hub.GatedRepoError), "model_not_found", "accept its licence"),
        (hub_error(hub.RepositoryNotFoundError), "model_not_found", "check the spelling"),
        (hub_error(hub.RevisionNotFoundError), "model_not_found", "no revision 'v2'"),
        (hub.LocalEntryNotFoundError("x"), "model_not_found", "cannot be reached"),
        (OSError(28, "No space left on device"), errors.LaunchFailed, "No space left"),
        (hub_error(hub.HfHubHTTPError), errors.LaunchFailed, "goes on where it stopped"),
    ],
    ids=str,
)
def test_download_that_fails_says_what_to_do(fake_hub, error, kind, text):
    fake_hub(fails_with=error)
    with refused(kind, match=text):
        download("org/model", report=print, revision="v2")


@pytest.mark.parametrize(
    ("environment", "asks"),
    [
        ({}, True),
        ({"HF_HUB_OFFLINE": "0"}, True),
        ({"HF_HUB_OFFLINE": "1"}, False),
        ({"TRANSFORMERS_OFFLINE": "TRUE"}, False),
        ({"VLLM_USE_MODELSCOPE": "true"}, False),
    ],
)
def test_hub_is_asked_only_where_vllm_would_ask_it(environment, asks):
    assert is_from_hub(environment) is asks


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, {"revision": None, "cache_dir": None}),
        (
            {"revision": "v2", "extra_args": ("--download_dir=/d",)},
            {"revision": "v2", "cache_dir": "/d"},
        ),
        ({"extra_args": ("--load-format", "dummy")}, None),
    ],
)
def test_server_downloads_a_hub_id_before_vllm_is_started(
    fake_hub, monkeypatch, tmp_path, settings, asked
):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    found, waits = fake_hub(), []
    server = VLLMServer(
        "org/model",
        **settings,
        token_file=str(tmp_path / "token"),
        on_wait=lambda what, seconds: waits.append(what),
    ).prepare()
    assert server.pid is None and ("downloading: 50 % of 2.00 GiB" in waits) == bool(asked)
    assert (asked or {}).items() <= found.asked.items()


def test_directory_is_never_asked_for_on_the_hub(fake_hub, monkeypatch, model_dir, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = fake_hub(fails_with=AssertionError("asked"))
    VLLMServer(model_dir("qwen3"), token_file=str(tmp_path / "token")).prepare()
    assert found.asked == {}
