"""Which tensors of the checkpoint lie together in which modules of the served model.

vLLM fuses: `q_proj`, `k_proj` and `v_proj` of the checkpoint are one `qkv_proj`, all experts of a layer
are two tensors. A module of which only a part is reloaded keeps uninitialised memory for the rest, in
silence, so tensors are written in groups: everything that shares a module. The model's own
`load_weights` says which those are: it is run once, at start, on tensors without data, and each weight
loader notes for which name it was called. No table of architectures is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tink_rl.errors import ConfigError, IncompleteGroup, ShapeMismatch, UnknownModules
from tink_rl.policy.fingerprint import CheckpointTensor
from tink_rl.policy.packet import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors of the checkpoint that are only right when they are written together."""

    key: str
    """First of the module names; the same on every rank."""
    modules: tuple[str, ...]
    """Names of vLLM's modules that hold them."""
    names: frozenset[str]
    """Names in the checkpoint."""


class Layout:
    """Every tensor of the checkpoint, and the group that it belongs to."""

    def __init__(
        self,
        index: Mapping[str, CheckpointTensor],
        groups: Iterable[Group],
        placed: Mapping[str, tuple[str, Any]] | None = None,
    ) -> None:
        self.index = dict(index)
        self.placed = dict(placed or {})
        """Module in the checkpoint -> module of vLLM and shard of it, where the weight is put unchanged."""
        self.groups = {group.key: group for group in groups}
        self.group_of = {name: group for group in self.groups.values() for name in group.names}
        self.by_module = {
            module.removesuffix(".base_layer"): group
            for group in self.groups.values()
            for module in group.modules
        }

    def describe(self) -> list[list[str]]:
        """The names of each group, sorted; what a sender needs to send whole groups only."""
        return [sorted(group.names) for group in self.groups.values()]

    def check(self, tensors: Iterable[TensorSpec]) -> None:
        """Raise unless each of `tensors` is one of the checkpoint, in its shape.

        Raises:
            UnknownModules, ShapeMismatch.
        """
        specs = list(tensors)
        unknown = sorted(spec.name for spec in specs if spec.name not in self.index)
        if unknown:
            raise UnknownModules(
                f"{len(unknown)} of {len(specs)} tensors are not in the served checkpoint, first "
                f"{unknown[0]!r}; it has names such as {next(iter(self.index))!r}: is this the model "
                "that is served?",
                unknown=unknown[:10],
            )
        for spec in specs:
            expected = tuple(self.index[spec.name].shape)
            if tuple(spec.shape) != expected:
                raise ShapeMismatch(
                    f"tensor {spec.name!r} has shape {list(spec.shape)}, the served checkpoint has "
                    f"{list(expected)}; is this the model that is served?",
                    tensor=spec.name,
                )

    def check_whole(self, names: Iterable[str]) -> None:
        """Raise unless `names` are whole groups.

        Raises:
            IncompleteGroup: names what is missing.
        """
        given = set(names)
        for name in sorted(given):
            group = self.group_of.get(name)
            if group is not None and not group.names <= given:
                missing = sorted(group.names - given)
                raise IncompleteGroup(
                    f"{name!r} was sent without {missing[:4]}{' ...' if missing[4:] else ''}, which vLLM "
                    f"keeps in the same module ({group.key}); send all of them, unchanged ones too",
                    missing=missing[:10],
                    module=group.key,
                )


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of `module` itself."""
    found = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@torch.no_grad()
def trace_layout(model: Any, index: Mapping[str, CheckpointTensor]) -> Layout:
    """The layout of `model`, whose weights are the checkpoint of `index`. No request may be running.

    The served tensors are set aside meanwhile and put back; not one byte of them is touched.

    Raises:
        ConfigError: the model's loader cannot be followed.
    """
    trace = _Trace(model, index)
    try:
        trace.run()
    finally:
        trace.put_back()
    return Layout(index, _connected(trace.touched), trace.placed())


class _Trace:
    def __init__(self, model: Any, index: Mapping[str, CheckpointTensor]) -> None:
        self._model, self._index = model, index
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._loaders: list[tuple[torch.Tensor, Any]] = []
        self._current = ""
        self._fed: torch.Tensor | None = None
        self._puts: dict[str, list[tuple[str, Any] | None]] = {}
        """Where each tensor went: module and shard id; None where it was changed before."""
        self._num_fed = 0
        self._eager = False
        self.touched: dict[str, set[str]] = {name: set() for name in index}

    def run(self) -> None:
        from tink_rl.server.vllm_names import initialize_layerwise_reload

        initialize_layerwise_reload(self._model)
        for name, module in self._modules.items():
            self._listen(name, module)
        self._model.load_weights(self._feed(self._index))
        if self._eager:  # this loader reads all names before it loads the first: ask one by one
            self.touched, self._puts = {name: set() for name in self._index}, {}
            for name in self._index:
                self._num_fed = 0
                self._model.load_weights(self._feed({name: self._index[name]}))

    def _listen(self, module_name: str, module: nn.Module) -> None:
        from tink_rl.server.vllm_names import to_meta_tensor

        for name, tensor in own_tensors(module).items():
            if not tensor.is_meta:
                if name not in module._parameters:
                    continue  # a buffer that the reload leaves alone, such as an expert map
                tensor = to_meta_tensor(tensor)
                module._parameters[name] = tensor
            self._loaders.append((tensor, getattr(tensor, "weight_loader", None)))
            tensor.weight_loader = self._note(module_name, name)  # type: ignore[attr-defined]

    def _note(self, module_name: str, tensor_name: str) -> Any:
        def note(*given: Any, **named: Any) -> bool:
            if self._num_fed == len(self._index) > 1 and not any(self.touched.values()):
                self._eager = True
            self.touched[self._current].add(module_name)
            put = (module_name.removesuffix(".base_layer"), _shard_id(given, named))
            is_whole = tensor_name == "weight" and _is_same(given, named, self._fed)
            self._puts.setdefault(self._current, []).append(put if is_whole else None)
            return True

        return note

    def _feed(self, index: Mapping[str, CheckpointTensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, entry in index.items():
            self._current, self._num_fed = name, self._num_fed + 1
            self._fed = torch.empty(entry.shape, device="meta")
            yield name, self._fed

    def placed(self) -> dict[str, tuple[str, Any]]:
        """See `Layout.placed`."""
        return {
            name.removesuffix(".weight"): puts[0]
            for name, puts in self._puts.items()
            if name.endswith(".weight") and len(puts) == 1 and puts[0] is not None
        }

    def put_back(self) -> None:
        for tensor, loader in self._loaders:
            # vLLM keeps these very tensors as its records for the next reload.
            if loader is None:
                del tensor.weight_loader  # type: ignore[attr-defined]
            else:
                tensor.weight_loader = loader  # type: ignore[attr-defined]
        for module in self._modules.values():
            put_back(module)


def _shard_id(given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """The third argument of a weight loader: which shard of a fused layer."""
    return given[2] if len(given) > 2 else named.get("loaded_shard_id", named.get("shard_id"))


def _is_same(given: tuple[Any, ...], named: Mapping[str, Any], fed: torch.Tensor | None) -> bool:
    """Whether a loader got just the tensor that the checkpoint holds."""
    loaded = given[1] if len(given) > 1 else named.get("loaded_weight")
    if not isinstance(loaded, torch.Tensor) or fed is None:
        return False
    is_view = loaded.untyped_storage()._cdata == fed.untyped_storage()._cdata
    return is_view and loaded.shape == fed.shape and loaded.stride() == fed.stride()


def put_back(module: nn.Module) -> None:
    """End a reload of `module` that did not end by itself: the tensors that it had, as they are."""
    from tink_rl.server.vllm_names import get_layerwise_info, place_kernel_tensors

    info = get_layerwise_info(module)
    if info.can_load() and info.kernel_tensors is not None:
        place_kernel_tensors(module, info)
    info.reset()


def _connected(touched: Mapping[str, set[str]]) -> Iterator[Group]:
    """Groups of names that share a module, directly or through others."""
    root: dict[str, str] = {}

    def find(module: str) -> str:
        while root.setdefault(module, module) != module:
            module = root[module]
        return module

    for modules in touched.values():
        first, *others = sorted(modules) or [""]
        for other in others:
            low, high = sorted((find(first), find(other)))
            root[high] = low
    names: dict[str, set[str]] = {}
    members: dict[str, set[str]] = {}
    for name, modules in touched.items():
        if modules:
            key = find(min(modules))
            names.setdefault(key, set()).add(name)
            members.setdefault(key, set()).update(modules)
    if not names:
        raise ConfigError("the model's load_weights called no weight loader")
    for key in names:
        yield Group(
            key=key.removesuffix(".base_layer"),
            modules=tuple(sorted(members[key])),
            names=frozenset(names[key]),
        )
