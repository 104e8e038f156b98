"""The bearer token of the control routes: made once, kept in a file that only its owner can read."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from tink_rl.config import default_token_file
from tink_rl.errors import ConfigError

_MIN_LENGTH = 16


def ensure_token_file(path: str | Path | None = None) -> Path:
    """The token's file; makes it (mode 0600) if it does not exist.

    Raises:
        ConfigError: others can read it, or its token is too short.
    """
    named = path or os.environ.get("TINK_TOKEN_FILE") or default_token_file()
    file = Path(named).expanduser().absolute()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return ensure_token_file(file)  # another process was faster: use its token
        with os.fdopen(handle, "w") as stream:
            stream.write(secrets.token_urlsafe(32) + "\n")
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"token file {file} has mode {mode:04o}, others can read it: chmod 600 {file}"
        )
    if len(file.read_text().strip()) < _MIN_LENGTH:
        raise ConfigError(
            f"token file {file} holds fewer than {_MIN_LENGTH} characters; delete it and start again"
        )
    return file
