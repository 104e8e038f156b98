"""Who may do what: two bearer tokens, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from enum import IntEnum
from pathlib import Path
from urllib.parse import urlsplit

from tink_rl.errors import BadToken
from tink_rl.loopback import is_loopback
from tink_rl.tokens import ensure_token_file
from tink_rl.worker.error_body import printable
from tink_rl.worker.options import WorkerOptions


class Scope(IntEnum):
    """What a route asks of its caller."""

    OPEN = 0
    """Nothing: liveness and readiness, which say nothing but yes or no."""
    SAMPLE = 1
    """The sample token; without one a caller on this machine."""
    ADMIN = 2
    """The admin token, always."""


class Tokens:
    """The tokens of one worker; holds only their hashes."""

    def __init__(
        self, *, admin: str, sample: str | None = None, admin_file: Path | None = None
    ) -> None:
        """Keep the tokens' hashes; `sample=None` lets everybody on this machine sample."""
        self.admin_file = admin_file
        """Where the admin token can be read."""
        self._admin = _hash(admin)
        self._sample = None if sample is None else _hash(sample)

    @classmethod
    def from_options(cls, options: WorkerOptions) -> Tokens:
        """Read the token files; makes those that are missing.

        Raises:
            ConfigError: others can read a file, or its token is too short.
        """
        file = ensure_token_file(options.admin_token_file)
        named = options.sample_token_file
        return cls(
            admin=_read(file),
            sample=None if named is None else _read(ensure_token_file(named)),
            admin_file=file,
        )

    def require(
        self,
        scope: Scope,
        authorization: str | None,
        remote: str | None = None,
        host: str | None = None,
    ) -> None:
        """Return if `authorization` (the header) carries a token for `scope`; admin's is good for all.

        Without a sample token `remote`, the caller's address, must be a loopback one to sample: whatever
        app holds the routes, only it knows where it listens. `host`, the header, must name one too.

        Raises:
            BadToken: no token, one that is not ours, or the sample token where the admin's is needed.
        """
        if scope is Scope.OPEN:
            return
        is_unset = scope is Scope.SAMPLE and self._sample is None
        is_here = is_loopback((remote or "").removeprefix("::ffff:"))
        if is_unset and is_here and _names_loopback(host):
            return
        given = _hash(_bearer(authorization))
        is_admin = hmac.compare_digest(given, self._admin)
        is_sample = hmac.compare_digest(given, self._sample or bytes(len(given)))
        if is_admin or (is_sample and scope is Scope.SAMPLE):
            return
        if is_sample:
            raise BadToken(
                "this token is for sampling; the route wants the admin token (its file is named in "
                "the worker's first lines)",
                code="wrong_scope",
            )
        if is_unset and is_here:
            raise BadToken(
                f"the request names host {printable(host or '')!r}, and without a token only requests "
                "for this machine are answered: use http://127.0.0.1:PORT, or set "
                "TINK_WORKER_SAMPLE_TOKEN_FILE=FILE (made if it does not exist), start the worker again "
                "and send the token"
            )
        if is_unset:
            raise BadToken(
                f"sampling from {remote or 'an unknown address'} needs a token and this worker has "
                "none: set TINK_WORKER_SAMPLE_TOKEN_FILE=FILE (made if it does not exist) and start it "
                "again, or connect to a loopback address"
            )
        raise BadToken(
            "missing or wrong token; send `Authorization: Bearer TOKEN` with the token from the "
            f"{'admin' if scope is Scope.ADMIN else 'sample'} token file of the worker"
        )


def _names_loopback(host: str | None) -> bool:
    """Whether a Host header names this machine, as a web page that had its own name point here cannot."""
    try:
        parts = urlsplit(f"//{host}")
    except ValueError:
        return False
    # "127.0.0.1/x" and "x@127.0.0.1" are not hosts, whatever a lenient parser makes of them
    return parts.netloc == host and "@" not in host and is_loopback(parts.hostname)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _bearer(header: str | None) -> str:
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _read(file: Path) -> str:
    return file.read_text().strip()
