"""Which directories of adapters may be read, and how: by open handles, so that no swap can race.

A stranger's path is never resolved, looked up or opened as a whole. It must begin with an adapter
root, by its letters alone; from the root's handle each further name is opened without following a
symbolic link. So nothing outside the roots is touched, not even to learn whether it exists.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tink_rl.errors import AdapterFilesInvalid, AdapterPathMissing, AdapterTooLarge, PathNotAllowed

MAX_PATH_BYTES = 4096
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:/")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# A FIFO without a writer must not block the open; a terminal must not become ours.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class SourceDir:
    """An open directory; its files are opened relative to it, whatever its path means by then."""

    def __init__(self, handle: int, label: str, *, confined: bool) -> None:
        self.handle = handle
        self.label = label
        """What error texts call it: the caller's words."""
        self._confined = confined

    def has(self, name: str) -> bool:
        """Whether the directory has an entry `name`; opens nothing."""
        try:
            os.stat(name, dir_fd=self.handle, follow_symlinks=False)
        except OSError:
            return False
        return True

    def open(self, name: str, max_bytes: int) -> BinaryIO | None:
        """The regular file `name` of at most `max_bytes`, open for reading; None if there is none.

        Raises:
            PathNotAllowed: a FIFO, device, directory or unreadable file; under a root also a
                symbolic or hard link.
            AdapterTooLarge: more bytes.
        """
        flags = _FILE | (os.O_NOFOLLOW if self._confined else 0)
        try:
            handle = os.open(name, flags, dir_fd=self.handle)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refused(name, error.errno) from None
        try:
            self._check(name, os.fstat(handle), max_bytes)
            return os.fdopen(handle, "rb", buffering=0)  # type: ignore[return-value]
        except BaseException:
            os.close(handle)
            raise

    def _check(self, name: str, found: os.stat_result, max_bytes: int) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise PathNotAllowed(
                f"{self.label}: {name} is no regular file; copy a plain file there"
            )
        if self._confined and found.st_nlink != 1:
            raise PathNotAllowed(
                f"{self.label}: {name} has {found.st_nlink} hard links, its other names may lie "
                "outside the adapter root; copy the file instead of linking it"
            )
        if found.st_size > max_bytes:
            raise AdapterTooLarge(
                f"{self.label}: {name} has {found.st_size} bytes, allowed are {max_bytes}; register "
                "an adapter of lower rank or fewer modules",
                given=found.st_size,
                expected=max_bytes,
            )

    def _refused(self, name: str, number: int | None) -> PathNotAllowed:
        reasons = {
            errno.ELOOP: "is a symbolic link; copy the file there",
            errno.EACCES: "cannot be read by this process; chmod it",
        }
        what = reasons.get(number or 0, "cannot be opened as a plain file")
        return PathNotAllowed(f"{self.label}: {name} {what}")


@contextmanager
def open_source(source: str | Path, roots: Sequence[Path] | None) -> Iterator[SourceDir]:
    """The directory `source`, open.

    Args:
        source: What the caller asked for.
        roots: Directories that it must lie under. None trusts the caller, as a program that calls
            this package directly is: every directory, `~`, relative paths and links are allowed.

    Raises:
        PathNotAllowed: outside the roots, or reached through a link. The same answer whether the
            path exists or not.
        AdapterPathMissing: allowed, but not there.
        AdapterFilesInvalid: roots is None and it is no directory.
    """
    text = _checked_words(source)
    handle = _open_trusted(text) if roots is None else _open_confined(text, roots)
    try:
        yield SourceDir(handle, text, confined=roots is not None)
    finally:
        os.close(handle)


def _checked_words(source: Any) -> str:
    if not isinstance(source, (str, Path)):
        raise PathNotAllowed(f"a LoRA path is a string, got {type(source).__name__}")
    text = str(source)
    try:
        length = len(os.fsencode(text))
    except UnicodeEncodeError:
        raise PathNotAllowed("a LoRA path must be text that the file system can hold") from None
    if not 0 < length <= MAX_PATH_BYTES:
        raise PathNotAllowed(
            f"a LoRA path has 1 to {MAX_PATH_BYTES} bytes, got {length}; use a shorter directory"
        )
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise PathNotAllowed("a LoRA path holds no control characters; rename the directory")
    if _URL.match(text):
        raise PathNotAllowed(
            "a LoRA path is a local directory, got a URL; download the adapter and give its directory"
        )
    return text


def _open_trusted(text: str) -> int:
    try:
        return os.open(Path(text).expanduser(), _DIRECTORY)
    except (FileNotFoundError, RuntimeError):  # RuntimeError: no home for ~user
        raise _missing(text) from None
    except NotADirectoryError:
        raise AdapterFilesInvalid(
            f"{text} is no directory; give the directory that holds adapter_config.json"
        ) from None
    except OSError as error:
        raise PathNotAllowed(f"{text} cannot be opened: {error.strerror}") from None


def _open_confined(text: str, roots: Sequence[Path]) -> int:
    root, names = _below_a_root(text, roots)
    try:
        handle = os.open(root, _DIRECTORY)  # the operator's own path: links in it are meant
    except OSError as error:
        raise PathNotAllowed(
            f"the adapter root {root} cannot be opened: {error.strerror}"
        ) from None
    for name in names:
        try:
            child = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
        except FileNotFoundError:
            raise _missing(text) from None
        except OSError:
            raise PathNotAllowed(
                f"{text}: {name!r} is a link, no directory, or unreadable; copy the adapter under "
                "the root itself"
            ) from None
        finally:
            os.close(handle)
        handle = child
    return handle


def _below_a_root(text: str, roots: Sequence[Path]) -> tuple[Path, list[str]]:
    parts = text.split("/")
    if text.startswith("/") and ".." not in parts:
        names = [part for part in parts if part not in ("", ".")]
        for root in roots:
            for spelling in (root.absolute(), root.resolve()):
                above = list(spelling.parts[1:])
                if spelling.is_dir() and names[: len(above)] == above:
                    return spelling, names[len(above) :]
    allowed = ", ".join(str(root) for root in roots) or "none is set"
    # Not the path itself: the answer must not depend on what lies there.
    raise PathNotAllowed(
        "this LoRA path is not allowed: expected the absolute path, without '..', of a directory "
        f"under an adapter root ({allowed}); copy the adapter there"
    )


def _missing(text: str) -> AdapterPathMissing:
    return AdapterPathMissing(
        f"LoRA path does not exist: {text}\nGive the directory that PEFT's save_pretrained() wrote; "
        "it holds adapter_config.json."
    )
