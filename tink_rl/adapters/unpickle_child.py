"""The child process of a conversion: it limits itself, loads tensors only, and writes safetensors.

`python -P -m tink_rl.adapters.unpickle_child OUT SIZE < checkpoint`; one JSON object on standard output:
tensor name -> [dtype, shape, blake3 of its bytes].
"""

from __future__ import annotations

import io
import json
import resource
import sys
from typing import Any

_SPARE_BYTES = 3 << 30
_CPU_S = 300


def _limit(size: int) -> None:
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, _CPU_S),
        (resource.RLIMIT_DATA, _SPARE_BYTES + 6 * size),
        (resource.RLIMIT_FSIZE, 2 * size + (1 << 20)),
        (resource.RLIMIT_NOFILE, 256),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _flat(found: object) -> dict[str, Any]:
    import torch

    if not isinstance(found, dict):
        raise TypeError(f"it holds a {type(found).__name__}, expected a dict of tensors")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{str(name)[:100]!r} is a {type(tensor).__name__}, expected a tensor")
        if tensor.layout is not torch.strided or not tensor.is_floating_point():
            raise TypeError(
                f"{name[:100]!r} is {tensor.dtype}, {tensor.layout}, expected dense floats"
            )
    # A copy of its own for each: safetensors takes no shared storage.
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def _convert(data: bytes, out: str) -> dict[str, Any]:
    import torch
    from blake3 import blake3
    from safetensors.torch import save_file

    # Not a path: for one, torch would also try a format of tar files that was not scanned.
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    tensors = _flat(found)
    save_file(tensors, out, metadata={"format": "pt"})
    return {
        name: [
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            blake3(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest(),
        ]
        for name, tensor in tensors.items()
    }


def main() -> int:
    """Convert standard input; 2, and the reason on standard error, if it cannot be."""
    out, size = sys.argv[1], int(sys.argv[2])
    _limit(size)
    try:
        answer = _convert(sys.stdin.buffer.read(), out)
    except Exception as error:  # noqa: BLE001 - whatever a hostile file provokes is the answer
        lines = [*str(error).splitlines(), ""]
        sys.stderr.write(f"{type(error).__name__}: {lines[0][:300]}\n")
        return 2
    sys.stdout.write(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
