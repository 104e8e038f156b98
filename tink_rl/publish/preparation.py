"""The steps before anything is sent: collect, normalise, pack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tink_rl.errors import UnsupportedAdapter
from tink_rl.policy import packet
from tink_rl.policy.adapter import Adapter, check_packed, from_peft_dir
from tink_rl.policy.collect import Collector, LiveModel, collector_for
from tink_rl.policy.peft_names import PeftModel, is_peft_model
from tink_rl.policy.support import WHOLE, Needs
from tink_rl.publish.base import TrainedBase
from tink_rl.publish.full import FullPath, FullTransfer
from tink_rl.publish.packets import Packer, PacketTransfer, holds
from tink_rl.types import PolicyVersion, SyncMode

if TYPE_CHECKING:
    from tink_rl.transport.fleet import Fleet

Transfer = PacketTransfer | FullTransfer
_NO_ADAPTER = Needs(modes=WHOLE, because=("a model that no adapter describes",))


class Preparation:
    """Makes what is sent out of what a publisher is given."""

    def __init__(self, fleet: Fleet, base: TrainedBase, full: FullPath) -> None:
        """Store.

        Args:
            fleet: Where it will be sent.
            base: Of what is published.
            full: The path of whole tensors.
        """
        self._fleet, self._base, self._full = fleet, base, full
        self._packer = Packer(fleet)
        self._collector: tuple[Any, Collector] | None = None

    def needs_of(self, source: object) -> Needs | None:
        """What the source of a publish needs of a mode; None: whatever is in use.

        Raises:
            UnsupportedAdapter: nothing that can be published.
            BaseMismatch: the base of a live model was changed in memory.
        """
        if isinstance(source, (Adapter, str, Path)):
            return None
        if isinstance(source, LiveModel):
            return _NO_ADAPTER
        if not is_peft_model(source):
            raise UnsupportedAdapter(
                f"publish() got {type(source).__name__}; expected a PEFT model, a PEFT directory or an "
                "Adapter (publish_full() takes whole models)"
            )
        return self._collector_of(source).needs

    def _collector_of(self, model: PeftModel) -> Collector:
        if self._collector is None or self._collector[0] is not model:
            self._collector = (model, collector_for(model, self._base.directory))
            self._base.check_live(model)
        return self._collector[1]

    def collect(self, source: object) -> Adapter | LiveModel:
        """What `source` holds now; of a live model views, to be packed before it can change."""
        if isinstance(source, (Adapter, LiveModel)):
            return source
        if isinstance(source, (str, Path)):
            return from_peft_dir(source, base=self._base.shapes())
        assert is_peft_model(source), "`needs_of` refuses anything else"
        return self._collector_of(source).collect(live=True)

    def pack(
        self,
        policy: Adapter | LiveModel,
        name: PolicyVersion,
        *,
        mode: SyncMode,
        dtype: str,
        served: Transfer | None,
    ) -> Transfer | None:
        """What is to be sent; None: `served` has the same bits. A rollout asks that after each step.

        Args:
            policy: Normalised.
            name: Policy and version.
            mode: In which an adapter travels.
            dtype: The servers', for whole tensors.
            served: What the current version was sent as, if there is one.

        Raises:
            NonFiniteWeights, WeightOutOfRange: of an adapter that is sent as whole tensors.
        """
        if isinstance(policy, LiveModel):
            return self._pack_live(policy, name.version, dtype, served)
        header = packet.layout(
            policy.tensors,
            mode=mode,
            base_fingerprint=self._base.fingerprint,
            rank=policy.rank,
        ).named(name.policy, name.version, 0)
        if served is not None and holds(served.packed, header, policy):
            return None
        outgoing = self._packer.pack(header, policy)
        if mode is not SyncMode.FULL:
            return PacketTransfer(self._fleet, outgoing)
        check_packed(header, outgoing.buffer)  # before the first byte of a full update is written
        # The packed copy: the live one may have changed when a lost server asks for it again.
        copy = Adapter(tensors=packet.unpack(header, outgoing.buffer), rank=policy.rank)
        return FullTransfer(self._full, copy, version=name.version, dtype=dtype, packed=outgoing)

    def _pack_live(
        self, policy: LiveModel, version: int, dtype: str, served: Transfer | None
    ) -> FullTransfer | None:
        digest = policy.digest()
        if isinstance(served, FullTransfer) and served.live_digest == digest:
            return None
        return FullTransfer(
            self._full,
            policy.model,
            version=version,
            dtype=dtype,
            live_digest=digest,
            holding=policy.changed,
        )

    def exchange(self, old: Transfer | None, new: Transfer | None) -> None:
        """`new` is what is served now, in place of `old`, whose memory is free."""
        if old is not None and old.packed is not None:
            self._packer.reuse(old.packed.buffer)
        elif new is not None and new.packed is not None:
            self._packer.reuse(None)
