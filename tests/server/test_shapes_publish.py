"""Greedy tokens of a real vLLM server equal PEFT's after each publish: shapes, targets, modes."""

from __future__ import annotations

from itertools import product

import pytest

from tests.policies import PeftTwin, WholeTwin, assert_served, served_greedy, sync_to
from tink_rl import errors

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

SOURCES = {
    "model": lambda twin: _plain(twin),
    "mapping": lambda twin: twin.tensors(),
    "stream": lambda twin: _exported(twin),
}


def _rows():
    """Every variant on one shape, the two that differ most on the others; `make test-long` has the rest."""
    for shape, mode, variant in product(SHAPES, ("adapter", "merged", "full"), VARIANTS):
        is_home = shape == SHAPES[0]
        is_short = is_home or variant in ("all-linear", "patterns")
        # The third is packed where the first was; once per mode more than the server has slots.
        count = 5 if not is_short or (is_home and variant == "all-linear") else 3
        yield pytest.param(shape, mode, variant, count, marks=() if is_short else pytest.mark.long)


@pytest.mark.parametrize(("shape", "mode", "variant", "count"), _rows())
def test_tokens_equal_pefts_after_every_publish(servers, model_dir, shape, mode, variant, count):
    server = servers.get(shape, mode="both")
    twin = PeftTwin(model_dir(shape), **VARIANTS[variant])
    with sync_to(server, twin.directory, mode) as sync:
        for seed in range(count):
            twin.randomise(seed)
            record = sync.publish(twin.model)
            assert (
                record.published and record.digest == server.client().status().served[record.name]
            )
            assert_served(server, record.name, twin.clear_cases())


def _whole_rows():
    """Every kind on one shape, and the stream, which is sent in another order, on the others."""
    for shape, kind in product(SHAPES, SOURCES):
        is_short = shape == SHAPES[0] or kind == "stream"
        yield pytest.param(shape, kind, marks=() if is_short else pytest.mark.long)


@pytest.mark.parametrize(("shape", "kind"), _whole_rows())
def test_tokens_equal_the_whole_models_after_every_full_publish(servers, model_dir, shape, kind):
    server = servers.get(shape, mode="both")
    twin = WholeTwin(model_dir(shape))
    base = server.client().status().base_model
    with sync_to(server, twin.directory, "full", bucket_mib=0.1) as sync:
        for seed in range(2):
            twin.shake_base(seed)
            record = sync.publish_full(SOURCES[kind](twin))
            status = server.client().status()
            assert record.digest == status.served[record.name] and status.full == record.name
            assert server.client().models() == [record.name]
            assert_served(server, record.name, twin.base_cases())
        for stale in (base, "policy@1"):
            with pytest.raises(errors.UnknownVersion):
                served_greedy(server, stale, [[5, 6]])
        sync.drop_current()
    assert_served(server, base, PeftTwin(twin.directory).clear_cases(adapter=False))


def _exported(twin):
    """In an order of its own, and with the tied head once more, as exporters write it."""
    yield from reversed(twin.tensors().items())
    if twin.model.config.tie_word_embeddings:
        yield "lm_head.weight", twin.tensors()["model.embed_tokens.weight"]


def _plain(twin):
    """The changed base as a transformers model of its own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(twin.directory)
    model.load_state_dict(twin.tensors(), strict=False)
    return model


@pytest.mark.parametrize("mode", ["adapter", "merged", "full"])
@pytest.mark.parametrize("shape", ["gemma3"])
def test_base_is_exact_after_the_policy_was_dropped(servers, model_dir, mode, shape):
    server = servers.get(shape, mode="both")
    twin = PeftTwin(model_dir(shape))
    cases = twin.clear_cases(adapter=False)
    base = server.client().status().base_model
    with sync_to(server, twin.directory, mode) as sync:
        twin.randomise(1)
        name = sync.publish(twin.model).name
        assert served_greedy(server, name, cases) != list(cases.values())
        sync.drop_current()
        assert_served(server, base, cases)
