"""Merged mode: golden + B·A into the served tensors, always as whole fused layers.

Writing goes through vLLM's layerwise reload, layer by layer, because after start-up a layer's tensors
may be packed for its kernels; on a GPU most layers are folded in place instead (`direct.py`). A fused layer
of which only some projections are sent would keep uninitialised memory for the others, in silence: every
projection of a touched layer is written, from golden where the adapter has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tink_rl.server import direct
from tink_rl.server.derived import Derived
from tink_rl.server.direct import Golden
from tink_rl.server.layout import put_back
from tink_rl.server.modules import Layer, Shard
from tink_rl.server.reloading import reloading


class Folder:
    """Folds versions into one worker's model. Remembers which layers differ from the base."""

    def __init__(
        self,
        layers: Mapping[str, Layer],
        golden: Golden,
        *,
        vllm_config: Any,
        device: torch.device,
        derived: Derived | None = None,
        in_place: Iterable[str] = (),
    ) -> None:
        """Store.

        Args:
            layers: Those that can be folded.
            golden: Their base weights.
            vllm_config: The engine's.
            device: Where the weights are served.
            derived: What the model makes of its weights; made again after every fold.
            in_place: Names of the layers that were found equal to golden (`direct.same_as_golden`).
        """
        self._layers = layers
        self._derived, self._in_place = derived, frozenset(in_place)
        self._golden = golden
        self._vllm_config = vllm_config
        self._device = device
        self._touched: set[str] = set()

    @property
    def touched(self) -> frozenset[str]:
        """Names of the layers that may differ from the base."""
        return frozenset(self._touched)

    def forget(self) -> None:
        """Somebody else has written all layers that this folder had touched."""
        self._touched = set()

    @torch.no_grad()
    def fold(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Serve golden + B·A for `tensors` (`MODULE.lora_A.weight` `[r, in]`, B `[out, r]`).

        Layers that an earlier version touched and this one does not go back to golden; an empty
        mapping restores the base. No request may be running. On any exception the weights are in no
        defined state until a later fold succeeds.
        """
        targets = {name.rsplit(".", 2)[0] for name in tensors}
        now = {
            name
            for name, layer in self._layers.items()
            if any(shard.name in targets for shard in layer.shards)
        }
        todo = sorted(self._touched | now)
        self._touched |= now  # before writing: after a failure all of them must be folded again
        with reloading(self._vllm_config, self._device), direct.exact_products(self._device):
            for name in todo:
                self.write_layer(self._layers[name], tensors)
            if self._derived is not None:
                self._derived.refresh(self._layers[name].module for name in todo)
        self._touched = now

    def write_layer(self, layer: Layer, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write all projections of one layer; after an exception it can be written again."""
        rows = direct.served_rows(layer) if layer.name in self._in_place else None
        if rows is not None:
            direct.fold_in_place(layer, rows, self._golden, tensors)
            return
        try:
            self._reload_layer(layer, tensors)
        except BaseException:
            put_back(layer.module)  # else the next reload would wrap half a layer
            raise

    def _reload_layer(self, layer: Layer, tensors: Mapping[str, torch.Tensor]) -> None:
        from tink_rl.server.vllm_names import finalize_layerwise_reload, initialize_layerwise_reload

        module: Any = layer.module
        bias = module._parameters.get("bias")
        initialize_layerwise_reload(module)
        for shard in layer.shards:
            whole = self._whole(shard, tensors)
            if shard.shard_id is None:
                module.weight.weight_loader(module.weight, whole)
            else:
                module.weight.weight_loader(module.weight, whole, shard.shard_id)
        finalize_layerwise_reload(module, self._vllm_config.model_config)
        if bias is not None and module.bias is not bias:
            raise AssertionError(f"the reload of {layer.name} replaced its bias")

    def _whole(self, shard: Shard, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The projection in its full shape; only this rank's part is filled (the loader reads no other)."""
        golden = self._golden.weight(shard).to(self._device)
        lora_a = tensors.get(f"{shard.name}.lora_A.weight")
        part = golden
        if lora_a is not None:
            lora_b = tensors[f"{shard.name}.lora_B.weight"]
            rows = lora_b[shard.rows].to(self._device, torch.float32)
            columns = lora_a[:, shard.columns].to(self._device, torch.float32)
            part = torch.addmm(golden.float(), rows, columns).to(golden.dtype)
        if part.shape == shard.shape:
            return part
        whole = torch.empty(shard.shape, dtype=part.dtype, device=self._device)
        whole[shard.rows, shard.columns] = part
        return whole
