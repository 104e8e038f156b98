"""The served policies of one API server: join, stage, commit, drop. Speaks to the workers by RPC.

All methods run in the API server's event loop. A refused or failed stage changes nothing. A merged
commit that fails midway leaves the server NOT READY until a fold from golden succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tink_rl import errors
from tink_rl.errors import TinkError
from tink_rl.policy.packet import PacketHeader, check_protocol
from tink_rl.server.gate import Gate
from tink_rl.server.host_store import SCHEME
from tink_rl.server.leases import LEASE_S, Lease, Leases
from tink_rl.types import PROTOCOL_VERSION, PolicyVersion, ServerState, SyncMode, Transport

logger = logging.getLogger("tink_rl.server")
_POLL_S = (0.0005, 0.001, 0.001, 0.002, 0.005, 0.01)


@dataclass(kw_only=True)
class Staged:
    """A packet that the workers are receiving or have checked."""

    stage_id: str
    name: str
    header: PacketHeader
    checked: bool = False
    """Every worker holds the bytes and found nothing wrong with them."""


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
        """
        self._engine, self._models, self._gate = engine, models, gate
        self._modes, self._facts = modes, facts
        self._channel_host, self._channel_port = channel_host, channel_port
        self._make_lora_request = make_lora_request
        self._leases = Leases()
        self._stages: dict[str, Staged] = {}
        self._served: dict[str, Served] = {}
        self._draining: dict[str, Served] = {}
        self._last_version: dict[str, int] = {}
        self._lock = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self.incarnation = uuid.uuid4().hex
        self.state = ServerState.READY
        self.reason: str | None = None
        self.base_name: str = models.base_model_paths[0].name
        self._base_paths = list(models.base_model_paths)

    # -- workers ----------------------------------------------------------------------------------

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        """Every worker's value of `method(*args)`, in rank order.

        Raises:
            TinkError: what the first failing worker raised.
        """
        answers = await self._engine.collective_rpc(method, args=args)
        for answer in answers:
            if not answer["ok"]:
                raise errors.from_wire(answer, 500)
        return [answer["value"] for answer in answers]

    async def prepare(self, options: dict[str, Any]) -> None:
        """Let every worker learn its model and load golden weights; called once, at start."""
        answers = await self.rpc("tink_prepare", options)
        self._facts["adapter_dtype"] = answers[0]["adapter_dtype"]
        self._facts["golden"] = answers[0]["golden"]

    async def _rpc_until_done(self, method: str, key: Any, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        for attempt in range(10_000_000):
            if all(state == "done" for state in await self.rpc(method, key)):
                return
            if time.monotonic() > deadline:
                raise errors.ChannelLost(f"{what} did not end within {timeout_s:g} s")
            await asyncio.sleep(_POLL_S[min(attempt, len(_POLL_S) - 1)])

    # -- status -----------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """The fields of `ServerStatus`; cheap, asks no worker."""
        merged = [v.name for v in self._served.values() if v.mode is SyncMode.MERGED]
        return {
            **self._facts,
            "protocol": PROTOCOL_VERSION,
            "incarnation": self.incarnation,
            "state": self.state,
            "reason": self.reason,
            "modes": list(self._modes),
            "base_model": self.base_name,
            "served": {v.name: v.digest for v in self._served.values()},
            "merged": merged[0] if merged else None,
            "draining": dict.fromkeys(self._draining, 1),
            "running": self._gate.num_running,
        }

    # -- channel ----------------------------------------------------------------------------------

    async def join(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take the lease of a policy and open a channel; the trainer dials what this answers.

        Raises:
            ProtocolMismatch, LeaseHeld, ConfigError.
        """
        check_protocol(body.get("protocol"))
        policy = PolicyVersion(policy=body["policy"], version=0).policy
        transport, timeout_s = Transport(body["transport"]), float(body["timeout_s"])
        if transport is Transport.SHM:  # before anything changes: can every worker map it?
            await self.rpc("tink_attach", body["segment"])
        lease, old = self._leases.take(policy, str(body["writer"]))
        if old is not None:
            await self.rpc("tink_close", old.epoch)
        for staged in [s for s in self._stages.values() if s.header.policy == policy]:
            await self._forget(staged)  # of a writer that died between stage and commit
        answer = {
            "epoch": lease.epoch,
            "incarnation": self.incarnation,
            "lease_s": LEASE_S,
            "last_version": self._last_version.get(policy, 0),
            "transport": transport,
        }
        if transport not in (Transport.HTTP, Transport.SHM):
            answer |= await self._open_channel(lease, transport, timeout_s)
        return answer

    async def _open_channel(
        self, lease: Lease, transport: Transport, timeout_s: float
    ) -> dict[str, Any]:
        bound = await self.rpc(
            "tink_bind", lease.epoch, self._channel_host, self._channel_port, timeout_s
        )
        spec = {
            "transport": transport,
            "host": self._channel_host,
            "port": bound[0],
            "nonce": secrets.token_hex(16),
            "world_size": self._facts["world_size"] + 1,
            "timeout_s": timeout_s,
        }
        await self.rpc("tink_join", lease.epoch, spec)
        return {**spec, "rank": self._facts["world_size"]}

    async def joined(self, body: dict[str, Any]) -> dict[str, Any]:
        """Wait until every worker is in the channel."""
        lease = self._leases.check(body["policy"], body["epoch"])
        await self._rpc_until_done(
            "tink_join_state", lease.epoch, float(body["timeout_s"]), "joining the channel"
        )
        return {}

    async def heartbeat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Renew the lease."""
        self._leases.check(body["policy"], body["epoch"])
        return {"incarnation": self.incarnation}

    async def leave(self, body: dict[str, Any]) -> dict[str, Any]:
        """End lease and channel; what is served stays served."""
        lease = self._leases.check(body["policy"], body["epoch"])
        await self.rpc("tink_close", lease.epoch)
        self._leases.release(lease.policy, lease.epoch)
        return {}

    # -- stage ------------------------------------------------------------------------------------

    async def stage(self, body: dict[str, Any]) -> dict[str, Any]:
        """Check a header and start receiving; the bytes may be sent once this has answered.

        Raises:
            TinkError: whatever is wrong with the packet; nothing has changed then.
        """
        header = PacketHeader.from_json(body["header"])
        self._leases.check(header.policy, header.epoch)
        self._check_mode(header)
        if header.base_fingerprint != self._facts["base_fingerprint"]:
            raise errors.BaseMismatch(
                f"the adapter was trained on base {header.base_fingerprint[:12]}, this server "
                f"serves {self._facts['base_fingerprint'][:12]} ({self.base_name}); serve the base "
                "that the trainer loads, or load the one that is served",
                given=header.base_fingerprint,
                expected=self._facts["base_fingerprint"],
            )
        transport, timeout_s = Transport(body["transport"]), float(body["timeout_s"])
        name = f"{header.policy}@{header.version}"
        staged = Staged(stage_id=f"{name}~{uuid.uuid4().hex[:8]}", name=name, header=header)
        options = {
            "transport": transport,
            "src": self._facts["world_size"],
            "timeout_s": timeout_s,
            "segment": body.get("segment"),
        }
        await self._all_or_none(
            staged, self.rpc("tink_stage", staged.stage_id, body["header"], options)
        )
        self._stages[staged.stage_id] = staged
        return {"stage_id": staged.stage_id}

    async def _all_or_none(self, staged: Staged, work: Any) -> Any:
        """What `work` gives; if it fails, no worker keeps the stage."""
        try:
            return await work
        except Exception:
            await self._forget(staged)
            raise

    async def _forget(self, staged: Staged) -> None:
        self._stages.pop(staged.stage_id, None)
        await self._engine.collective_rpc("tink_discard", args=(staged.stage_id,))

    async def _received(self, staged: Staged, digest: str, timeout_s: float) -> None:
        staged.header = replace(staged.header, digest=digest)
        states = await self.rpc("tink_sent", staged.stage_id, digest)
        if any(state != "done" for state in states):
            await self._rpc_until_done(
                "tink_stage_state", staged.stage_id, timeout_s, f"receiving {staged.name}"
            )
        staged.checked = True

    def _check_mode(self, header: PacketHeader) -> None:
        if header.mode not in self._modes:
            raise errors.ModeUnavailable(
                f"mode {header.mode.value!r}: this server was started for "
                f"{', '.join(self._modes)}; restart it with --mode {header.mode.value} or both"
            )
        for served in self._served.values():
            if served.mode is not header.mode:
                raise errors.ModeUnavailable(
                    f"mode {header.mode.value!r}: this server serves {served.name} in "
                    f"{served.mode.value} mode, and a slot adapter would add to merged weights; "
                    "drop that policy first, or use a second server"
                )
            other = PolicyVersion.parse(served.name).policy
            if header.mode is SyncMode.MERGED and other != header.policy:
                raise errors.ModeUnavailable(
                    f"merged mode holds one policy and {served.name} is served; use "
                    "SyncConfig(mode='adapter') for several policies, or a second server"
                )

    async def chunk(self, stage_id: str, offset: int, data: bytes) -> dict[str, Any]:
        """One chunk of a packet that travels as HTTP body."""
        staged = self._find_stage(stage_id)
        work = self.rpc("tink_chunk", stage_id, offset, data)
        await self._all_or_none(staged, work)
        return {}

    async def staged(self, body: dict[str, Any]) -> dict[str, Any]:
        """All bytes were sent, and hash to `digest`: answer when every worker has checked them."""
        staged = self._find_stage(body["stage_id"])
        work = self._received(staged, str(body["digest"]), float(body["timeout_s"]))
        await self._all_or_none(staged, work)
        return {"stage_id": staged.stage_id}

    async def discard(self, body: dict[str, Any]) -> dict[str, Any]:
        """Forget a stage; unknown ones are fine."""
        self._stages.pop(body["stage_id"], None)
        await self.rpc("tink_discard", body["stage_id"])
        return {}

    def _find_stage(self, stage_id: str) -> Staged:
        staged = self._stages.get(stage_id)
        if staged is None:
            raise errors.UnknownVersion(f"nothing is staged as {stage_id!r}; stage it first")
        return staged

    # -- commit -----------------------------------------------------------------------------------

    async def commit(self, body: dict[str, Any]) -> dict[str, Any]:
        """Serve a staged version; answers what every worker then holds.

        Raises:
            DrainTimeout: running requests did not end; nothing was written.
            CommitFailed: the server is NOT READY.
        """
        staged = self._find_stage(body["stage_id"])
        self._leases.check(staged.header.policy, staged.header.epoch)
        if not staged.checked:
            raise errors.BadRequest(f"{staged.name} was not received whole; call staged first")
        async with self._lock:
            self._check_mode(staged.header)
            if staged.header.mode is SyncMode.ADAPTER:
                work = self._commit_adapter(staged)
            else:
                work = self._commit_merged(
                    staged, float(body["drain_timeout_s"]), body["on_running"]
                )
            held_s: float = await self._all_or_none(staged, work)
        self._stages.pop(staged.stage_id, None)
        policy, version = staged.header.policy, staged.header.version
        self._last_version[policy] = max(version, self._last_version.get(policy, 0))
        return {"held_seconds": held_s, "digest": await self._read_back(staged.name)}

    async def _read_back(self, name: str) -> str:
        """The digest that every worker holds for `name`.

        Raises:
            WorkersDiffer: they do not agree with what was staged.
        """
        served = self._served[name]
        for report in await self.rpc("tink_report"):
            held = (
                report["merged"]
                if served.mode is SyncMode.MERGED
                else report["adapters"].get(served.path)
            )
            if held != served.digest:
                raise errors.WorkersDiffer(
                    f"{name}: a worker holds digest {held!r}, expected {served.digest!r}; restart "
                    "the server"
                )
        return served.digest

    async def _commit_adapter(self, staged: Staged) -> float:
        name, digest = staged.name, staged.header.digest
        path = f"{SCHEME}{name}/{digest[:16]}/{staged.stage_id.rpartition('~')[2]}"
        lora_id = self._models.lora_id_counter.inc(1)
        request = self._make_lora_request(lora_name=name, lora_int_id=lora_id, lora_path=path)
        await self.rpc("tink_keep", staged.stage_id, path)
        try:
            await self._engine.add_lora(request)
        except Exception as error:  # vLLM's own refusals have many types; the served ones stay
            await self.rpc("tink_release", path, lora_id)
            raise TinkError(f"vLLM refused {name}: {type(error).__name__}: {error}") from error
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
        self._gate.close()
        start = time.monotonic()
        aborted = False
        try:
            if on_running == "abort" and self._gate.num_running:
                aborted = True
                await self._engine.pause_generation(mode="abort", clear_cache=False)
            if not await self._gate.drained(drain_timeout_s):
                raise errors.DrainTimeout(
                    f"{self._gate.num_running} requests still run after {drain_timeout_s:g} s; "
                    "nothing was written. Raise SyncConfig(drain_timeout_s=...) or set "
                    "on_running='abort'"
                )
            await self._fold(staged)
        finally:
            if aborted:
                await self._engine.resume_generation()
            self._gate.open()
        return time.monotonic() - start

    async def _fold(self, staged: Staged | None) -> None:
        """Write, forget the old weights' cache, change the name. Nothing runs meanwhile."""
        name = self.base_name if staged is None else staged.name
        self.state = ServerState.COMMITTING
        try:
            await self.rpc("tink_fold", None if staged is None else staged.stage_id)
            if await self._engine.reset_prefix_cache() is not True:
                raise TinkError("vLLM did not reset its prefix cache")
        except Exception as error:  # whatever it was, half a policy may lie in the weights
            self._not_ready(f"the commit of {name} failed midway: {error}")
            raise errors.CommitFailed(
                f"the commit of {name} failed midway ({error}); the server is NOT READY until the "
                "next publish folds from golden, or it is restarted"
            ) from error
        self._served = {}
        if staged is not None:
            self._served[name] = Served(
                name=name, digest=staged.header.digest, mode=SyncMode.MERGED
            )
        self._rename(name)
        self.state, self.reason, self._gate.refusal = ServerState.READY, None, None

    def _not_ready(self, reason: str) -> None:
        self.state, self.reason = ServerState.NOT_READY, reason
        self._gate.refusal = errors.NotReady(
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
        """Stop serving a version; requests that run on it end on it. Merged: the base is folded back.

        Raises:
            UnknownVersion: it is not served.
        """
        name = str(body["name"])
        version = PolicyVersion.parse(name)
        self._leases.check(version.policy, body["epoch"])
        async with self._lock:
            served = self._served.get(name)
            if served is None:
                raise errors.UnknownVersion(
                    f"{name} is not served; served are {sorted(self._served) or 'none'}"
                )
            if served.mode is SyncMode.MERGED:
                await self._commit_merged(None, float(body["drain_timeout_s"]), body["on_running"])
            else:
                del self._served[name]
                self._models.lora_requests.pop(name, None)
                self._release_when_idle(served)
        return {}

    def _release_when_idle(self, served: Served) -> None:
        task = asyncio.create_task(self._release(served))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _release(self, served: Served) -> None:
        """Free an adapter once every request that was admitted while it had its name has ended."""
        self._draining[served.path] = served
        try:
            while not await self._gate.drained(60.0):
                logger.info("tink_rl: %s waits for running requests", served.name)
            await self.rpc("tink_release", served.path, served.lora_id)
        finally:
            self._draining.pop(served.path, None)
