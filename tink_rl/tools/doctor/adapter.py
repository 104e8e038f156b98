"""A PEFT directory: what each sync mode will do with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tink_rl import errors
from tink_rl.policy.adapter import Adapter, check_values, from_peft_dir
from tink_rl.policy.adapter_folder import find_adapter
from tink_rl.policy.model_dir import local_model_dir
from tink_rl.policy.peft_dir import read_config, read_tensors
from tink_rl.policy.shapes import BaseShapes
from tink_rl.policy.support import (
    EMBEDDING,
    HEAD,
    TIED,
    Needs,
    needs,
    unsupported_reasons,
)
from tink_rl.settings import LORA_RANKS, slot_for
from tink_rl.tools.doctor.finding import Finding, blocker, note, ok, warning
from tink_rl.types import ServerStatus, SyncMode

_WITHOUT = "train without that feature"
_MISFITS = (
    errors.AdapterFilesInvalid,
    errors.AdapterPathMissing,
    errors.PathNotAllowed,
    errors.BaseMismatch,
    errors.ShapeMismatch,
)


def check_adapter(directory: str | Path, status: ServerStatus | None = None) -> list[Finding]:
    """What is in `directory`, and what each mode (of the server behind `status`) does with it."""
    try:
        return _check(find_adapter(directory), status)
    except errors.UnsupportedAdapter as error:
        return [_said(error, _WITHOUT)]
    except _MISFITS as error:
        return [_said(error, "save it again with PEFT's save_pretrained")]
    except errors.NonFiniteWeights as error:
        return [blocker("adapter", error.message, "resume from an earlier checkpoint")]


def _said(error: errors.TinkError, fix: str) -> Finding:
    """The error with its own remedy, which stands after the last semicolon."""
    what, mark, remedy = error.message.rpartition("; ")
    return blocker("adapter", what, remedy) if mark else blocker("adapter", remedy, fix)


def _check(directory: Path, status: ServerStatus | None) -> list[Finding]:
    config = read_config(directory)
    if not unsupported_reasons(config):
        try:
            return _by_itself(from_peft_dir(directory, base=_base(config)), status)
        except errors.UnsupportedAdapter:  # by its tensors, which the config does not tell of
            if not _model_facts(config, read_tensors(directory)):
                raise
    if needs(config).refused:
        return _refused(needs(config))
    tensors = read_tensors(directory)
    check_values(tensors)
    facts = _model_facts(config, tensors)
    needed = needs(config | facts)
    if needed.refused:
        return _refused(needed)
    if SyncMode.ADAPTER in needed.modes:
        return _on_changed_base(config, tensors, status)
    return [*_only_whole(needed, status), *_perhaps_tied(facts)]


# -- what the files say -----------------------------------------------------------------------------


def _model_facts(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, bool | None]:
    """What the adapter sits on, as `support.model_facts` says it of a live model; empty: linear layers."""
    found: dict[str, bool | None] = {}
    if any(".lora_embedding_A" in name for name in tensors):
        found[EMBEDDING] = True
    if any(f"{head}.lora_A." in name for name in tensors for head in ("lm_head", "embed_out")):
        found[HEAD] = True
    return found | {TIED: _is_tied(config)} if found else {}


def _base(config: Mapping[str, Any]) -> BaseShapes | None:
    """The base that the config names, where it is at hand."""
    try:
        revision = config.get("revision")
        base = local_model_dir(str(config.get("base_model_name_or_path") or ""), revision=revision)
        return BaseShapes.from_model_dir(base)
    except (errors.ConfigError, OSError, ValueError):
        return None


def _is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the base shares embedding and head; None where the base is not at hand."""
    from transformers import AutoConfig

    try:
        base = local_model_dir(str(config.get("base_model_name_or_path")))
        text = AutoConfig.from_pretrained(base).get_text_config()
    except (errors.ConfigError, OSError, ValueError):
        return None
    return bool(getattr(text, "tie_word_embeddings", False))


# -- what the modes do with it ----------------------------------------------------------------------


def _refused(needed: Needs) -> list[Finding]:
    found = []
    for reason in needed.refused:
        what, _, fix = reason.rpartition("; ")
        found.append(blocker("adapter", f"no mode takes it: {what or reason}", fix or _WITHOUT))
    return found


def _by_itself(adapter: Adapter, status: ServerStatus | None) -> list[Finding]:
    check_values(adapter.tensors)
    size = sum(tensor.numel() for tensor in adapter.tensors.values())
    text = f"rank {adapter.rank}, {len(adapter.modules)} modules, {size:,} parameters"
    return [ok("adapter", text), *_effect(adapter), *_modes(adapter.rank, size, status)]


def _effect(adapter: Adapter) -> list[Finding]:
    moved = any(torch.any(t) for name, t in adapter.tensors.items() if name.endswith("B.weight"))
    if moved:
        return []
    return [warning("adapter", "B is zero everywhere: it computes what the base does", "train it")]


def _modes(rank: int, size: int, status: ServerStatus | None) -> list[Finding]:
    return [_slot(rank, size, status), _merged(size, status), _whole(status)]


def _on_changed_base(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], status: ServerStatus | None
) -> list[Finding]:
    """Its initialisation wrote to the base: A and B mean nothing without what it wrote."""
    rank = max((t.shape[0] for name, t in tensors.items() if ".lora_A." in name), default=0)
    size = sum(tensor.numel() for tensor in tensors.values())
    text = f"init_lora_weights={config['init_lora_weights']!r} changed the base weights: these files alone"
    fix = (
        "train on with the live model, or save it again with "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )
    modes = _modes(2 * rank, 2 * size, status)  # the delta against the original base
    return [
        warning("adapter", f"{text} are wrong, and nothing takes them", fix),
        *(replace(f, what=f"from the live model: {f.what}") for f in modes),
    ]


def _only_whole(needed: Needs, status: ServerStatus | None) -> list[Finding]:
    """More than a delta of linear layers: no adapter can say it, whole tensors can."""
    because = ", ".join(needed.because)
    if status is not None and SyncMode.FULL not in status.modes:
        what = f"{because} needs mode full, this server offers {', '.join(status.modes)}"
        return [blocker("adapter", what, f"tink-rl serve MODEL --mode full, or {_WITHOUT}")]
    return [
        warning(
            "adapter", f"{because}: whole tensors only", f"SyncConfig(mode='full'), or {_WITHOUT}"
        ),
        note("modes adapter, merged", "refused, for that reason"),
        ok("mode full", "the tensors that it changes, whole, from the live model of the trainer"),
    ]


def _perhaps_tied(facts: Mapping[str, bool | None]) -> list[Finding]:
    if facts.get(TIED, False) is not None:
        return []
    what = "its base is not at hand: where that ties embedding and head, no mode takes it"
    return [note("adapter", what, "hf download BASE, and ask again")]


def _whole(status: ServerStatus | None) -> Finding:
    if status is not None and SyncMode.FULL not in status.modes:
        return note("mode full", f"refused: this server offers {', '.join(status.modes)}")
    return ok("mode full", "every tensor that it touches, whole: works, at the cost of the bytes")


def _slot(rank: int, size: int, status: ServerStatus | None) -> Finding:
    fits = slot_for(rank)
    if fits is None:
        text = f"refused: rank {rank} is above vLLM's largest slot ({LORA_RANKS[-1]})"
        return note("mode adapter", text, "use merged mode")
    if status is None:
        text = f"into a slot of rank {fits}, {size * 2 / 2**20:.2f} MiB a publish in bf16"
        return ok("mode adapter", f"{text}; server: --max-lora-rank {fits}")
    if "adapter" not in status.modes:
        text = f"refused: this server offers {', '.join(status.modes)}"
        return note("mode adapter", text, "tink-rl serve MODEL --mode both")
    if rank > status.max_lora_rank:
        return blocker(
            "mode adapter",
            f"refused: rank {rank} is above this server's slots ({status.max_lora_rank})",
            f"tink-rl serve MODEL --max-lora-rank {fits}, or merged mode",
        )
    bytes_each = getattr(torch, status.adapter_dtype).itemsize
    text = f"into a slot, {size * bytes_each / 2**20:.2f} MiB a publish in {status.adapter_dtype}"
    return ok("mode adapter", text)


def _merged(size: int, status: ServerStatus | None) -> Finding:
    text = f"folded into the base in fp32, {size * 4 / 2**20:.2f} MiB a publish"
    if status is None:
        return ok("mode merged", f"{text}; exact on a float32 server, rounded below")
    if "merged" not in status.modes:
        refused = f"refused: this server offers {', '.join(status.modes)}"
        return note("mode merged", refused, "tink-rl serve MODEL --mode both")
    if status.dtype == "float32":
        return ok("mode merged", f"{text}; exact")
    return ok("mode merged", f"{text}; rounded to {status.dtype}, the start-up probe measures it")
