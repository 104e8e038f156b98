"""One adapter written as the store has it: float32, one rank, scaling folded in, checked on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tink_rl.errors import AdapterFilesInvalid
from tink_rl.policy.adapter_folder import CONFIG_FILE
from tink_rl.policy.peft_dir import MAX_CONFIG_BYTES, MAX_FILE_BYTES, WEIGHTS_FILE, PeftDir
from tink_rl.policy.tensor_file import MAX_HEADER_BYTES, float32_header, header_too_large
from tink_rl.policy.tensor_names import PREFIX

if TYPE_CHECKING:
    import torch

    from tink_rl.policy.peft_dir import LoraModule

MAX_STORED_BYTES = 2 * MAX_FILE_BYTES
"""Twice the largest source: a bfloat16 file doubles."""


def layout_of(adapter: PeftDir) -> list[tuple[str, tuple[int, int]]]:
    """Name and shape of every tensor that will be stored.

    Raises:
        AdapterFilesInvalid: they would be too large.
    """
    shapes = []
    for module in adapter.modules:
        rows, columns = module.shape
        shapes.append((f"{PREFIX}{module.name}.lora_A.weight", (adapter.rank, columns)))
        shapes.append((f"{PREFIX}{module.name}.lora_B.weight", (rows, adapter.rank)))
    num_bytes = sum(4 * height * width for _, (height, width) in shapes)
    if num_bytes > MAX_STORED_BYTES:
        raise AdapterFilesInvalid(
            f"{adapter.where}: as float32 of rank {adapter.rank} it takes {num_bytes} bytes, allowed are "
            f"{MAX_STORED_BYTES}; register an adapter of lower rank or fewer modules",
            given=num_bytes,
            expected=MAX_STORED_BYTES,
            code="adapter_too_large",
        )
    return shapes


def _config_bytes(adapter: PeftDir) -> bytes:
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": [module.name for module in adapter.modules],
    }
    return json.dumps(config, indent=1, sort_keys=True).encode() + b"\n"


def write_normalised(
    adapter: PeftDir, layout: Sequence[tuple[str, tuple[int, int]]], directory: Path
) -> tuple[str, int]:
    """Write both files and flush them to the disk; the digest, and the bytes of the weights."""
    from blake3 import blake3

    config, header = _config_bytes(adapter), float32_header(layout)
    _check_readable(adapter, config, header)
    hasher = blake3(config + b"\0" + header)
    _write_file(directory / CONFIG_FILE, [config])

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        for module in adapter.modules:
            for tensor in _padded(adapter, module):
                data = tensor.numpy().reshape(-1).view("u1").data
                hasher.update(data)
                yield data
        adapter.check_unchanged()

    num_bytes = _write_file(directory / WEIGHTS_FILE, pieces())
    sync_directory(directory)
    return hasher.hexdigest(), num_bytes


def _check_readable(adapter: PeftDir, config: bytes, header: bytes) -> None:
    """Raise unless our own reader takes the files that are to be written."""
    if len(header) - 8 > MAX_HEADER_BYTES:
        raise header_too_large(adapter.where, len(header) - 8)
    if len(config) > MAX_CONFIG_BYTES:
        raise AdapterFilesInvalid(
            f"{adapter.where}: the names of its {len(adapter.modules)} modules take {len(config)} bytes, "
            f"allowed are {MAX_CONFIG_BYTES}; adapt fewer modules",
            given=len(config),
            expected=MAX_CONFIG_BYTES,
            code="adapter_too_large",
        )


def _padded(adapter: PeftDir, module: LoraModule) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, checked, without subnormal numbers, filled up with zeros to the adapter's rank."""
    import torch

    from tink_rl.policy.adapter import check_values

    lora_a, lora_b = adapter.read(module)
    names = (f"{module.name}.lora_A.weight", f"{module.name}.lora_B.weight")
    check_values(dict(zip(names, (lora_a, lora_b), strict=True)))
    missing = adapter.rank - module.rank
    lora_a = torch.nn.functional.pad(lora_a, (0, 0, 0, missing))
    lora_b = torch.nn.functional.pad(lora_b, (0, missing))
    tiny = torch.finfo(torch.float32).tiny
    for tensor in (lora_a, lora_b):
        # A flood of subnormals slows a CPU a hundredfold; below 1e-38 they compute nothing.
        tensor.masked_fill_(tensor.abs() < tiny, 0.0)
    return lora_a.contiguous(), lora_b.contiguous()


def _write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    total = 0
    with path.open("xb", buffering=0) as file:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                count = file.write(view)
                view, total = view[count:], total + count
        os.fsync(file.fileno())
    return total


def sync_directory(path: Path) -> None:
    """Flush to the disk which files a directory has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
