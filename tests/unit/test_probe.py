"""What a probe makes of right policies, however they round, and of wrong ones, of every kind and size."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from tests.probe_rig import Rig, under_autocast
from tink_rl import errors
from tink_rl.publish.probe_rules import largest_gap, limits, share_applied
from tink_rl.publish.probes import NUM_DECODED
from tink_rl.training import precision
from tink_rl.types import SyncMode

PRECISIONS = ("fp32", "autocast", "bf16 server", "bf16")
"""Of the trainer: fp32; fp32 under bf16 autocast (TRL's default) with an fp32 server, and with a bf16
one; bf16 on both sides."""


@pytest.fixture(scope="module", params=PRECISIONS)
def any_rig(model_dir, request):
    return Rig(model_dir("qwen3"), request.param)


@pytest.fixture
def rig(model_dir):
    return Rig(model_dir("qwen3"))


def _noise(value):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(value.shape, generator=generator) * value.detach().float().std()


def _exchange_q_proj(rig):
    trained = dict(rig.twin.model.named_parameters())
    other = {"0": "1", "1": "0"}

    def change(name, value):
        if "q_proj" not in name:
            return value
        head, _, rest = name.partition("layers.")
        return trained[f"{head}layers.{other[rest[0]]}{rest[1:]}"]

    return change


WRONG = {
    "the base": lambda rig: lambda name, value: value * 0,
    "the version before": lambda rig: (
        lambda name, value: value + 0.05 * _noise(value) if "lora_B" in name else value
    ),
    "1.1 times": lambda rig: lambda name, value: value * 1.1 if "lora_B" in name else value,
    "2 times": lambda rig: lambda name, value: value * 2 if "lora_B" in name else value,
    "two modules exchanged": _exchange_q_proj,
    "a layer missing": lambda rig: lambda name, value: value * 0 if "layers.1." in name else value,
}
SEEN = {
    # of an adapter of that size (of B; it moves the largest logprob by so many nats)
    ("fp32", 0.002): ("ended",) * 6,  # 0.14
    ("fp32", 0.05): ("ended",) * 6,  # 2.3
    ("autocast", 0.002): ("ended",) * 6,
    ("autocast", 0.05): ("ended",) * 6,
    ("bf16 server", 0.01): ("warned", "-", "-", "warned", "-", "-"),  # 0.7
    ("bf16 server", 0.002): ("warned", "-", "-", "warned", "-", "-"),
    ("bf16 server", 0.05): ("ended", "-", "-", "ended", "ended", "warned"),
    ("bf16 server", 0.2): ("ended", "warned", "told", "ended", "ended", "ended"),  # 5.9
}
"""What happens to each of `WRONG`. "-": less than rounding explains there, on either side of the limit;
"told": warned about or ended."""


def outcome(rig, caplog):
    caplog.clear()
    try:
        rig.check()
    except errors.ProbeFailed:
        return "ended"
    return "warned" if "more than rounding usually explains" in caplog.text else "-"


@pytest.mark.parametrize(("case", "size"), SEEN)
def test_wrong_policy_is_caught_or_warned_about_where_rounding_cannot_explain_it(
    model_dir, caplog, case, size
):
    rig = Rig(model_dir("qwen3"), case)
    rig.train(size)
    for (name, wrong), expected in zip(WRONG.items(), SEEN[case, size], strict=True):
        rig.serve(wrong(rig))
        found = outcome(rig, caplog)
        assert expected == "-" or found == expected or (expected == "told" and found != "-"), name


@pytest.mark.parametrize("size", [0.0, 0.02, 0.2, 2.0])
def test_right_policy_is_neither_ended_nor_warned_about_however_it_has_grown(any_rig, caplog, size):
    for seed in range(3):
        any_rig.train(size, seed)
        assert outcome(any_rig, caplog) == "-"


def test_probe_under_autocast_is_as_exact_as_one_without(rig):
    rig.train(1.0)
    plain = rig.check()
    under_autocast(rig.twin.model)
    assert rig.check() == plain <= 1e-4
    ids_BT = torch.tensor([rig.prober.prompt_ids])
    with torch.no_grad():
        assert rig.twin.model(input_ids=ids_BT).logits.dtype == torch.bfloat16  # still as trained


def test_probe_leaves_random_state_mode_hooks_and_matmul_precision_alone(rig):
    rig.twin.model.train()
    state = torch.get_rng_state()
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        for view in ("exact", "trained", "base", "bfloat16"):
            rig.prober.measure([[3, 4, 5]], view)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert torch.equal(torch.get_rng_state(), state) and rig.twin.model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rig.twin.model.modules())


def test_autocast_is_left_for_the_block_only_also_when_the_forward_fails(rig):
    under_autocast(rig.twin.model)
    with pytest.raises(IndexError), precision.full_precision(rig.twin.model):
        rig.twin.model(input_ids=torch.tensor([[10**6]]))
    assert not torch.is_autocast_enabled("cpu")
    assert rig.twin.model(input_ids=torch.tensor([[3]])).logits.dtype == torch.bfloat16


def test_decoding_that_is_of_another_version_is_caught_and_named(rig):
    rig.train(0.05)
    rig.decode_with(0.02)
    with pytest.raises(errors.ProbeFailed, match="prompt agrees and only decoded tokens do not"):
        rig.check()
    rig.server.decodes = rig.server.model
    assert rig.check() <= 1e-4


def test_a_probe_is_one_request_to_each_server(rig):
    rig.train(0.05)
    rig.check()
    assert rig.server.num_requests == 1


def test_server_with_little_room_gets_a_shorter_prompt(rig):
    rig.server.state["max_model_len"] = 12
    rig.sync.status = rig.server.status()
    rig.prober.self_test(rig.sync, rig.twin.collector)
    assert len(rig.prober.prompt_ids) + NUM_DECODED == 12


# -- the start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PRECISIONS)
def test_server_that_applies_no_adapter_is_named_as_that(model_dir, case):
    rig = Rig(model_dir("qwen3"), case)
    rig.prober.self_test(rig.sync, rig.twin.collector)
    rig.sync.applies = False
    with pytest.raises(errors.ProbeFailed, match="those of the base without the adapter"):
        rig.prober.self_test(rig.sync, rig.twin.collector)


def change_base(rig, size):
    """What an SFT adapter that was merged in memory does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in rig.twin.model.named_parameters():
            if "base_layer" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * size


@pytest.mark.parametrize("case", ["fp32", "autocast"])
def test_base_that_was_changed_in_memory_is_refused_and_not_called_rounding(model_dir, case):
    rig = Rig(model_dir("qwen3"), case)
    change_base(rig, 1e-3)
    with pytest.raises(errors.BaseMismatch, match="that is no rounding") as caught:
        rig.prober.self_test(rig.sync, rig.twin.collector)
    text = str(caught.value)
    assert "Trainer: float32" in text and "server: float32 on cpu" in text
    assert "save_pretrained" in text and "dtype" not in text and "target_modules" not in text


def test_wrong_base_hides_in_no_rounding_of_any_size_below_fp32(model_dir, caplog):
    rig = Rig(model_dir("qwen3"), "bf16 server")
    change_base(rig, 0.004)
    rig.prober.self_test(rig.sync, rig.twin.collector)
    assert "compare the model that is trained with the one that is served" in caplog.text
    change_base(rig, 0.15)
    with pytest.raises(errors.BaseMismatch, match="allowed is 1"):
        rig.prober.self_test(rig.sync, rig.twin.collector)


def test_full_version_of_another_run_is_named_at_the_start_and_under_way(rig):
    change_base(rig, 0.05)
    rig.server.state["full"] = "vllm@4"
    with pytest.raises(errors.BaseMismatch, match="whole tensors of 'vllm@4' in place of its base"):
        rig.prober.self_test(rig.sync, rig.twin.collector)
    with pytest.raises(errors.ProbeFailed, match="whole tensors of 'vllm@4' in place of its base"):
        rig.check()


def test_autocast_beside_a_more_exact_server_is_told_once_with_its_cost(model_dir, caplog):
    rig = Rig(model_dir("qwen3"), "autocast")
    rig.prober.self_test(rig.sync, rig.twin.collector)
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "bf16=False" in record.getMessage()
    assert "under bfloat16 autocast and the server in float32" in record.getMessage()


@pytest.mark.parametrize("case", ["fp32", "bf16 server", "bf16"])
def test_honest_start_says_nothing(model_dir, caplog, case):
    rig = Rig(model_dir("qwen3"), case)
    rig.prober.self_test(rig.sync, rig.twin.collector)
    assert caplog.text == "" and rig.sync.probes.base_gap < 0.2


def test_adapter_outside_the_forward_pass_is_named_as_that(rig):
    for module in rig.twin.model.modules():
        if hasattr(module, "base_layer"):
            module.forward = module.base_layer.forward
    with pytest.raises(errors.ProbeFailed, match="take no part in its forward pass"):
        rig.prober.self_test(rig.sync, rig.twin.collector)


# -- the limits --------------------------------------------------------------------------------------


def test_no_noise_excuses_more_than_the_absolute_bound():
    for noise in (10.0, math.inf):
        assert limits("float32", noise).fail == 0.05
        assert limits("bfloat16", noise).fail == limits("bfloat16", 0.0, base_gap=9.0).fail == 2.0
        assert limits("bfloat16", noise, quantized=True).fail == 4.0
    assert limits("float32", math.nan) == limits("float32", 0.0, base_gap=1.0)
    assert limits("float32", 1e-5).fail == 1e-3
    assert limits("bfloat16", 0.02).quiet == pytest.approx(0.06)
    assert limits("bfloat16", 0.02).fail == pytest.approx(0.2)


def test_share_of_the_adapter_is_told_from_rounding_by_all_tokens_together():
    base, ours = [[-3.0] * 25], [[-3.0 + 0.1 * (-1) ** i for i in range(25)]]
    for share in (0.0, 1.0, 2.0):
        theirs = [[b + share * (o - b) for o, b in zip(ours[0], base[0], strict=True)]]
        found, sigmas = share_applied(ours, theirs, base, 0.05)
        assert found == pytest.approx(share) and sigmas == pytest.approx(10 * abs(share - 1))
    assert share_applied(base, ours, base, 0.05) == (1.0, 0.0)


def test_tolerance_of_the_user_is_the_limit(rig, caplog):
    rig.train(0.05)
    rig.serve(WRONG["1.1 times"](rig))
    object.__setattr__(rig.sync.config, "probe_tolerance", 1.0)
    assert 0.01 < rig.check() < 1.0 and caplog.text == ""


def test_nan_never_passes_as_a_small_gap():
    assert math.isnan(largest_gap([0.0, math.nan, 0.0], [0.0, 0.0, 0.5]))
    assert largest_gap([0.0, 1.0], [0.25, 1.0]) == 0.25


def test_nan_of_either_side_fails(rig):
    rig.train(0.05)
    rig.serve(lambda name, value: value * math.nan)
    with pytest.raises(errors.ProbeFailed, match="nan"):
        rig.check()


def test_format_is_the_coarsest_of_both_sides_and_of_the_slot(rig):
    check, status = rig.sync.probes, rig.server.status
    for state, trainer, mode, expected in (
        ({}, "float32", SyncMode.MERGED, "float32"),
        ({}, "bfloat16", SyncMode.MERGED, "bfloat16"),
        ({"dtype": "float16"}, "float32", SyncMode.MERGED, "float16"),
        ({"device": "cuda"}, "float32", SyncMode.MERGED, "tf32"),
        ({"adapter_dtype": "bfloat16"}, "float32", SyncMode.ADAPTER, "bfloat16"),
        ({"adapter_dtype": "bfloat16"}, "float32", SyncMode.MERGED, "float32"),
    ):
        rig.server.state = {
            "dtype": "float32",
            "adapter_dtype": "float32",
            "device": "cpu",
            **state,
        }
        assert check.rounds_to(trainer, status(), mode) == expected
