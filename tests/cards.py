"""Shapes of known models, and machines with cards that are not there."""

from __future__ import annotations

from tink_rl.gpus import Gpu
from tink_rl.memory_plan import ModelShape

GIB = 2**30


def dense(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    kv_width: int,
    vocab: int,
    kv_heads: int,
    head_dim: int = 128,
    tied: bool = False,
) -> ModelShape:
    """The shape of a Llama-like model."""
    layer = [(hidden, hidden), (kv_width, hidden), (kv_width, hidden), (hidden, hidden)]
    layer += [(ffn, hidden), (ffn, hidden), (hidden, ffn)]
    embeddings = vocab * hidden * (1 if tied else 2)
    return ModelShape(
        max_positions=32768,
        num_layers=layers,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        dtype="bfloat16",
        num_weights=layers * sum(a * b for a, b in layer) + embeddings,
        linear_shapes=layer * layers,
    )


MODELS = {
    "Qwen2.5-1.5B": dense(
        layers=28, hidden=1536, ffn=8960, kv_width=256, kv_heads=2, vocab=151936, tied=True
    ),
    "Qwen2.5-7B": dense(layers=28, hidden=3584, ffn=18944, kv_width=512, kv_heads=4, vocab=152064),
    "Llama-3.1-8B": dense(
        layers=32, hidden=4096, ffn=14336, kv_width=1024, kv_heads=8, vocab=128256
    ),
    "Qwen2.5-32B": dense(
        layers=64, hidden=5120, ffn=27648, kv_width=1024, kv_heads=8, vocab=152064
    ),
    "Llama-3-70B": dense(
        layers=80, hidden=8192, ffn=28672, kv_width=1024, kv_heads=8, vocab=128256
    ),
    "tiny base": dense(
        layers=4, hidden=128, ffn=256, kv_width=64, kv_heads=2, head_dim=32, vocab=48
    ),
}


def card(
    total: int,
    *,
    index: int = 0,
    name: str = "NVIDIA L4",
    free: int | None = None,
    capability: tuple[int, int] = (8, 9),
) -> Gpu:
    """A card of `total` bytes, free unless said otherwise."""
    return Gpu(
        index=index,
        uuid=f"GPU-{index}",
        name=name,
        total_bytes=total,
        free_bytes=total if free is None else free,
        capability=capability,
    )
