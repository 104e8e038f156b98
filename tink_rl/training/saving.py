"""A checkpoint is whole or not there."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tink_rl.errors import StorageFull
from tink_rl.training.trl_names import Trainer

_FULL = ("No space left on device", "Disk quota exceeded", "file write failed")
"""How libraries that raise no `OSError` say that a file could not be written."""


def whole_or_none(trainer: Trainer) -> Callable[..., None]:
    """`trainer._save_checkpoint` which leaves no folder of a save that failed."""
    save = trainer._save_checkpoint

    @functools.wraps(save)
    def saving(*args: Any, **kwargs: Any) -> None:
        """As it.

        Raises:
            StorageFull: it could not be written; what was there before is there.
        """
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        was_there = folder.exists()
        try:
            save(*args, **kwargs)
        except Exception as error:
            if not was_there:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) or any(text in str(error) for text in _FULL):
                raise StorageFull(
                    f"{folder} cannot be written ({error}), and nothing half is left of it; free space or "
                    "name another output_dir, then resume from the checkpoint before it"
                ) from error
            raise

    return saving
