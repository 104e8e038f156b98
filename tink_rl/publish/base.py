"""The base that a policy is trained on: the same in its directory, on the servers and in memory."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from tink_rl.errors import BaseMismatch
from tink_rl.policy.fingerprint import CheckpointTensor, base_fingerprint, checkpoint_index
from tink_rl.policy.live_check import check_live_base
from tink_rl.policy.peft_names import PeftModel
from tink_rl.policy.shapes import BaseShapes

if TYPE_CHECKING:
    from tink_rl.types import ServerStatus


class TrainedBase:
    """A base by its directory (or cached hub id); what is read of it is read once."""

    def __init__(self, directory: str) -> None:
        """Store; reads nothing yet."""
        self.directory = directory
        self._fingerprint: str | None = None
        self._shapes: BaseShapes | None = None
        self._compared: weakref.WeakSet[Any] = weakref.WeakSet()
        """Live models whose base was found to be this one."""

    @property
    def fingerprint(self) -> str:
        """See `base_fingerprint`."""
        if self._fingerprint is None:
            self._fingerprint = base_fingerprint(self.directory)
        return self._fingerprint

    def shapes(self) -> BaseShapes:
        """Of its modules."""
        if self._shapes is None:
            self._shapes = BaseShapes.from_model_dir(self.directory)
        return self._shapes

    def index(self) -> Mapping[str, CheckpointTensor]:
        """Its tensors by name."""
        return checkpoint_index(self.directory)

    def check_served(self, status: ServerStatus) -> None:
        """Raise unless the servers were started with it.

        Raises:
            BaseMismatch: they hold another one.
        """
        if status.base_fingerprint != self.fingerprint:
            commit = f" at {status.base_revision[:12]}" if status.base_revision else ""
            raise BaseMismatch(
                f"the trainer's base {self.directory!r} is not the one that is served "
                f"({status.base_model!r}{commit}); serve the directory that the trainer loads",
                given=self.fingerprint,
                expected=status.base_fingerprint,
            )

    def check_live(self, model: PeftModel, travels: Collection[str] = ()) -> None:
        """Compare the base of a live PEFT model with it, once a model.

        Raises:
            BaseMismatch: it was changed in memory.
        """
        if model not in self._compared:
            check_live_base(model, self.directory, travels=travels)
            self._compared.add(model)
