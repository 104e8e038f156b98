"""The tensors of an adapter file: which module's A or B each is, whatever its writer left in the names.

PEFT writes `base_model.model.X.lora_A.weight`. A raw state dict carries the adapter's name too, and the
wrappers of torch.compile, FSDP, DDP or activation checkpointing; they are taken out, but never what the
base itself has in its names. What is not LoRA of a linear layer is named as what it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from tink_rl.errors import AdapterFilesInvalid, UnsupportedAdapter
from tink_rl.policy.tensor_file import TensorEntry

logger = logging.getLogger("tink_rl")
PREFIX = "base_model.model."
"""What PEFT puts before the base model's own module names."""
MAX_NAME_LENGTH = 256
HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.(?P<adapter>.+))?\.weight")
_WRAPPERS = {
    "_orig_mod": "torch.compile's",
    "_fsdp_wrapped_module": "FSDP's",
    "_checkpoint_wrapped_module": "activation checkpointing's",
}
_DDP = "module."
_TINKER = (
    "`tinker_cookbook.weights.build_lora_adapter` writes PEFT's form (LoRA on the head it cannot keep: "
    "train with train_unembed=False)"
)
_WHOLE = (
    "publish the live model in full mode, or merge it (`tink-rl export --merged`) and serve that"
)

# What a tensor that is no `X.lora_[AB].weight` is, by its name; the first that matches says it.
_KINDS: tuple[tuple[str, str], ...] = (
    (r"\.lora_[ab]\.weight$", "is in torchtune's own format; let its FullModelHFCheckpointer save the "
     "adapter, which writes PEFT's adapter_model.safetensors beside it"),
    (r"\.lora_[ab]$", "is in MLX's format, whose matrices are transposed; `mlx_lm.fuse` writes a whole "
     "model, which can be served as a base"),
    (r"lora_(down|up)\b|^lora_(unet|te)", "is in kohya's format; convert the adapter to PEFT's"),
    (r"\.lora_embedding_[AB]", f"is LoRA on an embedding; leave it out of target_modules, or {_WHOLE}"),
    (r"\.lora_magnitude_vector", f"belongs to DoRA, which the config does not say; {_WHOLE}"),
    (r"\.lora_[AB](\..+)?\.bias$", f"is a bias of LoRA (lora_bias=True); train without, or {_WHOLE}"),
    (r"\.lora_E$|\.lora_E\.|\.ranknum", "belongs to AdaLoRA; merge the model with merge_and_unload() and "
     "serve that, or train plain LoRA"),
    (r"\.modules_to_save\.|\.original_module\.", "is of a raw state dict with trained modules; save the "
     f"adapter with PEFT's save_pretrained(), and {_WHOLE}"),
    (r"\.token_adapter\.|trainable_tokens", f"trains single tokens (trainable_token_indices); {_WHOLE}"),
    (r"\.base_layer\.", "is a weight of the base itself, of a raw state dict; save the adapter with PEFT's "
     "save_pretrained(), which leaves those out"),
    (r"\.ia3_l|\.hada_|\.lokr_|\.oft_|\.vera_|\.hra_u|prompt_embeddings", "is of another kind than LoRA, "
     "which the config does not say; save the adapter again with its own config"),
    (r"\.(weight|bias)$", f"is a whole tensor and no LoRA; {_WHOLE}"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Named:
    """The tensors of one file, by what they are."""

    modules: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    """Module in the base -> part ("A" or "B") -> tensor."""
    copies: dict[str, TensorEntry] = field(default_factory=dict)
    """Whole embeddings and heads, by their names in the base: to be compared with the base's own."""
    taken_out: set[str] = field(default_factory=set)
    """What was in the names and is neither PEFT's nor the base's, in words."""


def sort_tensors(
    entries: Iterable[TensorEntry],
    where: str,
    *,
    base: Collection[str] | None = None,
    as_written: bool = False,
) -> Named:
    """Which module and part each of `entries` is.

    Args:
        entries: Of one file.
        where: What error texts call it.
        base: Names of the base's modules, where it is known: nothing that it has is taken out.
        as_written: The names are ours: take nothing out.

    Raises:
        UnsupportedAdapter: a tensor that is not LoRA of a linear layer, or an ambiguous name.
        AdapterFilesInvalid: two tensors mean the same.
    """
    found, adapters = Named(), set[str]()
    for entry in entries:
        if len(entry.name) > MAX_NAME_LENGTH:
            raise UnsupportedAdapter(
                f"{where}: a tensor's name has {len(entry.name)} characters; at most {MAX_NAME_LENGTH}"
            )
        match = _LORA.fullmatch(entry.name)
        if match is None:
            _add_copy(found, entry, where)
            continue
        if match["adapter"]:
            adapters.add(match["adapter"])
            found.taken_out.add(f"{match['adapter']!r} (the adapter's name)")
        module = _module_of(match["module"], found.taken_out, where, base, as_written)
        _refuse_head(module, entry.name, where)
        parts = found.modules.setdefault(module, {})
        if match["part"] in parts:
            raise AdapterFilesInvalid(
                f"{where} holds {module}.lora_{match['part']} twice; save the adapter again",
                code="adapter_corrupt",
            )
        parts[match["part"]] = entry
    if len(adapters) > 1:
        raise UnsupportedAdapter(
            f"{where} holds the tensors of adapters {sorted(adapters)}; save one of them alone, with "
            "save_pretrained(DIR, selected_adapters=[NAME])"
        )
    if found.taken_out:
        logger.warning("%s: taken out of the names: %s", where, ", ".join(sorted(found.taken_out)))
    return found


def _module_of(
    name: str, taken_out: set[str], where: str, base: Collection[str] | None, as_written: bool
) -> str:
    plain = name.removeprefix(PREFIX)
    if as_written or (base is not None and plain in base):
        return plain
    words: set[str] = set()
    short = without_wrappers(name, words)
    if short.startswith(_DDP):
        inner = short
        while inner.startswith(_DDP):
            inner = inner.removeprefix(_DDP)
        if base is None:
            raise UnsupportedAdapter(
                f"{where}: names begin with {_DDP!r}, which is DDP's wrapper or a module of the base; name "
                "the base to tell them apart, or save model.module instead of the wrapped model"
            )
        if short not in base and inner in base:
            short = inner
            words.add(f"{_DDP!r} (DDP's or DataParallel's wrapper)")
    taken_out |= words
    return short


def without_wrappers(name: str, words: set[str]) -> str:
    """`name` without wrappers that no base has in its names, and without PEFT's prefix."""
    for wrapper in _WRAPPERS.keys() & set(name.split(".")):
        words.add(f"{wrapper + '.'!r} ({_WRAPPERS[wrapper]} wrapper)")
    short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    outer = short
    while outer.startswith(_DDP):
        outer = outer.removeprefix(_DDP)
    if outer != short and outer.startswith(PREFIX):  # around PEFT's model: no module of the base
        words.add(f"{_DDP!r} (DDP's or DataParallel's wrapper)")
        short = outer
    before, mark, rest = short.partition(f".{PREFIX}")
    if mark and not short.startswith(PREFIX):  # no base has PEFT's own words in its names
        words.add(f"{before + '.'!r} (a wrapper around PEFT's model)")
        short = f"{PREFIX}{rest}"
    short = short.removeprefix(PREFIX)
    while short.startswith(PREFIX):
        words.add(f"{PREFIX!r} (PEFT's prefix, twice)")
        short = short.removeprefix(PREFIX)
    return short


def _refuse_head(module: str, name: str, where: str) -> None:
    last = module.rpartition(".")[2]
    if last == "unembed_tokens":
        raise UnsupportedAdapter(
            f"{where}: tensor {name!r} is LoRA on the head (Tinker's unembed_tokens); {_TINKER}"
        )
    if last in HEADS + EMBEDDINGS:
        what = "the head" if last in HEADS else "an embedding"
        raise UnsupportedAdapter(
            f"{where}: tensor {name!r} is LoRA on {what}; leave {last} out of target_modules, or {_WHOLE}"
        )


def _add_copy(found: Named, entry: TensorEntry, where: str) -> None:
    short = without_wrappers(entry.name, set())
    while short.startswith(_DDP):
        short = short.removeprefix(_DDP)
    module, _, kind = short.rpartition(".")
    module = module.removesuffix(".base_layer")
    if kind == "weight" and module.rpartition(".")[2] in HEADS + EMBEDDINGS:
        found.copies[f"{module}.weight"] = entry
        return
    says = next((text for pattern, text in _KINDS if re.search(pattern, entry.name)), None)
    raise UnsupportedAdapter(
        f"{where}: tensor {entry.name[:200]!r} "
        + (says or "has a name that no adapter of PEFT has; save it with PEFT's save_pretrained()")
    )


def expert_shapes(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why the matrices of module `name` are none, where their shapes say it; None if they may be right."""
    a, b = shapes["A"], shapes["B"]
    given = f"{name} has A {list(a)} and B {list(b)}"
    if len(a) == 3 or len(b) == 3:
        return f"{given}: one matrix per expert in one tensor, as in a raw Tinker export; {_TINKER}"
    if not all(a + b) and ".experts" in name:
        return f"{given}: empty, as a raw Tinker export has it for experts; {_TINKER}"
    if not all(a + b) or len(a) != 2 or len(b) != 2:
        return (
            f"{given}, expected two matrices; under ZeRO-3 or FSDP gather the parameters before "
            "save_pretrained(), as Trainer.save_model() does"
        )
    return None


def adapts_table(name: str) -> bool:
    """Whether the tensor `name` is LoRA on an embedding or a head."""
    match = _LORA.fullmatch(name)
    last = match["module"].rpartition(".")[2] if match else ""
    return ".lora_embedding_" in name or last in HEADS + EMBEDDINGS


def renamed(name: str, base: Collection[str] | None = None) -> str:
    """The tensor's name as PEFT writes it, without wrappers and adapter's name."""
    match = _LORA.fullmatch(name)
    if match is None:
        return name
    try:
        module = _module_of(match["module"], set(), "", base, False)
    except UnsupportedAdapter:
        return name
    return f"{PREFIX}{module}.lora_{match['part']}.weight"
