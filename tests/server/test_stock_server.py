"""The existing integration's two server commands, as users type them: vLLM without our plugin."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import warm_server
from tests.policies import NUM_TOKENS, PeftTwin
from tests.refusals import refused
from tink_rl import errors, launch
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.vllm_backend import VLLMBackend
from tink_rl.worker.backends.vllm import VLLMSampler

pytestmark = pytest.mark.server
NUM_ADAPTERS = 6
FLAGS = "--enable-lora --max-loras 4 --max-lora-rank 64"
SMALL = "--dtype float32 --max-model-len 256 --enforce-eager --host 127.0.0.1"
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}


class StockServer:
    """A server that was started by its own command, in a process group of its own; one at a time."""

    running: StockServer | None = None

    def __init__(self, command: list[str], log: Path, **variables: str) -> None:
        if StockServer.running is not None:
            StockServer.running.stop()
        StockServer.running = self
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        env = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
            **variables,
        }
        command = [*command, "--port", str(self.port)]
        log.touch()
        if command[1] == "-m" and warm_server.CAN_FORK:
            self.process = warm_server.start(command, env, str(log))
            return
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self, timeout_s: float = 200.0) -> StockServer:
        deadline = time.monotonic() + timeout_s
        with VLLMClient(self.url) as client:
            while time.monotonic() < deadline:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                try:
                    client.generate([[1]], max_tokens=1)
                except errors.TinkError:
                    time.sleep(0.3)
                else:
                    return self
        raise AssertionError(self.log.read_text()[-3000:])

    def stop(self) -> None:
        StockServer.running = None
        launch._end_group(self.process.pid, signal.SIGTERM, 15.0)
        launch._end_group(self.process.pid, signal.SIGKILL, 10.0)
        self.process.wait(5.0)


@pytest.fixture(scope="module")
def twin(model_dir):
    return PeftTwin(model_dir("qwen3"))


@pytest.fixture(scope="module")
def goldens(twin, tmp_path_factory):
    """Adapters whose ranks and alphas differ between modules, which stock vLLM ignores in silence."""
    found = {}
    mixed = PeftTwin(
        twin.directory,
        rank_pattern={"q_proj": 4, "down_proj": 16},
        alpha_pattern={"k_proj": 64, "o_proj": 2},
    )
    for seed in range(NUM_ADAPTERS):
        one = mixed if seed % 2 else twin
        one.randomise(seed)
        path = tmp_path_factory.mktemp("adapter")
        one.model.save_pretrained(path)
        found[f"adapter-{seed}"] = (path, one.clear_cases(count=2))
    return found


@pytest.fixture(scope="module")
def stock(model_dir, tmp_path_factory):
    """`vllm serve MODEL --enable-lora ...`: the CPU build has no `vllm` command, this is what it runs."""
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    server = StockServer(
        [*module, str(model_dir("qwen3")), *FLAGS.split(), *SMALL.split()],
        tmp_path_factory.mktemp("stock") / "log",
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
    )
    yield server.wait()
    server.stop()


@pytest.fixture
def backend(stock, tmp_path):
    settings = {"base_url": stock.url, "tink_store_dir": str(tmp_path / "store")}
    with VLLMBackend({**settings, "tink_max_resident_adapters": 3}) as backend:
        yield backend
        for item in backend.list():
            backend.unregister(item["adapter_id"])
        backend._cache.settle()


def test_adapters_by_store_path_answer_as_peft_does_patterns_included(backend, goldens):
    for name, (path, _) in goldens.items():
        backend.register(name, path)
    for _ in range(2):  # three stay on the server, so that each is loaded more than once
        for name, (_, cases) in goldens.items():
            rows = backend.generate([list(prompt) for prompt in cases], name, **GREEDY)
            assert [row[0].token_ids for row in rows] == list(cases.values()), name
            assert {row[0].version for row in rows} == {1}
    backend._cache.settle()
    served = [name for name in backend.client.models() if "@" in name]
    assert 1 <= len(served) <= 3


def test_new_bytes_under_an_id_are_a_new_name_never_an_overwrite(backend, goldens):
    (old, old_cases), (new, new_cases) = list(goldens.values())[:2]
    for path, cases, number in ((old, old_cases, 1), (new, new_cases, 2), (old, old_cases, 3)):
        assert backend.register("math", path).version == number
        rows = backend.generate([list(prompt) for prompt in cases], "math", **GREEDY)
        assert [row[0].token_ids for row in rows] == list(cases.values())
        assert rows[0][0].version == number


def test_caller_may_delete_his_directory(backend, twin, tmp_path):
    twin.randomise(99)
    cases = twin.clear_cases(count=2)
    twin.model.save_pretrained(tmp_path / "mine")
    backend.register("gone", tmp_path / "mine")
    for file in (tmp_path / "mine").iterdir():
        file.unlink()
    for prompt, expected in cases.items():
        assert backend.generate(list(prompt), "gone", **GREEDY)[0][0].token_ids == expected


def test_info_states_plainly_what_is_missing_without_the_plugin(backend, model_dir):
    found = backend.info()
    assert found["reachable"] and not found["plugin"] and found["modes"] == []
    assert found["base_model"] == str(model_dir("qwen3"))
    text = " ".join(found["missing"])
    for gap in ("no check of an adapter", "no weight updates", "no drop that waits", "restart"):
        assert gap in text


def test_weight_updates_and_cache_resets_say_that_they_need_the_plugin(backend, twin):
    for call in (
        lambda: backend.init_communicator("cpu"),
        lambda: backend.update_model_weights(twin.model),
    ):
        with pytest.raises(errors.PluginMissing, match="tink-rl serve MODEL"):
            call()
    with pytest.raises(errors.NotSupportedByBackend, match="tink-rl serve MODEL"):
        backend.reset_prefix_cache()


def test_worker_backend_samples_from_a_stock_server(backend, goldens):
    import asyncio

    name, (path, cases) = next(iter(goldens.items()))
    backend.register(name, path)

    async def run():
        sampler = VLLMSampler(backend)
        await sampler.canary(10.0)
        prompts = [list(prompt) for prompt in cases]
        found = await sampler.sample(
            sampler.admit(prompts, name, SamplingParams(**GREEDY)), timeout_s=60.0
        )
        assert [c.token_ids for c in found] == list(cases.values())
        models = await sampler.models()
        assert [(m.kind, m.model_id) for m in models][1:] == [("adapter", name)]
        await sampler.close()

    asyncio.run(run())


# -- trl vllm-serve -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_server(model_dir, tmp_path_factory):
    """`trl vllm-serve --model MODEL --enable-lora ...`, which forwards to `vllm serve`."""
    root = tmp_path_factory.mktemp("trl")
    # `vllm serve` asks for the version of a distribution called vllm; the CPU build's has another name.
    number = f"{version('vllm-cpu')}+cpu"
    metadata = root / f"vllm-{number}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: vllm\nVersion: {number}\n")
    trl = str(Path(sys.executable).parent / "trl")
    command = [trl, "vllm-serve", "--model", str(model_dir("qwen3")), *FLAGS.split()]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    server = StockServer(
        [*command, *SMALL.replace("--enforce-eager", "--enforce_eager True").split()],
        root / "log",
        PYTHONPATH=path,
    )
    yield server.wait()
    server.stop()


@pytest.mark.long  # its three processes import TRL and vLLM, each by itself
def test_trl_vllm_serve_samples_and_says_how_adapters_could_be_loaded(
    trl_server, goldens, tmp_path
):
    with VLLMBackend(
        {"base_url": trl_server.url, "tink_store_dir": str(tmp_path / "store")}
    ) as backend:
        assert backend.generate("12=", max_tokens=4)[0][0].finish_reason in ("length", "stop")
        name, (path, _) = next(iter(goldens.items()))
        backend.register(name, path)
        with refused("runtime_loading_off") as caught:
            backend.generate("12=", name, max_tokens=1)
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in str(caught.value)
        assert "tink-rl serve MODEL --mode adapter" in str(caught.value)
        backend.reset_prefix_cache()  # TRL starts it in dev mode, which has a route for this
