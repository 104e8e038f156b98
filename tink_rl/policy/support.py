"""What each feature of peft gets: which sync modes can express it, and why not where none can. Pure.

`FEATURES` is the one list: it decides, and `docs/modes.md` is made from it. Every field of peft's
`LoraConfig` is accounted for: a field that is set and that no row knows is refused, because a new
feature of peft may change what the adapter means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tink_rl.errors import UnsupportedAdapter
from tink_rl.policy.peft_names import PeftModel
from tink_rl.types import SyncMode

ALL = (SyncMode.ADAPTER, SyncMode.MERGED, SyncMode.FULL)
WHOLE = (SyncMode.FULL,)

# Facts about the model, beside the fields of its adapter's config; absent where only files are known.
EMBEDDING, HEAD, TIED, QUANTIZED = "model.embedding", "model.head", "model.tied", "model.quantized"


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One row: `Feature(name="DoRA", field="use_dora", modes=(SyncMode.FULL,), why="...")`."""

    name: str
    setting: str
    """As a user writes it."""
    modes: tuple[SyncMode, ...]
    """What can express it; empty: refused."""
    why: str
    """How it is done, or what to do instead."""
    used: Callable[[Mapping[str, Any]], bool]
    """Whether facts (a config as a dict, with the model's) use it."""
    fields: tuple[str, ...] = ()
    """Fields of the config that this row accounts for."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an adapter needs."""

    modes: tuple[SyncMode, ...] = ALL
    """Modes that express all of it."""
    because: tuple[str, ...] = ()
    """Features that leave out a mode, with what is done about them."""
    refused: tuple[str, ...] = ()
    """Why nothing can express it, with remedies; empty if something can."""
    rank: int = 0
    """The largest rank that travels, which a slot must hold; 0: not known."""


def _set(field: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda facts: bool(facts.get(field))


def _init(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    def used(facts: Mapping[str, Any]) -> bool:
        return _init_of(facts) in names

    return used


def _init_of(facts: Mapping[str, Any]) -> str:
    value = facts.get("init_lora_weights", True)
    if not isinstance(value, str):
        return "default"
    return "pissa" if value.startswith("pissa") else value.lower()


def _type_of(facts: Mapping[str, Any]) -> str:
    return str(facts.get("peft_type") or "LORA").rpartition(".")[2]


_MERGING = ("LOHA", "LOKR", "IA3", "OFT", "VERA", "HRA")
_KEEPING = ("default", "gaussian", "eva", "orthogonal", "mixture")
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _row(
    name: str, setting: str, modes: tuple[SyncMode, ...], why: str, used: Any, *fields: str
) -> Feature:
    return Feature(name=name, setting=setting, modes=modes, why=why, used=used, fields=fields)


def _refused(name: str, field: str, why: str) -> Feature:
    return _row(name, f"{field}=...", (), why, _set(field), field)


FEATURES: tuple[Feature, ...] = (
    _row("LoRA on linear layers", 'target_modules="all-linear"', ALL,
         "scaling is folded into B", lambda facts: _type_of(facts) == "LORA",
         "r", "lora_alpha", "target_modules", "exclude_modules", "task_type", "peft_type",
         "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
         "megatron_core", "runtime_config"),
    _row("rsLoRA", "use_rslora=True", ALL, "its scaling is folded into B",
         _set("use_rslora"), "use_rslora"),
    _row("Rank per module", "rank_pattern={...}", ALL,
         "each module has its own rank (vLLM itself ignores the pattern in silence)",
         _set("rank_pattern"), "rank_pattern"),
    _row("Alpha per module", "alpha_pattern={...}", ALL,
         "each module's scaling is folded into its B (vLLM itself ignores it)",
         _set("alpha_pattern"), "alpha_pattern"),
    _row("Some layers only", "layers_to_transform=[...]", ALL, "what it matched is what travels",
         lambda facts: facts.get("layers_to_transform") is not None or bool(facts.get("layers_pattern")),
         "layers_to_transform", "layers_pattern"),
    _row("Dropout", "lora_dropout=0.1", ALL,
         "acts in training only; it makes the importance ratio noisy",
         _set("lora_dropout"), "lora_dropout"),
    _row("Gaussian, orthogonal or EVA initialisation", 'init_lora_weights="gaussian"', ALL,
         "the base stays as it is", _init(*_KEEPING[1:]), "init_lora_weights", "eva_config"),
    _row("PiSSA", 'init_lora_weights="pissa"', ALL,
         "as a delta of rank 2r against the checkpoint's base; `full` if the change is not of rank r, or "
         "that base is not known", _init("pissa")),
    _row("OLoRA", 'init_lora_weights="olora"', ALL, "as PiSSA", _init("olora")),
    _row("CorDA", 'init_lora_weights="corda"', ALL, "as PiSSA", _init("corda"), "corda_config"),
    _row("LoRA-GA", 'init_lora_weights="lora_ga"', ALL, "as PiSSA", _init("lora_ga"),
         "lora_ga_config"),
    _row("LoftQ", 'init_lora_weights="loftq"', WHOLE,
         "the base is replaced by a quantised one, a change of full rank: whole tensors",
         _init("loftq"), "loftq_config"),
    _row("QLoRA", "load_in_4bit=True (the trainer's base)", ALL,
         "the adapter joins the server's own, unquantised base; the start-up probe shows the gap",
         _set(QUANTIZED)),
    _row("DoRA", "use_dora=True", WHOLE, "whole tensors, merged in fp32 into temporaries",
         _set("use_dora"), "use_dora"),
    _row("Bias in lora_B", "lora_bias=True", WHOLE, "whole tensors; the layers must have a bias",
         _set("lora_bias"), "lora_bias"),
    _row("Trained biases", 'bias="all"', WHOLE, "whole tensors of the layers that have one",
         lambda facts: (facts.get("bias") or "none") != "none", "bias"),
    _row("Trained modules", 'modules_to_save=["norm"]', WHOLE,
         "whole tensors; a tied head must stay tied (ensure_weight_tying=True)",
         _set("modules_to_save"), "modules_to_save", "ensure_weight_tying"),
    _row("Trained token embeddings", "trainable_token_indices=[...]", WHOLE,
         "the embedding as a whole, and the head with it where they are tied",
         _set("trainable_token_indices"), "trainable_token_indices"),
    _row("LoRA on the embedding", 'target_modules=["embed_tokens", ...]', WHOLE,
         "the embedding as a whole", lambda f: bool(f.get(EMBEDDING)) and not f.get(TIED)),
    _row("LoRA on the head", 'target_modules=["lm_head", ...]', WHOLE, "the head as a whole",
         lambda f: bool(f.get(HEAD)) and not f.get(TIED)),
    _row("LoRA on a tied embedding or head", 'target_modules=["lm_head", ...], tied', (),
         "PEFT adapts one of the two, the server holds one tensor for both; leave it out of "
         "target_modules, or start from a base with tie_word_embeddings=False",
         lambda f: bool(f.get(TIED)) and bool(f.get(EMBEDDING) or f.get(HEAD))),
    _row("LoRA on MoE experts", 'target_parameters=["mlp.experts.gate_up_proj"]', WHOLE,
         "all experts of a touched layer as a whole", _set("target_parameters"), "target_parameters"),
    _row("LoHa, LoKr, IA3, OFT, VeRA, HRA", "LoHaConfig(...)", WHOLE,
         "whole tensors, merged by PEFT's own arithmetic", lambda f: _type_of(f) in _MERGING),
    _row("AdaLoRA", "AdaLoraConfig(...)", (),
         "its ranks are scaled by a third matrix; merge it with merge_and_unload() and serve that, or "
         "train with LoraConfig", lambda f: _type_of(f) == "ADALORA"),
    _row("Prompt learning and every other kind", "PromptTuningConfig(...)", (),
         "it cannot be merged into weights; use LoRA",
         lambda f: _type_of(f) not in ("LORA", "ADALORA", *_MERGING)),
    _row("Unknown initialisations", 'init_lora_weights="..."', (),
         "it may change the base; use init_lora_weights=True",
         lambda f: _init_of(f) not in (*_KEEPING, *_CHANGING)),
    _refused("Replicated layers", "layer_replication",
             "layers are replicated, which changes the base; set layer_replication=None"),
    _refused("Transposed weights (GPT-2's Conv1D)", "fan_in_fan_out",
             "transposed (Conv1D) base weights are not supported; use a model with linear layers"),
    _refused("Activated LoRA", "alora_invocation_tokens",
             "it depends on the prompt; set alora_invocation_tokens=None"),
    _refused("QALoRA", "use_qalora", "it pools its input; train with use_qalora=False"),
    _refused("MonteCLoRA", "monteclora_config", "it samples its weights; set monteclora_config=None"),
    _refused("Block-diagonal LoRA", "use_bdlora", "not supported; set use_bdlora=None"),
    _refused("Arrow", "arrow_config", "it routes between adapters; set arrow_config=None"),
    _refused("KaSA", "kasa_config", "it changes the base weights; set kasa_config=None"),
    _refused("VeLoRA", "velora_config", "not supported; set velora_config=None"),
    _refused("Megatron's parallel layers", "megatron_config",
             "export the adapter to plain PEFT first"),
)  # fmt: skip
_INACTIVE = frozenset(("qalora_group_size",))  # acts only through another field
_KNOWN = _INACTIVE | {field for feature in FEATURES for field in feature.fields}


def needs(facts: Mapping[str, Any]) -> Needs:
    """What an adapter with these facts needs.

    Args:
        facts: `LoraConfig.to_dict()` or `adapter_config.json`, and what is known of the model
            (`model_facts`).
    """
    used = [feature for feature in FEATURES if feature.used(facts)]
    modes = tuple(mode for mode in ALL if all(mode in f.modes for f in used if f.modes))
    refused = [f"{f.setting.partition('=')[0]}: {f.name}: {f.why}" for f in used if not f.modes]
    if _type_of(facts) == "LORA":
        refused += [
            f"{name}={value!r} is not known to this release"
            for name, value in facts.items()
            if value and name not in _KNOWN and not name.startswith("model.")
        ]
    if not refused and not modes:
        refused = [f"no mode takes {' and '.join(f.name for f in used if f.modes != ALL)} together"]
    return Needs(
        modes=() if refused else modes,
        because=tuple(f"{f.name} ({f.setting})" for f in used if f.modes not in ((), ALL)),
        refused=tuple(refused),
    )


def model_facts(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    """The facts of a live PEFT model: its adapter's config, and what the adapter sits on."""
    facts: dict[str, Any] = model.peft_config[adapter_name].to_dict()
    targets = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if hasattr(layer, "base_layer") and adapter_name in getattr(layer, "r", ())
    }
    config = model.config.get_text_config() if hasattr(model, "config") else None
    return {
        **facts,
        EMBEDDING: "embed_tokens" in targets,
        HEAD: bool(targets & {"lm_head", "embed_out"}),
        TIED: bool(getattr(config, "tie_word_embeddings", False)),
        QUANTIZED: bool(getattr(model.get_base_model(), "is_quantized", False)),
    }


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether the initialisation wrote to the base weights, by a difference that may be low-rank."""
    return _init_of(config) in _CHANGING


def unsupported_reasons(config: Mapping[str, Any]) -> list[str]:
    """Why an adapter of this configuration means nothing by its own A and B; empty if it does.

    Args:
        config: `adapter_config.json`, or `LoraConfig.to_dict()`.
    """
    found = needs(config)
    if found.refused:
        return list(found.refused)
    used = [f for f in FEATURES if f.used(config)]
    reasons = [
        f"{f.name} ({f.setting}): needs the live model and {' or '.join(f.modes)} mode: {f.why}"
        for f in used
        if SyncMode.ADAPTER not in f.modes
    ]
    if not reasons and changes_base(config):
        reasons = [
            f"init_lora_weights={config['init_lora_weights']!r} changed the base weights, so A and B alone "
            "are wrong: publish the live model, or save it with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        ]
    return reasons


def check_supported(config: Mapping[str, Any], *, where: str) -> None:
    """Raise unless A and B of an adapter with this `config` say all of it.

    Raises:
        UnsupportedAdapter: with every reason and its remedy.
    """
    reasons = unsupported_reasons(config)
    if reasons:
        raise UnsupportedAdapter(f"{where} cannot be published: {'; '.join(reasons)}")


def table() -> str:
    """`FEATURES` as a Markdown table; `docs/modes.md` holds it."""
    lines = [
        "| feature of peft | as set | adapter | merged | full | how, or what instead |",
        "|---|---|---|---|---|---|",
    ]
    for feature in FEATURES:
        marks = " | ".join("yes" if mode in feature.modes else "no" for mode in ALL)
        if not feature.modes:
            marks = " | ".join(["refused"] * 3)
        lines.append(f"| {feature.name} | `{feature.setting}` | {marks} | {feature.why} |")
    return "\n".join(lines) + "\n"


def _write_page() -> None:
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs" / "modes.md"
    head, mark, rest = page.read_text().partition("| feature of peft |")
    after = rest.partition("\n\n")[2] if mark else ""
    page.write_text(head + table() + ("\n" + after if after else ""))


if __name__ == "__main__":
    _write_page()
