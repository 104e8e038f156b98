"""Whether a live base computes what the checkpoint's config says: its config, its modules' numbers.

Weights are half of a model. The other half (rope, eps, scalings, soft caps, experts per token) is in the
config and in what each module took from it when it was built; both can be changed in memory. The served
model is built from the checkpoint's config, so that is what a live base must agree with.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tink_rl.errors import BaseMismatch
from tink_rl.policy.live_base import unwrapped_modules
from tink_rl.policy.peft_names import BaseModel

logger = logging.getLogger("tink_rl")
_NO_MATTER = re.compile(
    r"^_|token_id|drop|loss|jitter|^output_|label|architectures|dtype|use_cache|return_dict|"
    r"transformers_version|quantization|problem_type|initializer|tokenizer|^torchscript|task_specific|"
    r"max_position_embeddings|max_seq_len|vocab_size|padding_idx|layer_idx|^training$|checkpointing|"
    r"pruned_heads|chunk_size_feed_forward|is_causal|keys_to_ignore|^name_or_path$|pretraining_tp"
)
"""Settings by name that say how a model is trained, saved or logged, or that tensors show by their shape."""
_LARGEST_TABLE = 2**20
"""Elements; what is larger is a weight."""
_SAME = 1e-6
"""Relative; a config is written in decimals."""


def check_settings(base: BaseModel, saved: Any, *, where: str) -> None:
    """Raise unless `base` computes by the config `saved` of the checkpoint `where`.

    Raises:
        BaseMismatch: names the setting, the live value and the checkpoint's.
    """
    for setting, ours, theirs in _differences(base, saved):
        raise BaseMismatch(
            f"the trainer's base is not the checkpoint that is served ({where}): {setting} is {ours!r} in "
            f"the trainer, {theirs!r} by the checkpoint's config.json; load the model without that change, "
            "or save it with the change (model.save_pretrained('NEW_DIR')), serve NEW_DIR and load it in "
            "the trainer",
            setting=setting,
            given=str(ours),
            expected=str(theirs),
        )


def _differences(base: BaseModel, saved: Any) -> Iterator[tuple[str, Any, Any]]:
    ours, theirs = (c.get_text_config().to_dict() for c in (base.config, saved))
    yield from _of_config(ours, theirs, "config")
    yield from _of_modules(base, saved)


def _of_config(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(set(ours) & set(theirs)):
        if _NO_MATTER.search(key):
            continue
        mine, wanted = ours[key], theirs[key]
        if isinstance(mine, Mapping) and isinstance(wanted, Mapping):
            yield from _of_config(mine, wanted, f"{path}.{key}")
            for only in sorted(set(mine) ^ set(wanted)):
                yield f"{path}.{key}.{only}", mine.get(only), wanted.get(only)
        elif not _alike(mine, wanted):
            yield f"{path}.{key}", mine, wanted


def _alike(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) or isinstance(theirs, float):
        numbers = isinstance(ours, (int, float)) and isinstance(theirs, (int, float))
        return numbers and abs(ours - theirs) <= _SAME * max(abs(ours), abs(theirs))
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(_alike, ours, theirs))
    return bool(ours == theirs)


def _of_modules(base: BaseModel, saved: Any) -> Iterator[tuple[str, Any, Any]]:
    """Numbers of modules (eps, scaling, ...) and the tables that they computed (rotary frequencies)."""
    _, base = next(unwrapped_modules(base))
    try:
        with torch.random.fork_rng(devices=[]), _WeightsWithoutData():
            built = dict(_plain_class(base)(saved).named_modules())
    except Exception as error:  # noqa: BLE001 - a model's own code; its weights were compared all the same
        logger.warning(
            "%s cannot be built again from its config (%s), so what its modules took from it is not compared",
            *(type(base).__name__, error),
        )
        return
    for name, module in unwrapped_modules(base):
        if name in built:
            yield from _of_numbers(name, module, built[name])
            yield from _of_tables(name, module, built[name])


class _WeightsWithoutData(TorchFunctionMode):
    """Lets a model be built with its tables and without memory for its weights."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            found = func(*args, **{**kwargs, "device": "meta"})
            if func is torch.empty or found.numel() > _LARGEST_TABLE:
                return found
        return func(*args, **kwargs)


def _of_numbers(
    name: str, module: torch.nn.Module, other: torch.nn.Module
) -> Iterator[tuple[str, Any, Any]]:
    numbers = (int, float, bool)
    if "Dropout" in type(other).__name__:
        return
    for key, wanted in vars(other).items():
        mine = vars(module).get(key, wanted)
        comparable = type(wanted) in numbers and type(mine) in (*numbers, type(None))
        if comparable and not _NO_MATTER.search(key) and not _alike(mine, wanted):
            yield f"{name}.{key}", mine, wanted


def _plain_class(base: BaseModel) -> Any:
    """The class of the model: fully_shard puts one of its own in front."""
    kind = type(base)
    return kind.__mro__[2] if kind.__name__.startswith("FSDP") else kind


def _of_tables(
    name: str, module: torch.nn.Module, other: torch.nn.Module
) -> Iterator[tuple[str, Any, Any]]:
    """Buffers that are in no checkpoint because the config says them."""
    # With these, a long sequence may have stretched the table already; the original one stays.
    stretched = any(
        kind in str(getattr(other, "rope_type", "")) for kind in ("dynamic", "longrope")
    )
    for key in sorted(other._non_persistent_buffers_set):
        mine, wanted = module._buffers.get(key), other._buffers[key]
        if mine is None or wanted is None or wanted.is_meta or mine.is_meta:
            continue
        if stretched and "original" not in key:
            continue
        wanted = wanted.to(mine.device).to(mine.dtype)
        if mine.shape != wanted.shape or not torch.allclose(mine, wanted, rtol=1e-5, atol=0.0):
            yield f"{name}.{key}", mine.flatten()[:3].tolist(), wanted.flatten()[:3].tolist()
