"""Which base model this is, read from its files: the same hash on the trainer's and the server's side.

It holds under tensor parallelism, casting, packing and 4-bit loading, because no loaded tensor enters
it: the model config, and every checkpoint tensor's name, shape, dtype and sampled bytes do.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tink_rl.errors import ConfigError

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 100 * 2**20
_SAMPLE_BYTES = 64
_NUM_SAMPLES = 6
# Keys that say how the model was loaded or saved, not what it computes.
_VOLATILE_KEYS = frozenset(
    ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
)


@dataclass(frozen=True, kw_only=True)
class CheckpointTensor:
    """Where one tensor of a checkpoint lies."""

    name: str
    file: Path
    dtype: str
    """As safetensors writes it: "F32", "BF16", ..."""
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    end: int


def local_model_dir(model: str | Path) -> Path:
    """The directory of `model`: itself, or the cached snapshot of a hub id.

    Raises:
        ConfigError: neither a directory nor a cached hub id.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"base model {str(model)!r}: neither a directory nor a model in the local hub cache; "
            f"`hf download {model}` fetches it"
        ) from error


def checkpoint_index(model: str | Path) -> dict[str, CheckpointTensor]:
    """Every tensor of the checkpoint's `*.safetensors`, by name.

    Raises:
        ConfigError: there are none, or a file is not safetensors.
    """
    directory = local_model_dir(model)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        found = sorted(p.name for p in directory.iterdir())[:8]
        raise ConfigError(
            f"{directory} holds no *.safetensors (found {found}); save the base with "
            "save_pretrained(..., safe_serialization=True)"
        )
    index: dict[str, CheckpointTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            index[tensor.name] = tensor
    return index


def _read_header(file: Path) -> list[CheckpointTensor]:
    # Format: https://huggingface.co/docs/safetensors (8 bytes of length, JSON, then the tensors).
    with file.open("rb") as handle:
        size = struct.unpack("<Q", _exactly(handle, 8, file))[0]
        if size > _MAX_HEADER_BYTES:
            raise ConfigError(f"{file}: a header of {size} bytes; not a safetensors file")
        try:
            entries = json.loads(_exactly(handle, size, file))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}: the header is not JSON; not a safetensors file") from error
    start = 8 + size
    return [
        CheckpointTensor(
            name=name,
            file=file,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            begin=start + entry["data_offsets"][0],
            end=start + entry["data_offsets"][1],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    ]


def _exactly(handle: BinaryIO, size: int, file: Path) -> bytes:
    data = handle.read(size)
    if len(data) != size:
        raise ConfigError(f"{file} is truncated ({os.path.getsize(file)} bytes); copy it again")
    return data


def read_checkpoint_tensor(entry: CheckpointTensor) -> torch.Tensor:
    """The tensor of `entry`, on the CPU, in its stored dtype, mapped from the file."""
    from safetensors import safe_open

    with safe_open(entry.file, framework="pt") as handle:  # type: ignore[no-untyped-call]
        tensor: torch.Tensor = handle.get_tensor(entry.name)
    return tensor


def base_fingerprint(model: str | Path) -> str:
    """32 hex digits that name the base model `model` (a directory or a cached hub id).

    Reads a few hundred bytes per tensor, so that a 15 GB checkpoint takes well below a second.

    Raises:
        ConfigError: no config.json, or no safetensors.
    """
    from blake3 import blake3

    directory = local_model_dir(model)
    hasher = blake3(_canonical_config(directory))
    handles: dict[Path, BinaryIO] = {}
    try:
        for name, entry in sorted(checkpoint_index(directory).items()):
            hasher.update(f"{name}|{entry.dtype}|{list(entry.shape)}|".encode())
            if entry.file not in handles:
                handles[entry.file] = entry.file.open("rb")
            hasher.update(_sample(handles[entry.file], entry))
    finally:
        for handle in handles.values():
            handle.close()
    digest: str = hasher.hexdigest()
    return digest[:32]


def _canonical_config(directory: Path) -> bytes:
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{directory} has no config.json; expected a saved transformers model")
    config: dict[str, Any] = json.loads(path.read_text())
    kept = {k: v for k, v in config.items() if k not in _VOLATILE_KEYS}
    return json.dumps(kept, sort_keys=True).encode()


def _sample(handle: BinaryIO, entry: CheckpointTensor) -> bytes:
    length = entry.end - entry.begin
    last = max(0, length - _SAMPLE_BYTES)
    blocks = []
    for k in range(_NUM_SAMPLES):
        handle.seek(entry.begin + last * k // (_NUM_SAMPLES - 1))
        blocks.append(handle.read(min(_SAMPLE_BYTES, length)))
    return b"".join(blocks)
