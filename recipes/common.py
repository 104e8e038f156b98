"""What the recipes share: their arguments, the base, the adapter, and the server around a trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig

import tink_rl
from recipes.tasks import TASKS
from recipes.tiny_base import ensure_tiny_base
from tink_rl.cli import show_wait
from tink_rl.gpus import exact_dtype
from tink_rl.settings import LORA_RANKS, slot_for
from tink_rl.training.devices import one_device
from tink_rl.training.ranks import Ranks


@dataclass
class RecipeArguments:
    """What the recipes add to TRL's config."""

    task: str = field(
        default="digits", metadata={"help": f"One of {', '.join(TASKS)}, or your FILE.py."}
    )
    data_path: str | None = field(default=None, metadata={"help": "gsm8k: a JSONL file to use."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base; default: the tiny base, trained on first use."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Of the trainer's base; tiny base: as it is served."}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: the trainer's base in 4 bits (nf4), the server's as it is."},
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "all-linear, or module names joined by commas."}
    )
    vllm_server: str = field(
        default="auto",
        metadata={"help": "URL of a running server; auto: start one, stop it at the end."},
    )
    server_mode: str = field(
        default="both", metadata={"help": "auto server: merged, adapter or both."}
    )
    server_max_model_len: int = field(default=0, metadata={"help": "auto server; 0: the model's."})
    sync_mode: str = field(default="auto", metadata={"help": "merged, adapter or auto."})
    max_staleness: int = field(
        default=0,
        metadata={
            "help": "How many versions old rows may be: 1 samples while training. See docs/overlap.md."
        },
    )
    policy: str = field(default="policy", metadata={"help": "Name of the policy on the server."})
    token_file: str | None = field(default=None, metadata={"help": "Token of the control routes."})


def base_of(recipe: RecipeArguments, config: Any) -> str:
    """The base's directory or hub id; `config` says from now on how TRL loads it."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("tink_rl").setLevel(logging.INFO)
    model = recipe.model_name_or_path or _tiny_base(config)
    dtype = _tiny_dtype(recipe) if recipe.model_name_or_path is None else recipe.dtype
    config.model_init_kwargs = {
        "dtype": dtype,
        **one_device(config),
        **(_in_4bit(dtype) if recipe.load_in_4bit else {}),
        **(config.model_init_kwargs or {}),
    }
    return model


def lora_of(recipe: RecipeArguments) -> LoraConfig:
    """The adapter that is trained."""
    names = recipe.lora_target_modules
    return LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0,
        target_modules=names if names == "all-linear" else names.split(","),
        task_type="CAUSAL_LM",
    )


@contextmanager
def server_of(
    recipe: RecipeArguments, config: Any, base: str
) -> Iterator[tuple[str, tink_rl.SyncConfig]]:
    """URL of the server, and how to publish to it: a running one, or one that rank 0 starts and stops.

    Raises:
        TinkError: it did not start; on every rank.
    """
    with ExitStack() as stack:
        url, token_file = recipe.vllm_server, recipe.token_file
        if url == "auto":
            ranks = Ranks(
                config.process_index, config.world_size, timeout_s=float(config.ddp_timeout)
            )
            with closing(ranks):
                url, token_file = ranks.on_leader(lambda: _started(recipe, config, base, stack))
        sync = tink_rl.SyncConfig(
            mode=recipe.sync_mode,
            max_staleness=recipe.max_staleness,
            policy=recipe.policy,
            token_file=token_file,
        )
        yield url, sync


def _started(recipe: RecipeArguments, config: Any, base: str, stack: ExitStack) -> tuple[str, str]:
    server = tink_rl.VLLMServer(
        base,
        mode=recipe.server_mode,
        # Above the largest slot merged mode takes it, for which any will do.
        max_lora_rank=slot_for(recipe.lora_r) or LORA_RANKS[-1],
        max_loras=max(4, recipe.max_staleness + 2),
        dtype=_tiny_dtype(recipe) if recipe.model_name_or_path is None else "auto",
        max_model_len=recipe.server_max_model_len or None,
        token_file=recipe.token_file,
        shared_with_trainer=True,
        log_file=str(Path(config.output_dir) / "vllm.log"),
        on_wait=show_wait,
    )
    stack.enter_context(server)
    return server.url, str(server.token_file)


def train_and_save(trainer: Any) -> None:
    """Train; save adapter, state and version of the last policy."""
    config = trainer.args
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        print(f"adapter, log and version of the last policy: {config.output_dir}")


def _tiny_dtype(recipe: RecipeArguments) -> str:
    """The tiny base's: given, or the most exact one that a server of this mode has on this device."""
    return exact_dtype(recipe.server_mode) if recipe.dtype == "auto" else recipe.dtype


def _in_4bit(dtype: str) -> dict[str, Any]:
    """What `from_pretrained` needs for QLoRA (https://arxiv.org/abs/2305.14314, section 3)."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="bfloat16" if dtype == "auto" else dtype,
    )
    # One device per process: accelerate cannot move a quantised model afterwards.
    return {"quantization_config": settings, "device_map": {"": str(PartialState().device)}}


def _tiny_base(config: Any) -> str:
    with config.main_process_first(desc="training the tiny base"):
        return str(ensure_tiny_base())
