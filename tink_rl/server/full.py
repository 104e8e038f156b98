"""Full mode in one worker: whole tensors of the checkpoint into the served weights.

Tensors arrive in buckets and wait until their group (`layout.py`) is complete; a complete group is
written at once through vLLM's layerwise reload of its modules and the model's own `load_weights`, which
stacks, slices and packs. So a module is taken apart only while all of its new content is at hand, and
memory is bounded by a bucket and the largest group.

The writer remembers which groups differ from the checkpoint. What an earlier version changed and the
new one does not is read from the checkpoint's files again: a version is always checkpoint + what was sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tink_rl.errors import IncompleteGroup
from tink_rl.policy.fingerprint import read_checkpoint_tensor
from tink_rl.server.derived import Derived
from tink_rl.server.layout import Group, Layout, own_tensors, put_back
from tink_rl.server.reloading import reloading


class FullWriter:
    """Writes whole groups of tensors into one worker's model. No request may be running meanwhile.

    On any exception of `write`, `finish` or `restore` the weights are in no defined state until a later
    `finish` or `restore` succeeds.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        *,
        vllm_config: Any,
        dtype: torch.dtype,
        device: torch.device,
        derived: Derived | None = None,
    ) -> None:
        self.layout, self._derived = layout, derived
        self._model = model
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._vllm_config, self._dtype, self._device = vllm_config, dtype, device
        self._pending: dict[str, dict[str, torch.Tensor]] = {}
        self._now: set[str] = set()
        self.touched: set[str] = set()
        """Keys of the groups that may differ from the checkpoint."""

    def begin(self) -> None:
        """Start a version; forgets what an unfinished one left waiting."""
        self._pending, self._now = {}, set()

    @torch.no_grad()
    def write(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Write the groups that `tensors` complete, and say how many; keep copies of the rest."""
        fresh: set[str] = set()
        for name, tensor in tensors.items():
            group = self.layout.group_of.get(name)
            if group is None:
                continue  # a tensor that the served model does not load
            self._pending.setdefault(group.key, {})[name] = tensor
            fresh.add(group.key)
        complete = [
            group
            for key in sorted(fresh)
            if (group := self.layout.groups[key]).names <= self._pending[key].keys()
        ]
        self._write_groups(complete, [self._pending.pop(group.key) for group in complete])
        self._now |= {group.key for group in complete}
        for key in fresh & self._pending.keys():  # the buffer will be used again
            self._pending[key] = {
                name: tensor.clone() if name in tensors else tensor
                for name, tensor in self._pending[key].items()
            }
        return len(complete)

    def finish(self, also: Iterable[str] = ()) -> None:
        """End the version: everything else goes back to the checkpoint.

        Args:
            also: Module names of vLLM that were changed by other means (a merged version).

        Raises:
            IncompleteGroup: a part of a group was sent; nothing of that group was written.
        """
        if self._pending:
            key, found = min(self._pending.items())
            missing = sorted(self.layout.groups[key].names - found.keys())
            raise IncompleteGroup(
                f"{min(found)!r} was sent without {missing[:4]}, which vLLM keeps in the same module "
                f"({key}); send all of them, unchanged ones too",
                missing=missing[:10],
                module=key,
            )
        changed = self.touched | {
            self.layout.by_module[name].key for name in also if name in self.layout.by_module
        }
        self._restore(changed - self._now)
        self.touched, self._now = self._now, set()

    def restore(self) -> None:
        """Write the checkpoint's weights wherever a version changed them."""
        self.begin()
        self._restore(self.touched)
        self.touched = set()

    @torch.no_grad()
    def _restore(self, keys: Iterable[str]) -> None:
        for key in sorted(keys):
            group = self.layout.groups[key]
            tensors = {
                name: read_checkpoint_tensor(self.layout.index[name]).to(self._dtype)
                for name in sorted(group.names)
            }
            self._write_groups([group], [tensors])

    def _write_groups(self, groups: list[Group], tensors: list[dict[str, torch.Tensor]]) -> None:
        from tink_rl.server.vllm_names import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        if not groups:
            return
        self.touched |= {group.key for group in groups}  # before writing: it may fail midway
        modules = [self._modules[name] for group in groups for name in group.modules]
        with reloading(self._vllm_config, self._device):
            try:
                for module in modules:
                    initialize_layerwise_reload(module)
                    self._forget_packing(module)
                flat = {name: tensor for part in tensors for name, tensor in part.items()}
                self._model.load_weights(sorted(flat.items()))
                for module in modules:
                    finalize_layerwise_reload(module, self._vllm_config.model_config)
            except BaseException:
                for module in modules:
                    for part in module.modules():
                        put_back(part)
                raise
            self._repack_tied(modules)
            if self._derived is not None:
                self._derived.refresh(part for module in modules for part in module.modules())

    def _forget_packing(self, module: nn.Module) -> None:
        """Let experts be packed for a CPU again.

        vLLM 0.31 packs them only while it builds their kernel, and on a reload keeps the kernel: the
        plain weights would be copied over the packed ones, in silence.
        """
        method: Any = getattr(module, "quant_method", None)
        if self._device.type == "cpu" and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None

    def _repack_tied(self, modules: list[nn.Module]) -> None:
        """Let modules that share a tensor with `modules` pack it again (a tied head, on a CPU)."""
        if self._device.type != "cpu":
            return  # elsewhere the shared storage itself is used
        shared = {id(tensor) for module in modules for tensor in own_tensors(module).values()}
        for other in self._modules.values():
            if any(other is module for module in modules):
                continue
            method = getattr(other, "quant_method", None)
            if method is not None and any(id(t) in shared for t in own_tensors(other).values()):
                method.process_weights_after_loading(other)
