"""The last few versions of what is trained, each rank its own part, to compute with one of them again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tink_rl.policy.peft_names import PeftModel
from tink_rl.policy.sharded import own_storages

logger = logging.getLogger("tink_rl")
_ON_DEVICE_BYTES = 2**28
"""Of all kept versions together. An adapter's stay beside the model; what is larger waits in the host's
memory, and is copied when it is computed with."""


class KeptVersions:
    """The newest `count` versions of a model's trained parameters, by name."""

    def __init__(self, model: PeftModel, count: int) -> None:
        """Store; nothing is kept yet."""
        self._model, self._count = model, count
        self._versions: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def remember(self, name: str) -> None:
        """Keep what the model holds now as `name`, in place of the oldest where there are enough.

        Every rank of a sharded model must call it.
        """
        if name in self._versions:
            return
        own = own_storages(self._model)
        if len(self._versions) < self._count:
            device = self._device(own)
            copies = [torch.empty_like(tensor, device=device) for tensor in own]
        else:
            copies = self._versions.pop(next(iter(self._versions)))
        _copy(copies, own)
        self._versions[name] = copies

    def _device(self, own: Sequence[torch.Tensor]) -> torch.device:
        size = sum(tensor.numel() * tensor.itemsize for tensor in own)
        is_small = size * self._count <= _ON_DEVICE_BYTES
        device = own[0].device if is_small else torch.device("cpu")
        if not self._versions:
            logger.info(
                "the last %d versions of what is trained are kept on %s, %.1f MiB each",
                *(self._count, device, size / 2**20),
            )
        return device

    @contextmanager
    def swapped(self, name: str) -> Iterator[None]:
        """Compute with the version `name` inside the block; the own values come back bit for bit.

        They are written into the parameters' own memory, so that no optimizer, shard or view is told.
        Every rank of a sharded model must enter it, with the same name.
        """
        assert name in self._versions, f"{name} is not among the kept {list(self._versions)}"
        own = own_storages(self._model)
        now = [tensor.clone() for tensor in own]
        try:
            _copy(own, self._versions[name])
            yield
        finally:
            _copy(own_storages(self._model), now)


@torch.no_grad()
def _copy(to: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)
