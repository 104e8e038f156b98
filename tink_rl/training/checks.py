"""What is checked before the first step: settings under which a run would be wrong in silence."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import ProcessorMixin

from tink_rl.config import SyncConfig
from tink_rl.errors import ConfigError, SamplingRefused
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.training.generation import SamplingSettings
from tink_rl.training.trl_names import RolloutTrainer, SamplingArguments
from tink_rl.transport.payloads import NO_LIMITS, Limits, check_payload, given_kwargs
from tink_rl.transport.request_fields import check_fields
from tink_rl.types import ServerStatus, SyncMode

logger = logging.getLogger("tink_rl")
_LEAST_TEMPERATURE = 0.01
"""vLLM raises what is lower, but not 0, to this."""


def check_trainer(trainer: object, supported: tuple[type, ...]) -> None:
    """Check that a built trainer can read its rollouts through the seam.

    Raises:
        ConfigError: it is another trainer, has a vLLM connection, sees images, or samples otherwise.
    """
    if not isinstance(trainer, supported):
        names = ", ".join(cls.__name__ for cls in supported)
        raise ConfigError(
            f"attach() got {type(trainer).__name__}; expected one of {names}. To publish another "
            "trainer's policy, add tink_rl.PolicySyncCallback(trainer, ...)"
        )
    if getattr(trainer, "vllm_generation", None) is not None:
        raise ConfigError(
            "this trainer has a vLLM connection already; build it with use_vllm=False, then attach"
        )
    processing = getattr(trainer, "processing_class", None)
    if isinstance(processing, ProcessorMixin):
        raise ConfigError(
            f"processing_class is a {type(processing).__name__}: rollouts are sent as "
            "token ids, without images; give the tokenizer of a text model"
        )
    if getattr(trainer, "use_transformers_continuous_batching", False):
        raise ConfigError(
            "use_transformers_continuous_batching=True: rollouts come from the vLLM server; leave it "
            "False"
        )
    if getattr(trainer, "rollout_func", None) is not None:
        raise ConfigError(
            "rollout_func is set: it bypasses the sampled logprobs of the server; leave it None, and "
            "use tools=[...] or environment_factory for several turns"
        )


def check_look_ahead(trainer: RolloutTrainer, sync: SyncConfig) -> None:
    """Check that the rows of a later step can be known, and kept, while this one trains.

    Raises:
        ConfigError: the trainer's prompts come from environments, or its tools need a version for longer
            than it is served.
    """
    given = f"SyncConfig.max_staleness={sync.max_staleness}"
    if getattr(trainer, "environment_factories", None) is not None:
        raise ConfigError(
            f"{given} with environment_factory: an environment makes its prompt when it is reset, so no "
            "prompt is known ahead; leave max_staleness at 0"
        )
    if getattr(trainer, "tools", None) and sync.mode != SyncMode.ADAPTER:
        raise ConfigError(
            f"{given} with tools and mode={sync.mode!r}: later turns are sampled from the version of the "
            "first, which merged weights no longer hold then; set SyncConfig(mode='adapter')"
        )


def check_generation_kwargs(args: SamplingArguments) -> None:
    """Check what a trainer's arguments add to its requests, as far as no server is needed for it.

    Raises:
        ConfigError: names the entry, and what to do instead.
    """
    given = _kwargs_of(args)
    fixed = sorted({"seed", "n"} & set(given))
    if fixed:
        raise ConfigError(
            f"generation_kwargs sets {', '.join(fixed)}: every step would sample alike; seeds follow "
            "from the trainer's seed=..., and num_generations is the number"
        )
    temperature = given.get("temperature", args.temperature)
    if temperature != args.temperature:
        raise ConfigError(
            f"generation_kwargs['temperature']={temperature!r}, and the trainer scores with "
            f"temperature={args.temperature}: the two must be one; set temperature={temperature!r} as the "
            "argument, and take it out of generation_kwargs"
        )
    if given.get("max_tokens", 0) > args.max_completion_length:
        raise ConfigError(
            f"generation_kwargs['max_tokens']={given['max_tokens']} exceeds "
            f"max_completion_length={args.max_completion_length}, by which the trainer cuts and scales; "
            "raise that one, and take max_tokens out of generation_kwargs"
        )
    if not args.temperature >= _LEAST_TEMPERATURE:
        raise ConfigError(
            f"temperature={args.temperature}: the trainer divides logits by it, and vLLM samples at "
            f"{_LEAST_TEMPERATURE} or greedily below that; expected {_LEAST_TEMPERATURE} to 2"
        )
    _check_request(args, NO_LIMITS)


def _kwargs_of(args: SamplingArguments) -> dict[str, Any]:
    """What `generation_kwargs` sets, each value of its field's type.

    Raises:
        ConfigError: names the entry that is not.
    """
    try:
        given = given_kwargs(args.generation_kwargs)
        check_fields(given, shown="generation_kwargs[{!r}]".format)
    except SamplingRefused as error:
        raise ConfigError(error.message) from error
    return given


def _check_request(args: SamplingArguments, limits: Limits) -> None:
    """What every request is checked for, before the first one is made.

    Raises:
        ConfigError: what would not pass.
    """
    try:
        fields = SamplingSettings.of(args).fields()
        check_payload({"model": "policy", "prompt": [[0]], **fields}, limits)
    except SamplingRefused as error:
        raise ConfigError(error.message) from error


def check_arguments(args: SamplingArguments) -> None:
    """Check a trainer's arguments, before it is built.

    Raises:
        ConfigError: colocated vLLM was asked for, requests would carry what must not or cannot be sent,
            or VESPO with a mode that TRL refuses.
    """
    check_generation_kwargs(args)
    if args.use_vllm and args.vllm_mode == "colocate":
        raise ConfigError(
            "vllm_mode='colocate': this trainer samples from a server; set vllm_mode='server' (and "
            "vllm_server_base_url), or use trl's own trainer"
        )
    # TRL makes this check only under use_vllm=True, which is set after its own __init__.
    vespo = getattr(args, "loss_type", None) == "vespo"
    if vespo and args.vllm_importance_sampling_correction:
        mode = args.vllm_importance_sampling_mode
        if mode not in ("token_truncate", "token_mask"):
            raise ConfigError(
                f"loss_type='vespo' with vllm_importance_sampling_mode={mode!r}: expected "
                "'token_truncate' or 'token_mask'"
            )


def check_off_policy(args: SamplingArguments, max_staleness: int) -> None:
    """Check that rows of an older version are weighed as such, and say what becomes of them.

    Raises:
        ConfigError: they would be trained on as if the current version had sampled them.
    """
    if max_staleness == 0:
        return
    corrected = getattr(args, "vllm_importance_sampling_correction", None)
    if corrected is None:
        logger.warning(
            "max_staleness=%d: this trainer of TRL's weighs no row by an importance ratio, so rows of an "
            "older version are trained on as they are; offpolicy/age_max says how old",
            max_staleness,
        )
    elif not corrected:
        raise ConfigError(
            f"max_staleness={max_staleness} with vllm_importance_sampling_correction=False: rows of an older "
            "version would be trained on as if the current one had sampled them; set the correction to True, "
            "or max_staleness=0"
        )
    elif args.vllm_importance_sampling_mode == "sequence_mask":
        logger.info(
            "max_staleness=%d: vllm_importance_sampling_mode='sequence_mask' leaves out whole completions "
            "whose ratio, a product over their tokens, is out of bounds, which long ones of an older "
            "version often are (offpolicy/masked_share); 'token_truncate' keeps them",
            max_staleness,
        )


def check_sampling(
    args: SamplingArguments,
    status: ServerStatus,
    *,
    dropout: float,
    clients: Sequence[VLLMClient] = (),
) -> None:
    """Check that the sampler's logprobs mean what the importance ratio takes them for.

    Args:
        args: The trainer's.
        status: What the servers, which are alike, say of themselves.
        dropout: In the adapter.
        clients: Of the servers; each that has to tell logprobs over the whole vocabulary shows that it does.

    Raises:
        ConfigError: the server returns raw logprobs, or renormalised ones where they are compared with the
            trainer's, or a completion cannot fit.
    """
    corrected = getattr(args, "vllm_importance_sampling_correction", False)
    if corrected and status.logprobs_mode != "processed_logprobs":
        raise ConfigError(
            f"the server runs with --logprobs-mode {status.logprobs_mode}, which biases the "
            "importance ratio; restart it with --logprobs-mode processed_logprobs (`tink-rl serve` "
            "does)"
        )
    if corrected and dropout > 0 and not getattr(args, "disable_dropout", False):
        warnings.warn(
            f"lora_dropout={dropout}: the trainer's logprobs are computed with dropout, the sampler's "
            "without, so the importance ratio is noise; set lora_dropout=0 or disable_dropout=True",
            stacklevel=3,
        )
    changes = SamplingSettings.of(args).changes
    if changes:
        _check_full_logprobs(args, status, ", ".join(changes))
        if status.no_full_logprobs is None:
            for client in clients:
                prove_full_logprobs(client)
    if args.max_completion_length >= status.max_model_len:
        raise ConfigError(
            f"max_completion_length={args.max_completion_length}: the server takes "
            f"{status.max_model_len} tokens for prompt and completion; restart it with a larger "
            "--max-model-len"
        )
    _check_request(args, Limits(vocab_size=status.vocab_size, max_model_len=status.max_model_len))


def prove_full_logprobs(client: VLLMClient) -> None:
    """Let a server draw from one token, which of the whole vocabulary has a logprob below 0.

    Raises:
        ConfigError: the server tells the logprobs of what was left to draw from.
    """
    output = client.generate(
        [[1, 2, 3]],
        top_k=1,
        max_tokens=4,
        generation_kwargs={"ignore_eos": True},
        full_logprobs=True,
    )
    told = [values[0] for values in output["logprobs"][0]]
    if not min(told) < 0:
        raise ConfigError(
            f"the server at {client.base_url} says that it tells logprobs over the whole vocabulary, and "
            f"told {told} under top_k=1, which are those of one token; please report its vLLM version and "
            "flags, and set vllm_importance_sampling_correction=False meanwhile"
        )


def _check_full_logprobs(args: SamplingArguments, status: ServerStatus, names: str) -> None:
    """Check that a sampler which `names` narrow can tell logprobs that mean what the trainer's do."""
    if status.no_full_logprobs is None:
        logger.info(
            "%s: completions are drawn from a part of the policy. Logprobs of trainer and server are "
            "compared over the whole vocabulary, like with like; that the rest is never drawn, the loss "
            "does not correct for (nor does TRL's without vLLM)",
            names,
        )
        return
    problem = (
        f"{names}: the sampler's logprobs are renormalised over the tokens that are left and the "
        f"trainer's are not, and this server cannot tell others ({status.no_full_logprobs})"
    )
    corrected = getattr(args, "vllm_importance_sampling_correction", False)
    masked = getattr(args, "off_policy_mask_threshold", None) is not None
    if not corrected and not masked:
        warnings.warn(
            f"{problem}: those of the rollout log, and gaps made of them, are not the trainer's",
            stacklevel=4,
        )
        return
    reader = "vllm_importance_sampling_correction" if corrected else "off_policy_mask_threshold"
    off = "vllm_importance_sampling_correction=False" if corrected else f"{reader}=None"
    raise ConfigError(
        f"{problem}: {reader} would weigh whole completions down to nothing, and the run learn nothing. "
        f"Leave {names} out, set {off}, or sample from another server"
    )
