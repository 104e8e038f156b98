"""Runs on fixed seeds that must agree, however the policy travels and the work is split.

One process against two is in tests/multi, for DDP, FSDP2 and ZeRO-3.
"""

from __future__ import annotations

import signal

import pytest

from tests.invariant.running import (
    SAME_LOGPROB,
    assert_alike,
    assert_begins_alike,
    job,
    largest_difference,
    reference,
    train,
)
from tests.multi.launching import launch
from tests.policies import drop_all, sync_to

pytestmark = [pytest.mark.server, pytest.mark.home, pytest.mark.timeout(420)]


class Runs:
    """Each run is made once."""

    def __init__(self, servers, model_dir, root):
        self._servers, self._root, self.model = servers, root, model_dir("qwen3")
        self._done = {}

    @property
    def server(self):
        return self._servers.get("qwen3", mode="both")

    def job(self, name, **changes):
        return job(self.server, self.model, self._root / name, f"inv-{name}", **changes)

    def get(self, name, **changes):
        if name not in self._done:
            self._done[name] = train(self.job(name, **changes))
            self.drop_all()
        return self._done[name]

    def drop_all(self):
        """Merged mode needs a server on which nothing else is served."""
        with self.server.client() as client:
            status = client.status()
        for policy in {name.rpartition("@")[0] for name in status.served}:
            mode = "merged" if (status.merged or "").startswith(f"{policy}@") else "adapter"
            with sync_to(self.server, self.model, mode, policy=policy) as sync:
                drop_all(self.server, sync)


@pytest.fixture(scope="module")
def runs(servers, model_dir, tmp_path_factory):
    found = Runs(servers, model_dir, tmp_path_factory.mktemp("invariant"))
    yield found
    found.drop_all()


def test_policy_changes_from_step_to_step(runs):
    plain = runs.get("plain")
    assert len(set(plain.rewards)) > 1
    assert min(plain.grad_norms) > 0


def test_run_is_the_committed_reference(runs):
    """Bit for bit where the reference was made; elsewhere up to rounding, as far as it is comparable."""
    plain = runs.get("plain")
    known, same_machine = reference("plain", plain)
    if same_machine:
        assert plain == known
    else:
        assert_begins_alike(plain, known)


def test_same_seed_gives_the_same_run(runs):
    assert runs.get("again") == runs.get("plain")


def test_other_seed_gives_another_run(runs):
    other = runs.get("other-seed", args={"seed": 8})
    assert largest_difference(other.logprobs, runs.get("plain").logprobs) > 10 * SAME_LOGPROB


@pytest.mark.parametrize("transport", ["http", "auto"])
def test_transport_changes_nothing(runs, transport):
    assert runs.get(transport, sync={"transport": transport}) == runs.get("plain")


@pytest.mark.parametrize("mode", ["merged", "full"])
def test_every_mode_is_adapter_mode(runs, mode):
    assert_alike(runs.get(mode, sync={"mode": mode}), runs.get("plain"))


def test_eight_micro_batches_are_one_batch(runs):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    assert_alike(runs.get("accumulated", args=split), runs.get("plain"))


def test_killed_and_resumed_run_is_the_uninterrupted_one(runs):
    saved = {"save_strategy": "steps", "save_steps": 2}
    given = runs.job("killed", args=saved, kill_after_step=3)
    code, ranks, output = launch("accelerate_configs/cpu.yaml", given, runs._root / "killed")
    assert code in (1, -signal.SIGKILL, 128 + signal.SIGKILL), output[-4000:]
    assert ranks == {}  # it was killed, so it could not even say that it failed
    checkpoint = str(runs._root / "killed" / "checkpoint-2")
    resumed = runs.get("killed", args=saved, resume=checkpoint)
    plain = runs.get("plain")
    assert resumed.rewards == plain.rewards
    assert_alike(resumed, plain)
