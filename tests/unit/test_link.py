"""Which versions are probed, and what the other ranks do when a server lost the version."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tink_rl import SyncConfig, errors
from tink_rl.policy.sharded import Sharding
from tink_rl.training.connect import clients_of
from tink_rl.training.link import PolicyLink

NO_TIME = {
    f"{name}_s": 0.01
    for name in ("lease_wait", "join_timeout", "stage_timeout", "commit_timeout", "drain_timeout")
}


class _Replica:
    """Serves the version from the `after`-th look on."""

    def __init__(self, after):
        self._looks, self._after = 0, after

    def status(self):
        self._looks += 1
        if self._looks == 1 and self._after:
            raise errors.ServerUnreachable("it still starts")
        return SimpleNamespace(served=["policy@3"] if self._looks > self._after else [])


def test_trls_host_may_be_an_ipv6_address():
    args = SimpleNamespace(vllm_server_host="::1", vllm_server_port=8001)
    (client,) = clients_of(None, SyncConfig(token="t" * 20), args)
    assert client.base_url == "http://[::1]:8001"
    client.close()


def follower(*replicas, **changes):
    link = object.__new__(PolicyLink)
    link._accelerator = SimpleNamespace(is_main_process=False)
    link._config, link._current = SyncConfig(**changes), "policy@3"
    link.sync = SimpleNamespace(fleet=SimpleNamespace(replicas=replicas))
    return link


def test_other_ranks_wait_until_every_server_holds_the_version_again():
    assert follower(_Replica(0), _Replica(2)).recover()


def test_other_ranks_do_not_wait_for_ever():
    with pytest.raises(errors.UnknownVersion, match="--resume_from_checkpoint"):
        follower(_Replica(99), **NO_TIME).recover()


@pytest.mark.parametrize(
    ("sharding", "every", "expected"),
    [
        (Sharding.WHOLE, 2, [True, False, True, False]),
        (Sharding.DTENSOR, 2, [True, False, True, False]),
        (Sharding.ZERO3, 2, [True, False, False, False]),
        (Sharding.WHOLE, 0, [False] * 4),
    ],
)
def test_versions_that_are_probed(sharding, every, expected):
    link = follower(probe_every=every)
    link.collector = SimpleNamespace(sharding=sharding)
    found = []
    for num_published in range(4):
        link.records = [object()] * num_published
        found.append(link._probes_now())
    assert found == expected
