"""The served policies of one API server: status, commit, drop.

Who may publish is in `writers.py`, packets before their commit in `stages.py`, full versions in
`updates.py`. All methods run in the API server's event loop. A commit that fails midway in the weights
leaves the server NOT READY until a later one writes them whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tink_rl import errors
from tink_rl.errors import TinkError
from tink_rl.server.caches import forget_caches
from tink_rl.server.content import ServedContent
from tink_rl.server.gate import Gate
from tink_rl.server.host_store import SCHEME
from tink_rl.server.leases import Leases
from tink_rl.server.numbers import Numbers
from tink_rl.server.stages import Staged, Stages
from tink_rl.server.updates import FullUpdates
from tink_rl.server.workers import Workers, check_alike
from tink_rl.server.writers import Writers
from tink_rl.types import PROTOCOL_VERSION, PolicyVersion, ServerState, SyncMode

logger = logging.getLogger("tink_rl.server")
_STILL_RUNNING_S = 60.0
"""After so long a replaced version says that it waits for its requests."""
_ABORT_AGAIN_S = 0.1
"""How long what was aborted may take to end before what came after it is aborted too."""


@dataclass(kw_only=True)
class Served:
    """A version that can be sampled."""

    name: str
    digest: str
    mode: SyncMode
    path: str = ""
    lora_id: int = 0


class Policies:
    """What this server serves, and the control requests that change it."""

    def __init__(
        self,
        *,
        engine: Any,
        models: Any,
        gate: Gate,
        modes: tuple[SyncMode, ...],
        facts: dict[str, Any],
        channel_host: str,
        channel_port: int,
        make_lora_request: Callable[..., Any],
        content: ServedContent | None = None,
    ) -> None:
        """Store; `prepare` does the work.

        Args:
            engine: vLLM's engine client.
            models: `app.state.openai_serving_models`.
            gate: The gate that the middleware asks.
            modes: Sync modes that this server was started for.
            facts: Fields of `ServerStatus` that do not change.
            channel_host: Interface that channels bind.
            channel_port: Port that channels bind, 0 for any.
            make_lora_request: vLLM's `LoRARequest`.
            content: Of the served checkpoint.
        """
        self.engine, self._models, self.gate = engine, models, gate
        self.modes, self._facts = modes, facts
        self._make_lora_request = make_lora_request
        self._content = content
        self.workers, self.leases = Workers(engine), Leases()
        self.writers = Writers(self, host=channel_host, port=channel_port)
        self.stages = Stages(self)
        self.updates = FullUpdates(self)
        self._served: dict[str, Served] = {}
        self._draining: dict[str, Served] = {}
        self.numbers = Numbers()
        self.lock = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._broken: str | None = None
        """The version whose commit failed midway; its weights must not be sampled."""
        self.incarnation = uuid.uuid4().hex
        self.state = ServerState.READY
        self.reason: str | None = None
        self.base_name: str = models.base_model_paths[0].name
        self._base_paths = list(models.base_model_paths)

    async def prepare(self, options: dict[str, Any]) -> None:
        """Let every worker learn its model and load golden weights; called once, at start."""
        answers = await self.workers.ask("tink_prepare", options)
        self._facts["adapter_dtype"] = answers[0]["adapter_dtype"]
        self._facts["golden"] = answers[0]["golden"]
        self._facts["amx"] = answers[0]["amx"]
        reasons = [answer["no_full_logprobs"] for answer in answers]
        self._facts["no_full_logprobs"] = next(filter(None, reasons), None)
        reasons = [answer["no_full"] for answer in answers if answer["no_full"]]
        if reasons:
            self.modes = tuple(mode for mode in self.modes if mode is not SyncMode.FULL)
            if not self.modes:
                raise errors.ConfigError(
                    f"--mode full: this model cannot be reloaded: {reasons[0]}"
                )

    # -- status -----------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """The fields of `ServerStatus`; cheap, asks no worker."""
        update = self.updates.current
        held = {v.mode: v.name for v in self._served.values()}
        return {
            **self._facts,
            "protocol": PROTOCOL_VERSION,
            "incarnation": self.incarnation,
            "state": self.state if update is None else ServerState.NOT_READY,
            "reason": self.reason if update is None else f"{update.name} is being written",
            "modes": list(self.modes),
            "base_model": self.base_name,
            "served": {v.name: v.digest for v in self._served.values()},
            "merged": held.get(SyncMode.MERGED),
            "full": held.get(SyncMode.FULL),
            "draining": dict.fromkeys(self._draining, 1),
            "running": self.gate.num_running,
            "holding": self.gate.is_holding,
        }

    async def describe_base(self, body: dict[str, Any]) -> dict[str, Any]:
        """See `ServedContent.ask`.

        Raises:
            BaseMismatch, ConfigError: it cannot be told.
        """
        assert self._content is not None
        return await self._content.ask(body)

    def check_base(self, fingerprint: str) -> None:
        """Raise unless `fingerprint` is that of the served checkpoint.

        Raises:
            BaseMismatch: the sender loads another one.
        """
        expected = self._facts["base_fingerprint"]
        if fingerprint != expected:
            raise errors.BaseMismatch(
                f"the sender's base is {fingerprint[:12]}, this server serves {expected[:12]} "
                f"({self.base_name}); serve the base that the trainer loads, or load the one that is "
                "served",
                given=fingerprint,
                expected=expected,
            )

    def check_mode(self, mode: SyncMode, policy: str) -> None:
        """Raise unless a version of `policy` may be served in `mode` beside what is served now.

        Raises:
            ModeUnavailable: not started for it, or taken. NotReady: slots on broken weights.
        """
        if mode not in self.modes:
            raise errors.ModeUnavailable(
                f"mode {mode.value!r}: this server was started for "
                f"{', '.join(self.modes)}; restart it with --mode {mode.value} or both"
            )
        if mode is SyncMode.ADAPTER and self._broken is not None:
            raise errors.NotReady(
                f"this server is NOT READY: {self.reason}; a slot does not heal the weights under it: "
                "publish in full or merged mode, or restart the server"
            )
        for served in self._served.values():
            other = PolicyVersion.parse(served.name).policy
            if {mode, served.mode} == {SyncMode.ADAPTER, SyncMode.MERGED}:
                raise errors.ModeUnavailable(
                    f"mode {mode.value!r}: this server serves {served.name} in "
                    f"{served.mode.value} mode, and a slot adapter would add to merged weights; "
                    "drop that policy first, or use a second server"
                )
            if mode is SyncMode.ADAPTER and served.mode is SyncMode.FULL and other == policy:
                raise errors.ModeUnavailable(
                    f"mode 'adapter': policy {policy!r} is served in full mode as {served.name}, and a "
                    "policy has one kind at a time; drop that version first, or choose another name "
                    "with SyncConfig(policy=...)"
                )
            if SyncMode.ADAPTER not in (mode, served.mode) and other != policy:
                raise errors.ModeUnavailable(
                    f"{mode.value} mode holds one policy and {served.name} is served; use "
                    "SyncConfig(mode='adapter') for several policies, or a second server"
                )

    # -- commit -----------------------------------------------------------------------------------

    async def commit(self, body: dict[str, Any]) -> dict[str, Any]:
        """Serve a staged version and stop serving those of `retire`; answers what every worker then holds.

        With a `digest` the packet is checked first, or as it is served: a publisher with one replica asks
        for both at once.

        Raises:
            TinkError: what is wrong with the packet; nothing has changed.
            VersionTaken: this number was given to other weights.
            DrainTimeout: running requests did not end; nothing was written.
            CommitFailed: the server is NOT READY.
        """
        staged = self.stages.find(body["stage_id"])
        self.leases.check(staged.header.policy, staged.header.epoch)
        if not staged.checked:
            if not body.get("digest"):
                raise errors.BadRequest(f"{staged.name} was not received whole; call staged first")
            if not self.stages.is_checked_as_served(staged):
                await self.stages.check(staged, body)
        if staged.update is not None:
            raise errors.BadRequest("a bucket of a full update is not committed; call finish")
        retire = [str(name) for name in body.get("retire", ())]
        for name in retire:
            if PolicyVersion.parse(name).policy != staged.header.policy:
                raise errors.BadRequest(
                    f"{name} is no version of {staged.header.policy!r}, whose lease this is"
                )
        async with self.lock:
            self.leases.check(staged.header.policy, staged.header.epoch)
            self.check_mode(staged.header.mode, staged.header.policy)
            # From here on, whatever becomes of it: who joins meanwhile counts on from this number.
            digest = staged.header.digest if staged.checked else str(body["digest"])
            self.numbers.take(staged.name, digest)
            if staged.header.mode is SyncMode.ADAPTER:
                work = self._commit_adapter(staged, digest, float(body["timeout_s"]))
            else:
                work = self._commit_merged(
                    staged, float(body["drain_timeout_s"]), body["on_running"]
                )
            held_s: float = await self.stages.all_or_none(staged, work)
            for name in retire:
                self._retire_slot(name)
        self.stages.took(staged)
        full = next((v.name for v in self._served.values() if v.mode is SyncMode.FULL), None)
        return {"held_seconds": held_s, "digest": self._served[staged.name].digest, "full": full}

    @property
    def world_size(self) -> int:
        """Number of vLLM workers."""
        return int(self._facts["world_size"])

    async def _commit_adapter(self, staged: Staged, digest: str, timeout_s: float) -> float:
        name = staged.name
        path = f"{SCHEME}{name}/{digest[:16]}/{staged.stage_id.rpartition('~')[2]}"
        lora_id = self._models.lora_id_counter.inc(1)
        request = self._make_lora_request(lora_name=name, lora_int_id=lora_id, lora_path=path)
        try:
            held = await self.stages.serve(staged, digest, timeout_s, (name, path, lora_id))
            check_alike(name, digest, held)
        except TinkError:  # some workers may have it; what is served stays
            await self.workers.tell("tink_release", path, lora_id)
            raise
        replaced = self._served.get(name)
        self._served[name] = Served(
            name=name, digest=digest, mode=SyncMode.ADAPTER, path=path, lora_id=lora_id
        )
        self._models.lora_requests[name] = request  # visible last
        if replaced is not None:
            self._release_when_idle(replaced)
        return 0.0

    async def _commit_merged(
        self, staged: Staged | None, drain_timeout_s: float, on_running: str
    ) -> float:
        start = time.monotonic()
        try:
            await self.hold(drain_timeout_s, on_running)
            if staged is not None:  # nobody joined meanwhile, which forgets the packet
                self.leases.check(staged.header.policy, staged.header.epoch)
            await self._fold(staged)
        finally:
            self.gate.open()
        return time.monotonic() - start

    async def hold(self, drain_timeout_s: float, on_running: str) -> None:
        """Hold new requests and let running ones end; the caller opens the gate again.

        Raises:
            DrainTimeout: they did not end.
        """
        self.gate.close()
        ended = self._aborted if on_running == "abort" else self.gate.drained
        if not await ended(drain_timeout_s):
            raise errors.DrainTimeout(
                f"{self.gate.num_running} requests still run after {drain_timeout_s:g} s; "
                "nothing was written. Raise SyncConfig(drain_timeout_s=...) or set "
                "on_running='abort'"
            )

    async def _aborted(self, timeout_s: float) -> bool:
        """Abort what runs until nothing does; whether that was so within `timeout_s`.

        vLLM aborts what is in the engine, and a paused one keeps what comes after: a request that had
        passed the gate and was not there yet is let in, and aborted the next time.
        """
        deadline = time.monotonic() + timeout_s
        while self.gate.num_running:
            try:
                await self.engine.pause_generation(mode="abort", clear_cache=False)
            finally:
                await self.engine.resume_generation()
            left = deadline - time.monotonic()
            if await self.gate.drained(max(0.0, min(_ABORT_AGAIN_S, left))):
                return True
            if left <= 0:
                return False
        return True

    async def _fold(self, staged: Staged | None) -> None:
        """Write, forget the old weights' cache, change the name. Nothing runs meanwhile."""
        name = self.base_name if staged is None else staged.name
        self.state = ServerState.COMMITTING
        try:
            stage_id, digest = (
                (None, None) if staged is None else (staged.stage_id, staged.header.digest)
            )
            check_alike(name, digest, await self.workers.ask("tink_fold", stage_id))
            await forget_caches(self.engine)
        except Exception as error:  # whatever it was, half a policy may lie in the weights
            self.not_ready(f"the commit of {name} failed midway: {error}", name)
            raise errors.CommitFailed(
                f"the commit of {name} failed midway ({error}); the server is NOT READY until the "
                "next publish writes the weights whole, or it is restarted"
            ) from error
        self.became(name, digest or "", None if staged is None else SyncMode.MERGED)

    async def forget_prefixes(self, body: dict[str, Any]) -> dict[str, Any]:
        """Drop every cached prefix; new requests are held until the running ones have ended.

        Raises:
            DrainTimeout: they did not end; the cache is as it was.
        """
        async with self.lock:
            try:
                await self.hold(float(body["timeout_s"]), "drain")
                await forget_caches(self.engine)
            finally:
                self.gate.open()
        return {}

    def became(self, name: str, digest: str, mode: SyncMode | None) -> None:
        """The weights are `name` now, whole: serve them under that name only. None: the base.

        Slots of other policies stay; those of the same policy end with it, because a policy has one
        kind at a time.
        """
        kept = {}
        for served in self._served.values():
            same = mode is not None and _policy(served.name) == _policy(name)
            if served.mode is SyncMode.ADAPTER and not same:
                kept[served.name] = served
            elif served.mode is SyncMode.ADAPTER:
                self._models.lora_requests.pop(served.name, None)
                self._release_when_idle(served)
        self._served = kept
        if mode is not None:
            self._served[name] = Served(name=name, digest=digest, mode=mode)
        self._rename(name)
        self._broken = None
        self.state, self.reason, self.gate.refusal = ServerState.READY, None, None

    def not_ready(self, reason: str, name: str) -> None:
        """Refuse sampling: half of `name` may lie in the weights."""
        self._broken = name
        self.state, self.reason = ServerState.NOT_READY, reason
        self.gate.refusal = errors.NotReady(
            f"this server is NOT READY: {reason}; publish again or restart it"
        )
        logger.error("tink_rl: NOT READY: %s", reason)

    def _rename(self, name: str) -> None:
        """Answer under `name` only. vLLM keeps this list in two places that share one object."""
        path = self._base_paths[0]
        if name == self.base_name:
            self._models.base_model_paths[:] = self._base_paths
        else:
            self._models.base_model_paths[:] = [type(path)(name=name, model_path=path.model_path)]

    # -- drop -------------------------------------------------------------------------------------

    async def drop(self, body: dict[str, Any]) -> dict[str, Any]:
        """Stop serving a version; requests that run on it end on it. Merged, full: the base comes back.

        Raises:
            UnknownVersion: it is not served.
        """
        name = str(body["name"])
        version = PolicyVersion.parse(name)
        self.leases.check(version.policy, body["epoch"])
        async with self.lock:
            served = self._served.get(name)
            if name == self._broken:
                served = Served(name=name, digest="", mode=SyncMode.FULL)
            if served is None:
                raise errors.UnknownVersion(
                    f"{name} is not served; served are {sorted(self._served) or 'none'}"
                )
            if served.mode is not SyncMode.ADAPTER:
                await self._commit_merged(None, float(body["drain_timeout_s"]), body["on_running"])
            else:
                self._retire_slot(name)
        return {}

    def _retire_slot(self, name: str) -> None:
        """Stop serving a slot version, if it is served; requests that run on it end on it."""
        served = self._served.get(name)
        if served is None or served.mode is not SyncMode.ADAPTER:
            return
        del self._served[name]
        self._models.lora_requests.pop(name, None)
        self._release_when_idle(served)

    def _release_when_idle(self, served: Served) -> None:
        task = asyncio.create_task(self._release(served))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _release(self, served: Served) -> None:
        """Free an adapter once every request that was admitted while it had its name has ended."""
        self._draining[served.path] = served
        last = self.gate.last_ticket  # later ones found it under its name no more
        try:
            while not await self.gate.drained(_STILL_RUNNING_S, last):
                logger.info("tink_rl: %s waits for running requests", served.name)
            await self.workers.ask("tink_release", served.path, served.lora_id)
        finally:
            self._draining.pop(served.path, None)


def _policy(name: str) -> str:
    return PolicyVersion.parse(name).policy
