"""Tiny models of real shapes, made from a seed: what the tests serve and train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import families

VOCAB = 64
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _config(shape: str) -> Any:
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    if shape == "qwen3":
        return Qwen3Config(**_SHARED, head_dim=32, tie_word_embeddings=False)
    if shape == "qwen2":
        return Qwen2Config(**_SHARED, tie_word_embeddings=True)
    if shape == "llama":
        return LlamaConfig(**_SHARED, tie_word_embeddings=False)
    if shape == "gemma3":
        return Gemma3TextConfig(
            **_SHARED,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
        )
    if shape == "qwen3_moe":
        return Qwen3MoeConfig(
            **_SHARED,
            head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            tie_word_embeddings=False,
        )
    return families.make_config(shape, _SHARED)


def make_model(shape: str, directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of `shape` (see `_config`) with a tokenizer; its directory.

    Weights are large enough (std 0.15) for greedy choices to be clear, and biases are not zero.
    Gemma's scaled, tied embeddings would let every model repeat the last token, whatever its layers
    compute; larger post-norms keep the layers (and so an adapter) decisive.
    """
    from transformers import AutoModelForCausalLM

    config = _config(shape)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
            elif shape in ("gemma2", "gemma3", "gemma4") and ".post_" in name:
                parameter.fill_(3.0)  # the norm multiplies by 1 + weight
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_tokenizer() -> Any:
    """Characters as tokens; 64 of them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "0123456789+-*/=() abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    symbols = ["<pad>", "<bos>", "<eos>", "<unk>", *letters][:VOCAB]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}=",
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
