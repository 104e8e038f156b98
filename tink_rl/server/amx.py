"""AMX: permission for the tile registers, which the kernel gives a process only if it asks.

vLLM's attention in bf16 uses them wherever torch reports AMX, and asks for nothing: its worker would die
of an illegal instruction. The permission is the process's, for all its threads; a fork inherits it, an
exec loses it, so every process of vLLM asks for itself.
"""

from __future__ import annotations

import ctypes
import logging
import platform

logger = logging.getLogger("tink_rl.server")

_SYS_ARCH_PRCTL = 158
_ARCH_GET_XCOMP_PERM = 0x1022
_XFEATURE_XTILEDATA = 18


def ask_for_tiles() -> None:
    """Ask the kernel, where torch reports AMX; a refusal is one line in the log."""
    import torch

    if not torch.cpu._is_amx_tile_supported():
        return
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    if not torch.cpu._init_amx():
        logger.warning(
            "tink_rl: this CPU has AMX, but the kernel does not let this process use its tile registers "
            "(Linux before 5.16, or a sandbox): bf16 would end vLLM's worker with an illegal "
            "instruction; serve with --dtype float32"
        )


def may_use_tiles() -> bool | None:
    """Whether the kernel lets this process use the tile registers; None: torch reports no AMX."""
    import torch

    if not torch.cpu._is_amx_tile_supported():
        return None
    return bool(permitted_features() >> _XFEATURE_XTILEDATA & 1)


def permitted_features() -> int:
    """Bits of the CPU state components that this process may use; 0 where the kernel cannot say."""
    if platform.machine() != "x86_64":
        return 0
    bits = ctypes.c_uint64(0)
    failed = ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_GET_XCOMP_PERM, ctypes.byref(bits))
    return 0 if failed else bits.value
