"""The two secrets: the bearer token of our routes, and vLLM's own key.

`tink-rl serve` makes the token once and keeps it in a file that only its owner can read.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from pathlib import Path

from tink_rl.errors import ConfigError

_MIN_LENGTH = 16
_WRITTEN_S = 2.0
"""A process that makes the file writes the token within this time."""
_KEY_FILE = "TINK_VLLM_API_KEY_FILE"


def default_token_file() -> Path:
    """Where `tink-rl serve` keeps the token if no file was named."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tink_rl" / "token"


def ensure_token_file(path: str | Path | None = None) -> Path:
    """The token's file; makes it (mode 0600) if it does not exist.

    Raises:
        ConfigError: it cannot be made or read, others can read it, or its token is too short.
    """
    named = path or os.environ.get("TINK_TOKEN_FILE") or default_token_file()
    file = Path(named).expanduser().absolute()
    try:
        if not file.exists():
            _make(file)
        _check_private(file)
        token = _read_written(file)
    except OSError as error:
        raise ConfigError(
            f"token file {file} cannot be made or read ({error.strerror}); name another one with "
            "TINK_TOKEN_FILE or --token-file"
        ) from error
    if len(token) < _MIN_LENGTH:
        raise ConfigError(
            f"token file {file} holds fewer than {_MIN_LENGTH} characters; delete it and start again"
        )
    return file


def _make(file: Path) -> None:
    """Write a new token; nothing if another process was faster: its token counts."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(secrets.token_urlsafe(32) + "\n")
    except BaseException:  # an empty file would be found too short by every later start
        file.unlink(missing_ok=True)
        raise


def _check_private(file: Path) -> None:
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"token file {file} has mode {mode:04o}, others can read it: chmod 600 {file}"
        )


def _read_written(file: Path) -> str:
    """The token. An empty file is one that another process has just made: wait for its token."""
    deadline = time.monotonic() + _WRITTEN_S
    while not (token := file.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return token


def vllm_api_key(key: str | None = None, file: str | None = None) -> str | None:
    """vLLM's own --api-key, if it has one: `key`, or from a file, or VLLM_API_KEY.

    Args:
        key: The key itself.
        file: The file that holds it; None: what TINK_VLLM_API_KEY_FILE names.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    path = file or os.environ.get(_KEY_FILE)
    if key or not path:
        return key or os.environ.get("VLLM_API_KEY") or None
    try:
        secret = Path(path).expanduser().read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"{_KEY_FILE}={path!r} cannot be read ({error.strerror}); expected a file with vLLM's "
            "--api-key in one line"
        ) from error
    if not secret:
        raise ConfigError(f"{_KEY_FILE}={path!r} is empty; expected vLLM's --api-key in one line")
    return secret
