"""A server's URL as people write it, and as it is dialled. A leaf."""

from __future__ import annotations

import logging
import re
from urllib.parse import SplitResult, urlsplit

from tink_rl.errors import ConfigError

logger = logging.getLogger("tink_rl")

_EXPECTED = "expected http://HOST:PORT or https://HOST:PORT"
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
_OPENAI_PATH = re.compile(
    r"(/tink)?/v1(/(chat/)?(completions|models|embeddings|responses|status))?$|/health$"
)
"""Ends of a path that name a route and no place: OpenAI's clients ask for URL/v1."""
_said: set[str] = set()


def server_url(given: str) -> str:
    """`given` as the root of a server's routes, which may lie below a path prefix.

    Blanks and slashes at the end, and a route such as `/v1` (said once), are taken off; a wildcard
    address is dialled as loopback.

    Raises:
        ConfigError: it is not the URL of a server; what it holds of a password is not repeated.
    """
    text = given.strip()
    if "@" in text:
        raise ConfigError(
            f"a URL with a user or password in it: {_EXPECTED}; vLLM's own key goes into VLLM_API_KEY or "
            "SyncConfig(api_key=...), the token of the control routes into TINK_TOKEN_FILE"
        )
    if "://" not in text:
        example = (
            f", such as http://{text}" if re.match(r"[\w.\[-]", text) and ":/" not in text else ""
        )
        raise ConfigError(f"the URL {given!r} has no scheme: {_EXPECTED}{example}")
    parts = _split(text)
    path = parts.path.rstrip("/")
    kept = _OPENAI_PATH.sub("", path).rstrip("/")
    host = parts.netloc
    for wildcard, loopback in _WILDCARDS.items():
        if host == wildcard or host.startswith(f"{wildcard}:"):
            host = host.replace(wildcard, loopback, 1)
    url = f"{parts.scheme}://{host}{kept}"
    if kept != path and text not in _said:
        _said.add(text)
        logger.warning("%s: taken as %s; routes such as /v1 are added here", text, url)
    return url


def _split(text: str) -> SplitResult:
    """The parts of a URL with a scheme, a host and no question.

    Raises:
        ConfigError: it has not these.
    """
    if text.count(":") > 2 and "[" not in text:
        raise ConfigError(
            f"the URL {text!r}: an IPv6 address stands in brackets, http://[::1]:8000"
        )
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises if it is none
    except ValueError as error:
        raise ConfigError(f"the URL {text!r} cannot be read ({error}): {_EXPECTED}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"the URL {text!r}: {_EXPECTED}")
    if parts.query or parts.fragment or re.search(r"\s", text):
        raise ConfigError(f"the URL {text!r} has more than a host, port and path: {_EXPECTED}")
    return parts
