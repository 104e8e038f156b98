"""How many LoRA tensors TRL's server mode would send unmerged, shown on TRL's and vLLM's own code.

TRL's iterator merges the adapter, yields views of the weights, and unmerges when it is asked for the
item after the last one. vLLM's packer collects views and copies them only when a chunk exceeds its
size or the iterator has ended. So the last, unfilled chunk is copied after the unmerge: base weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tink_rl.policy.fingerprint import checkpoint_index
from tink_rl.policy.model_dir import local_model_dir
from tink_rl.tools.doctor.finding import Finding, blocker, bytes_text, note, ok

if TYPE_CHECKING:
    import torch

_LARGEST_REAL_BYTES = 4 * 2**30
"""Beyond this the weights stay on the meta device: shapes alone decide what a chunk holds."""


@dataclass(frozen=True, kw_only=True)
class SendCheck:
    """What one weight sync of stock TRL sent.

    Example: `SendCheck(num_adapted=28, num_unmerged=28, num_chunks=1, num_bytes=1048576, by="values")`
    """

    num_adapted: int
    """Base weights that carry a LoRA."""
    num_unmerged: int
    """Those of them that were sent without it."""
    num_chunks: int
    num_bytes: int
    by: str
    """"values": the bytes that were packed were compared; "shapes": no bytes, only the order of events."""


def check_trl(model: str | Path, *, rank: int = 16, dtype: str | None = None) -> list[Finding]:
    """What stock TRL's `use_vllm=True, vllm_mode="server"` would send of `model` with a LoRA.

    Raises:
        ConfigError: `model` is not a model directory or cached hub id.
        ImportError: trl, peft or vLLM is not installed.
    """
    found = send(model, rank=rank, dtype=dtype)
    text = (
        f"{found.num_unmerged} of {found.num_adapted} LoRA tensors would be sent unmerged "
        f"({found.num_chunks} chunks, {bytes_text(found.num_bytes)}, seen by {found.by})"
    )
    how = "trl's own iterator into vLLM's own packer, one sync in server mode, all-linear LoRA"
    findings = [note("trl", how)]
    if found.num_unmerged:
        fix = "from tink_rl import GRPOTrainer (docs/trainers.md): it sends the adapter"
        return [*findings, blocker("trl", text, fix)]
    return [*findings, ok("trl", text)]


def send(
    model: str | Path,
    *,
    rank: int = 16,
    dtype: str | None = None,
    buffer_bytes: int | None = None,
    by: str | None = None,
) -> SendCheck:
    """Run one sync's packing for `model`.

    Args:
        model: Model directory, or cached hub id.
        rank: Of the all-linear LoRA.
        dtype: That the trainer loads the base in; None: float32, TRL's default.
        buffer_bytes: Size of a chunk; None: vLLM's (1 GiB).
        by: "values" or "shapes"; None: values where the model is small enough.
    """
    import torch
    from vllm.distributed.weight_transfer import packed_tensor

    directory = local_model_dir(model)
    loaded: torch.dtype = getattr(torch, dtype or "float32")
    if by is None:
        by = "values" if _num_bytes(directory, loaded) <= _LARGEST_REAL_BYTES else "shapes"
    policy = _with_lora(directory, loaded, rank, real=by == "values")
    limit = buffer_bytes or packed_tensor.DEFAULT_PACKED_BUFFER_SIZE_BYTES
    adapted = _adapted(policy)
    merged = _merged_values(policy) if by == "values" else {}
    unmerged = num_chunks = num_bytes = 0
    with _unmerge_watched(policy) as ended:
        items = _trl_iterator(policy)
        while chunk := packed_tensor.pack_tensors(items, lambda item: item[1], limit):
            num_chunks, num_bytes = num_chunks + 1, num_bytes + sum(chunk.tensor_sizes)
            if by == "shapes":
                unmerged += sum(name in adapted for name in chunk.names) if ended() else 0
                continue
            for name, tensor in packed_tensor.unpack_tensor(
                chunk.packed_tensor, chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes
            ):
                unmerged += name in adapted and _is_base(tensor, adapted[name], merged[name])
    return SendCheck(
        num_adapted=len(adapted),
        num_unmerged=unmerged,
        num_chunks=num_chunks,
        num_bytes=num_bytes,
        by=by,
    )


def _num_bytes(directory: Path, dtype: torch.dtype) -> int:
    import math

    numbers = sum(math.prod(entry.shape) for entry in checkpoint_index(directory).values())
    return numbers * dtype.itemsize


def _with_lora(directory: Path, dtype: torch.dtype, rank: int, *, real: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    # B is not zero, or merged and unmerged would be the same.
    lora = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    if real:
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        return get_peft_model(base, lora)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
        return get_peft_model(base, lora)


def _trl_iterator(policy: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """TRL's own generator over what it sends; one process, nothing sharded."""
    from trl.generation.vllm_generation import VLLMGeneration

    generation = VLLMGeneration.__new__(VLLMGeneration)  # its __init__ would look for a server
    generation.model = policy
    generation._dist = SimpleNamespace(gather_params=lambda _: nullcontext(), is_fsdp=False)
    items: Iterator[tuple[str, torch.Tensor]] = generation._iter_named_params()
    return items


def _layers(policy: Any) -> Iterator[tuple[str, Any]]:
    for name, layer in policy.named_modules():
        if getattr(layer, "lora_A", None):
            yield f"{name.removeprefix('base_model.model.')}.weight", layer


def _adapted(policy: Any) -> dict[str, torch.Tensor]:
    return {name: layer.base_layer.weight.detach().clone() for name, layer in _layers(policy)}


def _merged_values(policy: Any) -> dict[str, torch.Tensor]:
    return {
        name: layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
        for name, layer in _layers(policy)
    }


def _is_base(sent: torch.Tensor, base: torch.Tensor, merged: torch.Tensor) -> bool:
    # Merging and unmerging in place rounds, so neither is met bit for bit: which one is nearer?
    return bool((sent - base).abs().sum() < (sent - merged).abs().sum())


@contextmanager
def _unmerge_watched(policy: Any) -> Iterator[Any]:
    """Whether `unmerge_adapter` was called since the block began."""
    calls: list[bool] = []
    original = policy.unmerge_adapter

    def unmerge() -> None:
        calls.append(True)
        original()

    policy.unmerge_adapter = unmerge
    try:
        yield lambda: bool(calls)
    finally:
        del policy.unmerge_adapter
