"""Where a trainer's base goes."""

from __future__ import annotations

from typing import Any


def one_device(config: Any) -> dict[str, Any]:
    """`model_init_kwargs` that keep the base of a single process on its own GPU; {} elsewhere.

    TRL's "auto" spreads it over every GPU that is visible, the vLLM server's included.

    Args:
        config: A Hugging Face `TrainingArguments`.
    """
    device = config.device  # before the next line: it sets the state up
    if device.type != "cuda" or config.distributed_state.distributed_type != "NO":
        return {}
    return {"device_map": {"": str(device)}}
