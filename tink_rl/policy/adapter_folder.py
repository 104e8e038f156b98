"""Where the adapter lies: the directory that was given, a named adapter's subfolder, or a checkpoint.

PEFT writes an adapter that is not called `default` to a subfolder of its name. TRL and PEFT's users put
a reference adapter beside it, which is never what was meant.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tink_rl.errors import AdapterConfigInvalid
from tink_rl.policy.foreign import what_is_there
from tink_rl.policy.paths import SourceDir, open_source

logger = logging.getLogger("tink_rl")
CONFIG_FILE = "adapter_config.json"
_REFERENCES = ("ref", "reference")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_MAX_NAMED = 8
_MAX_FOLDERS = 32
"""Per directory, where one is looked for to be named only."""


@contextmanager
def open_adapter_folder(
    source: str | Path, roots: Sequence[Path] | None, *, marks: Sequence[str] = (CONFIG_FILE,)
) -> Iterator[SourceDir]:
    """The directory that holds the adapter of `source`, open.

    Args:
        source: It, a run's or a checkpoint's directory.
        roots: See `open_source`.
        marks: Files by one of which it is known.

    Raises:
        PathNotAllowed, AdapterPathMissing, AdapterFilesInvalid: see `open_source`.
        AdapterConfigInvalid: it holds no adapter, or several.
    """
    with ExitStack() as stack, open_source(source, roots) as directory:
        found = _holding(directory, marks, stack)
        if found is None:
            raise _nothing(directory)
        if found is not directory:
            logger.info("%s: taken is %s", directory.label, found.label)
        yield found


def find_adapter(source: str | Path, *, marks: Sequence[str] = (CONFIG_FILE,)) -> Path:
    """The path of that directory, for a caller who may go anywhere.

    Raises:
        PathNotAllowed, AdapterPathMissing, AdapterFilesInvalid: see `open_adapter_folder`.
    """
    with open_adapter_folder(source, None, marks=marks) as found:
        return found.path


def _holding(directory: SourceDir, marks: Sequence[str], stack: ExitStack) -> SourceDir | None:
    if any(directory.has(mark) for mark in marks):
        return directory
    named, checkpoints = [], []
    for name in directory.folders():
        if match := _CHECKPOINT.match(name):
            checkpoints.append((int(match[1]), name))
        elif name not in _REFERENCES and (child := directory.child(name)) is not None:
            stack.callback(child.close)
            if any(child.has(mark) for mark in marks):
                named.append(child)
    if len(named) > 1:
        names = [child.label.rpartition("/")[2] for child in named]
        shown = ", ".join(names[:_MAX_NAMED]) + (", ..." if names[_MAX_NAMED:] else "")
        raise AdapterConfigInvalid(
            f"{directory.label} holds {len(names)} adapters: {shown}; give one of them, such as "
            f"{named[0].label}"
        )
    if named:
        return named[0]
    newer: list[str] = []
    for _, name in sorted(checkpoints, reverse=True):
        if (child := directory.child(name)) is not None:
            stack.callback(child.close)
            if (found := _holding(child, marks, stack)) is not None:
                if newer:
                    logger.warning("%s: no adapter in %s, so %s", directory.label, newer, name)
                return found
        newer.append(name)
    return None


def _deeper(directory: SourceDir, depth: int = 4) -> str | None:
    """The first adapter that lies deeper than is looked for one, as other trainers' runs have it."""
    for name in directory.folders()[:_MAX_FOLDERS]:
        child = directory.child(name) if name not in _REFERENCES else None
        if child is None:
            continue
        try:
            found = child.label if child.has(CONFIG_FILE) else None
            found = found or (_deeper(child, depth - 1) if depth > 1 else None)
        finally:
            child.close()
        if found:
            return found
    return None


def _nothing(directory: SourceDir) -> AdapterConfigInvalid:
    names = directory.names()
    if deeper := _deeper(directory):
        return AdapterConfigInvalid(
            f"{directory.label} holds no adapter itself, but below it lies {deeper}; give that directory"
        )
    references = [name for name in names if name in _REFERENCES]
    if references:
        return AdapterConfigInvalid(
            f"{directory.label} holds the reference adapter {references[0]}/ only; if that is meant, give "
            f"{directory.label}/{references[0]}"
        )
    if (known := what_is_there(names)) is not None:
        return AdapterConfigInvalid(f"{directory.label} {known}")
    return AdapterConfigInvalid(
        f"{directory.label} holds no {CONFIG_FILE}, nor does a checkpoint or a subfolder in it (found "
        f"{sorted(names)[:_MAX_NAMED]}); give the output_dir of a run, or what PEFT's save_pretrained() "
        "wrote"
    )
