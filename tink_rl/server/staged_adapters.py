"""Staged adapters of one worker process, by private path: what `tink://...` resolves to.

A copy stays here for as long as a request may name it. vLLM evicts adapters from its own cache and
reads them again at the next use; one whose source is gone would end the whole engine.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from tink_rl.policy.packet import PacketHeader

SCHEME = "tink://"


@dataclass(frozen=True, kw_only=True)
class StagedAdapter:
    """One checked adapter: header and tensors (views into one buffer on the CPU)."""

    header: PacketHeader
    tensors: dict[str, torch.Tensor]
    buffer: torch.Tensor
    """The bytes of the packet; free again once nobody can name the adapter."""


_LOCK = threading.Lock()
_ADAPTERS: dict[str, StagedAdapter] = {}


def put(path: str, adapter: StagedAdapter) -> None:
    """Keep `adapter` under `path` until `pop`."""
    with _LOCK:
        _ADAPTERS[path] = adapter


def get(path: str) -> StagedAdapter | None:
    """The adapter of `path`, or None."""
    with _LOCK:
        return _ADAPTERS.get(path)


def pop(path: str) -> StagedAdapter | None:
    """Forget `path` and give what it held; None for an unknown path."""
    with _LOCK:
        return _ADAPTERS.pop(path, None)
