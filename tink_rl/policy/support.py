"""What a LoRA configuration asks for, and why some of it cannot be published. Pure: plain data in.

Every field of peft's `LoraConfig` is accounted for here: a field that this list does not know and
that is set is refused too, because a new feature of peft may change what the adapter means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tink_rl.errors import UnsupportedAdapter

# Without effect on what the trained adapter computes, or folded into B (r, alpha, patterns, rsLoRA).
_HARMLESS = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "target_modules",  # what it matched is seen in the tensors
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",  # training only; the start-up checks warn about it
        "megatron_core",  # a module path; unused without megatron_config
        "loftq_config",  # acts only through init_lora_weights="loftq"
        "eva_config",  # initialises A from activations; the base stays as it is
        "qalora_group_size",  # acts only through use_qalora
        "runtime_config",
        "ensure_weight_tying",  # acts only on modules_to_save and embeddings, refused by themselves
    }
)
_REFUSED = {
    "use_dora": "DoRA rescales the base weights; train with use_dora=False",
    "lora_bias": "a bias in lora_B; train with lora_bias=False",
    "modules_to_save": "whole modules are trained; set modules_to_save=None",
    "trainable_token_indices": "token embeddings are trained; set trainable_token_indices=None",
    "target_parameters": "LoRA on bare parameters (MoE experts); target linear layers instead",
    "layer_replication": "layers are replicated, which changes the base; set layer_replication=None",
    "megatron_config": "Megatron's parallel layers; export the adapter to plain PEFT first",
    "fan_in_fan_out": "transposed (Conv1D) base weights, as in GPT-2, are not supported",
    "corda_config": "CorDA changes the base weights; use init_lora_weights=True",
    "lora_ga_config": "LoRA-GA changes the base weights; use init_lora_weights=True",
    "velora_config": "VeLoRA is not supported; set velora_config=None",
    "alora_invocation_tokens": "activated LoRA depends on the prompt; set it to None",
    "use_qalora": "QALoRA pools its input; train with use_qalora=False",
    "monteclora_config": "MonteCLoRA samples its weights; set monteclora_config=None",
    "use_bdlora": "block-diagonal LoRA is not supported; set use_bdlora=None",
    "arrow_config": "Arrow routes between adapters; set arrow_config=None",
    "kasa_config": "KaSA changes the base weights; set kasa_config=None",
}
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mixture")


def unsupported_reasons(config: Mapping[str, Any]) -> list[str]:
    """Why an adapter of this configuration cannot be published; empty if it can.

    Args:
        config: `adapter_config.json`, or `LoraConfig.to_dict()`.
    """
    reasons = []
    if str(config.get("peft_type", "LORA")).rpartition(".")[2] != "LORA":
        return [f"peft_type is {_brief(config['peft_type'])}, only LORA is supported"]
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={_brief(config['bias'])} trains biases; train with bias='none'")
    init = config.get("init_lora_weights", True)
    if init not in _INITS_THAT_KEEP_THE_BASE:
        reasons.append(
            f"init_lora_weights={_brief(init)} changes the base weights, so the adapter alone is wrong; "
            "use init_lora_weights=True"
        )
    known = _HARMLESS | {"bias", "init_lora_weights"}
    for name, value in config.items():
        if name in known or not value:
            continue
        reasons.append(_REFUSED.get(name, f"{name}={_brief(value)} is not known to this release"))
    return reasons


def _brief(value: Any) -> str:
    return repr(value)[:80]


def check_supported(config: Mapping[str, Any], *, where: str) -> None:
    """Raise unless `config` can be published.

    Raises:
        UnsupportedAdapter: with every reason and its remedy.
    """
    reasons = unsupported_reasons(config)
    if reasons:
        raise UnsupportedAdapter(f"{where} cannot be published: {'; '.join(reasons)}")
