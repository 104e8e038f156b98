"""The other recipes, and two runs at the same time against one server."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import loop
from recipes.tiny_base import ensure_tiny_base
from tests.policies import PeftTwin, assert_served
from tests.trainers import left_clean
from tests.warm_server import make_server
from tink_rl.gpus import exact_dtype
from tink_rl.training.rollouts import read_rollouts

# They train for minutes, and on a fresh checkout the tiny base before that.
pytestmark = [pytest.mark.recipe, pytest.mark.server, pytest.mark.long]
ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 12


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory):
    """A server of the tiny base with slots for two runs."""
    token = tmp_path_factory.mktemp("tiny") / "token"
    with make_server(
        ensure_tiny_base(),
        mode="both",
        dtype=exact_dtype("both"),
        max_lora_rank=16,
        max_loras=4,
        shared_with_trainer=True,
        token_file=str(token),
    ) as server:
        yield server


@pytest.fixture
def tiny(tiny_server):
    """The same; nothing that a run left is served for the next one, whose mode it would decide."""
    with left_clean(tiny_server) as server:
        yield server


def start(server, output, module, *arguments, policy, config="digits.yaml"):
    command = [
        *(sys.executable, "-m", module, *arguments),
        *("--config", str(ROOT / "recipes/configs" / config)),
        *("--vllm_server", server.url, "--token_file", str(server.token_file)),
        *("--policy", policy, "--output_dir", str(output)),
    ]
    output.mkdir(parents=True)
    with (output / "train.log").open("w") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(process, output):
    assert process.wait(240) == 0, (output / "train.log").read_text()[-4000:]
    state = json.loads((output / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


def policy_run(server, output, policy):
    small = ("--max_steps", str(NUM_STEPS), "--per_device_train_batch_size", "64")
    module = "tests.recipes.run_policy"
    return start(server, output, module, policy, *small, "--sync_mode", "adapter", policy=policy)


def last_rewards(history):
    return statistics.mean(row["reward"] for row in history[-4:])


@pytest.mark.timeout(1200)  # the tiny base may have to be trained first, on one core
def test_two_policies_learn_on_one_server_what_each_learns_alone(tiny, tmp_path):
    alone, together = {}, {}
    for policy in ("right", "wrong"):
        output = tmp_path / f"{policy}-alone"
        alone[policy] = finish(policy_run(tiny, output, policy), output)
    running = {p: policy_run(tiny, tmp_path / p, p) for p in ("right", "wrong")}
    for policy, process in running.items():
        together[policy] = finish(process, tmp_path / policy)
    for policy, history in together.items():
        # Neither samples the other: in name, and in what the logprobs say.
        logged = list(read_rollouts(tmp_path / policy / "rollouts.jsonl"))
        assert {row["policy"] for row in logged} == {policy} and len(logged) == 64 * NUM_STEPS
        assert max(row["rollout/logprob_gap"] for row in history) <= 1e-3
        # What it reaches: more than it began with, and what it reaches alone.
        assert last_rewards(history) > history[0]["reward"]
        assert last_rewards(history) == pytest.approx(last_rewards(alone[policy]), abs=0.1)
    digests = {
        policy: {row["digest"] for row in read_rollouts(tmp_path / policy / "rollouts.jsonl")}
        for policy in together
    }
    # They begin with the same (fresh) adapter; nothing after it is shared.
    assert len(digests["right"] & digests["wrong"]) == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_qlora_run_learns_and_its_adapter_is_served_on_the_servers_own_base(tiny, tmp_path, mode):
    output = tmp_path / "qlora"
    small = ("--max_steps", "16", "--per_device_train_batch_size", "64")
    given = ("--load_in_4bit", "true", "--sync_mode", mode, *small)
    history = finish(start(tiny, output, "recipes.grpo", *given, policy=f"q-{mode}"), output)
    assert re.search(
        r"base is quantised .* differ by [0-9.e-]+ nats", (output / "train.log").read_text()
    )
    rewards = [row["reward"] for row in history]
    assert statistics.mean(rewards[-4:]) > statistics.mean(rewards[:4])
    # What was trained on 4 bits is what the server adds to its own base.
    twin = PeftTwin(ensure_tiny_base(), r=16, lora_alpha=32)
    twin.model.load_adapter(output, "trained")
    twin.model.set_adapter("trained")
    version = json.loads((output / "tink_policy.json").read_text())["version"]
    assert_served(tiny, f"q-{mode}@{version}", twin.clear_cases())


@pytest.mark.timeout(300)
def test_loop_without_a_trainer_learns_from_the_version_it_just_published(tiny):
    given = ["--vllm_server", tiny.url, "--token_file", str(tiny.token_file)]
    history = loop.main([*given, "--max_steps", "12"])
    rewards = [row["reward"] for row in history]
    assert statistics.mean(rewards[-4:]) > statistics.mean(rewards[:4])
    first = history[0]["version"]
    assert [row["version"] for row in history] == list(range(first, first + 12))
    with tiny.client() as client:
        assert f"loop@{first + 12}" in client.status().served


@pytest.mark.timeout(300)
def test_rloo_recipe_learns_the_digits(tiny, tmp_path):
    output = tmp_path / "rloo"
    process = start(
        tiny,
        output,
        "recipes.rloo",
        *("--max_steps", "12"),
        policy="rloo",
        config="digits_rloo.yaml",
    )
    history = finish(process, output)
    rewards = [row["reward"] for row in history]
    assert statistics.mean(rewards[-5:]) > statistics.mean(rewards[:5])
    assert max(row["rollout/sequence_logprob_gap"] for row in history) <= 1e-3
    assert json.loads((output / "tink_policy.json").read_text())["policy"] == "rloo"


@pytest.mark.timeout(300)
def test_sft_recipe_shows_how_the_answers_turn_downwards(tiny, tmp_path):
    output = tmp_path / "sft"
    process = start(tiny, output, "recipes.sft_live", policy="down", config="digits_sft.yaml")
    finish(process, output)
    shown = (output / "train.log").read_text()
    # The first step of the warm-up has a learning rate of 0: it publishes nothing.
    first, last = shown.index("step 0, down@1"), shown.index("step 80, down@80")
    assert "1347" in shown[first:last].partition("step 20")[0]
    assert "7431" in shown[last:]
