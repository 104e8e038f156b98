"""Addresses: which ones only this machine can reach, and how one stands in a URL. A leaf."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str | None) -> bool:
    """Whether `host` (a name or an address, no port) is this machine by the loopback device."""
    if host == "localhost":
        return True
    try:
        return host is not None and ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_local(url: str) -> bool:
    """Whether `url` names a loopback address. A forwarded port looks like one, and is another machine."""
    try:
        return is_loopback(urlsplit(url).hostname)
    except ValueError:  # no URL, as whoever dials it will say
        return False


def http_url(host: str, port: int) -> str:
    """`http://HOST:PORT`; an IPv6 address stands in brackets there, whether `host` has them or not."""
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"
