"""One writer per policy name."""

from __future__ import annotations

import time

import pytest

from tink_rl import errors
from tink_rl.server.leases import LEASE_S, Leases


def test_lease_expires_only_unrenewed_and_epochs_grow():
    now = [0.0]
    leases = Leases(clock=lambda: now[0])
    first, _ = leases.take("p", "a")
    now[0] = LEASE_S - 1
    with pytest.raises(errors.LeaseHeld, match="SyncConfig"):
        leases.take("p", "b")
    leases.check("p", first.epoch)
    now[0] += 2
    with pytest.raises(errors.LeaseHeld):
        leases.take("p", "b")
    now[0] += LEASE_S
    second, old = leases.take("p", "b")
    assert old is first and second.epoch > first.epoch
    with pytest.raises(errors.StaleEpoch):
        leases.check("p", first.epoch)
    leases.release("p", first.epoch)
    leases.check("p", second.epoch)


def test_epochs_of_a_restarted_server_are_above_those_of_its_earlier_life():
    before, _ = Leases().take("policy", "one")
    time.sleep(0.002)
    after, _ = Leases().take("policy", "two")
    assert after.epoch > before.epoch
