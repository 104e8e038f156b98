"""Whether the installed TRL still has what `trl_names` lists; looked at when a trainer is attached."""

from __future__ import annotations

import inspect
import re
from importlib import import_module

import trl

from tink_rl import seam
from tink_rl.seam import Name
from tink_rl.training import trl_names


def check(trainer: trl_names.RolloutTrainer) -> None:
    """Look at a built trainer, its arguments and its class.

    Raises:
        ConfigError: a name moved.
    """
    cls = next(cls for cls in type(trainer).__mro__ if cls.__module__.startswith("trl."))
    found = seam.misfits(methods_of(cls)) + _misfits_of_source(cls)
    for owner, names in (
        (trainer, attributes_of(cls)),
        (trainer.args, arguments_of(type(trainer.args))),
    ):
        name_of = type(owner).__name__
        found += [f"{name_of}.{n} is not there" for n in sorted(names) if not hasattr(owner, n)]
    seam.judge("trl", trl.__version__, found)


def methods_of(cls: type) -> list[Name]:
    """What is called, or replaced, of a trainer's class."""
    named = trl_names.METHODS | (trl_names.METHODS_OF_SCORED if is_scored(cls) else {})
    return [
        Name(f"{cls.__module__}:{cls.__name__}.{name}", exactly=takes)
        for name, takes in named.items()
    ]


def attributes_of(cls: type) -> set[str]:
    """What is read of a trainer, and not put there by us."""
    read = _names_of(trl_names.Trainer, trl_names.RolloutTrainer) - trl_names.SET_BY_US
    return read if is_scored(cls) else read - trl_names.OF_SCORED


def arguments_of(config: type) -> set[str]:
    """What is read of its arguments."""
    read = _names_of(trl_names.Arguments, trl_names.SamplingArguments)
    return read if issubclass(config, trl.GRPOConfig) else read - trl_names.OF_THE_RATIO


def is_scored(cls: type) -> bool:
    """Whether its rollouts have rewards: all but distillation's."""
    return issubclass(cls, trl.GRPOTrainer | trl.RLOOTrainer)


def read_of_generation(cls: type) -> set[str]:
    """What TRL reads of its vLLM object, in whose place ours stands.

    Of the whole module's text: for a class alone Python 3.11 builds the module's syntax tree, which takes
    its time and can fail with a `SystemError` where a thread builds another one.
    """
    source = inspect.getsource(import_module(cls.__module__))
    return set(re.findall(r"self\.vllm_generation\.(\w+)", source))


def _misfits_of_source(cls: type) -> list[str]:
    try:
        read = read_of_generation(cls)
        call = inspect.getsource(cls._generate_single_turn)  # type: ignore[attr-defined]
    except (OSError, AttributeError):  # compiled without sources, or told by its name already
        return []
    found = [
        f"{cls.__name__} reads vllm_generation.{name}, which ours has not"
        for name in sorted(read - trl_names.READ_OF_GENERATION)
    ]
    return found + [
        f"{cls.__name__}._generate_single_turn does not say {text!r}"
        for text in trl_names.SAID_WHERE_IT_SAMPLES
        if text not in call
    ]


def _names_of(*protocols: type) -> set[str]:
    return {name for protocol in protocols for name in protocol.__annotations__}
