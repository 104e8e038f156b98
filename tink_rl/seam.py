"""The names of TRL and vLLM that we lean on, as data, and the check that they are where they were.

Neither has an interface for what is done here. The lists are `training/trl_names.py` and
`server/vllm_names.py`; they are checked when a trainer is attached and when a server starts, so that a
release that moved a name says so before anything is sampled.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tink_rl.errors import ConfigError

KNOWN_GOOD = {"trl": ("1.13", "1.14", "1.15", "1.16"), "vllm": ("0.31", "0.32")}
"""Minor releases on which the contract tests passed, newest last; `make compat` says more of a pair."""


@dataclass(frozen=True)
class Name:
    """One name and, of a function, how it is called.

    Example: `Name("vllm.v1.engine.async_llm:AsyncLLM.pause_generation", accepts=("mode",))`
    """

    path: str
    """`module`, or `module:attribute` with any number of dots."""
    exactly: tuple[str, ...] = ()
    """Its parameters, all of them: what we put in its place is called as it is."""
    accepts: tuple[str, ...] = ()
    """Parameters that we give by name."""

    def find(self) -> Any:
        """The object.

        Raises:
            ImportError, AttributeError: it is not there.
        """
        module, _, attributes = self.path.partition(":")
        found: Any = import_module(module)
        for attribute in filter(None, attributes.split(".")):
            found = getattr(found, attribute)
        return found

    def misfit(self) -> str | None:
        """What is wrong with it, or None."""
        try:
            found = self.find()
        except (ImportError, AttributeError) as error:
            return f"{self.path} is not there ({error})"
        return self.misfit_of(tuple(inspect.signature(found).parameters)) if self._called else None

    def misfit_of(self, parameters: Sequence[str]) -> str | None:
        """What is wrong with the parameters of the function, or None."""
        if self.exactly and tuple(parameters) != self.exactly:
            return f"{self.path} takes {', '.join(parameters)}; expected {', '.join(self.exactly)}"
        missing = [name for name in self.accepts if name not in parameters]
        return f"{self.path} takes no {', '.join(missing)}" if missing else None

    @property
    def _called(self) -> bool:
        return bool(self.exactly or self.accepts)


def misfits(names: Iterable[Name]) -> list[str]:
    """What is wrong with any of them."""
    return [text for name in names if (text := name.misfit()) is not None]


def judge(host: str, version: str, found: Sequence[str]) -> None:
    """Refuse a release of `host` that moved something; warn of one that was never tested.

    Args:
        host: A key of `KNOWN_GOOD`.
        version: What is installed.
        found: What moved.

    Raises:
        ConfigError: something moved (`seam_moved`).
    """
    good = KNOWN_GOOD[host]
    if found:
        raise ConfigError(
            f"{host} {version} has moved what tink_rl leans on: {'; '.join(found)}. Known good: "
            f"{host} {', '.join(good)}; install one of these, or a newer tink-rl",
            code="seam_moved",
            moved=list(found),
        )
    if not is_known_good(host, version):
        warnings.warn(
            f"{host} {version} was never tested with this tink_rl; every name that is leaned on is where "
            f"it was. Known good: {', '.join(good)}",
            stacklevel=2,
        )


def is_known_good(host: str, version: str) -> bool:
    """Whether this minor release was tested."""
    return ".".join(version.split(".")[:2]) in KNOWN_GOOD[host]
