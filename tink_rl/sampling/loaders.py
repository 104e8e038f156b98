"""Two ways onto a server: as a verified packet through our plugin, or by path on a stock server."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from tink_rl import errors
from tink_rl.adapters.registry import Registration
from tink_rl.adapters.store import AdapterStore
from tink_rl.config import SyncConfig
from tink_rl.errors import TinkError
from tink_rl.policy import packet
from tink_rl.policy.shapes import BaseShapes
from tink_rl.sampling.server_view import KnownServer, ServedBase, ServerView
from tink_rl.transport.outgoing import OutgoingPacket
from tink_rl.transport.replica import Replica
from tink_rl.transport.sampling_client import SamplingClient
from tink_rl.types import PolicyVersion, ServerStatus, SyncMode

if TYPE_CHECKING:
    import torch

    from tink_rl.policy.adapter import Adapter

_LOOK_AGAIN_S = 0.1


class PluginLoader:
    """Sends the stored tensors as a packet: checked by the server, nothing on a shared disk."""

    def __init__(
        self,
        client: SamplingClient,
        store: AdapterStore,
        *,
        deadline_s: float = 60.0,
        attempts: int = 3,
    ) -> None:
        """Store.

        Args:
            client: With the token of the control routes.
            store: Where the adapters' bytes are.
            deadline_s: Longest wait for another process that loads the same version.
            attempts: How often a load whose reply was lost is tried.
        """
        self._client, self._store = client, store
        self._deadline_s, self._attempts = deadline_s, attempts

    def load(self, wanted: Registration) -> None:
        """See `Loader.load`. The digest that every worker reports is compared.

        Raises:
            LeaseHeld: another process has been loading this version for too long.
            BaseMismatch: it was registered for another base than the one that is served.
            DigestMismatch, ModeUnavailable, RankExceeded, ServerUnreachable, BadToken.
        """
        status = self._client.status()
        header, buffer = self._pack(wanted, status)
        deadline, left = time.monotonic() + self._deadline_s, self._attempts
        while not self._is_there(wanted.server_name, header.digest, status):
            try:
                self._publish(wanted.server_name, header, buffer)
                return
            except errors.LeaseHeld:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOOK_AGAIN_S)
            except errors.TinkError as error:
                left -= 1
                is_lost = error.retry is errors.Retry.RECONNECT
                if not is_lost or left <= 0 or time.monotonic() > deadline:
                    raise
            status = self._client.status()

    def _pack(
        self, wanted: Registration, status: ServerStatus
    ) -> tuple[packet.PacketHeader, torch.Tensor]:
        import torch

        adapter = self._store.read(wanted.digest).to(getattr(torch, status.adapter_dtype))
        header, buffer = packet.pack(
            adapter.tensors,
            mode=SyncMode.ADAPTER,
            base_fingerprint=wanted.base_fingerprint or status.base_fingerprint,
            rank=adapter.rank,
        )
        name = PolicyVersion.parse(wanted.server_name)
        return packet.seal(header.named(name.policy, name.version, 0), buffer), buffer

    def _is_there(self, name: str, digest: str, status: ServerStatus) -> bool:
        found = status.served.get(name)
        if found is not None and found != digest:
            raise errors.DigestMismatch(
                f"{self._client.base_url} serves {name} with digest {found[:12]}, the store holds "
                f"{digest[:12]}; restart the vLLM server",
                given=found,
                expected=digest,
            )
        return found is not None

    def _publish(self, name: str, header: packet.PacketHeader, buffer: torch.Tensor) -> None:
        replica = self._replica(name)
        try:
            replica.ensure_channel()
            stage_id = replica.stage(OutgoingPacket(header, buffer))
            held = replica.commit(stage_id).digest
        finally:
            replica.close()
        if held != header.digest:
            raise errors.DigestMismatch(
                f"{self._client.base_url} holds {held!r} as {name}, sent was {header.digest!r}"
            )

    def _replica(self, name: str) -> Replica:
        config = SyncConfig(
            policy=PolicyVersion.parse(name).policy, transport="http", lease_wait_s=0.0
        )
        writer = f"sampling-{uuid.uuid4().hex[:12]}"
        return Replica(self._client, config, writer=writer, lasting=True)

    def drop(self, name: str) -> None:
        """See `Loader.drop`. A version that somebody else is loading at this moment stays."""
        replica = self._replica(name)
        try:
            replica.ensure_channel()
            replica.drop(name)
        except errors.LeaseHeld:
            return
        finally:
            replica.close()


class PathLoader:
    """Lets a stock server read the store's directory, which both must see under the same path."""

    def __init__(
        self, client: SamplingClient, store: AdapterStore, base: ServedBase, *, attempts: int = 3
    ) -> None:
        self._client, self._store, self._base = client, store, base
        self._attempts = attempts

    def load(self, wanted: Registration) -> None:
        """See `Loader.load`. After a lost reply the server's own list decides.

        Raises:
            PluginMissing, BackendError, ServerUnreachable.
            BaseMismatch, UnknownModules: it does not fit the base, which the server would not say.
            DigestMismatch: the server has this name from another path.
        """
        adapter = self._store.read(wanted.digest)  # the server would take damaged bytes in silence
        if wanted.base_fingerprint is None:
            self._check_shapes(wanted, adapter)
        path = str(self._store.open(wanted.digest))
        last: TinkError | None = None
        for _ in range(self._attempts):
            if self._is_there(wanted.server_name, path):
                return
            try:
                self._client.load_lora(wanted.server_name, path)
            except errors.TinkError as error:
                if error.retry is errors.Retry.NO:
                    raise
                last = error
            else:
                return
        if not self._is_there(wanted.server_name, path):
            raise last or errors.BackendError(f"adapter {wanted.server_name} could not be loaded")

    def _check_shapes(self, wanted: Registration, adapter: Adapter) -> None:
        """For an adapter that was registered unchecked; no other check tells a smaller base apart."""
        if self._base.directory is None or self._base.fingerprint is None:
            return
        shapes = {}
        for module in adapter.modules:
            rows = adapter.tensors[f"{module}.lora_B.weight"].shape[0]
            shapes[module] = (rows, adapter.tensors[f"{module}.lora_A.weight"].shape[1])
        BaseShapes.from_model_dir(self._base.directory).check(
            shapes, where=f"adapter {wanted.adapter_id!r}, version {wanted.version}"
        )

    def _is_there(self, name: str, path: str) -> bool:
        for card in self._client.model_cards():
            if card["id"] == name:
                if card.get("root") != path:
                    raise errors.DigestMismatch(
                        f"{self._client.base_url} serves {name} from {card.get('root')!r}, the store "
                        f"is at {path!r}; let both processes use one TINK_STORE_DIR, or restart vLLM"
                    )
                return True
        return False

    def drop(self, name: str) -> None:
        """See `Loader.drop`. vLLM keeps the tensors until it needs their slot; the files stay too."""
        self._client.unload_lora(name)


class LoaderByServer:
    """The loader that fits the server, as it is at that moment."""

    def __init__(self, server: KnownServer, store: AdapterStore) -> None:
        self._server, self._store = server, store

    def load(self, wanted: Registration) -> None:
        """See `Loader.load`.

        Raises:
            BaseMismatch: the server has another base than when `wanted` was registered.
        """
        view = self._server.view(fresh=True)
        base = self._server.base_of(view)
        loader = self._loader(view, base)
        _check_registered_for(wanted, base.fingerprint, self._server.client.base_url)
        loader.load(wanted)

    def drop(self, name: str) -> None:
        """See `Loader.drop`."""
        view = self._server.view()
        self._loader(view, ServedBase(directory=None, fingerprint=None)).drop(name)

    def _loader(self, view: ServerView, base: ServedBase) -> PluginLoader | PathLoader:
        if view.token_refused is not None:
            raise errors.BadToken(view.token_refused)
        client, store = self._server.client, self._store
        return PluginLoader(client, store) if view.plugin else PathLoader(client, store, base)


def _check_registered_for(wanted: Registration, served: str | None, url: str) -> None:
    given = wanted.base_fingerprint
    if given is not None and served is not None and given != served:
        raise errors.BaseMismatch(
            f"adapter {wanted.adapter_id!r}, version {wanted.version}, was registered for base "
            f"{given[:12]}, {url} now serves base {served[:12]}; if it was trained on this one too, "
            f"register it again: register_lora_adapter({wanted.adapter_id!r}, lora_path)",
            given=given,
            expected=served,
        )
