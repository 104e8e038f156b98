"""Whether the base that a trainer holds is the checkpoint that is served: whole tensors, one by one.

A fingerprint is of files; a base is what lies in memory, and that may have been merged, resized,
averaged or loaded again. So every tensor of the live base is compared with the checkpoint's, exactly,
after the cast that a loader makes. Nothing is copied but one chunk at a time, and of a sharded model
every rank reads its own part only.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tink_rl.errors import BaseMismatch
from tink_rl.policy.base_names import Pair, match_names
from tink_rl.policy.fingerprint import CheckpointTensor, MappedCheckpoint
from tink_rl.policy.packed_base import is_packed, packed_difference
from tink_rl.policy.peft_names import BaseModel
from tink_rl.policy.sharded import own_part, read_whole, whole_shape

logger = logging.getLogger("tink_rl")
_CHUNK = 2**20
"""Elements that are cast, or moved to the model's device, at once."""
_WHOLE_CHUNK = 2**26
"""Elements that are compared in one call where nothing has to be cast."""
_SAY_EVERY_S = 5.0
HEAD = "lm_head.weight"
_ROUNDINGS = (torch.bfloat16, torch.float16)
_WAY_OUT = (
    "serve what the trainer holds: save the base and its tokenizer before the LoRA is added "
    "(model.save_pretrained('NEW_DIR'), tokenizer.save_pretrained('NEW_DIR')), `tink-rl serve NEW_DIR`, "
    "and load NEW_DIR in the trainer; or load the checkpoint unchanged"
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One tensor that is not the checkpoint's."""

    name: str
    what: str
    """As a sentence goes on: "differs by up to 0.01 in 128 of 8192 elements, first in row 17"."""
    max_abs: float | None = None


@dataclass(kw_only=True)
class Comparison:
    """What was found so far."""

    num_tensors: int = 0
    num_bytes: int = 0
    """Of the checkpoint, as this rank read it."""
    differences: list[Difference] = field(default_factory=list)
    rounded: dict[torch.dtype, list[str]] = field(default_factory=dict)
    """Tensors that hold the checkpoint's values after a rounding to this narrower dtype."""
    unread: dict[str, list[str]] = field(default_factory=dict)
    """Why -> tensors that could not be compared."""


def compare_base(
    base: BaseModel,
    index: Mapping[str, CheckpointTensor],
    *,
    where: str,
    changed_on_purpose: Collection[str] = (),
    tied: bool = False,
    saved_as: Collection[str] = (),
) -> Comparison:
    """Compare the base model `base` with the checkpoint of `index`; every rank of a sharded one calls it.

    Args:
        base: The model under an adapter, with PEFT's wrappers in place.
        index: The checkpoint's tensors.
        where: Directory or name of the checkpoint, for the error.
        changed_on_purpose: Names of weights that an initialisation (PiSSA, LoftQ, ...) changed; they
            travel with the adapter.
        tied: Whether the checkpoint's config ties head and embedding.
        saved_as: Names of the class that was saved; another one may leave tensors out (images).

    Raises:
        BaseMismatch: a tensor differs, is missing or is too many; names the first and how far off.
    """
    live = dict(base_tensors(base))
    shapes = {name: whole_shape(tensor) for name, tensor in live.items()}
    if tied and any(live.get(HEAD) is t for name, t in live.items() if name != HEAD):
        del shapes[HEAD]  # loaders leave the file's alone, if it has one
        index = {name: entry for name, entry in index.items() if name != HEAD}
    known = match_names(base, shapes, index)
    found = Comparison()
    found.differences += _without_partner(base, live, index, known, saved_as)
    progress = _Progress(sum(index[pair.stored].num_bytes for pair in known))
    parts = _Parts(base, live)
    files, skipped = MappedCheckpoint(), set(changed_on_purpose)
    for pair in known:
        tensor = live[pair.live[0]]
        if tensor.requires_grad or not skipped.isdisjoint({pair.stored, *pair.live}):
            continue  # what is trained is published whole, and may have been resumed
        _compare(pair, tensor, parts, files.tensor(index[pair.stored]), found)
        progress.add(index[pair.stored].num_bytes)
    _say(found, progress)
    if found.differences:
        raise mismatch(found, where)
    return found


def mismatch(found: Comparison, where: str) -> BaseMismatch:
    """The error that names the first difference of `found`."""
    first, num = found.differences[0], len(found.differences)
    others = f" (and {num - 1} more tensors)" if num > 1 else ""
    return BaseMismatch(
        f"the trainer's base is not the checkpoint that is served ({where}): {first.name} "
        f"{first.what}{others}; {_WAY_OUT}",
        tensor=first.name,
        max_abs=first.max_abs,
        num_tensors=num,
        tensors=[difference.name for difference in found.differences[:10]],
    )


# -- what the live base holds -----------------------------------------------------------------------


def unwrapped_modules(
    module: Any, path: str = "", *, keep_adapted: bool = False
) -> Iterator[tuple[str, Any]]:
    """The modules of a base with their names, without what PEFT, compile and checkpointing wrap.

    With `keep_adapted`, what PEFT put in a module's place stands for it, and is not looked into.
    """
    if keep_adapted and hasattr(module, "base_layer"):
        yield path, module
        return
    module = _unwrapped(module)
    yield path, module
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        yield from unwrapped_modules(child, below, keep_adapted=keep_adapted)


def base_tensors(base: BaseModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of a base, by their names without wrappers."""
    for path, module in unwrapped_modules(base):
        skipped = module._non_persistent_buffers_set
        own = dict(module._parameters)
        own |= {name: b for name, b in module._buffers.items() if name not in skipped}
        for name, tensor in own.items():
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def _unwrapped(module: Any) -> Any:
    """What stands in the base at the place of `module`."""
    inner = module
    if hasattr(module, "modules_to_save"):
        inner = module.original_module
    layer = getattr(module, "token_adapter", module)
    if hasattr(layer, "base_layer") and hasattr(layer, "get_base_layer"):
        inner = layer.get_base_layer()
    for wrapper in ("_orig_mod", "_checkpoint_wrapped_module"):
        inner = inner._modules.get(wrapper, inner)
    return inner if inner is module else _unwrapped(inner)


def _without_partner(
    base: BaseModel,
    live: Mapping[str, torch.Tensor],
    index: Mapping[str, CheckpointTensor],
    pairs: Collection[Pair],
    saved_as: Collection[str],
) -> Iterator[Difference]:
    """Tensors of one side that the other one lacks; what takes no part in computing is only logged."""
    matched = {name for pair in pairs for name in pair.live}
    held = {id(live[name]) for name in matched}
    for name, tensor in live.items():
        if name in matched or id(tensor) in held:  # a tied head is the embedding
            continue
        if isinstance(tensor, torch.nn.Parameter):
            yield Difference(name=name, what="is in the trainer's base only")
        else:
            logger.info("the buffer %s of the trainer's base is not in the checkpoint", name)
    stored = {pair.stored for pair in pairs}
    missing = set(index) - stored
    unused = sorted(name for name in missing if _is_unused(base, name, stored, saved_as))
    if unused:
        logger.info(
            "%d tensors of the checkpoint do not belong to the trainer's %s, first %s",
            *(len(unused), type(base).__name__, unused[0]),
        )
    for name in sorted(missing - set(unused)):
        yield Difference(name=name, what="is in the checkpoint only")


def _is_unused(
    base: BaseModel, name: str, matched: Collection[str], saved_as: Collection[str]
) -> bool:
    """Whether a tensor of the checkpoint means nothing to this model, as transformers sees it too."""
    patterns = set(getattr(base, "_keys_to_ignore_on_load_unexpected", None) or ())
    if any(re.search(pattern, name) for pattern in patterns | {r"rotary_emb\.inv_freq"}):
        return True
    if getattr(base, "is_quantized", False) and not name.endswith((".weight", ".bias")):
        return True  # statistics of a packed weight; the weight itself is compared
    if type(base).__name__.removeprefix("FSDP") in saved_as:
        return False
    # The text model of a checkpoint of text and images: towers stand beside its layers, not in them.
    shared = (p for p in _prefixes(name) if any(other.startswith(p) for other in matched))
    return not any(".layers." in prefix for prefix in shared)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:k]) + "." for k in range(1, len(parts)))


# -- one pair ---------------------------------------------------------------------------------------


def _compare(
    pair: Pair, tensor: torch.Tensor, parts: _Parts, stored: torch.Tensor, found: Comparison
) -> None:
    found.num_tensors += 1
    if tensor.is_meta:
        found.unread.setdefault("offloaded by accelerate", []).append(pair.stored)
        return
    if is_packed(tensor):
        _compare_packed(pair, tensor, stored, found)
        return
    if pair.shape != tuple(stored.shape):
        found.differences.append(_other_shape(pair, tuple(stored.shape)))
        return
    ours, theirs, start = parts.of(pair, stored)
    if ours.is_floating_point() != theirs.is_floating_point():
        found.unread.setdefault(f"{ours.dtype} from {theirs.dtype}", []).append(pair.stored)
        return
    found.num_bytes += theirs.numel() * theirs.itemsize
    if _equal(ours, theirs):
        return
    via = next((d for d in _ROUNDINGS if _equal(ours, theirs, via=d)), None)
    if via is not None:
        found.rounded.setdefault(via, []).append(pair.stored)
        return
    found.differences.append(_measured(pair, ours, theirs, start))


class _Parts:
    """What this rank holds of the live base."""

    def __init__(self, base: BaseModel, live: Mapping[str, torch.Tensor]) -> None:
        self._base, self._live = base, live
        self._last: tuple[tuple[str, ...], list[torch.Tensor]] = ((), [])

    def of(self, pair: Pair, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """This rank's elements of `pair`, the same ones of `stored`, and the first one's index there."""
        own = own_part(self._live[pair.live[0]]) if pair.begin is not None else None
        if own is None:
            return pair.assembled(self._base, self._whole(pair.live)), stored, 0
        ours, begin = own
        assert pair.begin is not None
        first = max(pair.begin, begin)
        last = max(first, min(pair.begin + stored.numel(), begin + ours.numel()))
        flat = stored.reshape(-1)[first - pair.begin : last - pair.begin]
        return ours[first - begin : last - begin], flat, first - pair.begin

    def _whole(self, names: tuple[str, ...]) -> list[torch.Tensor]:
        """Whole tensors, gathered once for all parts of them, which stand side by side."""
        if self._last[0] != names:
            self._last = ((), [])
            self._last = (names, read_whole([self._live[name] for name in names]))
        return self._last[1]


def _chunks(
    ours: torch.Tensor, theirs: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    as_it_is = ours.dtype == theirs.dtype and ours.device == theirs.device
    size = _WHOLE_CHUNK if as_it_is else _CHUNK
    a, b = ours.reshape(-1), theirs.reshape(-1)
    for begin in range(0, a.numel(), size):
        yield a[begin : begin + size], b[begin : begin + size].to(ours.device)


@torch.no_grad()
def _equal(ours: torch.Tensor, theirs: torch.Tensor, via: torch.dtype | None = None) -> bool:
    """Whether `ours` is `theirs` after a loader's cast (first to `via`), element by element."""
    for a, b in _chunks(ours, theirs):
        cast = (b if via is None else b.to(via)).to(a.dtype)
        if not _same_words(a, cast) and bool(_unequal(a, cast).any()):
            return False
    return True


def _same_words(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the bits are the same, eight bytes at a time: half of the time, in bf16 a third."""
    aligned = all(
        t.numel() * t.itemsize % 8 == t.storage_offset() * t.itemsize % 8 == t.data_ptr() % 8 == 0
        for t in (a, b)
    )
    return torch.equal(a.view(torch.int64), b.view(torch.int64)) if aligned else torch.equal(a, b)


def _unequal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where `a` and `b` differ; a NaN in both is the same."""
    return (a != b) & ~((a != a) & (b != b))


@torch.no_grad()
def _measured(pair: Pair, ours: torch.Tensor, theirs: torch.Tensor, start: int) -> Difference:
    largest, count, seen, first = 0.0, 0, 0, None
    for a, b in _chunks(ours, theirs):
        cast = b.to(a.dtype)
        unequal = _unequal(a, cast)
        if bool(unequal.any()):
            count += int(unequal.sum())
            gaps = (a[unequal].double() - cast[unequal].double()).abs().nan_to_num(nan=torch.inf)
            largest = max(largest, float(gaps.max()))
            first = seen + int(unequal.nonzero()[0]) if first is None else first
        seen += a.numel()
    assert first is not None
    width = math.prod(pair.shape[1:])
    at = f", first in row {(start + first) // width}" if len(pair.shape) > 1 else ""
    what = f"differs by up to {largest:.3g} in {count} of {theirs.numel()} elements{at}"
    return Difference(name=pair.stored, what=what, max_abs=largest)


def _other_shape(pair: Pair, stored: tuple[int, ...]) -> Difference:
    what = f"has shape {list(pair.shape)}, in the checkpoint {list(stored)}"
    is_layer = ".layers." in pair.stored
    if len(stored) == 2 and pair.shape[1:] == stored[1:] and not is_layer:
        rows = f"{pair.shape[0]} rows, in the checkpoint {stored[0]}"
        what = f"has {rows}: the vocabulary was resized in memory"
    return Difference(name=pair.stored, what=what)


def _compare_packed(
    pair: Pair, tensor: torch.Tensor, stored: torch.Tensor, found: Comparison
) -> None:
    found.num_bytes += stored.numel() * stored.itemsize
    try:
        if stored.is_floating_point() and (pair.begin != 0 or pair.shape != tuple(stored.shape)):
            raise NotImplementedError("a packed weight of another layout than the checkpoint's")
        gap = packed_difference(tensor, stored)
    except NotImplementedError as error:
        found.unread.setdefault(str(error), []).append(pair.stored)
        return
    if gap is not None:
        what = f"differs by up to {gap:.3g} after quantising it as the trainer did"
        found.differences.append(Difference(name=pair.stored, what=what, max_abs=gap))


# -- saying -----------------------------------------------------------------------------------------


class _Progress:
    """Says how far the comparison is, every few seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self.begin = self._said = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if now - self._said > _SAY_EVERY_S:
            self._said = now
            logger.info(
                "comparing the trainer's base with the checkpoint: %.1f of %.1f GB",
                *(self._done / 1e9, self._total / 1e9),
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin


def _say(found: Comparison, progress: _Progress) -> None:
    for dtype, names in found.rounded.items():
        logger.warning(
            "%d tensors of the trainer's base, first %s, hold the checkpoint's values rounded to %s, which "
            "the server does not round: load the model in the checkpoint's dtype",
            *(len(names), names[0], str(dtype).removeprefix("torch.")),
        )
    for why, names in found.unread.items():
        logger.warning(
            "%d tensors of the trainer's base could not be compared with the checkpoint, first %s (%s)",
            *(len(names), names[0], why),
        )
    logger.log(
        logging.INFO if progress.seconds > _SAY_EVERY_S else logging.DEBUG,
        "compared %d tensors of the trainer's base (%.2f GB) with the checkpoint in %.1f s",
        *(found.num_tensors, found.num_bytes / 1e9, progress.seconds),
    )
