"""The client that stands where TRL's stands: sampling, and TRL's weight interface on full updates.

`VLLMClient` keeps the method names and return shapes of TRL 1.16's client.
"""

from __future__ import annotations

import uuid
from typing import Any

import httpx

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.publish.full_update import BUCKET_BYTES, FullUpdate
from tink_rl.transport.fleet import Fleet
from tink_rl.transport.replica import Replica
from tink_rl.transport.sampling_client import SamplingClient
from tink_rl.types import PolicyVersion, SyncMode


class VLLMClient(SamplingClient):
    """One vLLM server, seen from outside. Thread-safe; a context manager."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        api_key: str | None = None,
        request_timeout_s: float = 600.0,
        connect_timeout_s: float = 5.0,
        connection_timeout: float = 0.0,
        group_port: int | None = None,
        policy: str = "policy",
        ca_file: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Store; with `connection_timeout` > 0, wait that long for the server to answer.

        Args:
            base_url: `http://HOST:PORT` of the server, or https; `/v1` behind it is taken off.
            token: Bearer token of the control routes; sampling does not need it.
            api_key: vLLM's own `--api-key`, if it has one.
            request_timeout_s: Deadline of one sampling request.
            connect_timeout_s: Deadline of opening one connection.
            connection_timeout: Seconds to wait for the server (TRL's name).
            group_port: Accepted for TRL's sake and not needed: the server names the port at join.
            policy: Name under which whole tensors are served that TRL's weight interface sends.
            ca_file: Authorities to trust beside the system's (PEM); None: what TINK_CA_FILE names.
            transport: For tests.

        Raises:
            ConfigError: `base_url` is not the URL of a server, or the CA file cannot be read.
            ServerUnreachable: nobody answered within `connection_timeout`.
        """
        self.policy = policy
        self._fleet: Fleet | None = None
        self._update: FullUpdate | None = None
        super().__init__(
            base_url,
            token=token,
            api_key=api_key,
            request_timeout_s=request_timeout_s,
            connect_timeout_s=connect_timeout_s,
            connection_timeout=connection_timeout,
            ca_file=ca_file,
            transport=transport,
        )

    def close(self) -> None:
        """Close communicator and connections; using the client afterwards raises."""
        self.close_communicator()
        super().close()

    def init_communicator(self, device: Any = "cpu") -> None:
        """Check that whole tensors can be sent here; the channel itself opens with the first of them.

        Raises:
            PluginMissing, BadToken, ServerUnreachable.
            ModeUnavailable: the server does not offer full mode.
        """
        modes = self.status().modes
        if SyncMode.FULL not in modes:
            raise errors.ModeUnavailable(
                f"mode 'full': the server at {self.base_url} offers {', '.join(modes)}; restart it with "
                "`tink-rl serve` of this release (a quantised server does not offer it)",
                replica=self.base_url,
            )

    def close_communicator(self) -> None:
        """Give lease and channel back. An update that `reset_prefix_cache` did not end is aborted."""
        update, self._update = self._update, None
        fleet, self._fleet = self._fleet, None
        if update is not None:
            update.abort("close_communicator() came before reset_prefix_cache()")
        if fleet is not None:
            fleet.close()

    def update_named_param(self, name: str, weights: Any) -> None:
        """Send one whole tensor under its name in the checkpoint.

        The first one opens an update: the server holds requests and is NOT READY until
        `reset_prefix_cache()`, with which TRL ends a series of these calls, makes what was sent the
        served policy, `policy@N`. Tensors that were not sent are the checkpoint's then. Nothing half
        is ever served.

        Raises:
            UnknownModules, ShapeMismatch, NonFiniteWeights, ...: the update has ended; if something was
                written already, the server is NOT READY until the next whole one.
        """
        if self._update is None:
            self._update = self._begin_update(None)
        try:
            self._update.add(name, weights)
        except BaseException:
            self._update = None
            raise

    def update_model_params(self, model: Any) -> None:
        """Send all tensors of `model` (transformers, or PEFT: merged on the fly) and serve them.

        Names, shapes and groups are checked before the first byte.

        Raises:
            TinkError: what is wrong, or the update that `update_named_param` has under way.
        """
        from tink_rl.policy.full import full_source  # loads torch, which sampling does not need

        if self._update is not None:
            raise errors.ConfigError(
                "update_named_param() has an update under way; end it with reset_prefix_cache()"
            )
        replica = self._replica()
        source = full_source(model, replica.layout())
        update = self._begin_update(source.plan(self.status().dtype))
        update.add_all(source.pairs())
        update.finish()

    def reset_prefix_cache(self) -> None:
        """End the update that `update_named_param` began: serve what was sent, under `policy@N`.

        Without one there is nothing to do: every version has a cache of its own (name and salt).

        Raises:
            IncompleteGroup: some tensors were sent without others of the same module.
            CommitFailed: the server is NOT READY until the next whole update.
        """
        update, self._update = self._update, None
        if update is not None:
            update.finish()

    def drop(self, name: str) -> list[str]:
        """Stop serving a policy, or one version of it (`policy@N`), that nobody publishes.

        Requests that run on it end on it. Where it was in the weights the base comes back.

        Returns:
            Names of the versions that were served.

        Raises:
            LeaseHeld: somebody publishes it, who is named.
            UnknownVersion: no such version is served.
        """
        version = PolicyVersion.find(name)
        policy = name if version is None else version.policy
        versions = [v for p in self.status().policies if p.policy == policy for v in p.versions]
        chosen = versions if version is None else [v for v in versions if v == name]
        if not chosen:
            served = sorted(self.status().served)
            raise errors.UnknownVersion(
                f"{name} is not served; served are {', '.join(served) or 'none'}",
                replica=self.base_url,
            )
        config = SyncConfig(policy=policy, transport="http", lease_wait_s=0.0)
        replica = Replica(self, config, writer=f"drop-{uuid.uuid4().hex[:12]}")
        try:
            replica.ensure_channel()
            for served_name in chosen:
                replica.drop(served_name)
        finally:
            replica.close()
        return chosen

    def drop_idle(self) -> list[str]:
        """`drop` every policy that nobody publishes or keeps; names of the versions that were served."""
        idle = [found.policy for found in self.status().policies if found.owner is None]
        return [version for policy in idle for version in self.drop(policy)]

    def _replica(self) -> Replica:
        if self._fleet is None:
            config = SyncConfig(policy=self.policy, mode=SyncMode.FULL)
            self._fleet = Fleet([Replica(self, config, writer=f"client-{uuid.uuid4().hex[:12]}")])
        replica = self._fleet.replicas[0]
        replica.ensure_channel()
        return replica

    def _begin_update(self, plan: list[dict[str, Any]] | None) -> FullUpdate:
        replica, status = self._replica(), self.status()
        assert self._fleet is not None
        last = max([replica.last_version, *(_version(n, self.policy) for n in status.served)])
        replica.last_version = last + 1
        update = FullUpdate(
            self._fleet,
            policy=self.policy,
            version=last + 1,
            base_fingerprint=status.base_fingerprint,
            dtype=status.dtype,
            bucket_bytes=BUCKET_BYTES,
        )
        update.begin(plan)
        return update


def _version(name: str, policy: str) -> int:
    found = PolicyVersion.find(name)
    return found.version if found is not None and found.policy == policy else 0
