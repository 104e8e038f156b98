"""The model runner of GPUs (V2), with async scheduling, on a CPU through Triton's interpreter.

Slots go through the CPU's own LoRA kernels here: those of GPUs are not tried.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.policies import PeftTwin, assert_served, long_greedy, sync_to, under_way
from tests.tiny_models import VOCAB
from tink_rl.training.probe import Prober

pytestmark = [
    pytest.mark.server,
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed"),
]
_FOLDER = Path(__file__).parent / "v2_runner"


@pytest.fixture
def server(servers):
    return servers.get(
        "qwen3",
        mode="both",
        max_loras=2,
        startup_timeout_s=900.0,
        extra_args=("--max-num-batched-tokens", "256", "--max-num-seqs", "8"),
        env={
            "PYTHONPATH": str(_FOLDER),
            "TRITON_INTERPRET": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "1",
            "VLLM_LOGGING_LEVEL": "DEBUG",
        },
    )


@pytest.fixture(scope="module")
def twin(model_dir):
    return PeftTwin(model_dir("qwen3"))


def test_log_says_that_this_runner_ran_and_scheduled_ahead(server):
    log = Path(server.log_path).read_text()
    assert "Using V2 Model Runner" in log
    assert "Batch queue is enabled with size 2" in log


@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_versions_are_served_right_and_pass_the_probe(server, twin, mode):
    with sync_to(server, twin.directory, mode) as sync:
        for seed in range(2):
            twin.randomise(seed)
            name = Prober(twin.model, vocab_size=VOCAB).publish(sync, twin.model).name
            assert_served(server, name, twin.clear_cases())


def test_slot_that_was_evicted_comes_back_when_it_is_asked_for(server, twin):
    with sync_to(server, twin.directory, "adapter", keep_versions=4) as sync:
        cases = {}
        for seed in range(4):  # two slots
            twin.randomise(seed)
            cases[sync.publish(twin.model).name] = twin.clear_cases()
        for name, expected in cases.items():
            assert_served(server, name, expected)


@pytest.mark.parametrize("on_running", ["drain", "abort"])
def test_fold_waits_for_what_was_scheduled_ahead(server, twin, on_running):
    with sync_to(server, twin.directory, "merged", on_running=on_running) as sync:
        twin.randomise(1)
        first = sync.publish(twin.model)
        with under_way(server, lambda: long_greedy(server, first.name)):
            twin.randomise(2)
            second = sync.publish(twin.model)
        assert_served(server, second.name, twin.clear_cases())
