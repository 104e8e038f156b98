"""What a pickled checkpoint would do, read without doing it: an allow-list of opcodes and names.

`torch.load(weights_only=True)` has had holes (CVE-2025-32434, CVE-2026-24747), so it never sees a file
that asks for more than a dict of plain tensors does. What was scanned is what is handed on: a zip
archive is rebuilt from the entries that were read, because two readers of one archive may differ.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile

from tink_rl.errors import AdapterFilesInvalid

_OPCODES = frozenset(
    (
        *("PROTO", "EMPTY_DICT", "EMPTY_TUPLE", "EMPTY_LIST", "MARK", "BINUNICODE"),
        *("GLOBAL", "BININT", "BININT1", "BININT2", "LONG1", "TUPLE"),
        *("TUPLE1", "TUPLE2", "TUPLE3", "BINPERSID", "NEWTRUE", "NEWFALSE"),
        *("NONE", "REDUCE", "SETITEM", "SETITEMS", "APPEND", "APPENDS"),
        *("BUILD", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "STOP"),
    )
)
_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        "torch BFloat16Storage",
        "torch DoubleStorage",
        "torch FloatStorage",
        "torch HalfStorage",
    }
)
_ENTRY = re.compile(
    r"[^/]+/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|"
    r"\.data/serialization_id|data/\d+)"
)
_MAX_ENTRIES = 20_000
_MAX_PICKLE_BYTES = 4 << 20
_NUM_LEGACY_PICKLES = 5
"""Magic number, protocol, system, the object, the keys of its storages."""


def scanned(data: bytes, where: str) -> bytes:
    """A checkpoint of the same tensors as `data` that asks for nothing but tensors.

    Raises:
        AdapterFilesInvalid: it would call or import something else, or `torch.save` does not write such a
            file.
    """
    if data[:4] == b"PK\x03\x04":
        return _scanned_zip(data, where)
    stream = io.BytesIO(data)
    for _ in range(_NUM_LEGACY_PICKLES):
        _scan(stream, where)
    return data


def _scanned_zip(data: bytes, where: str) -> bytes:
    clean = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(clean, "w") as copy:
            entries = archive.infolist()
            _check_entries(entries, len(data), where)
            for entry in entries:
                content = archive.read(entry)
                if entry.filename.endswith("/data.pkl"):
                    _scan(io.BytesIO(content), where)
                copy.writestr(zipfile.ZipInfo(entry.filename), content)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise _corrupt(where, f"a damaged archive ({type(error).__name__})") from None
    return clean.getvalue()


def _check_entries(entries: list[zipfile.ZipInfo], size: int, where: str) -> None:
    names = [entry.filename for entry in entries]
    if len(entries) > _MAX_ENTRIES or len(set(names)) != len(names):
        raise _corrupt(where, "an archive of too many or of equal entries")
    if len({name.partition("/")[0] for name in names}) != 1:
        raise _corrupt(where, "an archive of more than one folder")
    for entry in entries:
        if not _ENTRY.fullmatch(entry.filename):
            raise AdapterFilesInvalid(
                f"{where} holds the entry {entry.filename[:80]!r}, which no checkpoint of tensors has; "
                "save the adapter again with safe_serialization=True",
                code="pickle_refused",
            )
        if entry.compress_type != zipfile.ZIP_STORED:
            raise _corrupt(where, "a compressed archive")
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise _corrupt(where, "an archive without one data.pkl of a sane size")
    if sum(entry.file_size for entry in entries) > size:
        raise _corrupt(where, "an archive whose entries are larger than itself")


def _scan(stream: io.BytesIO, where: str) -> None:
    start = stream.tell()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            asked = f"{opcode.name} {argument}" if opcode.name == "GLOBAL" else opcode.name
            allowed = argument in _GLOBALS if opcode.name == "GLOBAL" else opcode.name in _OPCODES
            if not allowed:
                raise AdapterFilesInvalid(
                    f"{where} asks for {asked[:100]!r}, which a dict of tensors does not need; nothing of "
                    "it was run. Do not open it elsewhere; ask its author for a safetensors file",
                    code="pickle_refused",
                )
            if stream.tell() - start > _MAX_PICKLE_BYTES:
                raise _corrupt(where, "a pickle of an insane size")
    except (ValueError, UnicodeDecodeError, IndexError, OverflowError) as error:
        if isinstance(error, AdapterFilesInvalid):
            raise
        raise _corrupt(where, "no intact pickle") from None


def _corrupt(where: str, what: str) -> AdapterFilesInvalid:
    return AdapterFilesInvalid(
        f"{where} is no file that torch.save writes: {what}; copy it again", code="adapter_corrupt"
    )
