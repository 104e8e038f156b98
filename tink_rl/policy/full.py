"""Whole tensors to publish in full mode: out of a model, a PEFT model, an adapter on its base, or a stream.

Names are the checkpoint's. Adapters are merged in fp32 into temporaries, one module at a time: nothing
is ever merged in place, and no second model is held. vLLM fuses some tensors into one module, so what
is sent are whole groups (`Groups`, as the server says them): of a group in which one tensor changed, all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tink_rl.errors import UnknownModules, UnsupportedAdapter
from tink_rl.policy.adapter import Adapter
from tink_rl.policy.fingerprint import CheckpointTensor, read_checkpoint_tensor
from tink_rl.policy.peft_names import BaseModel, PeftModel, is_peft_model

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
Groups = Sequence[Sequence[str]]
"""Names of the served checkpoint's tensors, by group that must be sent whole."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor that can be made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class FullSource:
    """What is going to be sent."""

    entries: list[Entry] | None
    """In order, if everything is known beforehand; it can then be sent again."""
    stream: Iterator[tuple[str, torch.Tensor]] | None = None
    """Else: pairs that can be read once."""

    def plan(self, dtype: str) -> list[dict[str, Any]] | None:
        """Names, shapes and dtypes for the server to check before the first byte; None for a stream."""
        if self.entries is None:
            return None
        return [{"name": e.name, "shape": list(e.shape), "dtype": dtype} for e in self.entries]

    def pairs(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, one after the other."""
        if self.entries is None:
            assert self.stream is not None
            yield from self.stream
        else:
            for entry in self.entries:
                yield entry.name, entry.make()


def full_source(
    source: object, groups: Groups, index: Mapping[str, CheckpointTensor] | None = None
) -> FullSource:
    """The tensors of `source` for a server whose tensors lie in `groups`.

    Args:
        source: An `Adapter` (sent as base + B·A; needs `index`), a PEFT model, any other module, a
            mapping of names to tensors, or an iterable of pairs.
        groups: See `Groups`.
        index: The checkpoint of the base.

    Raises:
        UnknownModules: the model has tensors that the server does not load, or lacks some.
        UnsupportedAdapter: something that cannot be sent.
    """
    if isinstance(source, Adapter):
        assert index is not None
        return FullSource(entries=_of_adapter(source, groups, index))
    if is_peft_model(source):
        return FullSource(entries=_of_peft(source, groups))
    if isinstance(source, torch.nn.Module):
        found = _Collected()
        found.entries = _tensors(source)
        known = {name for group in groups for name in group}
        entries, _ = _in_checkpoint_names(source, found, known)
        return FullSource(entries=_in_groups(entries, groups, changed=None))
    if isinstance(source, Mapping):
        pairs = _without_tied_head(source.items(), groups)
        return FullSource(entries=[_entry(name, tensor) for name, tensor in pairs])
    if isinstance(source, Iterable):
        return FullSource(entries=None, stream=_without_tied_head(source, groups))
    raise UnsupportedAdapter(
        f"publish_full() got {type(source).__name__}; expected a model, a PEFT model or (name, tensor) "
        "pairs"
    )


def _without_tied_head(
    pairs: Iterable[tuple[str, torch.Tensor]], groups: Groups
) -> Iterator[tuple[str, torch.Tensor]]:
    """`pairs` without a head that the checkpoint does not have because it is the embedding.

    Exporters write it all the same.

    Raises:
        UnsupportedAdapter: it is not the embedding any more.
    """
    known = {name for group in groups for name in group}
    if _HEAD in known:
        yield from pairs
        return
    marks: dict[str, str] = {}
    for name, tensor in pairs:
        if name == _HEAD or name.endswith(_EMBEDDING):
            marks[name] = _mark(tensor)
            if len(set(marks.values())) > 1:
                raise _untied(next(other for other in marks if other != _HEAD))
        if name != _HEAD:
            yield name, tensor


def _mark(tensor: torch.Tensor) -> str:
    from blake3 import blake3

    data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return str(blake3(data.numpy().data).hexdigest())


def _entry(name: str, tensor: torch.Tensor) -> Entry:
    return Entry(name=name, shape=tuple(tensor.shape), make=lambda: tensor.detach())


def _tensors(module: torch.nn.Module) -> dict[str, Entry]:
    """Parameters and persistent buffers of `module`; tied ones under each of their names."""
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if hasattr(tensor, "full_tensor"):
            raise UnsupportedAdapter(
                f"{name!r} is sharded over processes; gather the model first (get_state_dict with "
                "full_state_dict=True) and publish that mapping"
            )
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise UnsupportedAdapter(f"{name!r} has no data (meta device); load the model whole")
    return {name: _entry(name, tensor) for name, tensor in state.items()}


def _in_groups(
    entries: Mapping[str, Entry], groups: Groups, *, changed: set[str] | None
) -> list[Entry]:
    """The entries of whole groups, in the server's order; only groups with a changed name, if given.

    Raises:
        UnknownModules: the model lacks a name, or has one that no group holds.
    """
    known = {name for group in groups for name in group}
    lost = sorted((set(entries) if changed is None else changed) - known)
    lost = [name for name in lost if not _is_tied_head(name, entries, known)]
    wanted = [
        name
        for group in groups
        if changed is None or not changed.isdisjoint(group)
        for name in group
    ]
    missing = [name for name in wanted if name not in entries]
    if lost or missing:
        raise UnknownModules(
            f"the model has {len(lost)} tensors that the served checkpoint has not "
            f"({lost[:3]}) and lacks {len(missing)} that it has ({missing[:3]}); is this the model "
            "that is served?",
            unknown=lost[:10],
            missing=missing[:10],
        )
    return [entries[name] for name in wanted]


def _is_tied_head(name: str, entries: Mapping[str, Entry], known: set[str]) -> bool:
    """Whether `name` is a head that the server does not hold because it is the embedding.

    Raises:
        UnsupportedAdapter: the two differ.
    """
    embeddings = [other for other in known if other.endswith(_EMBEDDING) and other in entries]
    if name != _HEAD or not embeddings:
        return False
    head, embedding = entries[name].make(), entries[embeddings[0]].make()
    if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding.to(head)):
        raise _untied(embeddings[0])
    return True


def _untied(embedding: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"{_HEAD} and {embedding} are one tensor in the served model, but the adapter makes them differ; "
        "leave both out of the adapter, train them tied (ensure_weight_tying=True), or start from a "
        "base with tie_word_embeddings=False"
    )


# -- an adapter on the checkpoint -------------------------------------------------------------------


def _of_adapter(
    adapter: Adapter, groups: Groups, index: Mapping[str, CheckpointTensor]
) -> list[Entry]:
    def make(name: str) -> Callable[[], torch.Tensor]:
        module = name.removesuffix(".weight")
        lora_a = adapter.tensors.get(f"{module}.lora_A.weight")
        if lora_a is None:
            return lambda: read_checkpoint_tensor(index[name])
        lora_b = adapter.tensors[f"{module}.lora_B.weight"]
        return lambda: torch.addmm(
            read_checkpoint_tensor(index[name]).float(), lora_b.cpu().float(), lora_a.cpu().float()
        )

    entries = {
        name: Entry(name=name, shape=tuple(item.shape), make=make(name))
        for name, item in index.items()
    }
    changed = {f"{module}.weight" for module in adapter.modules}
    unknown = sorted(changed - set(index))
    if unknown:
        raise UnknownModules(
            f"{len(unknown)} of {len(changed)} modules of the adapter match nothing in the base, first "
            f"{unknown[0]!r}: was the adapter trained on this base?",
            unknown=unknown[:10],
        )
    return _in_groups(entries, groups, changed=changed)


# -- a live PEFT model ------------------------------------------------------------------------------


def _of_peft(model: PeftModel, groups: Groups) -> list[Entry]:
    base = model.get_base_model()
    found = _Collected()
    _visit("", base, found)
    if not found.changed:
        raise UnsupportedAdapter("the PEFT model has no active adapter that changes its base")
    known = {name for group in groups for name in group}
    entries, changed = _in_checkpoint_names(base, found, known)
    if any(name == _HEAD or name.endswith(_EMBEDDING) for name in changed):
        changed |= {_HEAD} & set(entries)  # a tied one must still be the other's equal
    return _in_groups(entries, groups, changed=changed)


class _Collected:
    """Entries of the base, by their names in memory, and which of them the adapter changes."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.changed: set[str] = set()

    def add(self, path: str, tensors: Mapping[str, torch.Tensor], changed: bool) -> None:
        for key, tensor in tensors.items():
            name = f"{path}.{key}" if path else key
            self.entries[name] = _entry(name, tensor)
            if changed or tensor.requires_grad:
                self.changed.add(name)

    def add_merged(self, path: str, layer: Any, adapters: list[str]) -> None:
        def make(key: str) -> Callable[[], torch.Tensor]:
            return lambda: merged_copy(layer, adapters)[key]

        for key, tensor in layer.get_base_layer().state_dict(keep_vars=True).items():
            name = f"{path}.{key}"
            self.entries[name] = Entry(name=name, shape=tuple(tensor.shape), make=make(key))
            self.changed.add(name)


def _visit(path: str, module: Any, found: _Collected) -> None:
    """Collect `module` and what is below it, as a forward pass would compute it."""
    if hasattr(module, "modules_to_save"):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        trained = bool(active) and not module.disable_adapters
        inner = module.modules_to_save[active[0]] if trained else module.original_module
        found.add(path, inner.state_dict(keep_vars=True), changed=trained)
        return
    layer = getattr(module, "token_adapter", module)
    if hasattr(layer, "base_layer") and hasattr(layer, "merge"):
        if layer.merged:
            raise UnsupportedAdapter(
                f"{path} is merged into the base; call unmerge_adapter() before a publish"
            )
        adapters = [name for name in layer.active_adapters if name in _adapters(layer)]
        if adapters and not layer.disable_adapters:
            found.add_merged(path, layer, adapters)
        else:
            found.add(path, layer.get_base_layer().state_dict(keep_vars=True), changed=False)
        return
    own = dict(module.named_parameters(recurse=False))
    skipped = module._non_persistent_buffers_set
    own |= {k: v for k, v in module.named_buffers(recurse=False) if k not in skipped}
    found.add(path, own, changed=False)
    for name, child in module.named_children():
        _visit(f"{path}.{name}" if path else name, child, found)


def _adapters(layer: Any) -> set[str]:
    return {
        name
        for attribute in layer.adapter_layer_names
        for name in (getattr(layer, attribute, None) or ())
    } | {name for name in getattr(layer, "r", ()) if isinstance(layer.r, dict)}


@torch.no_grad()
def merged_copy(layer: Any, adapters: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of a wrapped layer's base with `adapters` merged, in fp32, by PEFT's own arithmetic.

    Works on a copy of this one layer; the layer itself is not touched.
    """
    twin = copy.deepcopy(layer).float()
    part = twin
    while hasattr(part, "base_layer"):  # LoRA on several parameters of one module is a chain
        part.merge(safe_merge=True, adapter_names=adapters)
        part = part.base_layer
    found: dict[str, torch.Tensor] = twin.get_base_layer().state_dict()
    return found


# -- names in memory, names in the checkpoint -------------------------------------------------------


def _in_checkpoint_names(
    base: BaseModel, found: _Collected, known: set[str]
) -> tuple[dict[str, Entry], set[str]]:
    """Entries and changes under the checkpoint's names, where transformers holds tensors otherwise.

    It keeps all experts of a layer in one tensor, for example; its own conversion takes them apart.
    """
    entries: dict[str, Entry] = {}
    changed: set[str] = set()
    for name, entry in found.entries.items():
        parts = {name: entry} if name in known else _converted(base, entry, known)
        entries |= parts
        if name in found.changed:
            changed |= set(parts)
    return entries, changed


def _converted(base: BaseModel, entry: Entry, known: set[str]) -> dict[str, Entry]:
    from transformers.core_model_loading import revert_weight_conversion

    def convert(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = revert_weight_conversion(base, {entry.name: tensor})
        return found

    shapes = convert(torch.empty(entry.shape, device="meta"))
    if not set(shapes) <= known:
        return {entry.name: entry}
    last: dict[str, torch.Tensor] = {}

    def make(name: str) -> Callable[[], torch.Tensor]:
        def part() -> torch.Tensor:
            if not last:
                last.update(convert(entry.make()))
            tensor = last.pop(name)  # each is asked for once a publish; what is left is the rest
            return tensor

        return part

    return {
        name: Entry(name=name, shape=tuple(tensor.shape), make=make(name))
        for name, tensor in shapes.items()
    }
