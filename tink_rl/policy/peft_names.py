"""What is read and called of a live PEFT model by everyone that gets one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

if TYPE_CHECKING:  # the store reads adapters without it
    import torch


class BaseModel(Protocol):
    """A transformers model, as PEFT wraps it."""

    config: Any

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """See `torch.nn.Module`, as all that follows."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def modules(self) -> Iterator[Any]: ...

    def named_modules(self) -> Iterator[tuple[str, Any]]: ...


class PeftModel(BaseModel, Protocol):
    """A `peft.PeftModel`, without importing peft."""

    training: bool
    peft_config: Mapping[str, Any]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that take part in a forward pass."""

    def get_base_model(self) -> Any:
        """The model that the adapters were put into."""

    def disable_adapter(self) -> AbstractContextManager[None]:
        """The base alone, inside the block."""

    def train(self, mode: bool = ...) -> Any: ...

    def eval(self) -> Any: ...

    def __call__(self, *, input_ids: torch.Tensor) -> Any: ...


def is_peft_model(source: object) -> TypeGuard[PeftModel]:
    """Whether `source` is one."""
    return hasattr(source, "get_base_model")
