"""Which directories of adapters may be read, and how: by open handles, so that no swap can race.

A stranger's path is never resolved, looked up or opened as a whole. It must begin with an adapter
root, by its letters alone; from the root's handle each further name is opened without following a
symbolic link. So nothing outside the roots is touched, not even to learn whether it exists.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tink_rl.errors import AdapterFilesInvalid, AdapterPathMissing, ConfigError, PathNotAllowed

MAX_PATH_BYTES = 4096
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:/")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BLOB = re.compile(r"[0-9A-Za-z]{8,128}")
_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model.pt",
)
_MAX_ENTRIES = 10_000
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# A FIFO without a writer must not block the open; a terminal must not become ours.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class SourceDir:
    """An open directory; its files are opened relative to it, whatever its path means by then."""

    def __init__(
        self, handle: int, label: str, *, below: tuple[Path, tuple[str, ...]] | None = None
    ) -> None:
        """Own `handle`, an open directory.

        Args:
            handle: Of the directory.
            label: What error texts call it: the caller's words.
            below: The root that it is confined to, and the names that lead from there; None: trusted.
        """
        self.handle = handle
        self.label = label
        self._below = below

    @property
    def path(self) -> Path:
        """Where a trusted caller finds it."""
        return Path(self.label).expanduser()

    def close(self) -> None:
        """Close the handle."""
        os.close(self.handle)

    def names(self) -> list[str]:
        """The first entries of the directory, sorted."""
        with os.scandir(self.handle) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, _MAX_ENTRIES))

    def folders(self) -> list[str]:
        """Names of its directories, and, unless it is confined, of links to some; sorted."""
        with os.scandir(self.handle) as entries:
            found = list(itertools.islice(entries, _MAX_ENTRIES))
            return sorted(e.name for e in found if e.is_dir(follow_symlinks=self._below is None))

    def child(self, name: str) -> SourceDir | None:
        """Its directory `name`, open, to be closed by the caller; None if it cannot be opened."""
        flags = _DIRECTORY | (os.O_NOFOLLOW if self._below is not None else 0)
        try:
            handle = os.open(name, flags, dir_fd=self.handle)
        except OSError:
            return None
        below = self._below and (self._below[0], (*self._below[1], name))
        return SourceDir(handle, f"{self.label.rstrip('/')}/{name}", below=below)

    def has(self, name: str) -> bool:
        """Whether the directory has an entry `name`; opens nothing."""
        try:
            os.stat(name, dir_fd=self.handle, follow_symlinks=False)
        except OSError:
            return False
        return True

    def open(
        self, name: str, max_bytes: int, remedy: str = "save a smaller one"
    ) -> BinaryIO | None:
        """The regular file `name` of at most `max_bytes`, open for reading; None if there is none.

        Args:
            name: Of the file.
            max_bytes: The limit.
            remedy: What to do about a file above it.

        Raises:
            PathNotAllowed: a FIFO, device, directory or unreadable file; under a root also a
                hard link, or a symbolic one but a hub cache's into its own blobs below that root.
            AdapterFilesInvalid: more bytes.
        """
        flags = _FILE | (os.O_NOFOLLOW if self._below is not None else 0)
        try:
            handle = os.open(name, flags, dir_fd=self.handle)
        except FileNotFoundError:
            return None
        except OSError as error:
            blob = self._open_blob(name) if error.errno == errno.ELOOP else None
            if blob is None:
                raise self._refused(name, error.errno) from None
            handle = blob
        try:
            self._check(name, os.fstat(handle), max_bytes, remedy)
            return os.fdopen(handle, "rb", buffering=0)
        except BaseException:
            os.close(handle)
            raise

    def _open_blob(self, name: str) -> int | None:
        """What a hub cache's snapshot links to, if that lies in the cache's own blobs below the root.

        The link is read, never followed: each name of the way there is opened from the root's handle.
        """
        if self._below is None:
            return None
        root, names = self._below
        home = next((i for i in range(len(names) - 1, -1, -1) if names[i] == "snapshots"), None)
        with suppress(OSError):
            target = os.readlink(name, dir_fd=self.handle)
            ups = "../" * (len(names) - home) if home is not None else "/"
            if target.startswith(f"{ups}blobs/") and _BLOB.fullmatch(target.rpartition("/")[2]):
                blob = target.removeprefix(f"{ups}blobs/")
                blobs = _walk(root, (*names[:home], "blobs"))
                try:
                    return (
                        os.open(blob, _FILE | os.O_NOFOLLOW, dir_fd=blobs)
                        if "/" not in blob
                        else None
                    )
                finally:
                    os.close(blobs)
        return None

    def _check(self, name: str, found: os.stat_result, max_bytes: int, remedy: str) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise PathNotAllowed(
                f"{self.label}: {name} is not a regular file; copy a plain file there"
            )
        if self._below is not None and found.st_nlink != 1:
            raise PathNotAllowed(
                f"{self.label}: {name} has {found.st_nlink} hard links, its other names may lie "
                "outside the adapter root; copy the file instead of linking it"
            )
        if found.st_size > max_bytes:
            raise AdapterFilesInvalid(
                f"{self.label}: {name} has {found.st_size} bytes, at most {max_bytes} are read; {remedy}",
                given=found.st_size,
                expected=max_bytes,
                code="adapter_too_large",
            )

    def _refused(self, name: str, number: int | None) -> PathNotAllowed:
        reasons = {
            errno.ELOOP: "is a symbolic link that leads out of the adapter root; copy the file there (of "
            "a hub id: `hf download ID --local-dir DIR` writes plain files)",
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
        AdapterFilesInvalid: roots is None and it is not a directory.
    """
    text = _checked_words(source)
    if roots is None:
        path = _trusted_path(text)
        directory = SourceDir(_open_trusted(path, text), path if path != text else text)
    else:
        root, names = _below_a_root(text, roots)
        directory = SourceDir(_open_confined(text, root, names), text, below=(root, tuple(names)))
    try:
        yield directory
    finally:
        directory.close()


def _checked_words(source: object) -> str:
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
    if text.startswith("file:"):
        raise PathNotAllowed(
            "a LoRA path is a plain path, got a file: URL; give the directory without file://"
        )
    if _URL.match(text):
        raise PathNotAllowed(
            "a LoRA path is a local directory, got a URL; download the adapter and give its directory"
        )
    # The file instead of its folder, as completion in a shell leaves it.
    head, _, last = text.rstrip("/").rpartition("/")
    if last in _FILES:
        return head or ("/" if text.startswith("/") else ".")
    return text


def _trusted_path(text: str) -> str:
    """`text`, or the cached snapshot of the hub id that it is."""
    if not HUB_ID.fullmatch(text) or Path(text).exists():
        return text
    from tink_rl.policy.model_dir import local_model_dir

    try:
        return str(local_model_dir(text))
    except ConfigError:
        raise AdapterPathMissing(
            f"LoRA path does not exist: {text}\nNor is it an adapter in the local hub cache; give a "
            f"directory, or `hf download {text}` first."
        ) from None


def _open_trusted(path: str, text: str) -> int:
    try:
        return os.open(Path(path).expanduser(), _DIRECTORY)
    except (FileNotFoundError, RuntimeError):  # RuntimeError: no home for ~user
        raise _missing(text) from None
    except NotADirectoryError:
        raise AdapterFilesInvalid(
            f"{text} is not a directory; give the directory that holds adapter_config.json"
        ) from None
    except OSError as error:
        raise PathNotAllowed(f"{text} cannot be opened: {error.strerror}") from None


def _open_confined(text: str, root: Path, names: Sequence[str]) -> int:
    try:
        return _walk(root, names)
    except FileNotFoundError as error:
        if error.filename == str(root):
            raise _unopened(root, error) from None
        raise _missing(text) from None
    except OSError as error:
        if error.filename == str(root):
            raise _unopened(root, error) from None
        raise PathNotAllowed(
            f"{text}: {error.filename!r} is a link, no directory, or unreadable; copy the adapter under "
            "the root itself"
        ) from None


def _unopened(root: Path, error: OSError) -> PathNotAllowed:
    return PathNotAllowed(f"the adapter root {root} cannot be opened: {error.strerror}")


def _walk(root: Path, names: Sequence[str]) -> int:
    """A handle of the directory below `root`, opened name by name; follows no link but in `root`.

    Raises:
        OSError: its `filename` is what could not be opened.
    """
    handle = os.open(str(root), _DIRECTORY)  # the operator's own path: links in it are meant
    for name in names:
        try:
            child = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
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
    if HUB_ID.fullmatch(text) and roots:
        raise PathNotAllowed(
            f"a LoRA path is a directory here, got a hub id; `hf download {text} --local-dir "
            f"{roots[0]}/{text.rpartition('/')[2]}`, and give that directory"
        )
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
