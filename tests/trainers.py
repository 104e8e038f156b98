"""What the tests of the trainers share: a task of noise, short runs, and a server left clean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig

import tink_rl
from tests.policies import drop_all, sync_to
from tink_rl import SyncConfig
from tink_rl.launch import VLLMServer

PROMPTS = Dataset.from_dict({"prompt": [f"{i}+{j}=" for i in range(8) for j in range(8)]})
SHORT_RUN: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 16,
    "max_completion_length": 8,
    "max_steps": 4,
    "learning_rate": 5e-3,
    "beta": 0.0,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "model_init_kwargs": {"dtype": "float32"},
}


def reward_noise(completions, **_):
    """Varies between any two completions, so that every step changes the policy."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def config(path: Any, cls: Any = GRPOConfig, **changes: Any) -> Any:
    """Arguments of a run of four steps."""
    groups = {} if cls.__name__ == "DistillationConfig" else {"num_generations": 4}
    return cls(output_dir=str(path), **{**SHORT_RUN, **groups, **changes})


def lora(**changes: Any) -> LoraConfig:
    """LoRA on every linear layer."""
    return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **changes})


def make_trainer(
    server: VLLMServer,
    model_dir: Any,
    path: Any,
    *,
    sync: SyncConfig | None = None,
    cls: Any = tink_rl.GRPOTrainer,
    config_cls: Any = GRPOConfig,
    lora_changes: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer of the tiny Qwen3 whose rollouts come from `server`; nothing has started yet."""
    directory = model_dir("qwen3")
    if issubclass(cls, tink_rl.training.trainer.PolicySyncMixin):
        extra = {"servers": server.url, "sync": sync, **(extra or {})}
    if not cls.__name__.startswith("Distillation"):
        extra = {"reward_funcs": reward_noise, **(extra or {})}
    return cls(
        model=str(directory),
        args=config(path, config_cls, **changes),
        train_dataset=PROMPTS,
        processing_class=AutoTokenizer.from_pretrained(directory),
        peft_config=lora(**(lora_changes or {})),
        **(extra or {}),
    )


def settings(server: VLLMServer, **changes: Any) -> SyncConfig:
    """Settings with the server's token."""
    return SyncConfig(token=server.token, **changes)


def rows(trainer: Any) -> list[dict[str, Any]]:
    """The logged rows of training."""
    return [row for row in trainer.state.log_history if "loss" in row]


@contextmanager
def left_clean(server: VLLMServer) -> Iterator[VLLMServer]:
    """A run leaves its last version served: fold it back, drop it."""
    yield server
    if not server.alive:
        return
    with server.client() as client:
        status = client.status()
    mode = "merged" if status.merged else "adapter"
    for policy in {name.rpartition("@")[0] for name in status.served}:
        with sync_to(server, server.options.model, mode, policy=policy) as sync:
            drop_all(server, sync)
