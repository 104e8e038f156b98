"""What runs leave on a real server: who takes its place, and what is dropped by hand."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from tests.policies import PeftTwin, assert_served, random_adapter, served_greedy, sync_to
from tests.trainers import left_clean
from tink_rl import cli, errors
from tink_rl.config import SyncConfig
from tink_rl.publish.publisher import WeightSync

pytestmark = [pytest.mark.server, pytest.mark.home]


@pytest.fixture
def server(servers):
    with left_clean(servers.get("qwen3", mode="both")) as server:
        yield server


@pytest.fixture(scope="module")
def twin(model_dir):
    return PeftTwin(model_dir("qwen3"))


@contextmanager
def run_that_ends(server, twin, mode, **settings):
    """A publisher that gives its lease back and drops nothing, as a run does."""
    config = SyncConfig(mode=mode, token=server.token, lease_wait_s=0.0, **settings)
    with WeightSync(server.url, base_model=twin.directory, config=config) as sync:
        yield sync


def left_by_run(server, twin, mode, *, num_versions=1, **settings):
    with run_that_ends(server, twin, mode, **settings) as sync:
        return [sync.publish(random_adapter(twin, i)).name for i in range(num_versions)]


def test_heir_of_a_policy_ends_what_it_did_not_publish_and_nobody_elses(server, twin):
    other = left_by_run(server, twin, "adapter", policy="other")
    for _ in range(3):  # one after the other, on a warm server
        left = left_by_run(server, twin, "adapter", num_versions=3)[-2:]
        assert set(server.client().status().served) == {*other, *left}
    with sync_to(server, twin.directory, "adapter") as heir:
        assert set(server.client().status().served) == {*other, *left}  # nothing is proven yet
        name = heir.publish(random_adapter(twin, 7)).name
        assert set(server.client().status().served) == {*other, name}
        twin.randomise(7)
        assert_served(server, name, twin.clear_cases())


@pytest.mark.parametrize(("left", "next_one"), [("merged", "adapter"), ("adapter", "merged")])
def test_run_takes_the_place_of_what_nobody_owns(server, twin, left, next_one):
    old = left_by_run(server, twin, left, policy="ended")[0]
    [found] = server.client().status().policies
    assert (found.policy, found.mode, found.versions) == ("ended", left, (old,))
    assert (found.owner, found.lease_s) == (None, None) and found.num_bytes > 0
    with sync_to(server, twin.directory, next_one, policy="fresh") as sync:
        twin.randomise(5)
        name = sync.publish(twin.model).name
        assert_served(server, name, twin.clear_cases())
        with pytest.raises(errors.UnknownVersion):
            served_greedy(server, old, [[5, 6]])
        [found] = server.client().status().policies
        assert found.policy == "fresh" and sync.writer in found.owner and found.lease_s > 0
    base = server.client().status().base_model
    assert_served(server, base, twin.clear_cases(adapter=False))


def test_auto_takes_the_whole_server_where_only_leftovers_are_in_slots(server, twin):
    left_by_run(server, twin, "adapter", policy="ended")
    with sync_to(server, twin.directory, "auto", policy="fresh") as sync:
        assert sync.publish(random_adapter(twin, 1)).mode == "merged"


def test_drop_by_hand_refuses_what_a_run_publishes_and_names_it(server, twin, capsys):
    ended = left_by_run(server, twin, "adapter", policy="ended", num_versions=2)
    token = ["--token-file", server.options.token_file]
    with sync_to(server, twin.directory, "adapter") as sync, server.client() as client:
        name = sync.publish(random_adapter(twin, 1)).name
        assert cli.main(["status", server.url, *token]) == 0
        shown = capsys.readouterr().out
        assert f"{', '.join(ended)}: adapter, " in shown and "nobody owns it" in shown
        assert f"writer {sync.writer!r}, lease " in shown
        with pytest.raises(errors.LeaseHeld, match=sync.writer):
            client.drop("policy")
        with pytest.raises(errors.UnknownVersion, match=f"{ended[0]}, {ended[1]}, {name}"):
            client.drop("nobody")
        assert cli.main(["drop", server.url, ended[0], *token]) == 0
        assert set(client.status().served) == {ended[1], name}
        assert cli.main(["drop", server.url, "--idle", *token]) == 0
        assert set(client.status().served) == {name}
        assert cli.main(["drop", server.url, "--idle", *token]) == 0
    assert "nothing: somebody owns" in capsys.readouterr().err
    merged = left_by_run(server, twin, "merged")
    with server.client() as client:
        assert client.drop_idle() == merged
        assert client.status().served == {}
        base = client.status().base_model
    assert_served(server, base, twin.clear_cases(adapter=False))
