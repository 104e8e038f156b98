"""Whose certificates are trusted, for every client alike, and what is wrong with one that is not. A leaf.

Proxy variables of the environment are not for our servers (a proxy would swallow loopback), and the
switch of httpx that leaves them out leaves out SSL_CERT_FILE too; so what is trusted is decided here.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from tink_rl.errors import ConfigError

CA_FILE = "TINK_CA_FILE"
_OPENSSL = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_HASHED = re.compile(r"[0-9a-f]{8}\.\d+")
_WRONG_NAME = (62, 64)
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""
_WRONG_TIME = (9, 10)
_PROBE_S = 2.0
_REMEDY = (
    f"give the certificate of its authority (PEM) with {CA_FILE} or SyncConfig(ca_file=...); "
    "SSL_CERT_FILE and SSL_CERT_DIR are read too"
)


def context_for(url: str, ca_file: str | None = None) -> ssl.SSLContext | None:
    """What verifies the server of `url`; None where nothing is encrypted.

    Trusted are the system's authorities, or those of SSL_CERT_FILE and SSL_CERT_DIR, and beside them
    those of `ca_file`.

    Args:
        url: Of the server.
        ca_file: PEM file, or OpenSSL's directory of them; None: what TINK_CA_FILE names.

    Raises:
        ConfigError: a file that is named cannot be read, or holds no certificate.
    """
    if not url.startswith("https://"):
        return None
    for name in _OPENSSL:  # OpenSSL itself passes over what is not there, in silence
        value = os.environ.get(name)
        if value and not all(Path(part).exists() for part in value.split(os.pathsep)):
            raise ConfigError(f"{name}={value!r} does not exist; correct or unset it")
    context = ssl.create_default_context()
    if named := os.environ.get(_OPENSSL[0]):  # nor does it tell of one that holds no certificate
        _add(context, Path(named), f"{_OPENSSL[0]}={named!r}")
    if not any(os.environ.get(name) for name in _OPENSSL):
        _add_public_authorities(context)
    given = ca_file or os.environ.get(CA_FILE)
    if given:
        path = Path(given).expanduser()
        _add(context, path, f"the CA file {str(path)!r}")
    return context


def _add_public_authorities(context: ssl.SSLContext) -> None:
    """Those of certifi, as httpx would: a Python may know no store of the system."""
    try:
        import certifi
    except ImportError:
        return
    context.load_verify_locations(cafile=certifi.where())


def _add(context: ssl.SSLContext, path: Path, called: str) -> None:
    try:
        if path.is_dir():
            _add_directory(context, path)
        else:
            context.load_verify_locations(cafile=path)
    except (OSError, ssl.SSLError) as error:
        why = "holds no PEM certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(
            f"{called} {why}; expected the authority's certificate in PEM form "
            f"({CA_FILE}, SyncConfig.ca_file, --ca-file)"
        ) from error


def _add_directory(context: ssl.SSLContext, path: Path) -> None:
    """Both kinds: hashed names, of which OpenSSL looks up one, and plain files, which it would not see."""
    context.load_verify_locations(capath=path)
    files = sorted(path.iterdir())
    added = any(_HASHED.fullmatch(file.name) for file in files)
    for file in files:
        if file.suffix in (".pem", ".crt", ".cer"):
            with suppress(OSError, ssl.SSLError):
                context.load_verify_locations(cafile=file)
                added = True
    if not added:
        raise ssl.SSLError("no certificate in this directory")


def what_is_wrong(url: str, error: BaseException) -> str | None:
    """What a user reads of a connection that failed in TLS; None: it did not fail there."""
    if url.startswith("http://"):
        return (
            f"the server at {url} speaks TLS; give its URL with https://"
            if wants_tls(url)
            else None
        )
    found: BaseException | None = error
    while (
        found is not None and type(found).__module__ != "ssl"
    ):  # aiohttp has subclasses of its own
        found = found.__cause__ or found.__context__
    if not isinstance(found, ssl.SSLError):
        return None
    if isinstance(found, ssl.SSLCertVerificationError):
        return f"the certificate of {url} {_verdict(found)}"
    if found.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return f"the server at {url} speaks no TLS; give its URL with http://"
    return (
        f"no TLS connection to {url} ({found.reason or found}); look into the log of what serves it"
    )


def _verdict(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _WRONG_NAME:
        return f"is for another host ({error.verify_message}); use the name that stands in it"
    if error.verify_code in _WRONG_TIME:
        return f"is refused: {error.verify_message}; renew it, or set the clock"
    return f"is not trusted ({error.verify_message}): {_REMEDY}"


def wants_tls(url: str) -> bool:
    """Whether what listens at an http:// URL speaks TLS, found by asking it."""
    parts = urlsplit(url)
    if parts.scheme != "http":
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    try:
        with socket.create_connection((parts.hostname, parts.port or 80), _PROBE_S) as plain:
            plain.settimeout(_PROBE_S)
            context.wrap_socket(plain, server_hostname=parts.hostname).close()
    except (OSError, ValueError):
        return False
    return True
