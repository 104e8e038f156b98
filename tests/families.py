"""Families of models: a tiny one of each real config class, and what was seen of it in each mode.

The one list: the tests walk it, and `docs/models.md` is made from it (`python -m tests.families`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODES = ("adapter", "merged", "full")
_SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
}
_LATENT_TARGETS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row. Example: `Family(name="Phi-3, Phi-4", shape="phi3", config="Phi3Config")`."""

    name: str
    """As people call it."""
    shape: str
    """For `tiny_models.make_model`."""
    config: str
    """Class of transformers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What its config has beside the shared sizes."""
    served: tuple[str, ...] = MODES
    """Modes in which a real server answers as PEFT does (`tests/server/test_shapes_families.py`)."""
    folded: bool = False
    """Whether a fold is compared with the merged checkpoint (`tests/unit/test_families.py`)."""
    targets: str | tuple[str, ...] = "all-linear"
    """Of the adapter."""
    note: str = ""
    """What is special."""


FAMILIES = (
    Family(name="Phi-3, Phi-4", shape="phi3", config="Phi3Config", folded=True,
           settings={"sliding_window": None, "tie_word_embeddings": False},
           note="`qkv_proj` and `gate_up_proj` are fused in the checkpoint: the same A, B's rows cut"),
    Family(name="GLM-4", shape="glm4", config="Glm4Config", folded=True,
           settings={"head_dim": 32, "attention_bias": True, "tie_word_embeddings": False},
           note="`gate_up_proj` is fused in the checkpoint, and two projections in vLLM"),
    Family(name="Falcon-H1", shape="falcon_h1", config="FalconH1Config", folded=True, served=(),
           settings={"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16,
                     "mamba_n_groups": 1, "tie_word_embeddings": False},
           targets=("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "gate_proj", "down_proj"),
           note="hybrid: vLLM names the mixers otherwise; `conv1d` and states are never touched"),
    Family(name="Nemotron-H", shape="nemotron_h", config="NemotronHConfig", folded=True, served=(),
           settings={"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4,
                     "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "head_dim": 32},
           targets=("q_proj", "k_proj", "v_proj", "o_proj", "in_proj"),
           note="hybrid, as Falcon-H1"),
    Family(name="Qwen3-Next", shape="qwen3_next", config="Qwen3NextConfig", folded=True, served=(),
           settings={"head_dim": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                     "linear_key_head_dim": 32, "linear_value_head_dim": 32, "num_experts": 4,
                     "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                     "shared_expert_intermediate_size": 64, "architectures": ["Qwen3NextForCausalLM"],
                     "layer_types": ["linear_attention", "full_attention"],
                     "tie_word_embeddings": False},
           targets=("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba"),
           note="hybrid: gated delta net, with experts; `conv1d` and states are never touched"),
    Family(name="Mistral", shape="mistral", config="MistralConfig", folded=True, served=(),
           settings={"sliding_window": None, "tie_word_embeddings": False}),
    Family(name="Ministral 3", shape="ministral3", config="Ministral3Config", folded=True, served=(),
           settings={"head_dim": 32, "tie_word_embeddings": False}),
    Family(name="OLMo 2", shape="olmo2", config="Olmo2Config", folded=True, served=(),
           settings={"tie_word_embeddings": False}),
    Family(name="OLMo 3", shape="olmo3", config="Olmo3Config", folded=True, served=(),
           settings={**_SLIDING, "tie_word_embeddings": False}),
    Family(name="Gemma 2", shape="gemma2", config="Gemma2Config", folded=True, served=(),
           settings={"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
           note="tied head"),
    Family(name="Gemma 4 (text)", shape="gemma4", config="Gemma4TextConfig", folded=True, served=(),
           settings={"head_dim": 32, "global_head_dim": 32, "num_global_key_value_heads": 2,
                     "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, **_SLIDING},
           note="tied head; without per-layer embeddings and shared keys and values"),
    Family(name="Granite", shape="granite", config="GraniteConfig", folded=True, served=(),
           settings={"tie_word_embeddings": False}),
    Family(name="SmolLM3", shape="smollm3", config="SmolLM3Config", folded=True, served=(),
           settings={"tie_word_embeddings": True, "no_rope_layers": [1, 0]}, note="tied head"),
    Family(name="StarCoder 2", shape="starcoder2", config="Starcoder2Config", folded=True, served=(),
           settings={"sliding_window": None}, note="biases, tied head"),
    Family(name="Cohere 2", shape="cohere2", config="Cohere2Config", folded=True, served=(),
           settings={"head_dim": 32, "logit_scale": 1.0, **_SLIDING}, note="tied head"),
    Family(name="EXAONE 4", shape="exaone4", config="Exaone4Config", folded=True, served=(),
           settings={"head_dim": 32, "tie_word_embeddings": False, **_SLIDING}),
    Family(name="Llama with biases", shape="llama_biases", config="LlamaConfig", folded=True, served=(),
           settings={"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
           note="tied head"),
    Family(name="Qwen2 with YaRN", shape="qwen2_yarn", config="Qwen2Config", folded=True, served=(),
           settings={"rope_parameters": _YARN, "tie_word_embeddings": False}),
    Family(name="Qwen3-MoE", shape="qwen3_moe_attention", config="Qwen3MoeConfig", folded=True, served=(),
           settings={"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
                     "moe_intermediate_size": 64, "tie_word_embeddings": False},
           targets=("q_proj", "k_proj", "v_proj", "o_proj"), note="experts: `full` mode only"),
    Family(name="Mixtral", shape="mixtral", config="MixtralConfig", folded=True, served=(),
           settings={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
           targets=("q_proj", "k_proj", "v_proj", "o_proj"), note="experts: `full` mode only"),
    Family(name="OLMoE", shape="olmoe", config="OlmoeConfig", folded=True, served=(),
           settings={"num_experts": 4, "num_experts_per_tok": 2},
           targets=("q_proj", "k_proj", "v_proj", "o_proj"), note="experts: `full` mode only"),
    Family(name="gpt-oss", shape="gpt_oss", config="GptOssConfig", folded=True, served=(),
           settings={"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, **_SLIDING},
           targets=("q_proj", "k_proj", "v_proj", "o_proj"), note="experts: `full` mode only"),
    Family(name="DeepSeek-V2", shape="deepseek_v2", config="DeepseekV2Config", folded=True, served=(),
           settings=_LATENT, targets=_LATENT_TARGETS,
           note="MLA: what decode multiplies by follows every fold; no slot for `kv_b_proj`"),
    Family(name="DeepSeek-V3", shape="deepseek_v3", config="DeepseekV3Config", folded=True,
           served=(), settings={**_LATENT, "n_group": 1, "topk_group": 1}, targets=_LATENT_TARGETS,
           note="MLA, as DeepSeek-V2"),
)  # fmt: skip
BY_SHAPE = {family.shape: family for family in FAMILIES}


def make_config(shape: str, shared: Mapping[str, Any]) -> Any:
    """The transformers config of a tiny model of `shape`."""
    import transformers

    family = BY_SHAPE[shape]
    return getattr(transformers, family.config)(**{**shared, **family.settings})


def table() -> str:
    """`FAMILIES` as a Markdown table; `docs/models.md` holds it."""
    lines = [
        "| family | config class | adapter | merged | full | fold | adapter on | what is special |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        marks = " | ".join("served" if mode in family.served else "-" for mode in MODES)
        folded = "yes" if family.folded else "-"
        targets = "all linear layers"
        if family.targets != "all-linear":
            targets = ", ".join(f"`{target}`" for target in family.targets)
        lines.append(
            f"| {family.name} | `{family.config}` | {marks} | {folded} | {targets} | {family.note} |"
        )
    return "\n".join(lines) + "\n"


PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def page(text: str) -> str:
    """`text` of the page with the table of today."""
    head, mark, rest = text.partition("| family | config class |")
    assert mark, "the page has a table"
    after = rest.partition("\n\n")[2]
    return head + table() + (f"\n{after}" if after else "")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
