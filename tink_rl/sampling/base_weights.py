"""A whole model sent as the base of a server: the channel of `update_model_weights`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.sampling.server_view import KnownServer
from tink_rl.settings import Settings
from tink_rl.types import PublishRecord

if TYPE_CHECKING:
    from tink_rl.publish.publisher import WeightSync

_POLICY = "weights"
"""Policy name of what is sent: the base answers as `weights@N` afterwards."""


class BaseWeights:
    """Publishes whole models to one server, over a channel that is opened on first use. Thread-safe."""

    def __init__(self, server: KnownServer, settings: Settings) -> None:
        self._server, self._settings = server, settings
        self._sync: WeightSync | None = None
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether the channel is open."""
        return self._sync is not None

    def open(self, device: object) -> None:
        """See `VLLMBackend.init_communicator`."""
        with self._lock:
            self._open(device)

    def publish(self, model: object) -> PublishRecord:
        """See `VLLMBackend.update_model_weights`."""
        with self._lock:
            record = self._open(getattr(model, "device", "cpu")).publish_full(model)
            self._server.invalidate()
        return record

    def close(self) -> None:
        """See `VLLMBackend.close_communicator`."""
        with self._lock:
            sync, self._sync = self._sync, None
            if sync is not None:
                sync.close()

    def _open(self, device: object) -> WeightSync:
        from tink_rl.publish.publisher import WeightSync

        if self._sync is None:
            client, view = self._server.client, self._server.view(fresh=True)
            if not view.plugin:
                raise errors.PluginMissing(
                    f"the vLLM server at {client.base_url} runs without the tink_rl plugin, which "
                    "takes whole models; start it with `tink-rl serve MODEL --mode full`",
                    replica=client.base_url,
                )
            directory = self._server.base_of(view).directory
            if directory is None:
                raise errors.BaseMismatch(
                    f"the base model {view.root!r} cannot be read here; set TINK_BASE_MODEL to its "
                    "directory"
                )
            config = SyncConfig(
                mode="full",
                policy=_POLICY,
                transport=_transport(device),
                token_file=self._settings.tink_token_file,
                request_timeout_s=self._settings.tink_request_timeout,
            )
            sync = WeightSync(client, base_model=directory, config=config)
            try:
                sync.open()
            except BaseException:  # an interrupted notebook cell must not keep a lease either
                sync.close()
                raise
            self._sync = sync  # not before: the next call would take it for open
        return self._sync


def _transport(device: object) -> str:
    import torch

    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise errors.ConfigError(
            f"init_communicator(device={str(device)!r}): expected 'cpu'"
            + (", or 'cuda'" if torch.cuda.is_available() else "; this machine has no CUDA GPU")
        )
    return "gloo" if kind == "cpu" and torch.cuda.is_available() else "auto"
