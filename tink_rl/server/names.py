"""What trainers and checkpoints call the projections of the served model: one mapping, used by every mode.

vLLM renames: a model of text and images has another prefix there than in transformers, a hybrid model's
mixers lie one level deeper, and a checkpoint may hold `gate_up_proj` where an adapter is told to have
`gate_proj` and `up_proj`, or the other way round. Asked in this order: where the model's own loader puts
a tensor of that name (`layout.py`), vLLM's names, its `hf_to_vllm_mapper`. An adapter on a fused name is
the same A for every projection, with B's rows cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tink_rl.errors import UnknownModules
from tink_rl.server.modules import Layer, Shard

_LIVE_TEXT = "model.language_model."
"""Before the text model's names where transformers loads it with its images."""


class Names:
    """From a module's name, as it comes, to the projections that it is."""

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, Layer],
        placed: Mapping[str, tuple[str, Any]] | None = None,
    ) -> None:
        """Store.

        Args:
            model: The served one.
            layers: Its linear layers.
            placed: Module in the checkpoint -> module of vLLM, and the shard of it, where the loader puts
                that weight unchanged.
        """
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._mapper: Any = None if mapper is None else mapper.get_rename_mapper()
        self._layers = layers
        self._shards = {shard.name: shard for layer in layers.values() for shard in layer.shards}
        self._placed = placed or {}
        self._found: dict[str, tuple[Shard, ...]] = {}

    def __len__(self) -> int:
        """Number of projections."""
        return len(self._shards)

    @property
    def example(self) -> str:
        """A name that is known, for error texts."""
        return min(self._placed.keys() or self._shards.keys(), default="none")

    def find(self, module: str) -> tuple[Shard, ...]:
        """The projections that `module` is, in fused order; none if it is unknown."""
        if module not in self._found:
            self._found[module] = self._look_for(module)
        return self._found[module]

    def _look_for(self, module: str) -> tuple[Shard, ...]:
        if module in self._placed:
            layer, shard_id = self._placed[module]
            shards = self._layers[layer].shards if layer in self._layers else ()
            return (
                shards if shard_id is None else tuple(s for s in shards if s.shard_id == shard_id)
            )
        inner = _LIVE_TEXT + module.removeprefix("model.")
        for name in (module, self._renamed(module), self._renamed(inner)):
            if name in self._shards:
                return (self._shards[name],)
            if name in self._layers:
                return self._layers[name].shards
        return ()

    def _renamed(self, module: str) -> str:
        if self._mapper is None:
            return module
        return str(self._mapper.map_name(f"{module}.weight") or "").removesuffix(".weight")

    def cut(
        self, tensors: Mapping[str, torch.Tensor], *, for_slots: bool = False
    ) -> dict[str, torch.Tensor]:
        """A packet's tensors by projection; `for_slots`: in the names that vLLM's slots take."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            module, _, part = name.removesuffix(".weight").rpartition(".")
            shards = self._found.get(module) or self.find(module)
            layer = self._layers[shards[0].layer]
            if len(shards) == 1:
                found[f"{shards[0].name}.{part}.weight"] = tensor
            elif for_slots and layer.comes_fused:
                found[f"{layer.name}.{part}.weight"] = tensor
            else:
                for shard, rows in layer.rows_of():
                    found[f"{shard.name}.{part}.weight"] = (
                        tensor if part == "lora_A" else tensor[rows]
                    )
        return found


def split(name: str) -> tuple[str, str]:
    """Module and part of a tensor of a packet.

    Raises:
        UnknownModules: it is neither A nor B.
    """
    module, _, part = name.removesuffix(".weight").rpartition(".")
    if part not in ("lora_A", "lora_B") or not name.endswith(".weight"):
        raise UnknownModules(f"tensor {name!r}: expected MODULE.lora_A.weight or .lora_B.weight")
    return module, part
