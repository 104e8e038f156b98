"""Where a trainer's base goes."""

from __future__ import annotations

from typing import Any

from tink_rl.training.trl_names import Arguments


def one_device(config: Arguments) -> dict[str, Any]:
    """`model_init_kwargs` that keep the base of a single process on its own GPU; {} elsewhere.

    TRL's "auto" spreads it over every GPU that is visible, the vLLM server's included; and the Trainer
    would run it on all of them at once (`nn.DataParallel`), which TRL refuses.

    Args:
        config: A Hugging Face `TrainingArguments`; told that there is one GPU.
    """
    device = config.device  # before the next line: it sets the state up
    if device.type != "cuda" or config.distributed_state.distributed_type != "NO":
        return {}
    config._n_gpu = 1  # as the Trainer does for a model that is spread
    return {"device_map": {"": str(device)}}
