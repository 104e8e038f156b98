"""Copies of the base's embedding and head that PEFT saved beside an adapter (`save_embedding_layers`).

Unchanged ones say nothing and are let through; a larger vocabulary or trained rows are another model.
"""

from __future__ import annotations

from collections.abc import Mapping

from tink_rl.errors import BaseMismatch, UnsupportedAdapter
from tink_rl.policy.fingerprint import CheckpointTensor, read_checkpoint_tensor
from tink_rl.policy.tensor_file import TensorEntry, TensorFile
from tink_rl.policy.tensor_names import EMBEDDINGS, HEADS

_FLOATS = ("F32", "F16", "BF16")


def check_copies(
    copies: Mapping[str, TensorEntry],
    file: TensorFile,
    base: Mapping[str, CheckpointTensor] | None,
    where: str,
) -> None:
    """Raise unless each of `copies` is what the base holds.

    Args:
        copies: By name in the base.
        file: That holds them.
        base: The base's embeddings and heads by name; None: it is not known.
        where: What error texts call the adapter.

    Raises:
        BaseMismatch: of another size: the vocabulary was extended, or it is another base.
        UnsupportedAdapter: trained, or there is no base to compare with.
    """
    for name, entry in copies.items():
        own = _of_base(name, base or {})
        if own is None or own.dtype not in _FLOATS:
            raise UnsupportedAdapter(
                f"{where} holds the whole {name} beside the LoRA, and there is no base to compare it with; "
                "where it was not trained, save the adapter with save_pretrained(DIR, "
                "save_embedding_layers=False)"
            )
        _check_size(name, entry.shape, own.shape, where)
        if not _equal(file, entry, own):
            raise UnsupportedAdapter(
                f"{where} holds the whole {name}, and it is not the base's: it was trained; publish the "
                "live model in full mode, or merge it (`tink-rl export --merged`) and serve that"
            )


def _of_base(name: str, base: Mapping[str, CheckpointTensor]) -> CheckpointTensor | None:
    if name in base:
        return base[name]
    if name.split(".")[-2] not in HEADS:
        return None
    embeddings = [n for n in base if n.split(".")[-2] in EMBEDDINGS]
    return base[embeddings[0]] if len(embeddings) == 1 else None  # a tied head


def _check_size(name: str, given: tuple[int, ...], expected: tuple[int, ...], where: str) -> None:
    if given == expected:
        return
    if len(given) == 2 and given[1:] == expected[1:]:
        larger = "extended" if given[0] > expected[0] else "cut"
        raise BaseMismatch(
            f"{where}: {name} has {given[0]} rows, the base's vocabulary has {expected[0]}: the vocabulary "
            f"was {larger} before training; save that base with its tokenizer (save_pretrained of the "
            "model without the adapter), and serve it"
        )
    raise BaseMismatch(
        f"{where}: {name} has shape {list(given)}, in the base it has {list(expected)}: the adapter was "
        "trained on another base; serve that one"
    )


def _equal(file: TensorFile, entry: TensorEntry, own: CheckpointTensor) -> bool:
    if entry.dtype not in _FLOATS:
        return False
    copy = file.read(entry)
    return bool((read_checkpoint_tensor(own).to(copy.dtype) == copy).all())
