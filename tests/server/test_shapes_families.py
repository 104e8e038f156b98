"""Every family of `tests/families.py` on a real server: tokens and logprobs equal PEFT's in each mode."""

from __future__ import annotations

import pytest

from tests.families import BY_SHAPE
from tests.policies import NUM_TOKENS, PeftTwin, assert_served, sync_to
from tink_rl.gpus import exact_dtype

pytestmark = [pytest.mark.server, pytest.mark.long]


@pytest.mark.parametrize("shape", [shape for shape, family in BY_SHAPE.items() if family.served])
def test_family_is_served_as_peft_computes_it(servers, model_dir, shape):
    family = BY_SHAPE[shape]
    server = servers.get(shape, mode="both" if "adapter" in family.served else "merged")
    targets = family.targets if isinstance(family.targets, str) else list(family.targets)
    twin = PeftTwin(model_dir(shape), target_modules=targets)
    for mode in family.served:
        with sync_to(server, twin.directory, mode) as sync:
            for seed in range(2):
                twin.randomise(seed)
                record = sync.publish(twin.model)
                assert record.mode == mode
                cases = twin.clear_cases()
                assert_served(server, record.name, cases)
                if exact_dtype("merged") == "float32":
                    assert gap(server, record.name, twin, cases) <= 1e-4
            sync.drop_current()
        base = server.client().status().base_model
        assert_served(server, base, twin.clear_cases(adapter=False))


def gap(server, name, twin, cases) -> float:
    """The largest difference of a sampled token's logprob."""
    with server.client() as client:
        output = client.generate(
            [list(prompt) for prompt in cases],
            temperature=0.0,
            max_tokens=NUM_TOKENS,
            model=name,
            generation_kwargs={"ignore_eos": True},
        )
    found = [
        abs(row[0] - expected)
        for prompt, tokens, rows in zip(
            cases, output["completion_ids"], output["logprobs"], strict=True
        )
        for row, expected in zip(rows, twin.logprobs(prompt, tokens), strict=True)
    ]
    assert len(found) == len(cases) * NUM_TOKENS
    return max(found)
