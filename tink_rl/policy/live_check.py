"""Everything that a live PEFT model must share with the checkpoint that is served, before it is trained."""

from __future__ import annotations

from collections.abc import Collection

from tink_rl.errors import UnsupportedAdapter
from tink_rl.policy.fingerprint import checkpoint_index
from tink_rl.policy.live_base import base_tensors, compare_base, unwrapped_modules
from tink_rl.policy.live_settings import check_settings
from tink_rl.policy.model_dir import local_model_dir
from tink_rl.policy.peft_names import PeftModel
from tink_rl.policy.sharded import reshard
from tink_rl.policy.support import changes_base
from tink_rl.policy.vocabulary import check_vocabulary


def check_live_base(
    model: PeftModel, base_model: str, *, travels: Collection[str] = (), tokenizer: object = None
) -> None:
    """Raise unless the base under the adapter of `model` is the checkpoint `base_model`.

    Every rank of a sharded model must call it; each reads its own part, and what one finds only it
    raises.

    Args:
        model: A live PEFT model.
        base_model: Directory (or cached hub id) of the checkpoint that is served.
        travels: Names of base tensors that are published whole, whatever they hold.
        tokenizer: The trainer's, if it has one.

    Raises:
        BaseMismatch: a tensor, a setting or a token differs; names the first and the way out.
    """
    reshard(model)
    base, directory = model.get_base_model(), local_model_dir(base_model)
    saved = type(base.config).from_pretrained(directory)
    text = saved.get_text_config()
    compare_base(
        base,
        checkpoint_index(directory),
        where=str(directory),
        changed_on_purpose={*changed_weights(model), *travels},
        tied=bool(saved.tie_word_embeddings or text.tie_word_embeddings),
        saved_as=saved.architectures or (),
    )
    check_settings(base, saved, where=str(directory))
    if tokenizer is not None:
        check_vocabulary(tokenizer, directory, text.vocab_size)


def changed_weights(model: PeftModel) -> set[str]:
    """Weights of the base that an initialisation of the adapter wrote to (PiSSA, OLoRA, LoftQ, ...)."""
    changing = {name for name, c in model.peft_config.items() if changes_base(c.to_dict())}
    if not changing:
        return set()
    return {
        f"{name}.weight"
        for name, layer in unwrapped_modules(model.get_base_model(), keep_adapted=True)
        if changing & set(getattr(layer, "lora_A", ()))
    }


def check_frozen(model: PeftModel) -> None:
    """Raise if training changes the base beside an adapter that travels alone.

    Raises:
        UnsupportedAdapter: names the first trained tensor.
    """
    trained = [name for name, t in base_tensors(model.get_base_model()) if t.requires_grad]
    if trained:
        raise UnsupportedAdapter(
            f"{len(trained)} tensors of the base are trained, first {trained[0]}, but only the adapter is "
            "published: freeze them (requires_grad_(False)), or name their modules in modules_to_save=[...], "
            "which travels in full mode"
        )
