"""Receivers that fail on purpose, given to a test server with `--worker-extension-cls`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tink_rl.errors import TinkError
from tink_rl.server.receiver import TinkWorkerExtension

SWITCH = "TINK_TEST_SWITCH"
"""Environment variable: a file; its text says which fault is on."""


def faulty_options(switch: Path) -> dict[str, Any]:
    """`ServerOptions` of a server whose workers fail as the file `switch` says."""
    return {
        "worker_extension_cls": "tests.server.faulty.FaultyExtension",
        "env": {SWITCH: str(switch), "PYTHONPATH": os.getcwd()},
    }


def _fault() -> str:
    path = Path(os.environ[SWITCH])
    return path.read_text().strip() if path.exists() else ""


class FaultyExtension(TinkWorkerExtension):
    """Fails as the switch file says: `fold` or `write` midway, `drop-adapters`, `damage` on arrival,
    `serve` on rank 1."""

    def tink_fold(self, stage_id: Any) -> Any:
        """Fail after the first layer was written."""
        folder = self._tink().folder
        assert folder is not None
        original, written = type(folder).write_layer, []

        def write(layer: Any, tensors: Any) -> None:
            if _fault() == "fold" and written:
                raise RuntimeError("injected: the second layer failed")
            written.append(layer)
            original(folder, layer, tensors)

        folder.write_layer = write  # type: ignore[method-assign]
        try:
            return super().tink_fold(stage_id)
        finally:
            del folder.write_layer

    def tink_write(self, stage_id: Any) -> Any:
        """Fail in the middle of the second bucket of a full update."""
        update, writer = self._tink().update, self._tink().writer
        assert update is not None and writer is not None
        load = writer._model.load_weights

        def half(weights: Any) -> Any:
            load(list(weights)[:1])
            raise RuntimeError("injected: the second tensor failed")

        if _fault() == "write" and update.chain._digests:
            writer._model.load_weights = half
        try:
            return super().tink_write(stage_id)
        finally:
            writer._model.__dict__.pop("load_weights", None)

    def tink_serve(self, stage_id: Any, digest: Any, patience_s: Any, *slot: Any) -> Any:
        """Refuse on one of two ranks (`serve`); serve zeros under the right digest (`drop-adapters`)."""
        worker: Any = self
        if _fault() == "serve" and worker.rank == 1:
            return {"ok": False, **TinkError("injected: no slot on rank 1").to_wire()}
        self._tink_damage(stage_id)
        if _fault() == "drop-adapters":
            inbox = self._tink().inbox
            inbox.seal(stage_id, digest)
            if inbox.state(stage_id, patience_s) == "done":
                for tensor in inbox.stages[stage_id].tensors.values():
                    tensor.zero_()
        return super().tink_serve(stage_id, digest, patience_s, *slot)

    def tink_sent(self, stage_id: Any, digest: Any, patience_s: Any) -> Any:
        self._tink_damage(stage_id)
        return super().tink_sent(stage_id, digest, patience_s)

    def _tink_damage(self, stage_id: Any) -> None:
        """Damage a byte of a packet that came over HTTP (`damage`)."""
        if _fault() == "damage":
            self._tink().inbox.stages[stage_id].buffer[3] ^= 1
