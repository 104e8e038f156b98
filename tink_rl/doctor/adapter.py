"""A PEFT directory: what each sync mode will do with it."""

from __future__ import annotations

from pathlib import Path

import torch

from tink_rl import errors
from tink_rl.doctor.finding import Finding, blocker, note, ok, warning
from tink_rl.policy.adapter import Adapter, check_values, from_peft_dir
from tink_rl.settings import LORA_RANKS
from tink_rl.types import ServerStatus, SyncMode


def check_adapter(directory: str | Path, status: ServerStatus | None = None) -> list[Finding]:
    """What is in `directory`, and what each mode (of the server behind `status`) does with it."""
    try:
        adapter = from_peft_dir(directory)
    except errors.UnsupportedAdapter as error:
        return _only_whole(error, status)
    except errors.AdapterFilesInvalid as error:
        return [blocker("adapter", error.message, "save it again with PEFT's save_pretrained")]
    try:
        check_values(adapter.tensors)
    except errors.TinkError as error:
        return [blocker("adapter", error.message, "resume from an earlier checkpoint")]
    size = sum(tensor.numel() for tensor in adapter.tensors.values())
    text = f"rank {adapter.rank}, {len(adapter.modules)} modules, {size:,} parameters"
    return [ok("adapter", text), *_effect(adapter), *_modes(adapter, size, status)]


def _effect(adapter: Adapter) -> list[Finding]:
    moved = any(torch.any(t) for name, t in adapter.tensors.items() if name.endswith("B.weight"))
    if moved:
        return []
    return [warning("adapter", "B is zero everywhere: it computes what the base does", "train it")]


def _modes(adapter: Adapter, size: int, status: ServerStatus | None) -> list[Finding]:
    return [_slot(adapter, size, status), _merged(size, status), _whole(status)]


def _only_whole(error: errors.UnsupportedAdapter, status: ServerStatus | None) -> list[Finding]:
    """More than a delta of linear layers: no adapter can say it, whole tensors can."""
    if status is not None and SyncMode.FULL not in status.modes:
        fix = "train without that feature, or serve from a server that offers full mode"
        return [blocker("adapter", error.message, fix)]
    return [
        warning("adapter", error.message, "SyncConfig(mode='full'), or train without that feature"),
        note("modes adapter, merged", "refused, for that reason"),
        ok("mode full", "the tensors that it changes, whole, from the live model of the trainer"),
    ]


def _whole(status: ServerStatus | None) -> Finding:
    if status is not None and SyncMode.FULL not in status.modes:
        return note("mode full", f"refused: this server offers {', '.join(status.modes)}")
    return ok("mode full", "every tensor that it touches, whole: works, at the cost of the bytes")


def _slot(adapter: Adapter, size: int, status: ServerStatus | None) -> Finding:
    fits = next((rank for rank in LORA_RANKS if rank >= adapter.rank), None)
    if fits is None:
        text = f"refused: rank {adapter.rank} is above vLLM's largest slot ({LORA_RANKS[-1]})"
        return note("mode adapter", text, "use merged mode")
    if status is None:
        text = f"into a slot of rank {fits}, {size * 2 / 2**20:.2f} MiB a publish in bf16"
        return ok("mode adapter", f"{text}; server: --max-lora-rank {fits}")
    if "adapter" not in status.modes:
        text = f"refused: this server offers {', '.join(status.modes)}"
        return note("mode adapter", text, "tink-rl serve MODEL --mode both")
    if adapter.rank > status.max_lora_rank:
        return blocker(
            "mode adapter",
            f"refused: rank {adapter.rank} is above this server's slots ({status.max_lora_rank})",
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
