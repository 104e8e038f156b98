"""From a pickled `adapter_model.bin` to safetensors, without ever running a pickle's code.

Three walls: the file is read as opcodes and refused if it asks for anything but tensors
(`pickle_scan`); what passes is loaded with `weights_only=True` in a child process with limits
(`unpickle_child`); what the child wrote is read back and compared, and appears by one rename.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tink_rl
from tink_rl.adapters.pickle_scan import scanned
from tink_rl.errors import AdapterFilesInvalid, DeadlineExceeded, StorageFull
from tink_rl.policy.adapter_folder import CONFIG_FILE, open_adapter_folder
from tink_rl.policy.paths import SourceDir
from tink_rl.policy.peft_dir import MAX_FILE_BYTES, PICKLE_FILES, WEIGHTS_FILE
from tink_rl.policy.tensor_file import TensorFile

CHILD_TIMEOUT_S = 300.0
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "LANG", "PYTHONHOME")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion wrote: `Converted(source=.../adapter_model.bin, path=.../adapter_model.safetensors,
    num_tensors=28, num_bytes=122312)`"""

    source: Path
    path: Path
    num_tensors: int
    num_bytes: int


def convert(directory: str | Path) -> Converted:
    """Write `adapter_model.safetensors` beside the pickled weights in `directory`, which stay.

    Raises:
        AdapterPathMissing: no such directory.
        AdapterFilesInvalid: nothing to convert, safetensors are there already, or the pickle asks for more
            than a flat dict of tensors.
        AdapterFilesInvalid: it is not a torch checkpoint; or it holds no tensor.
        AdapterFilesInvalid, PathNotAllowed: the file.
        StorageFull: the directory cannot be written.
        DeadlineExceeded: the child took too long.
    """
    marks = (CONFIG_FILE, WEIGHTS_FILE, *PICKLE_FILES)
    with open_adapter_folder(str(directory), None, marks=marks) as source:
        folder = source.path
        if source.has(WEIGHTS_FILE):
            raise AdapterFilesInvalid(
                f"{source.label} has {WEIGHTS_FILE} already; that is what is used, nothing was changed"
            )
        name, data = _read_pickle(source)
    where = folder / name
    clean = scanned(data, str(where))
    try:
        return _write(folder, where, clean)
    except OSError as error:
        if isinstance(error, (StorageFull, DeadlineExceeded)):
            raise
        raise StorageFull(
            f"{folder} cannot be written: {error.strerror}; free space, or copy the adapter to a "
            "directory of yours and convert it there"
        ) from error


def _read_pickle(source: SourceDir) -> tuple[str, bytes]:
    for name in PICKLE_FILES:
        file = source.open(name, MAX_FILE_BYTES)
        if file is not None:
            with file:
                return name, _read_all(file)
    raise AdapterFilesInvalid(
        f"{source.label} has neither {' nor '.join(PICKLE_FILES)}; give the directory of a PEFT adapter"
    )


def _read_all(file: Any) -> bytes:
    pieces, total = [], 0
    while (piece := file.read(1 << 24)) and total <= MAX_FILE_BYTES:
        pieces.append(piece)
        total += len(piece)
    return b"".join(pieces)[:MAX_FILE_BYTES]


def _write(folder: Path, source: Path, clean: bytes) -> Converted:
    temporary = Path(tempfile.mkdtemp(prefix=".tink-convert-", dir=folder))
    try:
        written = temporary / WEIGHTS_FILE
        expected = _load_in_child(clean, written, source)
        if not expected:
            raise AdapterFilesInvalid(
                f"{source} holds no tensor: the adapter was lost when it was saved; nothing was written, "
                "save it again from the trained model",
                code="adapter_incomplete",
            )
        _verify(written, expected)
        target = folder / WEIGHTS_FILE
        written.chmod(0o644)
        os.rename(written, target)
        return Converted(
            source=source,
            path=target,
            num_tensors=len(expected),
            num_bytes=target.stat().st_size,
        )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load_in_child(clean: bytes, out: Path, source: Path) -> dict[str, list[Any]]:
    # -P: the directory that the user stands in is not searched for modules.
    command = [
        sys.executable,
        "-P",
        "-m",
        "tink_rl.adapters.unpickle_child",
        str(out),
        str(len(clean)),
    ]
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(tink_rl.__file__).parents[1]),
    }
    try:
        done = subprocess.run(
            command, input=clean, capture_output=True, env=environment, timeout=CHILD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(
            f"loading {source} took longer than {CHILD_TIMEOUT_S:g} s; convert it where it was trained"
        ) from None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        raise AdapterFilesInvalid(
            f"{source} was not converted (child ended with {done.returncode}): {reason}; expected a flat "
            "dict of float tensors, as PEFT's save_pretrained(safe_serialization=False) writes",
            code="pickle_refused",
        )
    answer: dict[str, list[Any]] = json.loads(done.stdout)
    return answer


def _verify(written: Path, expected: dict[str, list[Any]]) -> None:
    from blake3 import blake3

    with written.open("rb", buffering=0) as file:
        tensors = TensorFile(file, str(written))
        found = {
            entry.name: [
                _DTYPES.get(entry.dtype, entry.dtype),
                list(entry.shape),
                blake3(tensors.read_bytes(entry)).hexdigest(),
            ]
            for entry in tensors.entries
        }
        os.fsync(file.fileno())
    if found != expected:
        raise AdapterFilesInvalid(
            f"{written} does not hold what was loaded; convert again", code="adapter_corrupt"
        )
