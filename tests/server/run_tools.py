"""One rank of `test_two_ranks_take_different_numbers_of_turns`; started by accelerate."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tink_rl
from tests import calculator
from tests.trainers import config


def main(base: str, caller: str, url: str, token_file: str, output: str) -> None:
    """Train three steps; write which version each turn of this rank was sampled from."""
    # The order is kept: of each batch the first half goes to rank 0, the second to rank 1.
    needs, needs_none = calculator.sums()[::9], calculator.echoes()
    prompts = [p for i in range(4) for p in (needs[i], needs[i + 4], *needs_none[i : i + 2])]
    trainer = tink_rl.GRPOTrainer(
        model=PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            caller,
            is_trainable=True,
        ),
        reward_funcs=lambda completions, **_: [-float(len(c)) for c in completions],
        args=config(
            output,
            per_device_train_batch_size=8,
            max_completion_length=64,
            model_init_kwargs=None,
            max_steps=3,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=calculator.tokenizer_of(Path(base)),
        tools=[calculator.add],
        servers=url,
        sync=tink_rl.SyncConfig(mode="adapter", policy="two-ranks", token_file=token_file),
    )
    asked = []
    generate = trainer.vllm_generation.generate

    def counted(*args, **kwargs):
        answer = generate(*args, **kwargs)
        asked.append((trainer.state.global_step, trainer.vllm_generation.last_model))
        return answer

    trainer.vllm_generation.generate = counted
    trainer.train()
    rank = PartialState().process_index
    (Path(output) / f"turns-{rank}.json").write_text(json.dumps(asked))


if __name__ == "__main__":
    main(*sys.argv[1:])
