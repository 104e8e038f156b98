"""Which directory a base model is: itself, a snapshot of the hub's cache at a revision, a subfolder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tink_rl.errors import ConfigError, LaunchFailed

_COMMIT = re.compile(r"[0-9a-f]{40}$")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_WEB = re.compile(r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)")


def local_model_dir(
    model: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    cache_dir: str | Path | None = None,
) -> Path:
    """The directory of `model`: itself, or the cached snapshot of a hub id.

    Args:
        model: A directory or a hub id.
        revision: Branch, tag, `refs/pr/N` or commit of a hub id; None: its main branch.
        subfolder: Of the model in it, as `from_pretrained(..., subfolder=...)` takes it.
        cache_dir: The hub cache; None: the default one.

    Raises:
        ConfigError: neither a directory nor a cached hub id, or it has no such subfolder.
    """
    if not str(model):
        raise ConfigError(
            "the base model was made in memory: it names no directory and no hub id; save it with "
            "save_pretrained(DIR), load it from there, and serve DIR"
        )
    path = Path(model).expanduser()
    found = path if path.is_dir() else _snapshot(str(model), revision, cache_dir)
    if not subfolder:
        return found
    if not (found / subfolder).is_dir():
        folders = sorted(p.name for p in found.iterdir() if p.is_dir())[:8]
        raise ConfigError(f"{found} has no subfolder {subfolder!r}; it has {folders}")
    return found / subfolder


def models_below(directory: Path) -> list[str]:
    """Names of the subfolders of `directory` that hold a model, if it holds none itself."""
    if (directory / "config.json").is_file():
        return []
    return sorted(path.parent.name for path in directory.glob("*/config.json"))


def commit_of(directory: Path) -> str | None:
    """The commit whose snapshot in a hub cache `directory` lies in; None: it does in none."""
    for name, parent in zip(directory.parts[1:], directory.parts[:-1], strict=True):
        if parent == "snapshots" and _COMMIT.match(name):
            return name
    return None


def place_in_hub(directory: str | Path) -> dict[str, str]:
    """`{"base_revision": COMMIT, "base_subfolder": ""}` of a directory in a hub cache; else empty."""
    path = Path(directory)
    commit = commit_of(path)
    if commit is None:
        return {}
    inner = path.parts[path.parts.index(commit) + 1 :]
    return {"base_revision": commit, "base_subfolder": "/".join(inner)}


def _snapshot(model: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ConfigError(
            f"base model {model!r}{at}: neither a directory nor a model in the local hub cache"
            f"{_cached_revisions(model, cache_dir, revision)}; {_way_to(model, revision)}"
        ) from error


def _way_to(model: str, revision: str | None) -> str:
    """What to do about a model that is not here."""
    path = Path(model).expanduser()
    if path.is_file():
        return f"that is a file: give its directory, {str(path.parent)!r}"
    if web := _WEB.match(model):
        return f"a URL is not a model: give the hub id, {web[1]!r}"
    if not _HUB_ID.fullmatch(model):
        return "give a directory that exists, or a hub id such as ORGANISATION/NAME"
    pinned = f" --revision {revision}" if revision else ""
    return f"`hf download {model}{pinned}` fetches it, if that is a hub id"


def _cached_revisions(model: str, cache_dir: str | Path | None, revision: str | None = None) -> str:
    """` (cached: v2)`: branches and tags of `model`, or the commits that begin so; empty if none is."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not _HUB_ID.fullmatch(model):
        return ""
    home = Path(cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(
        repo_id=model, repo_type="model"
    )
    refs = home / "refs"
    found = sorted(p.relative_to(refs).as_posix() for p in refs.rglob("*") if p.is_file())
    if revision and re.fullmatch(r"[0-9a-f]{4,39}", revision):  # a commit is asked for in full
        found = sorted(p.name for p in home.glob(f"snapshots/{revision}*")) or found
    return f" (cached: {', '.join(found[:8])})" if found else ""


def model_to_serve(model: str, revision: str | None, subfolder: str) -> str:
    """What vLLM is given as the model: `model`, or a directory, because vLLM knows no subfolders.

    Raises:
        LaunchFailed: as far as that can be known before vLLM downloads it.
    """
    if not subfolder:
        _check_model(model, revision)
        return model
    try:
        directory = local_model_dir(model, revision=revision, subfolder=subfolder)
    except ConfigError as error:
        raise LaunchFailed(error.message, code="model_not_found") from error
    _check_model(str(directory), None)
    return str(directory)


def _check_model(model: str, revision: str | None) -> None:
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            inner = models_below(path)
            hint = f"; --subfolder {inner[0]} holds one" if inner else ""
            raise LaunchFailed(
                f"model directory {model!r} has no config.json; expected a saved transformers model{hint}",
                code="model_not_found",
            )
        return
    # `models/base` may be either; beside a folder `models` it is a path with a slip.
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    looks_like_path = looks_like_path or path.parent.is_dir()
    offline = os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True", "yes")
    if not looks_like_path and not offline:
        return  # a hub id: vLLM downloads it
    try:
        if looks_like_path:
            raise ConfigError("not a directory")
        local_model_dir(model, revision=revision)
    except ConfigError as error:
        cached = "" if looks_like_path else _cached_revisions(model, None, revision)
        raise LaunchFailed(
            f"model {model!r} was not found (neither a directory nor in the local hub cache{cached}); "
            f"check the path and --revision; {_way_to(model, revision)}",
            code="model_not_found",
        ) from error


def loaded_from(model: Any, asked: Any = None) -> str:
    """The directory that a live base model was loaded from; the name it bears where that is not here.

    Args:
        model: As `from_pretrained` gave it; it remembers the commit of a hub id.
        asked: What `from_pretrained` was given, if that is known: it alone says subfolder and cache.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    known = asked if isinstance(asked, dict) else {}
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    revision, cache_dir = commit or known.get("revision"), known.get("cache_dir")
    try:
        found = local_model_dir(name, revision=revision, cache_dir=cache_dir)
        subfolder = str(known.get("subfolder") or "")
        inner = models_below(found)
        if not subfolder and len(inner) == 1:
            subfolder = inner[0]  # nowhere else in it can the model have come from
        return str(local_model_dir(found, subfolder=subfolder))
    except ConfigError:
        return name  # whoever needs the files says so
