"""Changes that one rank plants in its own part of the base, and what every rank then says of them."""

from __future__ import annotations

from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from tink_rl.errors import TinkError
from tink_rl.policy.live_base import base_tensors
from tink_rl.policy.live_check import check_live_base
from tink_rl.training.ranks import Ranks

CASES = {
    "a thousandth of one tensor": ("model.layers.1.mlp.up_proj.weight", None),
    "one norm": ("model.layers.1.input_layernorm.weight", 3),
    "one row of the embedding": ("model.embed_tokens.weight", -1),
}
EXPERT = ("model.layers.1.mlp.experts.gate_up_proj", -1)


def outcomes(trainer, job):
    """Case -> tensor, message and class of the error that this rank met; None where there was none."""
    link = trainer.policy_link
    base = link._model.get_base_model()
    found = {name: _outcome(link, base, case, link._check_base) for name, case in CASES.items()}
    model = _experts(job)
    check = partial(check_live_base, model, job["moe"])
    found["an honest one with experts"] = _outcome(link, None, None, check)
    found["one expert"] = _outcome(link, model.get_base_model(), EXPERT, check)
    found["none any more"] = _outcome(link, None, None, link._check_base)
    return found


def _outcome(link, base, case, check):
    """What every rank raises when rank 1 holds something else; its own values come back."""
    ranks = Ranks(link.ranks.index, link.ranks.count, timeout_s=60)
    part = kept = None
    if case is not None and ranks.index == ranks.count - 1:
        name, index = case
        part = _own(dict(base_tensors(base))[name])
        kept = part.clone()
        if index is None:
            part.mul_(1.001)
        else:
            part[index] += 0.01
    try:
        ranks.each(check)
    except TinkError as error:
        return [error.details.get("tensor"), error.message, type(error).__name__]
    finally:
        ranks.close()
        if part is not None:
            part.copy_(kept)
    return None


@torch.no_grad()
def _own(parameter):
    """This rank's elements, flat; what is written there is the parameter's."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.data.view(-1)
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach().view(-1)


def _experts(job):
    """A model with experts, sharded as this run's is."""
    base = AutoModelForCausalLM.from_pretrained(job["moe"], dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    if job["kind"] == "fsdp2":
        for layer in base.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model
