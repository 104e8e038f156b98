"""Who takes what of a card, held against figures that were worked out by hand (decimal GB, per GPU)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import huggingface_hub
import pytest

from tests.cards import GIB, MODELS, card
from tink_rl import gpus
from tink_rl.errors import ConfigError
from tink_rl.memory_plan import (
    ServePlan,
    gpu_line,
    plan_memory,
    read_shape,
    shape_of,
    split_gpu,
)
from tink_rl.tools.doctor.finding import Level
from tink_rl.tools.doctor.memory import check_memory, judge_cpu, judge_gpus

GB = 10**9


SMALL = MODELS["Qwen2.5-1.5B"]


@pytest.mark.parametrize(
    ("model", "workers", "golden_gb", "fold_gb"),
    [
        ("Qwen2.5-1.5B", 1, 2.6, 0.25),
        ("Qwen2.5-7B", 1, 13.1, 1.2),
        ("Llama-3.1-8B", 1, 14.0, 1.1),
        ("Qwen2.5-32B", 1, 62.4, 2.6),
        ("Llama-3-70B", 8, 17.1, 0.5),
    ],
)
def test_golden_weights_and_the_peak_of_a_fold(model, workers, golden_gb, fold_gb):
    plan = plan_memory(MODELS[model], ServePlan(tensor_parallel_size=workers))
    assert plan.golden / GB == pytest.approx(golden_gb, abs=0.06)
    assert plan.fold_peak / GB == pytest.approx(fold_gb, abs=0.06)


@pytest.mark.parametrize(
    ("model", "card_gb", "host_gb", "device_gb"),
    [
        ("Qwen2.5-1.5B", 24, 12, 9.8),
        ("Qwen2.5-1.5B", 48, 26, 23),
        ("Qwen2.5-1.5B", 80, 43, 41),
        ("Qwen2.5-1.5B", 141, 77, 74),
        ("Qwen2.5-7B", 48, 25, 11.5),
        ("Qwen2.5-7B", 80, 42, 29),
        ("Qwen2.5-7B", 141, 76, 63),
        ("Llama-3.1-8B", 48, 24.4, 10.4),
        ("Llama-3.1-8B", 80, 42, 28),
        ("Llama-3.1-8B", 141, 76, 62),
    ],
)
def test_golden_weights_in_host_memory_leave_the_trainer_its_share(
    model, card_gb, host_gb, device_gb
):
    serve = ServePlan()
    split = split_gpu(plan_memory(MODELS[model], serve), serve, card_gb * GB)
    assert split.golden_tier == "host" and split.golden_on_gpu == 0
    assert split.left / GB == pytest.approx(host_gb, abs=0.5)
    taken = ServePlan(golden_tier="device")
    on_device = split_gpu(plan_memory(MODELS[model], taken), taken, card_gb * GB)
    assert on_device.left / GB == pytest.approx(device_gb, abs=0.5)


@pytest.mark.parametrize(
    ("model", "card_gb", "alone", "tier"),
    [
        ("Qwen2.5-1.5B", 24, True, "host"),
        ("Qwen2.5-1.5B", 80, True, "device"),
        ("Qwen2.5-1.5B", 80, False, "host"),
        ("Qwen2.5-7B", 80, True, "host"),
        ("Qwen2.5-7B", 141, True, "host"),
        ("Llama-3-70B", 80, True, "host"),
    ],
)
def test_golden_weights_stay_on_a_gpu_only_where_nothing_else_wants_the_room(
    model, card_gb, alone, tier
):
    serve = ServePlan(
        shared_with_trainer=not alone, tensor_parallel_size=8 if "70B" in model else 1
    )
    assert split_gpu(plan_memory(MODELS[model], serve), serve, card_gb * GB).golden_tier == tier


@pytest.mark.parametrize(
    ("model", "card_gb", "serves"),
    [
        ("Qwen2.5-1.5B", 24, True),
        ("Qwen2.5-7B", 24, False),
        ("Qwen2.5-7B", 48, True),
        ("Qwen2.5-32B", 141, False),
    ],
)
def test_model_that_does_not_fit_a_shared_card_is_told_before_it_is_started(model, card_gb, serves):
    serve = ServePlan(max_model_len=2048)
    cards = [card(card_gb * GB)]
    found = judge_gpus(plan_memory(MODELS[model], serve), serve, cards, host=512 * GB)
    blocked = [f for f in found if f.level is Level.BLOCKER and "server" in f.what]
    assert bool(blocked) is not serves
    assert all("--alone" in f.fix for f in blocked)


def test_32b_fits_a_card_of_its_own():
    serve = ServePlan(shared_with_trainer=False, max_model_len=2048)
    cards = [card(141 * GB)]
    found = judge_gpus(plan_memory(MODELS["Qwen2.5-32B"], serve), serve, cards, host=512 * GB)
    assert {f.level for f in found} <= {Level.OK, Level.NOTE}


def test_golden_weights_of_a_large_model_want_host_memory():
    serve = ServePlan(shared_with_trainer=False, max_model_len=2048)
    plan = plan_memory(MODELS["Qwen2.5-32B"], serve)
    found = judge_gpus(plan, serve, [card(141 * GB)], host=100 * GB)
    [blocked] = [f for f in found if f.level is Level.BLOCKER]
    assert "CPU's memory" in blocked.what and "--golden-tier file" in blocked.fix


@pytest.mark.parametrize(
    ("model", "card_gb", "text", "level"),
    [
        ("Qwen2.5-1.5B", 24, "a batch of 16 sequences", Level.OK),
        ("Qwen2.5-7B", 48, "a batch of 8 sequences", Level.OK),
        ("Qwen2.5-7B", 32, "a batch does not fit", Level.BLOCKER),
        ("Qwen2.5-7B", 80, "a batch of 32 sequences", Level.OK),
    ],
)
def test_trainer_is_told_the_batch_that_fits_what_it_is_left(model, card_gb, text, level):
    serve = ServePlan(max_model_len=2048, max_lora_rank=16)
    plan = plan_memory(MODELS[model], serve)
    found = judge_gpus(plan, serve, [card(card_gb * GB)], host=512 * GB)[-1]
    assert found.level is level and text in found.what


def test_card_that_others_use_is_told_apart_from_one_that_is_too_small():
    serve = ServePlan(max_model_len=2048)
    busy = card(80 * GB, free=20 * GB)
    found = judge_gpus(plan_memory(SMALL, serve), serve, [busy], host=512 * GB)
    [blocked] = [f for f in found if f.level is Level.BLOCKER]
    assert "are free, the server wants 33.5 GiB" in blocked.what


@pytest.mark.parametrize(
    ("num_cards", "workers", "level"),
    [(0, 1, Level.WARNING), (1, 2, Level.BLOCKER), (8, 8, None)],
)
def test_cards_that_are_not_there_are_missed(num_cards, workers, level):
    serve = ServePlan(tensor_parallel_size=workers, shared_with_trainer=False)
    cards = [card(80 * GB)] * num_cards
    found = judge_gpus(plan_memory(MODELS["Llama-3-70B"], serve), serve, cards, host=2000 * GB)
    assert [f.level for f in found if f.level not in (Level.OK, Level.NOTE)] == (
        [level] if level else []
    )


def test_card_without_bfloat16_is_told_what_to_do():
    serve = ServePlan(max_model_len=2048)
    old = card(32 * GB, capability=(7, 0))
    found = judge_gpus(plan_memory(SMALL, serve), serve, [old], host=512 * GB)[-1]
    assert found.level is Level.WARNING and "--dtype half" in found.fix


def test_line_at_start_names_every_part_once():
    serve = ServePlan(max_model_len=2048)
    line = gpu_line(plan_memory(SMALL, serve), serve, [card(24 * GIB)])
    assert line == (
        "GPU 0 (NVIDIA L4, 24.0 GiB): server 10.8 GiB = weights 2.9 GiB + slots 0.3 GiB + KV cache 6.1 GiB"
        " + vLLM itself about 1.5 GiB; golden weights 2.4 GiB in the CPU's memory; trainer 12.5 GiB"
    )
    two = gpu_line(plan_memory(SMALL, serve), serve, [card(24 * GIB)] * 2)
    assert two.startswith(line) and "--alone" in two
    assert gpu_line(plan_memory(SMALL, serve), serve, []) == ""


def test_share_that_was_given_is_the_one_that_is_planned():
    serve = ServePlan(gpu_memory_utilization=0.7)
    assert split_gpu(plan_memory(SMALL, serve), serve, 100 * GB).server == 70 * GB
    assert ServePlan(shared_with_trainer=False).share == 0.92


def test_plan_follows_the_models_shape():
    plan = plan_memory(SMALL, ServePlan(max_lora_rank=16, max_loras=4))
    assert plan.golden == 2 * 1_310_195_712  # every matrix of the 28 layers
    assert plan.slots == 4 * 2 * 18_464_768  # rank 16 on all linear layers: 18.5 M parameters
    assert plan.kv_per_token == 28_672
    assert plan_memory(SMALL, ServePlan(mode="adapter")).golden == 0
    assert plan_memory(SMALL, ServePlan(mode="merged")).slots == 0
    two = plan_memory(SMALL, ServePlan(tensor_parallel_size=2))
    assert two.weights == plan.weights // 2 and two.kv_per_token == plan.kv_per_token // 2
    assert plan_memory(SMALL, ServePlan(dtype="float32")).weights == 2 * plan.weights


# -- on a CPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available_gib", "mode", "level", "text"),
    [
        (20, "both", Level.OK, "fits"),
        (5, "both", Level.BLOCKER, "--mode adapter (saves 2.4 GiB)"),
        (5, "merged", Level.BLOCKER, "--golden-tier file"),
        (2, "both", Level.BLOCKER, "a smaller model"),
    ],
)
def test_plan_that_does_not_fit_says_what_to_leave_out(available_gib, mode, level, text):
    plan = plan_memory(SMALL, ServePlan(mode=mode))
    found = judge_cpu(plan, available=int(available_gib * GIB))
    assert found.level is level and text in f"{found.what} {found.fix}"


def test_sequence_longer_than_the_cpus_cache_is_a_blocker():
    plan = plan_memory(SMALL, ServePlan(max_model_len=65536))
    found = judge_cpu(plan, available=32 * GIB)
    assert found.level is Level.BLOCKER and "VLLM_CPU_KVCACHE_SPACE=2" in found.fix


# -- the shape --------------------------------------------------------------------------------------


def test_shape_is_read_from_the_directory_and_a_wrong_one_is_refused(model_dir, tmp_path):
    shape = read_shape(model_dir("qwen3"))
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim) == (2, 2, 32)
    assert len(shape.linear_shapes) == 14 and (192, 128) in shape.linear_shapes
    assert check_memory(str(model_dir("gemma3")), ServePlan())[-1].level is Level.OK
    with pytest.raises(ConfigError, match="safetensors"):
        read_shape(tmp_path)


def test_shape_of_a_hub_id_that_is_not_cached_comes_from_the_hubs_headers(
    model_dir, tmp_path, monkeypatch
):
    directory = model_dir("qwen3")
    known = read_shape(directory)
    tensors = {
        f"model.layers.{i}.weight": SimpleNamespace(shape=list(shape))
        for i, shape in enumerate(known.linear_shapes)
    }
    answer = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_, **__: str(directory / "config.json")
    )
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: answer)
    assert read_shape("org/not-cached").linear_shapes == known.linear_shapes


def test_hub_id_that_nobody_knows_is_refused_with_what_the_hub_says(monkeypatch):
    def fail(*_, **__):
        raise OSError("404 Client Error. Repository Not Found\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ConfigError, match=r"Repository Not Found.*check the id"):
        read_shape("org/not-cached")


def test_language_model_of_a_vision_model_is_what_counts(model_dir):
    config = json.loads((model_dir("qwen3") / "config.json").read_text())
    shape = shape_of({"text_config": config, "dtype": "bfloat16"}, [("head.weight", (4, 8))])
    assert shape.num_layers == 2 and shape.num_weights == 32 and shape.linear_shapes == []


def test_doctor_plans_the_card_at_hand(model_dir, monkeypatch):
    monkeypatch.setattr(gpus, "has_gpu", lambda: True)
    monkeypatch.setattr(gpus, "visible_gpus", lambda: [card(24 * GB)])
    found = check_memory(str(model_dir("qwen3")), ServePlan(max_model_len=256))
    assert {f.level for f in found} == {Level.OK, Level.NOTE}
    assert any("NVIDIA L4" in f.what for f in found) and "batch" in found[-1].what
