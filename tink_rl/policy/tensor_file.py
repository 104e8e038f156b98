"""Safetensors read and written piece by piece: one tensor in memory at a time, bounds checked first.

The format (https://huggingface.co/docs/safetensors) is eight bytes of length, a JSON header, then the
tensors. Nothing is mapped: a file that shrinks under a mapping ends the process.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from tink_rl import strict_json
from tink_rl.errors import AdapterFilesInvalid
from tink_rl.policy.foreign import what_a_file_is

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 16 << 20
"""Holds the names of 50,000 adapted modules, which is more than any model has experts."""
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a file: `TensorEntry(name="...lora_A.weight", dtype="F32", shape=(8, 128), begin=0,
    end=4096)`; `begin` and `end` count from the first byte after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file that is open for reading.

    Raises:
        AdapterFilesInvalid: the file is truncated, or its header does not describe its bytes exactly, or
                names too many tensors.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where
        self._before = os.fstat(file.fileno())
        size = self._before.st_size
        if size < 8:
            raise self._corrupt(f"has {size} bytes, too few for a header")
        if (known := what_a_file_is(bytes(self._read(0, min(size, 32))))) is not None:
            raise AdapterFilesInvalid(f"{where} {known}", code="adapter_corrupt")
        (length,) = struct.unpack("<Q", self._read(0, 8))
        if 8 + length > size:
            raise self._corrupt(f"ends at byte {size}, inside its header of {length} bytes")
        if length > MAX_HEADER_BYTES:
            raise header_too_large(where, length)
        self._start = 8 + length
        self.entries = self._parse(self._read(8, length))
        self._check_cover(size - self._start)

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor of `entry` (float32, float16, bfloat16 or float64), in memory of its own.

        Raises:
            AdapterFilesInvalid: the file was cut meanwhile.
        """
        import torch

        dtype = getattr(torch, _TORCH[entry.dtype])
        if entry.end == entry.begin:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(self.read_bytes(entry), dtype=dtype).view(entry.shape)

    def read_bytes(self, entry: TensorEntry) -> bytearray:
        """The bytes of `entry`, whatever its dtype.

        Raises:
            AdapterFilesInvalid: the file was cut meanwhile.
        """
        return self._read(self._start + entry.begin, entry.end - entry.begin)

    def check_unchanged(self) -> None:
        """Raise if the file was written to since it was opened: what was read may be of two versions.

        Raises:
            AdapterFilesInvalid: it was.
        """
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._before.st_size, self._before.st_mtime_ns):
            raise self._corrupt("was written to while it was read")

    def _read(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if not count:
                raise self._corrupt(f"ends at byte {offset + done}, before its tensors do")
            done += count
        return data

    def _parse(self, header: bytearray) -> list[TensorEntry]:
        try:
            found = strict_json.loads(header.decode())
            if not isinstance(found, dict):
                raise TypeError("it is not an object")
            found.pop("__metadata__", None)
            return [_entry(name, item) for name, item in found.items()]
        except (ValueError, TypeError, KeyError) as error:
            raise self._corrupt(
                f"has a header that is not one of safetensors ({_short(error)})"
            ) from None

    def _check_cover(self, size: int) -> None:
        end = 0
        for entry in sorted(self.entries, key=lambda entry: (entry.begin, entry.end)):
            if entry.begin != end:
                raise self._corrupt(f"has a gap or an overlap before tensor {entry.name[:200]!r}")
            end = entry.end
        if end != size:
            raise self._corrupt(f"has {size} bytes of tensors, its header describes {end}")

    def _corrupt(self, what: str) -> AdapterFilesInvalid:
        return AdapterFilesInvalid(
            f"{self._where} {what}; copy it again, or save the adapter again",
            code="adapter_corrupt",
        )


def header_too_large(where: str, length: int) -> AdapterFilesInvalid:
    """A limit, and no damage."""
    return AdapterFilesInvalid(
        f"{where} has a header of {length} bytes, at most {MAX_HEADER_BYTES} are read (about 50,000 "
        "modules); adapt fewer modules, or merge the adapter (`tink-rl export --merged`) and serve that",
        given=length,
        expected=MAX_HEADER_BYTES,
        code="adapter_too_large",
    )


def _short(error: Exception) -> str:
    # Never the text of an error that may quote the file: only its kind, or what we said ourselves.
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return "no JSON"
    return str(error)[:100] if isinstance(error, (ValueError, TypeError)) else type(error).__name__


def _entry(name: str, item: Any) -> TensorEntry:
    if set(item) != {"dtype", "shape", "data_offsets"} or item["dtype"] not in _ITEM_BYTES:
        raise ValueError("a tensor without known dtype, shape and offsets")
    shape, (begin, end) = item["shape"], item["data_offsets"]
    numbers = [*shape, begin, end]
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise ValueError("a shape or offset that is not a count")
    if end - begin != math.prod(shape) * _ITEM_BYTES[item["dtype"]]:
        raise ValueError("offsets that do not fit a shape")
    return TensorEntry(name=name, dtype=item["dtype"], shape=tuple(shape), begin=begin, end=end)


def float32_header(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a file of float32 tensors in the given order; the same for the same input."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes:
        end = offset + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors that begin at a multiple of eight
    return struct.pack("<Q", len(text)) + text
