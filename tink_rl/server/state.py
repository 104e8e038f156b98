"""What one API server serves and may be asked for; everything that changes it reaches it here.

Runs in the API server's event loop. Commits of slots and merged weights are in `commits.py`, full versions
in `updates.py`, packets before their commit in `stages.py`, leases' routes in `writers.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine
from typing import Any

from tink_rl import errors
from tink_rl.protocol import Empty, ForgetPrefixesRequest
from tink_rl.server.caches import forget_caches
from tink_rl.server.gate import Gate
from tink_rl.server.leases import Leases
from tink_rl.server.numbers import Numbers
from tink_rl.server.rpc import Workers
from tink_rl.server.served import Served, Slots, owner_of, served_policies
from tink_rl.types import (
    PROTOCOL_VERSION,
    OnRunning,
    PolicyVersion,
    ServedPolicy,
    ServerState,
    ServerStatus,
    SyncMode,
)

logger = logging.getLogger("tink_rl.server")
_STILL_RUNNING_S = 60.0
"""After so long a replaced version says that it waits for its requests."""
_ABORT_AGAIN_S = 0.1
"""How long what was aborted may take to end before what came after it is aborted too."""
_CUT_AFTER_S = 5.0
"""How long a request may outlive its end in the engine before its handler is ended too."""


class ServedState:
    """The served versions of one server, its workers, its gate, and who may change them."""

    def __init__(
        self,
        *,
        engine: Any,
        models: Any,
        gate: Gate,
        modes: tuple[SyncMode, ...],
        facts: dict[str, Any],
    ) -> None:
        """Store; `prepare` does the work.

        Args:
            engine: vLLM's engine client.
            models: `app.state.openai_serving_models`.
            gate: The gate that the middleware asks.
            modes: Sync modes that this server was started for.
            facts: Fields of `ServerStatus` that do not change.
        """
        self.engine, self.gate, self.modes = engine, gate, modes
        self._models, self._facts = models, facts
        self._models.lora_requests = Slots(models.lora_requests, self._was_asked_for)
        self.workers, self.leases, self.numbers = Workers(engine), Leases(), Numbers()
        self.lock = asyncio.Lock()
        """Held by whoever changes what is served."""
        self.served: dict[str, Served] = {}
        self.writing: str | None = None
        """The full version that is on its way into the weights."""
        self.broken: str | None = None
        """The version whose commit failed midway; its weights must not be sampled."""
        self.server_state = ServerState.READY
        self.reason: str | None = None
        self.incarnation = uuid.uuid4().hex
        self.base_name: str = models.base_model_paths[0].name
        self._base_paths = list(models.base_model_paths)
        self._draining: dict[str, frozenset[int]] = {}
        """Paths of replaced versions, and the tickets of the requests that may run on each."""
        self._background: set[asyncio.Task[None]] = set()

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

    @property
    def world_size(self) -> int:
        """Number of vLLM workers."""
        return int(self._facts["world_size"])

    def status(self) -> ServerStatus:
        """Cheap; asks no worker."""
        held = {v.mode: v.name for v in self.served.values()}
        writing = self.writing is not None
        return ServerStatus(
            **self._facts,
            protocol=PROTOCOL_VERSION,
            incarnation=self.incarnation,
            state=ServerState.NOT_READY if writing else self.server_state,
            reason=f"{self.writing} is being written" if writing else self.reason,
            modes=self.modes,
            base_model=self.base_name,
            served={v.name: v.digest for v in self.served.values()},
            merged=held.get(SyncMode.MERGED),
            full=held.get(SyncMode.FULL),
            draining={
                path: len(tickets & self.gate.running()) for path, tickets in self._draining.items()
            },
            running=self.gate.num_running,
            holding=self.gate.is_holding,
            policies=self.policies(),
            pending=self.gate.pending(),
        )

    def policies(self) -> tuple[ServedPolicy, ...]:
        """What is served of each policy, and whose it is."""
        return tuple(served_policies(self.served.values(), self.leases, self.gate))

    # -- what may be changed ------------------------------------------------------------------------

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
        if mode is SyncMode.ADAPTER and self.broken is not None:
            raise errors.NotReady(
                f"this server is NOT READY: {self.reason}; a slot does not heal the weights under it: "
                "publish in full or merged mode, or restart the server"
            )
        self.in_the_way(mode, policy)

    def in_the_way(self, mode: SyncMode, policy: str) -> list[Served]:
        """What must go before a version of `policy` is served in `mode`, and belongs to nobody else.

        Raises:
            ModeUnavailable: something must that is another writer's, or of another kind.
        """
        found = []
        for served in self.served.values():
            owner = None if served.policy == policy else owner_of(served, self.leases)
            if {mode, served.mode} == {SyncMode.ADAPTER, SyncMode.MERGED}:
                if owner is not None:
                    raise errors.ModeUnavailable(
                        f"mode {mode.value!r}: this server serves {served.name} of {owner} in "
                        f"{served.mode.value} mode, and a slot adapter would add to merged weights; "
                        "wait until that ends (`tink-rl status URL`), or use a second server"
                    )
                found.append(served)
            if (
                mode is SyncMode.ADAPTER
                and served.mode is SyncMode.FULL
                and served.policy == policy
            ):
                raise errors.ModeUnavailable(
                    f"mode 'adapter': policy {policy!r} is served in full mode as {served.name}, and a "
                    f"policy has one kind at a time; `tink-rl drop URL {policy}` first, or choose another "
                    "name with SyncConfig(policy=...)"
                )
            if SyncMode.ADAPTER not in (mode, served.mode) and owner is not None:
                raise errors.ModeUnavailable(
                    f"{mode.value} mode holds one policy and {served.name} of {owner} is served; use "
                    "SyncConfig(mode='adapter') for several policies, or a second server"
                )
        return found

    # -- requests ---------------------------------------------------------------------------------

    async def hold(self, drain_timeout_s: float, on_running: OnRunning) -> None:
        """Hold new requests and let running ones end; the caller opens the gate again.

        Raises:
            DrainTimeout: they did not end.
        """
        self.gate.close()
        ended = self._aborted if on_running == "abort" else self.gate.drained
        if not await ended(drain_timeout_s):
            oldest = self.gate.pending("running")[0]
            raise errors.DrainTimeout(
                f"{self.gate.num_running} requests still run after {drain_timeout_s:g} s, the oldest "
                f"for {oldest.age_s:.0f} s ({oldest.what} from {oldest.address}); nothing was written. "
                "Raise SyncConfig(drain_timeout_s=...) or set on_running='abort'"
            )

    async def _aborted(self, timeout_s: float) -> bool:
        """Abort what runs until nothing does; whether that was so within `timeout_s`.

        vLLM aborts what is in the engine, and a paused one keeps what comes after: a request that had
        passed the gate and was not there yet is let in, and aborted the next time. One that does not end
        with it is cut.
        """
        start = time.monotonic()
        while self.gate.num_running:
            try:
                await self.engine.pause_generation(mode="abort", clear_cache=False)
            finally:
                await self.engine.resume_generation()
            left = start + timeout_s - time.monotonic()
            if await self.gate.drained(max(0.0, min(_ABORT_AGAIN_S, left))):
                return True
            if left <= 0:
                return False
            if timeout_s - left > min(_CUT_AFTER_S, timeout_s / 2):
                self.gate.cut()
        return True

    async def forget_prefixes(self, request: ForgetPrefixesRequest) -> Empty:
        """Drop every cached prefix; new requests are held until the running ones have ended.

        Raises:
            DrainTimeout: they did not end; the cache is as it was.
        """
        async with self.lock:
            try:
                await self.hold(request.timeout_s, "drain")
                await forget_caches(self.engine)
            finally:
                self.gate.open()
        return Empty()

    # -- what is served now -----------------------------------------------------------------------

    def _was_asked_for(self, name: str) -> None:
        if name in self.served:
            self.served[name].was_used()

    def fill_slot(self, served: Served, request: Any) -> None:
        """Serve a version that every worker holds in a slot; `request` is vLLM's record of it."""
        replaced = self.served.get(served.name)
        self.served[served.name] = served
        self._models.lora_requests[served.name] = request  # visible last
        if replaced is not None:
            self._release_when_idle(replaced)

    def next_slot_id(self) -> int:
        """A number that vLLM gave to no adapter yet."""
        return int(self._models.lora_id_counter.inc(1))

    def mark_served(self, name: str, digest: str, mode: SyncMode | None) -> None:
        """The weights are `name` now, whole: serve them under that name only. None: the base.

        Slots of other policies stay; those of the same policy end with it, because a policy has one
        kind at a time.
        """
        kept = {}
        for served in self.served.values():
            same = mode is not None and served.policy == PolicyVersion.parse(name).policy
            if served.mode is SyncMode.ADAPTER and not same:
                kept[served.name] = served
            elif served.mode is SyncMode.ADAPTER:
                self._models.lora_requests.pop(served.name, None)
                self._release_when_idle(served)
        self.served = kept
        if mode is not None:
            self.served[name] = Served(name=name, digest=digest, mode=mode)
        self._rename(name)
        self.broken = None
        self.server_state, self.reason, self.gate.refusal = ServerState.READY, None, None

    def not_ready(self, reason: str, name: str) -> None:
        """Refuse sampling: half of `name` may lie in the weights."""
        self.broken = name
        self.server_state, self.reason = ServerState.NOT_READY, reason
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

    def retire_slot(self, name: str) -> None:
        """Stop serving a slot version, if it is served; requests that run on it end on it."""
        served = self.served.get(name)
        if served is None or served.mode is not SyncMode.ADAPTER:
            return
        del self.served[name]
        self._models.lora_requests.pop(name, None)
        self._release_when_idle(served)

    def _release_when_idle(self, served: Served) -> None:
        self.in_background(self._release(served))

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` for as long as it takes, in this server's life."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _release(self, served: Served) -> None:
        """Free an adapter once every request that was admitted for it while it had its name has ended."""
        tickets = self.gate.running(served.name)  # later ones found it under its name no more
        self._draining[served.path] = tickets
        try:
            while not await self.gate.drained(_STILL_RUNNING_S, tickets):
                logger.info("tink_rl: %s waits for running requests", served.name)
            await self.workers.ask("tink_release", served.path, served.lora_id)
        finally:
            self._draining.pop(served.path, None)
