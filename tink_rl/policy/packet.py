"""The wire: one header, one flat buffer, one digest.

A packet is one policy version's weights. The header names every tensor with shape, dtype and byte
offset; the buffer holds them back to back, each aligned to 64 bytes. Scaling is already folded in
(`policy/adapter.py`), so a packet carries no alpha. `digest` is blake3 over the canonical header
(without digest, policy, version and epoch) and the buffer: the same weights give the same digest
under every name, which makes publishing twice free. It is computed while the bytes travel, on both
sides, so a header starts its way unsealed and the digest follows the last byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import AfterValidator, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from tink_rl.errors import BadRequest, DigestMismatch, ProtocolMismatch
from tink_rl.types import PROTOCOL_VERSION, SyncMode

if TYPE_CHECKING:
    import torch

ALIGNMENT_BYTES = 64
MAX_HEADER_TENSORS = 200_000
_NOT_HASHED = ("digest", "policy", "version", "epoch")
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def check_protocol(given: int) -> int:
    """`given`, if it is the protocol version of this package.

    Raises:
        ProtocolMismatch: it is another one.
    """
    if given != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"protocol {given!r} was given, this side speaks {PROTOCOL_VERSION}; install the same "
            "tink-rl release in the trainer and in the server (`pip show tink-rl` on both)",
            given=given,
            expected=PROTOCOL_VERSION,
        )
    return given


Dtype = Literal["float32", "float16", "bfloat16"]
Protocol = Annotated[int, AfterValidator(check_protocol)]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Where one tensor lies: `TensorSpec(name="model.layers.0.self_attn.q_proj.lora_A.weight",
    shape=(16, 128), dtype="float32", offset=0)`."""

    name: str
    shape: tuple[PositiveInt, ...]
    dtype: Dtype
    offset: NonNegativeInt
    """First byte in the buffer; a multiple of 64."""

    @property
    def num_bytes(self) -> int:
        """Bytes of this tensor, without padding."""
        count = 1
        for size in self.shape:
            count *= size
        return count * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class PacketHeader:
    """What a control request says about the buffer that the communicator carries."""

    protocol: Protocol
    """Read first: a header of another version may have other fields."""
    mode: SyncMode
    base_fingerprint: str
    rank: NonNegativeInt
    """Largest LoRA rank of any module."""
    tensors: tuple[TensorSpec, ...]
    num_bytes: NonNegativeInt
    """Length of the buffer, padding included."""
    digest: str
    """Empty until the header is sealed."""
    policy: str
    version: NonNegativeInt
    epoch: NonNegativeInt

    def canonical(self) -> bytes:
        """The bytes of the header that enter the digest."""
        # Not dataclasses.asdict: its deep copies take a millisecond per hundred tensors.
        names = [field.name for field in fields(self) if field.name not in _NOT_HASHED]
        data = {name: getattr(self, name) for name in names}
        data["tensors"] = [vars(spec) for spec in self.tensors]
        return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()

    def to_json(self) -> bytes:
        """As it travels."""
        return _HEADER.dump_json(self)

    def same_weights(self, other: PacketHeader) -> bool:
        """Whether equal buffers under both headers have one digest."""
        names = [field.name for field in fields(self) if field.name not in _NOT_HASHED]
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def named(self, policy: str, version: int, epoch: int) -> PacketHeader:
        """The same weights under another policy version and channel epoch."""
        return replace(self, policy=policy, version=version, epoch=epoch)

    @classmethod
    def from_json(cls, data: bytes | str) -> PacketHeader:
        """Read and check a header that came over the wire.

        Raises:
            ProtocolMismatch: the sender speaks another protocol version.
            BadRequest: a field is missing, of another type, or tensors overlap or leave the buffer.
        """
        try:
            return _HEADER.validate_json(data, strict=True)
        except ValidationError as error:
            raise malformed("packet header", error) from error


def malformed(what: str, error: ValidationError) -> BadRequest:
    """Names the first field of `what` that is missing, or not what it should be."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    given = "" if first["type"] == "missing" else f", given {first['input']!r:.100}"
    return BadRequest(
        f"{what}{'.' if field else ''}{field}: {first['msg']}{given}; install the same tink-rl release in "
        "the trainer and in the server (`pip show tink-rl` on both)",
        field=field,
    )


def _layout_checked(header: PacketHeader) -> PacketHeader:
    if not 0 < len(header.tensors) <= MAX_HEADER_TENSORS:
        raise ValueError(f"a packet holds 1 to {MAX_HEADER_TENSORS} tensors")
    end = 0
    for spec in header.tensors:
        if spec.offset < end or spec.offset % ALIGNMENT_BYTES:
            raise ValueError(f"tensor {spec.name!r} at byte {spec.offset} overlaps or is unaligned")
        end = spec.offset + spec.num_bytes
    if end > header.num_bytes:
        raise ValueError(f"tensors end at byte {end}, the buffer at {header.num_bytes}")
    if len({spec.name for spec in header.tensors}) != len(header.tensors):
        raise ValueError("two tensors of the packet have the same name")
    return header


CheckedHeader = Annotated[PacketHeader, AfterValidator(_layout_checked)]
"""A header whose tensors lie in the buffer, one behind the other."""
_HEADER: TypeAdapter[PacketHeader] = TypeAdapter(CheckedHeader)
_SPECS = TypeAdapter(list[TensorSpec])


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def pack(
    tensors: Mapping[str, torch.Tensor],
    *,
    mode: SyncMode,
    base_fingerprint: str,
    rank: int,
    allocate: Callable[[int], torch.Tensor] | None = None,
) -> tuple[PacketHeader, torch.Tensor]:
    """Header (not sealed yet), and the buffer `[num_bytes] uint8` on the CPU, in order of tensor name.

    `allocate(num_bytes)` gives the memory to pack into: used again, or shared with who reads it, because
    fresh pages and another copy cost more than the packing. None: fresh memory.

    Raises:
        KeyError: a tensor has a dtype that does not travel (float32, float16, bfloat16 do).
    """
    import torch

    header = layout(tensors, mode=mode, base_fingerprint=base_fingerprint, rank=rank)
    num_bytes = header.num_bytes
    buffer = allocate(num_bytes) if allocate else torch.empty(num_bytes, dtype=torch.uint8)
    fill(header, buffer, tensors)
    return header, buffer


def layout(
    tensors: Mapping[str, torch.Tensor], *, mode: SyncMode, base_fingerprint: str, rank: int
) -> PacketHeader:
    """The header (not sealed yet) of `tensors`, in order of their names; looks at no value.

    Raises:
        KeyError: a tensor has a dtype that does not travel (float32, float16, bfloat16 do).
    """
    specs, num_bytes = [], 0
    for name, tensor in sorted(tensors.items()):
        spec = TensorSpec(
            name=name,
            shape=tuple(tensor.shape),
            dtype=cast(Dtype, str(tensor.dtype).removeprefix("torch.")),
            offset=num_bytes,
        )
        specs.append(spec)
        num_bytes += _aligned(spec.num_bytes)
    return PacketHeader(
        protocol=PROTOCOL_VERSION,
        mode=mode,
        base_fingerprint=base_fingerprint,
        rank=rank,
        tensors=tuple(specs),
        num_bytes=num_bytes,
        digest="",
        policy="",
        version=0,
        epoch=0,
    )


def fill(header: PacketHeader, buffer: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy `tensors` to where `header`, which is their layout, says.

    Args:
        header: What `layout` gave.
        buffer: `[num_bytes] uint8` on the CPU.
        tensors: By name, on any device.
    """
    for spec, target in zip(header.tensors, _views(buffer, header.tensors), strict=True):
        target.copy_(tensors[spec.name].detach())
        end, aligned = spec.offset + spec.num_bytes, spec.offset + _aligned(spec.num_bytes)
        if end < aligned:
            buffer[end:aligned] = 0  # padding is hashed too


def seal(header: PacketHeader, buffer: torch.Tensor) -> PacketHeader:
    """The header with the digest of `buffer`."""
    return replace(header, digest=digest_of(header, buffer))


def view(buffer: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor of `spec` as a view into `buffer` (no copy)."""
    import torch

    flat = buffer[spec.offset : spec.offset + spec.num_bytes]
    return flat.view(getattr(torch, spec.dtype)).view(spec.shape)


def unpack(header: PacketHeader, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """All tensors by name, as views into `buffer`, which must have been checked."""
    views = _views(buffer, header.tensors)
    return {spec.name: view for spec, view in zip(header.tensors, views, strict=True)}


def same_bits(packed: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether `tensor` (of any device) is what was packed: a NaN equals itself, -0.0 does not equal 0.0.

    Both have the same shape and dtype.
    """
    import torch

    words = {4: torch.int32, 2: torch.int16}[packed.element_size()]
    return packed.view(words).equal(tensor.detach().to(packed.device).view(words))


def _views(buffer: torch.Tensor, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """`view` of every spec. At once where all have one dtype: an adapter has hundreds of tensors."""
    import torch

    dtypes = {spec.dtype for spec in specs}
    if len(dtypes) > 1:
        return [view(buffer, spec) for spec in specs]
    item = _ITEM_BYTES[specs[0].dtype]
    end = specs[-1].offset + specs[-1].num_bytes
    ends = [*(spec.offset for spec in specs[1:]), end]
    sizes = [(after - spec.offset) // item for spec, after in zip(specs, ends, strict=True)]
    flat = buffer[specs[0].offset : end].view(getattr(torch, specs[0].dtype))
    return [
        (piece if size * item == spec.num_bytes else piece[: spec.num_bytes // item]).view(
            spec.shape
        )
        for spec, piece, size in zip(specs, torch.split(flat, sizes), sizes, strict=True)
    ]


def digest_of(header: PacketHeader, buffer: torch.Tensor) -> str:
    """blake3 (hex) over the canonical header and the buffer; a GPU buffer is copied to the host."""
    hasher = Hasher(header)
    hasher.update(buffer)
    return hasher.digest()


class Hasher:
    """The digest of a packet whose buffer arrives piece by piece, in order."""

    def __init__(self, header: PacketHeader) -> None:
        from blake3 import blake3

        self._blake3 = blake3(header.canonical(), max_threads=min(4, len(os.sched_getaffinity(0))))
        self._num_bytes = 0

    def update(self, piece: torch.Tensor) -> None:
        """Take the next piece, `[n] uint8`."""
        self._num_bytes += piece.numel()
        self._blake3.update(piece.cpu().numpy().data)

    def digest(self) -> str:
        """blake3, hex."""
        return str(self._blake3.hexdigest())

    def check(self, header: PacketHeader) -> None:
        """Raise unless the pieces are what the sealed `header` announces.

        Raises:
            DigestMismatch: another number of bytes; or other bytes.
        """
        if self._num_bytes != header.num_bytes:
            raise DigestMismatch(
                f"{self._num_bytes} bytes arrived, the header of {header.policy}@{header.version} "
                f"announced {header.num_bytes}; publish again",
                given=self._num_bytes,
                expected=header.num_bytes,
                code="truncated_packet",
            )
        found = self.digest()
        if found != header.digest:
            raise DigestMismatch(
                f"the bytes of {header.policy}@{header.version} hash to {found[:12]}, the header says "
                f"{header.digest[:12]}: they changed on the way; publish again",
                given=found,
                expected=header.digest,
            )


class DigestChain:
    """The digest of a whole that travels in buckets: blake3 over the buckets' digests, in order."""

    def __init__(self) -> None:
        self._digests: list[str] = []

    def add(self, digest: str) -> None:
        """Take the digest of the next bucket."""
        self._digests.append(digest)

    def digest(self) -> str:
        """blake3, hex."""
        from blake3 import blake3

        return str(blake3("".join(self._digests).encode()).hexdigest())


def specs_from_plan(plan: Any) -> list[TensorSpec]:
    """The tensors that a full update announces: a list of `{"name", "shape", "dtype"}`.

    Raises:
        BadRequest: it is malformed, or names a tensor twice.
    """
    try:
        specs = _SPECS.validate_python([{**item, "offset": 0} for item in plan])
    except (TypeError, ValueError) as error:
        raise BadRequest(f"the plan of a full update is malformed: {error!r}") from error
    if len({spec.name for spec in specs}) != len(specs):
        raise BadRequest("two tensors of the plan have the same name")
    return specs
