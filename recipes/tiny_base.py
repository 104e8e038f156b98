"""Train the tiny base model of the demo once: a 4-layer Qwen3 that knows the answer, noisily.

    python -m recipes.tiny_base                 # about a minute on 2 cores; cached afterwards

It learns from right and wrong answers mixed, so that sampling at temperature 1 is right about half the
time while the most likely answer is right: what reinforcement learning can sharpen in minutes.
Deterministic for a seed on one machine. The result is an ordinary model directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.tasks import digits

DEFAULT_CACHE = Path(".cache/tiny_base")
SYMBOLS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    *"0123456789",
    *"=+-*/<>,. ",
    *"abcdefghijklmnopqrstuvwx",
)


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """What the cached model depends on."""

    seed: int = 0
    num_steps: int = 260
    batch_size: int = 256
    learning_rate: float = 3e-3
    wrong_share: float = 0.65
    """Share of wrong answers among the training answers of the last part."""
    clean_part: float = 0.6
    """Part of the steps, at first, that see right answers only. Without it the head, which LoRA leaves
    alone, never learns to be sure, and no policy on top of it can be."""
    num_layers: int = 4
    width: int = 128
    version: int = 3


def make_tokenizer() -> Any:
    """Characters as tokens; decoding joins them without spaces."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def _make_model(settings: BaseSettings, tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(SYMBOLS),
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(settings.seed)
    return Qwen3ForCausalLM(config)


def _wrong(answer: str, rng: random.Random) -> str:
    """The answer with one digit replaced by another."""
    position = rng.randrange(len(answer))
    others = [d for d in "0123456789" if d != answer[position]]
    return answer[:position] + rng.choice(others) + answer[position + 1 :]


def _batch(
    texts: list[str], wrong_share: float, rng: random.Random, tokenizer: Any
) -> torch.Tensor:
    rows = []
    for text in texts:
        answer = digits.answer_of(text)
        if rng.random() < wrong_share:
            answer = _wrong(answer, rng)
        rows.append([*tokenizer.encode(digits.prompt_of(text) + answer), tokenizer.eos_token_id])
    return torch.tensor(rows)


def _train(settings: BaseSettings, tokenizer: Any) -> Any:
    model = _make_model(settings, tokenizer)
    rng = random.Random(settings.seed)
    train, _ = digits.problems()
    prompt_length = digits.NUM_DIGITS + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.num_steps, pct_start=0.1
    )
    start = time.perf_counter()
    for step in range(1, settings.num_steps + 1):
        clean = step <= settings.clean_part * settings.num_steps
        texts = rng.choices(train, k=settings.batch_size)
        ids_BT = _batch(texts, 0.0 if clean else settings.wrong_share, rng, tokenizer)
        labels_BT = ids_BT.clone()
        labels_BT[:, :prompt_length] = -100
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == settings.num_steps:
            seconds = time.perf_counter() - start
            print(
                f"tiny base: step {step}/{settings.num_steps}, loss {loss.item():.3f}, {seconds:.0f} s",
                flush=True,
            )
    return model


def ensure_tiny_base(settings: BaseSettings | None = None, cache: Path = DEFAULT_CACHE) -> Path:
    """The directory of the tiny base; trains it if the cache does not hold it."""
    settings = settings or BaseSettings()
    key = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:12]
    directory = cache / key
    if (directory / "config.json").is_file():
        return directory
    print(
        "tiny base: training a 4-layer model to sort digits (once; cached afterwards)", flush=True
    )
    tokenizer = make_tokenizer()
    model = _train(settings, tokenizer)
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)  # a run that was interrupted leaves no half model behind
    return directory


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    arguments = parser.parse_args()
    print(ensure_tiny_base(BaseSettings(seed=arguments.seed), arguments.cache))


if __name__ == "__main__":
    main()
