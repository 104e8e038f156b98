"""Lets accelerate use FSDP2 on the CPU.

accelerate 1.15 chooses FSDP only where it found GPUs; on a CPU it runs DDP under an FSDP config and says
nothing. Torch's `fully_shard` itself works over gloo, so the suite sets what accelerate leaves out.
"""

from __future__ import annotations

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def enable() -> None:
    """Call it before the first `Accelerator` or `Trainer` is made; does nothing without an FSDP config."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return
    plain_init = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        first = AcceleratorState._shared_state == {}
        plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if first:
            # both: every later AcceleratorState() copies from PartialState again
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
