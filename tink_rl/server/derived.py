"""Tensors that vLLM makes of a linear layer's weight after loading, and keeps beside it.

Multi-head latent attention decodes with `W_UV` and `W_UK_T`, which its attention layer makes of `kv_b_proj`;
a prefill uses `kv_b_proj` itself. vLLM's reload of the linear layer alone leaves the former at the old
weights, in silence, so the attention layer makes them again after every write. Their storage stays, and
captured graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tink_rl.errors import ConfigError
from tink_rl.server.modules import Layer, unwrap


class Derived:
    """The attention layers of one model that keep tensors made of their linear layers."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        from tink_rl.server.vllm_names import LinearBase, is_deferred_attention_layer

        self._model, self._dtype = model, dtype
        self._owners: list[tuple[Any, list[nn.Module]]] = []
        """Each with the linear layers that it holds, without LoRA's wrappers."""
        for module in model.modules():
            if is_deferred_attention_layer(module):
                held = [part for part in module.modules() if isinstance(part, LinearBase)]
                if held:
                    self._owners.append((module, held))

    def owned(self, layers: Iterable[Layer]) -> dict[str, str]:
        """The projections that a LoRA slot cannot change, and whose they are.

        The attention layer multiplies by the weight itself, past the wrapper of the slot.
        """
        owner_of = {id(part): type(owner).__name__ for owner, held in self._owners for part in held}
        return {
            shard.name: owner_of[id(layer.module)]
            for layer in layers
            for shard in layer.shards
            if id(layer.module) in owner_of
        }

    @torch.no_grad()
    def refresh(self, written: Iterable[nn.Module]) -> None:
        """Make them again wherever one of the modules in `written` is what they are made of."""
        found = {id(unwrap(module)) for module in written}
        for owner, held in self._owners:
            if any(id(part) in found for part in held):
                owner.process_weights_after_loading(self._dtype)

    @torch.no_grad()
    def check(self) -> None:
        """Raise if writing weights would leave something of the old ones behind. The base must be served.

        Raises:
            ConfigError: merged and full mode cannot work on this model.
        """
        for owner, _ in self._owners:
            if getattr(owner, "is_amx_bmm_enabled", False):
                raise ConfigError(
                    "the attention backend AMX_MLA throws kv_b_proj's weight away after packing it, so "
                    "merged and full mode cannot write it; start the server with --attention-backend "
                    "CPU_MLA, or with --mode adapter"
                )
            before = _addresses(owner)
            owner.process_weights_after_loading(self._dtype)
            moved = sorted(name for name, at in _addresses(owner).items() if at != before.get(name))
            if moved:
                raise ConfigError(
                    f"{type(owner).__name__} makes {moved[0]!r} of its weights at a new address, which "
                    "captured graphs do not see: merged and full mode cannot refresh it; start the "
                    "server with --mode adapter"
                )
        if callable(getattr(self._model, "process_weights_after_loading", None)):
            raise ConfigError(
                f"{type(self._model).__name__} makes further tensors of its weights after loading, which "
                "merged and full mode would leave at the old ones; start the server with --mode adapter"
            )


def _addresses(module: nn.Module) -> dict[str, int]:
    """Where the tensors of `module` itself lie, registered or not; scalars (scales of the cache) aside."""
    found = {**vars(module), **module._parameters, **module._buffers}
    tensors = {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}
    return {name: t.data_ptr() for name, t in tensors.items() if t.numel() > 1}
