"""The default `VLLMBackend` of a process: made on first use, replaced while calls are under way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tink_rl.sampling.backend import Config, VLLMBackend
from tink_rl.settings import Settings

_default: VLLMBackend | None = None
_default_lock = threading.Lock()
_initializing = threading.Lock()


def default_backend() -> VLLMBackend:
    """The backend behind the functions of `tink_rl.vllm_backend`; made from the environment at first."""
    global _default
    with _default_lock:
        if _default is None:
            _default = VLLMBackend()
        return _default


@contextmanager
def lent() -> Iterator[VLLMBackend]:
    """The default backend, which is not closed before the block ends."""
    while True:
        backend = default_backend()
        with backend.calls.one():
            if backend is _default:  # else it was replaced before it was counted
                yield backend
                return


def _close_when_idle(old: VLLMBackend) -> None:
    """Close `old` after its last call under way, which others wait for in their own threads."""

    def close() -> None:
        old.calls.ended(old.settings.tink_request_timeout)
        old.close()

    if old.calls.ended(0):
        old.close()
    else:
        threading.Thread(target=close, name="tink-close", daemon=True).start()


def initialize_vllm_client(config: Config = None) -> VLLMBackend:
    """Make the backend that the functions of `tink_rl.vllm_backend` use, and wait for its server.

    With the settings of the present one it stays as it is. Another one takes its place at once; calls
    under way end on the old one, which is closed after the last of them.

    Args:
        config: `Settings` or a dict (`{"base_url": "http://10.0.0.7:8000", "timeout": 2.0}`); what it
            does not name comes from the environment, then from the defaults.

    Raises:
        ServerUnreachable: `The vLLM server can't be reached at URL`, a `ConnectionError`.
        ConfigError: a setting is wrong.
    """
    global _default
    settings = Settings.load(config)
    with _initializing:
        with _default_lock:
            present = _default
        if present is not None and present.is_as_new(settings):
            return present.connect()
        fresh = VLLMBackend(settings)
        try:
            fresh.connect()
        except BaseException:
            fresh.close()
            raise
        with _default_lock:
            old, _default = _default, fresh
    if old is not None:
        _close_when_idle(old)
    return fresh
