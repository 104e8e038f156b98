"""The receiver in every vLLM worker (`--worker-extension-cls`): join, receive, check, commit.

vLLM's engine loop calls these methods between steps, so none may block: joining (`channels.py`) and
receiving (`inbox.py`) run in threads of the worker, and the routes ask for their state. Only an engine
without requests waits for a packet, for milliseconds. Every method answers `{"ok": True, ...}` or
`{"ok": False, "error": ...}`; an exception that escaped would end the engine for everybody.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from tink_rl.errors import (
    ConfigError,
    DigestMismatch,
    IncompleteGroup,
    ModeUnavailable,
    ShapeMismatch,
    TinkError,
    UnknownVersion,
)
from tink_rl.policy import packet
from tink_rl.protocol import SegmentSpec
from tink_rl.server import amx, full_logprobs, headers, modules, staged_adapters
from tink_rl.server.channels import Channels
from tink_rl.server.derived import Derived
from tink_rl.server.folding import Folder
from tink_rl.server.full import FullWriter
from tink_rl.server.golden import GoldenWeights
from tink_rl.server.inbox import Inbox, Stage
from tink_rl.server.layout import Layout
from tink_rl.server.names import Names
from tink_rl.server.preparing import follow_loader, merged_mode, without_slots
from tink_rl.transport.shared_memory import Segment
from tink_rl.types import SyncMode

logger = logging.getLogger("tink_rl.server")


def _answers(method: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Turn the return value or exception of a worker method into a plain answer."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return {"ok": True, "value": method(self, *args, **kwargs)}
        except TinkError as error:
            return {"ok": False, **error.to_wire()}
        except Exception as error:  # anything that escapes here ends the engine for all its users
            logger.exception("tink_rl: %s failed", method.__name__)
            return {"ok": False, **TinkError(f"{type(error).__name__}: {error}").to_wire()}

    return call


class _Update:
    """A full version on its way in."""

    def __init__(self, update_id: str, names: frozenset[str], epoch: int) -> None:
        self.update_id, self.epoch = update_id, epoch
        self.missing = set(names)
        """Names that were announced and have not come."""
        self.announced = names
        self.chain = packet.DigestChain()


class _State:
    """What one worker remembers between calls."""

    def __init__(self, *, rank: int, device: torch.device) -> None:
        self.channels = Channels(rank=rank)
        self.inbox = Inbox(self.channels, device=device)
        self.names = Names(None, {})
        self.refused: dict[SyncMode, dict[str, str]] = {}
        """Projections that a mode cannot change here, and why."""
        self.golden: GoldenWeights | None = None
        self.folder: Folder | None = None
        self.writer: FullWriter | None = None
        self.update: _Update | None = None
        self.max_lora_rank = 0
        self.adapter_dtype = "float32"


class TinkWorkerExtension:
    """Mixed into vLLM's worker class; every name starts with `tink_`."""

    tink_state_: _State | None = None

    def _tink(self) -> _State:
        if self.tink_state_ is None:
            raise ConfigError("the receiver was not prepared; was the endpoint plugin loaded?")
        return self.tink_state_

    # -- start ------------------------------------------------------------------------------------

    @_answers
    def tink_prepare(self, options: dict[str, Any]) -> dict[str, Any]:
        """Learn the model's layers and, for merged mode, load the golden weights.

        Raises:
            ModeUnavailable, ConfigError: merged mode cannot work here.
        """
        worker: Any = self
        state = _State(rank=worker.rank, device=worker.device)
        model = worker.model_runner.get_model()
        layers = modules.linear_layers(model)
        derived = Derived(model, worker.model_config.dtype)
        state.refused[SyncMode.ADAPTER] = without_slots(layers.values(), derived)
        lora = worker.vllm_config.lora_config
        state.max_lora_rank = lora.max_lora_rank if lora is not None else 0
        if lora is not None:
            state.adapter_dtype = str(lora.lora_dtype).removeprefix("torch.")
        layout, no_full = follow_loader(model, options)
        state.names = Names(model, layers, None if layout is None else layout.placed)
        if SyncMode.MERGED in options["modes"]:
            merged = merged_mode(worker, layers, state.names, derived, options)
            state.golden, state.folder = merged.golden, merged.folder
            state.refused[SyncMode.MERGED] = dict(merged.refused)
        if SyncMode.FULL in options["modes"] and layout is not None:
            no_full = self._tink_prepare_full(state, layout, derived)
        self.tink_state_ = state
        return {
            "num_modules": len(state.names),
            "adapter_dtype": state.adapter_dtype,
            "golden": {}
            if state.golden is None
            else state.golden.describe() | _left(worker.device),
            "no_full": no_full,
            "amx": amx.may_use_tiles(),
            "no_full_logprobs": full_logprobs.install(worker.model_runner),
        }

    def _tink_prepare_full(self, state: _State, layout: Layout, derived: Derived) -> str | None:
        """Prepare full mode; why it cannot be offered, or None."""
        worker: Any = self
        try:
            derived.check()
        except ConfigError as error:
            logger.warning("tink_rl: no full mode on this server: %s", error)
            return f"{type(error).__name__}: {error}"
        state.writer = FullWriter(
            worker.model_runner.get_model(),
            layout,
            vllm_config=worker.vllm_config,
            dtype=worker.model_config.dtype,
            device=worker.device,
            derived=derived,
        )
        return None

    # -- channel ----------------------------------------------------------------------------------

    @_answers
    def tink_bind(self, epoch: int, host: str, port: int, timeout_s: float) -> int | None:
        """See `Channels.bind`."""
        return self._tink().channels.bind(epoch, host, port, timeout_s)

    @_answers
    def tink_join(self, epoch: int, spec: dict[str, Any]) -> None:
        """See `Channels.join`."""
        self._tink().channels.join(epoch, spec)

    @_answers
    def tink_join_state(self, epoch: int) -> str:
        """See `Channels.state`."""
        return self._tink().channels.state(epoch)

    @_answers
    def tink_attach(self, segment: bytes) -> None:
        """Show that this worker can map the trainer's shared memory.

        Raises:
            SegmentUnreachable: it cannot.
        """
        Segment.attach(SegmentSpec.from_json(segment))

    @_answers
    def tink_close(self, epoch: int) -> None:
        """See `Channels.close`."""
        self._tink().channels.close(epoch)

    # -- stage ------------------------------------------------------------------------------------

    @_answers
    def tink_stage(self, stage_id: str, header_json: bytes, options: dict[str, Any]) -> None:
        """Check the header against the model, then receive and check the bytes in a thread.

        Raises:
            RankExceeded, UnknownModules, ShapeMismatch: before a byte was sent.
        """
        state = self._tink()
        header = packet.PacketHeader.from_json(header_json)
        if header.mode is SyncMode.FULL:
            self._tink_update(options["update_id"])
            self._tink_writer().layout.check(header.tensors)
        else:
            headers.check_header(
                header,
                state.names,
                max_lora_rank=state.max_lora_rank,
                refused=state.refused.get(header.mode),
            )
            _check_dtypes(header, state.adapter_dtype)
        state.inbox.open(stage_id, header, options)

    @_answers
    def tink_chunk(self, stage_id: str, offset: int, data: bytes) -> int:
        """See `Inbox.chunk`."""
        return self._tink().inbox.chunk(stage_id, offset, data)

    @_answers
    def tink_sent(self, stage_id: str, digest: str, patience_s: float) -> str:
        """The sender is done and says the digest; answers, and raises, as `tink_stage_state`.

        With `patience_s` it waits that long for the end, so that nobody needs to ask again: for an
        engine that has nothing else to do.
        """
        inbox = self._tink().inbox
        inbox.seal(stage_id, digest)
        return inbox.state(stage_id, patience_s)

    @_answers
    def tink_stage_state(self, stage_id: str) -> str:
        """ "running" or "done"; raises why the packet was refused, and forgets it then."""
        return self._tink().inbox.state(stage_id)

    @_answers
    def tink_discard(self, stage_id: str) -> None:
        """Forget a stage; unknown ones are fine."""
        self._tink().inbox.discard(stage_id)

    # -- commit -----------------------------------------------------------------------------------

    @_answers
    def tink_serve(
        self, stage_id: str, digest: str, patience_s: float, name: str, path: str, lora_id: int
    ) -> str | None:
        """Adapter mode: `tink_sent`, then put the tensors into a slot; the digest (None: they still come).

        vLLM's LoRA manager finds them again under `path` whenever it evicted them.

        Raises:
            TinkError: the packet is not right, or vLLM refuses it.
        """
        from tink_rl.server.vllm_names import LoRARequest

        worker: Any = self
        state = self._tink()
        state.inbox.seal(stage_id, digest)
        if state.inbox.state(stage_id, patience_s) != "done":
            return None
        stage = state.inbox.get(stage_id)
        staged_adapters.put(
            path,
            staged_adapters.StagedAdapter(
                header=stage.header,
                tensors=state.names.cut(stage.tensors, for_slots=True),
                buffer=stage.buffer,
            ),
        )
        state.inbox.discard(stage_id)
        request = LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=path)
        try:
            worker.add_lora(request)
        except Exception as error:  # vLLM's own refusals have many types
            raise TinkError(f"vLLM refused {name}: {type(error).__name__}: {error}") from error
        return stage.header.digest

    @_answers
    def tink_fold(self, stage_id: str | None) -> str | None:
        """Merged mode: serve golden + B·A of the stage (None: the base again); the digest.

        What a full version changed goes back to the checkpoint first. No request may be running.
        After an exception the weights are undefined.
        """
        state = self._tink()
        if state.folder is None and stage_id is not None:
            raise ConfigError(
                "the server was not started for merged mode; use --mode merged or both"
            )
        stage = state.inbox.get(stage_id) if stage_id is not None else None
        if state.writer is not None and state.writer.touched:
            state.writer.restore()
            self._tink_reset_lora()
        if state.folder is not None:
            tensors = {} if stage is None else self._tink_on_device(stage)
            state.folder.fold(state.names.cut(tensors))
        if stage is not None:
            state.inbox.discard(str(stage_id))
            state.inbox.give_back(stage.buffer)
        return stage.header.digest if stage is not None else None

    def _tink_on_device(self, stage: Stage) -> dict[str, torch.Tensor]:
        """The tensors of a packet where the weights are; a GPU gets them in one copy."""
        worker: Any = self
        if worker.device.type == "cpu":
            return stage.tensors
        return packet.unpack(stage.header, stage.buffer.to(worker.device, non_blocking=True))

    # -- full -------------------------------------------------------------------------------------

    def _tink_writer(self) -> FullWriter:
        writer = self._tink().writer
        if writer is None:
            raise ModeUnavailable("this server does not offer full mode; its log says why")
        return writer

    def _tink_update(self, update_id: str) -> _Update:
        update = self._tink().update
        if update is None or update.update_id != update_id:
            raise UnknownVersion(f"no full update {update_id!r} is under way; begin again")
        return update

    @_answers
    def tink_layout(self) -> list[list[str]]:
        """Names of the checkpoint's tensors, by group that must be sent whole."""
        return self._tink_writer().layout.describe()

    @_answers
    def tink_check_plan(self, plan: list[dict[str, Any]]) -> None:
        """Check names, shapes and groups of everything that is going to be sent.

        Raises:
            UnknownModules, ShapeMismatch, IncompleteGroup.
        """
        layout = self._tink_writer().layout
        layout.check(packet.specs_from_plan(plan))
        layout.check_whole(item["name"] for item in plan)

    @_answers
    def tink_begin(self, update_id: str, names: list[str], epoch: int) -> None:
        """Start a full version; `names` is what was announced, empty if nothing was."""
        self._tink_writer().begin()
        self._tink().update = _Update(update_id, frozenset(names), epoch)

    @_answers
    def tink_write(self, stage_id: str) -> int:
        """Write the groups that a checked bucket completes; how many.

        After an exception the weights are undefined.
        """
        state = self._tink()
        stage = state.inbox.get(stage_id)
        if state.update is None:
            raise UnknownVersion("no full update is under way; begin again")
        names = {spec.name for spec in stage.header.tensors}
        if state.update.announced and not names <= state.update.missing:
            raise IncompleteGroup(
                f"{min(names - state.update.missing)!r} was not announced, or came twice"
            )
        num_groups = self._tink_writer().write(stage.tensors)
        state.update.missing -= names
        state.update.chain.add(stage.header.digest)
        state.inbox.discard(stage_id)
        state.inbox.give_back(stage.buffer)
        return num_groups

    @_answers
    def tink_finish(self, update_id: str, digest: str) -> str:
        """End a full version: the rest is the checkpoint's, slots are loaded again; the digest.

        Raises:
            IncompleteGroup: something is missing. DigestMismatch: another whole was sent.
        """
        state, update = self._tink(), self._tink_update(update_id)
        if update.missing:
            raise IncompleteGroup(
                f"{len(update.missing)} announced tensors did not come, first {min(update.missing)!r}"
            )
        found = update.chain.digest()
        if found != digest:
            raise DigestMismatch(
                f"the buckets hash to {found[:12]}, the sender says {digest[:12]}; publish again"
            )
        writer = self._tink_writer()
        writer.finish(also=state.folder.touched if state.folder is not None else ())
        if state.folder is not None:
            state.folder.forget()
        self._tink_reset_lora()
        self._tink_end_update()
        return digest

    @_answers
    def tink_abort(self) -> None:
        """Forget a full version that is not finished; what was written stays written."""
        self._tink_end_update()
        writer = self._tink().writer
        if writer is not None:
            writer.begin()

    def _tink_end_update(self) -> None:
        state, update = self._tink(), self._tink().update
        if update is not None:  # its segment has the size of a bucket; the sender lets go of it too
            state.channels.forget_segments(update.epoch)
        state.update = None

    def _tink_reset_lora(self) -> None:
        """Forget what the LoRA layers took from the old base; vLLM loads adapters again when asked."""
        worker: Any = self
        worker.model_runner.reset_lora_state()

    @_answers
    def tink_release(self, path: str, lora_id: int) -> None:
        """Forget an adapter that no request can name any more, in vLLM's cache and in ours."""
        worker: Any = self
        released = staged_adapters.pop(path)
        worker.remove_lora(lora_id)
        if released is not None:  # and nobody reads its bytes any more
            self._tink().inbox.give_back(released.buffer)


def _left(device: torch.device) -> dict[str, int]:
    """What nobody has taken of a GPU."""
    return (
        {"device_left_bytes": torch.cuda.mem_get_info(device)[0]} if device.type == "cuda" else {}
    )


def _check_dtypes(header: packet.PacketHeader, adapter_dtype: str) -> None:
    allowed = (
        {adapter_dtype} if header.mode is SyncMode.ADAPTER else {"float32", "bfloat16", "float16"}
    )
    for spec in header.tensors:
        if spec.dtype not in allowed:
            raise ShapeMismatch(
                f"tensor {spec.name!r} is {spec.dtype}, the server's slots take {adapter_dtype}; "
                "publish with the dtype that the server's status names",
                given=spec.dtype,
                expected=adapter_dtype,
                code="dtype_mismatch",
            )
