"""The modes of one worker, made ready at start: what each can change, from what, and how."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tink_rl.policy.fingerprint import checkpoint_index
from tink_rl.server import direct, golden_plan
from tink_rl.server.derived import Derived
from tink_rl.server.folding import Folder
from tink_rl.server.golden import GoldenWeights, foldable
from tink_rl.server.layout import Layout, trace_layout
from tink_rl.server.modules import Layer
from tink_rl.server.names import Names
from tink_rl.types import SyncMode

logger = logging.getLogger("tink_rl.server")


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What merged mode needs in one worker."""

    golden: GoldenWeights
    folder: Folder
    refused: Mapping[str, str]
    """Projections that stay at the base, and why."""


def without_slots(layers: Iterable[Layer], derived: Derived) -> dict[str, str]:
    """The projections that a LoRA slot cannot change, and why."""
    kept = list(layers)
    found = {
        shard.name: "vLLM has no LoRA layer for it"
        for layer in kept
        for shard in layer.shards
        if not layer.has_slots
    }
    return found | {
        name: f"{owner} multiplies by that weight itself, which a slot does not change"
        for name, owner in derived.owned(kept).items()
    }


def follow_loader(model: Any, options: Mapping[str, Any]) -> tuple[Layout | None, str | None]:
    """Where the model's own loader puts the checkpoint's tensors; or why that cannot be seen.

    Nothing is followed for a server of slots only: its weights may be packed.
    """
    if not {SyncMode.MERGED, SyncMode.FULL} & set(options["modes"]):
        return None, None
    try:
        return trace_layout(model, checkpoint_index(options["model_dir"])), None
    except Exception as error:  # an odd loader costs this server full mode, nothing else
        logger.warning(
            "tink_rl: the model's loader cannot be followed: no full mode", exc_info=True
        )
        return None, f"{type(error).__name__}: {error}"


def merged_mode(
    worker: Any,
    layers: Mapping[str, Layer],
    names: Names,
    derived: Derived,
    options: Mapping[str, Any],
) -> Merged:
    """Load golden weights and decide how each layer is folded. The base must be served.

    Args:
        worker: vLLM's.
        layers: All linear layers of its model.
        names: What they are called.
        derived: What the model makes of them.
        options: Of `tink_prepare`.

    Raises:
        ConfigError: no layer can be folded, or folding would leave something of the old weights.
        ModeUnavailable: there is not enough memory.
    """
    dtype, device = worker.model_config.dtype, worker.device
    derived.check()
    index, kept, reasons = foldable(checkpoint_index(options["model_dir"]), layers, names)
    in_place = {name for name, layer in kept.items() if direct.served_rows(layer) is not None}
    golden = GoldenWeights(
        index,
        kept,
        dtype=dtype,
        device=device,
        memory=golden_plan.measure(
            device,
            shared_with_trainer=options["shared_with_trainer"],
            num_workers=worker.vllm_config.parallel_config.local_world_size,
        ),
        wanted=golden_plan.need(kept.values(), dtype, without_copy=in_place),
        tier=options["golden_tier"],
        budget_gib=options["golden_budget_gib"],
    )
    golden.load()
    if golden.plan.tier == "file":  # a comparison would read all of it once more
        in_place = set()
    in_place = {name for name in in_place if direct.same_as_golden(kept[name], golden)}
    if device.type == "cuda":
        logger.info("tink_rl: %d of %d layers are folded in place", len(in_place), len(kept))
    folder = Folder(
        kept,
        golden,
        vllm_config=worker.vllm_config,
        device=device,
        derived=derived,
        in_place=in_place,
    )
    return Merged(golden=golden, folder=folder, refused=reasons)
