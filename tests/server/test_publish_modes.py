"""Greedy tokens of a real vLLM server equal PEFT's after each publish: shapes, targets, modes."""

from __future__ import annotations

import pytest

from tests.policies import PeftTwin, assert_served, served_greedy, sync_to

pytestmark = pytest.mark.server

SHAPES = ("qwen3", "qwen2", "llama", "gemma3")
VARIANTS = {
    "all-linear": {},
    "attention only": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "q and v only": {"target_modules": ["q_proj", "v_proj"]},
    "up_proj only": {"target_modules": ["up_proj"]},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 12},
        "alpha_pattern": {"q_proj": 32, "down_proj": 2},
    },
}


# The decorator nearest to the function varies slowest: one server start per shape.
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["adapter", "merged"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_pefts_after_every_publish(servers, model_dir, shape, mode, variant):
    server = servers.get(shape, mode="both")
    twin = PeftTwin(model_dir(shape), **VARIANTS[variant])
    with sync_to(server, twin.directory, mode) as sync:
        for seed in range(5):
            twin.randomise(seed)
            record = sync.publish(twin.model)
            assert (
                record.published and record.digest == server.client().status().served[record.name]
            )
            assert_served(server, record.name, twin.clear_cases())


@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_base_is_exact_after_the_policy_was_dropped(servers, model_dir, mode):
    server = servers.get("gemma3", mode="both")
    twin = PeftTwin(model_dir("gemma3"))
    cases = twin.clear_cases(adapter=False)
    base = server.client().status().base_model
    with sync_to(server, twin.directory, mode) as sync:
        twin.randomise(1)
        name = sync.publish(twin.model).name
        assert served_greedy(server, name, cases) != list(cases.values())
        sync.drop_current()
        assert_served(server, base, cases)
