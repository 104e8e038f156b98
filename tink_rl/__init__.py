"""Reinforcement learning with LoRA on TRL, with rollouts from a vLLM server that always holds the
current policy.

Heavy names resolve on first use: `import tink_rl` loads neither torch, TRL nor vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "DistillationTrainer": "tink_rl.training.trainer",
    "GRPOTrainer": "tink_rl.training.trainer",
    "PolicySyncCallback": "tink_rl.training.callback",
    "PolicyVersion": "tink_rl.types",
    "PublishRecord": "tink_rl.types",
    "RLOOTrainer": "tink_rl.training.trainer",
    "SyncConfig": "tink_rl.config",
    "SyncMode": "tink_rl.types",
    "TinkError": "tink_rl.errors",
    "VLLMClient": "tink_rl.publish.vllm_client",
    "VLLMServer": "tink_rl.launch",
    "WeightSync": "tink_rl.publish.publisher",
    "attach": "tink_rl.training.trainer",
}

__all__ = [
    "DistillationTrainer",
    "GRPOTrainer",
    "PolicySyncCallback",
    "PolicyVersion",
    "PublishRecord",
    "RLOOTrainer",
    "SyncConfig",
    "SyncMode",
    "TinkError",
    "VLLMClient",
    "VLLMServer",
    "WeightSync",
    "__version__",
    "attach",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tink_rl' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
