"""Which base model this is, read from its files: the same hash on the trainer's and the server's side.

It holds under tensor parallelism, casting, packing and 4-bit loading, because no loaded tensor enters
it: the model config, and every checkpoint tensor's name, shape, dtype and sampled bytes do.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tink_rl.errors import ConfigError
from tink_rl.policy.foreign import what_a_file_is
from tink_rl.policy.model_dir import local_model_dir, models_below

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_BESIDE = re.compile(r"(adapter_model|consolidated)[^/]*\.safetensors$")
"""Files that do not belong to a checkpoint in the names of transformers."""
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

    @property
    def num_bytes(self) -> int:
        """Of the stored tensor."""
        return self.end - self.begin


# -- which files are the checkpoint -----------------------------------------------------------------


def checkpoint_files(directory: Path) -> list[Path]:
    """The files of `directory` that a model is loaded from, whatever else lies there; sorted.

    The index's files where there is an index, else `model.safetensors`. Not a consolidated copy in
    Mistral's names, not an adapter, not a variant such as `model.fp16.safetensors`.

    Raises:
        ConfigError: there are none, a file of the index is missing, or transformers and vLLM would load
            different tensors.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if index.is_file():
        indexed = _indexed_files(index)
        if single.is_file() and indexed != [single]:
            _check_equal(single, index, indexed)
        return indexed
    if single.is_file():
        return [single]
    # vLLM takes whatever is there; transformers would not load such a directory.
    found = [f for f in sorted(directory.glob("*.safetensors")) if not _BESIDE.match(f.name)]
    if not found:
        raise _no_checkpoint(directory)
    return found


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        files = sorted(index.parent / name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{index} has no weight_map of tensor names to file names; save the base again"
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ConfigError(
            f"{index} names {len(files)} files, of which {len(missing)} are not there "
            f"(first {missing[:1]}); download or copy the model again"
        )
    return files


def _check_equal(single: Path, index: Path, indexed: list[Path]) -> None:
    # transformers loads `single`, vLLM the indexed files: right as long as they hold the same.
    if _digest_of(_entries([single])) != _digest_of(_entries(indexed)):
        raise ConfigError(
            f"{single.parent} holds two models: transformers loads {single.name}, vLLM the files of "
            f"{index.name}, and they differ; remove the one that is not meant"
        )


def _no_checkpoint(directory: Path) -> ConfigError:
    if (directory / "adapter_config.json").is_file():
        return ConfigError(
            f"{directory} is an adapter, not a base model; give the base that its adapter_config.json "
            "names as base_model_name_or_path"
        )
    if inner := models_below(directory):
        return ConfigError(
            f"{directory} holds no model itself, its subfolders {inner[:8]} do; give {directory}/"
            f"{inner[0]}, or subfolder={inner[0]!r}"
        )
    found = sorted(p.name for p in directory.iterdir())[:8]
    return ConfigError(
        f"{directory} holds no {SINGLE_FILE} and no {INDEX_FILE} (found {found}); save the base with "
        "transformers' save_pretrained(), which writes safetensors"
    )


def checkpoint_index(model: str | Path) -> dict[str, CheckpointTensor]:
    """Every tensor of the checkpoint that `model` is loaded from, by name.

    Raises:
        ConfigError: see `checkpoint_files`; or a file is not safetensors.
    """
    return _entries(checkpoint_files(local_model_dir(model)))


def _entries(files: Iterable[Path]) -> dict[str, CheckpointTensor]:
    return {tensor.name: tensor for file in files for tensor in _read_header(file)}


def _read_header(file: Path) -> list[CheckpointTensor]:
    # Format: https://huggingface.co/docs/safetensors (8 bytes of length, JSON, then the tensors).
    with file.open("rb") as handle:
        if (known := what_a_file_is(handle.read(32))) is not None:
            raise ConfigError(f"{file} {known}")
        handle.seek(0)
        size = struct.unpack("<Q", _exactly(handle, 8, file))[0]
        if size > _MAX_HEADER_BYTES:
            raise ConfigError(f"{file}: a header of {size} bytes; not a safetensors file")
        header = _exactly(handle, size, file)
    start = 8 + size
    try:
        found = [
            CheckpointTensor(
                name=name,
                file=file,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                begin=start + entry["data_offsets"][0],
                end=start + entry["data_offsets"][1],
            )
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"{file} has a header that is not one of safetensors; download or copy it again"
        ) from error
    end, there = max((tensor.end for tensor in found), default=start), os.path.getsize(file)
    if there < end:
        raise _truncated(file, f"{there} bytes of {end}")
    return found


def _exactly(handle: BinaryIO, size: int, file: Path) -> bytes:
    data = handle.read(size)
    if len(data) != size:
        raise _truncated(file, f"{os.path.getsize(file)} bytes")
    return data


def _truncated(file: Path, how: str) -> ConfigError:
    return ConfigError(f"{file} is truncated ({how}); download or copy it again")


def read_checkpoint_tensor(entry: CheckpointTensor) -> torch.Tensor:
    """The tensor of `entry`, on the CPU, in its stored dtype, mapped from the file."""
    from safetensors import safe_open

    with safe_open(entry.file, framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(entry.name)
    return tensor


class MappedCheckpoint:
    """Tensors of a checkpoint, mapped from files that are opened once each."""

    def __init__(self) -> None:
        self._handles: dict[Path, Any] = {}

    def tensor(self, entry: CheckpointTensor) -> torch.Tensor:
        """As `read_checkpoint_tensor`, without reading the file's header again."""
        from safetensors import safe_open

        if entry.file not in self._handles:
            self._handles[entry.file] = safe_open(entry.file, framework="pt")
        tensor: torch.Tensor = self._handles[entry.file].get_tensor(entry.name)
        return tensor


def base_fingerprint(model: str | Path) -> str:
    """32 hex digits that name the base model `model` (a directory or a cached hub id).

    Reads a few hundred bytes per tensor, so that a 15 GB checkpoint takes well below a second.

    Raises:
        ConfigError: no config.json, or no safetensors.
    """
    directory = local_model_dir(model)
    digest = _digest_of(checkpoint_index(directory), first=_canonical_config(directory))
    return digest[:32]


def _digest_of(entries: Mapping[str, CheckpointTensor], first: bytes = b"") -> str:
    from blake3 import blake3

    hasher = blake3(first)
    handles: dict[Path, BinaryIO] = {}
    try:
        for name, entry in sorted(entries.items()):
            hasher.update(f"{name}|{entry.dtype}|{list(entry.shape)}|".encode())
            if entry.file not in handles:
                handles[entry.file] = entry.file.open("rb")
            hasher.update(_sample(handles[entry.file], entry))
    finally:
        for handle in handles.values():
            handle.close()
    digest: str = hasher.hexdigest()
    return digest


def _canonical_config(directory: Path) -> bytes:
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{directory} has no config.json; expected a saved transformers model")
    try:
        config = json.loads(path.read_text())
        kept = {k: v for k, v in config.items() if k not in _VOLATILE_KEYS}
    except (ValueError, AttributeError) as error:
        why = error if isinstance(error, ValueError) else "it is not an object"
        raise ConfigError(
            f"{path} is not a JSON object ({why}); download or save the model again"
        ) from error
    return json.dumps(kept, sort_keys=True).encode()


def _sample(handle: BinaryIO, entry: CheckpointTensor) -> bytes:
    length = entry.end - entry.begin
    last = max(0, length - _SAMPLE_BYTES)
    blocks = []
    for k in range(_NUM_SAMPLES):
        handle.seek(entry.begin + last * k // (_NUM_SAMPLES - 1))
        blocks.append(handle.read(min(_SAMPLE_BYTES, length)))
    return b"".join(blocks)
