"""Every message of `/tink/v1`: what a publisher sends, what a server answers. A leaf, for both ends.

A route is `POST /tink/v1/ACTION` with a JSON object and `Authorization: Bearer TOKEN`; `ROUTES` has all of
them, in the order of a publish. Beside them are `GET status` (`types.ServerStatus`), `GET layout`
(`LayoutAnswer`), and `POST stage/STAGE_ID/chunk?offset=N` with raw bytes. The header of a packet is
`policy.packet.PacketHeader`. A request with a missing field, or one of another type, is answered with
`BadRequest` (400), which names the field; an error of the server's own is a 500. Either is
`{"error": {"code", "message", "details"}}` (`errors.from_wire`). What an answer of a newer server has
beside the fields below is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from tink_rl.errors import ProtocolMismatch
from tink_rl.policy.packet import CheckedHeader, Dtype, Protocol, malformed
from tink_rl.types import OnRunning, PolicyVersion, ServerStatus, Transport

PREFIX = "/tink/v1"


def _policy(name: str) -> str:
    return PolicyVersion(policy=name, version=0).policy


def _version(name: str) -> str:
    return str(PolicyVersion.parse(name))


PolicyName = Annotated[str, AfterValidator(_policy)]
VersionName = Annotated[str, AfterValidator(_version)]
"""`policy@N`."""


class Message(BaseModel):
    """A JSON object on the wire; fields that it does not know are ignored."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def read(cls, data: bytes) -> Self:
        """What came over the wire.

        Raises:
            BadRequest: a field is missing, or not what it should be; it is named.
            ProtocolMismatch: the sender speaks another version of this protocol.
        """
        try:
            return cls.model_validate_json(data, strict=True)
        except ValidationError as error:
            raise malformed(cls.__name__, error) from error

    def to_json(self) -> bytes:
        """What goes over the wire: the fields that were given."""
        return self.model_dump_json(exclude_unset=True).encode()


class Empty(Message):
    """`{}`: there is nothing to say."""


# -- the lease of a policy, and the channel of its packets --------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SegmentSpec:
    """What the trainer says of a segment of shared memory: `SegmentSpec(pid=4711, handle=23,
    nonce="9a..", num_bytes=4096)`"""

    pid: NonNegativeInt
    handle: NonNegativeInt
    """File descriptor in process `pid`."""
    nonce: Annotated[str, Field(min_length=64, max_length=64)]
    num_bytes: NonNegativeInt
    """For a packet, without the head of the segment."""

    def to_json(self) -> bytes:
        """As it goes on to every worker."""
        return _SEGMENT.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes | str) -> SegmentSpec:
        """Read and check what came over the wire.

        Raises:
            BadRequest: a field is missing or not of its form.
        """
        try:
            return _SEGMENT.validate_json(data, strict=True)
        except ValidationError as error:
            raise malformed("shared memory segment", error) from error


_SEGMENT = TypeAdapter(SegmentSpec)


class _Carried(Message):
    """What says which transport it takes."""

    transport: Transport
    timeout_s: float
    segment: SegmentSpec | None = None
    """Shared memory, with transport "shm"."""

    @model_validator(mode="after")
    def _segment_of_shared_memory(self) -> Self:
        if self.transport is Transport.SHM and self.segment is None:
            raise ValueError("transport 'shm' needs a segment")
        return self


class JoinRequest(_Carried):
    """Take the lease of a policy."""

    protocol: Protocol
    policy: PolicyName
    writer: str
    """Names the publisher: the same one may join again at any time, another one when the lease ended."""
    lasting: bool = False
    """What it publishes is in use after it leaves, and beside other versions: nobody else replaces it."""


class JoinAnswer(Message):
    """The lease; with a transport that needs a channel, what to dial."""

    epoch: int
    """Of the lease: every later request states it, and an older one is refused."""
    incarnation: str
    """Identifier of one life of the server process."""
    lease_s: float
    """The lease ends so long after the last request that stated it."""
    last_version: int
    """Highest version of the policy whose commit ever arrived, or 0."""
    transport: Transport
    host: str = ""
    port: int = 0
    nonce: str = ""
    world_size: int = 0
    """The server's workers and the publisher."""
    rank: int = 0
    """The publisher's."""
    timeout_s: float = 0.0


class LeaseRequest(Message):
    """Renew a lease (`heartbeat`), or end it (`leave`); what is served stays served."""

    policy: str
    epoch: int


class JoinedRequest(LeaseRequest):
    """Wait until every worker is in the channel."""

    timeout_s: float


class HeartbeatAnswer(Message):
    """The server is the one that was joined if this is its incarnation."""

    incarnation: str


# -- one packet -------------------------------------------------------------------------------------


class StageRequest(_Carried):
    """Check a header and begin to receive."""

    header: CheckedHeader
    update_id: str | None = None
    """The full update that the packet is a bucket of."""


class StageAnswer(Message):
    """The packet may be sent; or, after `staged`, every worker found it right."""

    stage_id: str


class StagedRequest(Message):
    """All bytes were sent: wait until every worker has checked them."""

    stage_id: str
    digest: str
    timeout_s: float


class DiscardRequest(Message):
    """Forget a packet; an unknown one is fine."""

    stage_id: str


class CommitRequest(Message):
    """Serve a packet."""

    stage_id: str
    timeout_s: float
    drain_timeout_s: float
    on_running: OnRunning
    retire: tuple[VersionName, ...] = ()
    """Versions of the same policy in slots, to be served no longer."""
    digest: str | None = None
    """Check the packet first, which nobody did: a publisher with one server asks for both at once."""


class CommitAnswer(Message):
    """What every worker holds now."""

    held_seconds: float
    digest: str
    full: str | None = None
    """The version whose whole tensors are in place of the base."""


class DropRequest(Message):
    """Stop serving a version."""

    name: VersionName
    epoch: int
    drain_timeout_s: float
    on_running: OnRunning


# -- one full update --------------------------------------------------------------------------------


class LayoutAnswer(Message):
    """Names of the served checkpoint's tensors, by group that must be sent whole."""

    groups: list[list[str]]


class PlannedTensor(Message):
    """One tensor that is going to be sent."""

    name: str
    shape: tuple[PositiveInt, ...]
    dtype: Dtype


class BeginRequest(Message):
    """Hold requests; the buckets of a full version follow."""

    policy: PolicyName
    version: NonNegativeInt
    epoch: int
    base_fingerprint: str
    timeout_s: float
    """The update ends if nothing comes for so long."""
    drain_timeout_s: float
    on_running: OnRunning
    plan: list[PlannedTensor] | None = None
    """What is going to be sent; None: not known beforehand."""


class BeginAnswer(Message):
    """The update is under way."""

    update_id: str


class FinishRequest(Message):
    """Serve what was sent."""

    update_id: str
    digest: str
    """Over the digests of all buckets."""


class AbortRequest(Message):
    """End an update early; one that has ended is fine."""

    update_id: str
    reason: str = "its sender gave up"


# -- beside a publish -------------------------------------------------------------------------------


class BaseAnswer(Message):
    """Digests of the served checkpoint's tensors, once all bytes are read."""

    num_bytes: int
    num_done: int
    tensors: dict[str, str] | None


class ForgetPrefixesRequest(Message):
    """Drop every cached prefix."""

    timeout_s: float


# -- routes -----------------------------------------------------------------------------------------

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


@dataclass(frozen=True)
class Route(Generic[Q, A]):
    """`POST /tink/v1/{action}`: `request` is answered with `answer`."""

    action: str
    request: type[Q]
    answer: type[A]

    def read_answer(self, data: Mapping[str, Any]) -> A:
        """What the server answered.

        Raises:
            ProtocolMismatch: it is not what this release expects; the field is named.
        """
        try:
            return self.answer.model_validate(data)
        except ValidationError as error:
            raise _unexpected(self.action, error) from error


_STATUS = TypeAdapter(ServerStatus)


def read_status(data: Mapping[str, Any]) -> ServerStatus:
    """What `GET status` answered; fields of newer servers are ignored.

    Raises:
        ProtocolMismatch: a field is missing, or not what it should be; it is named.
    """
    try:
        return _STATUS.validate_python(data)
    except ValidationError as error:
        raise _unexpected("status", error) from error


def _unexpected(action: str, error: ValidationError) -> ProtocolMismatch:
    wrong = malformed(f"the answer to {action!r}", error)
    return ProtocolMismatch(wrong.message, **wrong.details)


JOIN = Route("join", JoinRequest, JoinAnswer)
JOINED = Route("joined", JoinedRequest, Empty)
HEARTBEAT = Route("heartbeat", LeaseRequest, HeartbeatAnswer)
STAGE = Route("stage", StageRequest, StageAnswer)
STAGED = Route("staged", StagedRequest, StageAnswer)
DISCARD = Route("discard", DiscardRequest, Empty)
COMMIT = Route("commit", CommitRequest, CommitAnswer)
DROP = Route("drop", DropRequest, Empty)
BEGIN = Route("begin", BeginRequest, BeginAnswer)
FINISH = Route("finish", FinishRequest, CommitAnswer)
ABORT = Route("abort", AbortRequest, Empty)
LEAVE = Route("leave", LeaseRequest, Empty)
BASE = Route("base", Empty, BaseAnswer)
FORGET_PREFIXES = Route("forget_prefixes", ForgetPrefixesRequest, Empty)
LAYOUT = Route("layout", Empty, LayoutAnswer)
"""With GET, and no body."""

ROUTES: tuple[Route[Any, Any], ...] = (
    *(JOIN, JOINED, HEARTBEAT, STAGE, STAGED, DISCARD, COMMIT, DROP),
    *(BEGIN, FINISH, ABORT, LEAVE, BASE, FORGET_PREFIXES),
)
