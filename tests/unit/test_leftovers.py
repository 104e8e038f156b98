"""What a run that ended, failed or was forgotten leaves: on a server, in its process, on its model."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace

import pytest

from tests.fakes import status
from tink_rl import cli, errors
from tink_rl.config import SyncConfig
from tink_rl.protocol import HeartbeatAnswer, JoinAnswer
from tink_rl.publish.modes import choose_mode
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.server.commits import Commits
from tink_rl.server.gate import Gate
from tink_rl.server.leases import LEASE_S, Leases
from tink_rl.server.leftovers import Leftovers
from tink_rl.server.state import Served, ServedState
from tink_rl.training import trainer as trainer_module
from tink_rl.transport.connection import Connection
from tink_rl.types import SyncMode, Transport


class Now:
    """A clock that the test moves."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def now(monkeypatch):
    clock = Now()
    monkeypatch.setattr("tink_rl.server.served.time", SimpleNamespace(monotonic=clock))
    return clock


def served_state(now, *served):
    """A server's state without an engine."""
    models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name="base", model_path="base")],
        lora_requests={v.name: v for v in served},
    )
    state = ServedState(engine=None, models=models, gate=Gate(), modes=tuple(SyncMode), facts={})
    state.leases = Leases(clock=now)
    state.served = {version.name: version for version in served}
    state.models = models
    return state


def version(name, mode=SyncMode.ADAPTER, **facts):
    return Served(name=name, digest="d", mode=mode, num_bytes=10, last_used=100.0, **facts)


def policies(state):
    return {found.policy: found for found in state.policies()}


def test_policy_is_its_leases_else_a_sampling_services_else_nobodys(now):
    state = served_state(now, version("a@1"), version("a@2"), version("kept@1", lasting=True))
    found = policies(state)
    assert found["a"].versions == ("a@1", "a@2") and found["a"].num_bytes == 20
    assert (found["a"].owner, found["a"].lease_s) == (None, None)
    assert found["kept"].owner == "a sampling service"
    state.leases.take("a", "run-1")
    assert policies(state)["a"].owner == "writer 'run-1'"
    assert policies(state)["a"].lease_s == LEASE_S
    now.seconds += LEASE_S + 1
    assert policies(state)["a"].owner is None


def test_use_is_seen_where_a_slot_is_looked_up_and_where_anything_runs_on_the_weights(now):
    state = served_state(now, version("a@1"), version("b@1"))
    now.seconds = 150.0
    assert state.models.lora_requests["a@1"].name == "a@1"
    assert "b@1" in state.models.lora_requests  # a look at the list is no use of it
    idle = {name: found.idle_s for name, found in policies(state).items()}
    assert idle == {"a": 0.0, "b": 50.0}
    merged = served_state(now, version("m@1", SyncMode.MERGED))
    assert policies(merged)["m"].idle_s == 50.0
    merged.gate.last_admitted = 140.0
    assert policies(merged)["m"].idle_s == 10.0


@pytest.mark.parametrize("mode", [SyncMode.ADAPTER, SyncMode.MERGED])
def test_place_of_what_nobody_owns_is_taken_and_an_owner_is_named(now, mode):
    other = SyncMode.MERGED if mode is SyncMode.ADAPTER else SyncMode.ADAPTER
    state = served_state(now, version("old@1", other))
    assert [found.name for found in state.in_the_way(mode, "new")] == ["old@1"]
    state.leases.take("old", "run-1")
    with pytest.raises(errors.ModeUnavailable, match=r"old@1 of writer 'run-1' .*second server"):
        state.check_mode(mode, "new")
    assert state.in_the_way(mode, "old")  # a run's own earlier versions are in nobody's way


def test_adapters_of_a_sampling_service_make_no_room(now):
    state = served_state(now, version("kept@1", lasting=True))
    with pytest.raises(errors.ModeUnavailable, match=r"kept@1 of a sampling service"):
        state.check_mode(SyncMode.MERGED, "new")


def test_full_version_of_ones_own_is_ended_by_a_command_that_is_named(now):
    state = served_state(now, version("p@4", SyncMode.FULL))
    with pytest.raises(errors.ModeUnavailable, match=r"one kind at a time; `tink-rl drop URL p`"):
        state.check_mode(SyncMode.ADAPTER, "p")
    assert state.in_the_way(SyncMode.MERGED, "other") == []  # it is written over
    state.leases.take("p", "run-1")
    with pytest.raises(errors.ModeUnavailable, match=r"p@4 of writer 'run-1'"):
        state.check_mode(SyncMode.MERGED, "other")


def test_idle_policy_goes_unless_it_is_owned_or_sampled(now, monkeypatch):
    names = ("left@1", "left@2", "leased@1", "sampled@1")
    state = served_state(now, *map(version, names), version("kept@1", lasting=True))
    dropped = []
    monkeypatch.setattr(state, "retire_slot", dropped.append)
    commits = Commits(state, None, None)
    leftovers = Leftovers(state, commits, keep_s=60.0)
    now.seconds += 50
    asyncio.run(leftovers.drop_idle())
    assert dropped == []
    now.seconds += 50
    state.leases.take("leased", "run-1")
    assert state.models.lora_requests["sampled@1"]
    asyncio.run(leftovers.drop_idle())
    assert dropped == ["left@1", "left@2"]


def test_watch_goes_on_after_an_error_and_says_it(now, caplog):
    state = served_state(now)
    leftovers = Leftovers(state, Commits(state, None, None), keep_s=0.001)
    looks = []

    async def fails():
        looks.append(len(looks))
        raise errors.DrainTimeout("requests run")

    async def run():
        leftovers.drop_idle = fails
        task = asyncio.create_task(leftovers.watch())
        while len(looks) < 3:
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(run())
    assert "stays served: requests run" in caplog.text


# -- what the next run takes -----------------------------------------------------------------------


def policy(name, owner=None, mode="adapter"):
    return {
        **{"policy": name, "mode": mode, "versions": [f"{name}@1"], "owner": owner},
        **{"lease_s": None, "num_bytes": 1, "idle_s": 1.0},
    }


@pytest.mark.parametrize(("owner", "mode"), [(None, "merged"), ("writer 'x'", "adapter")])
def test_auto_counts_only_what_somebody_owns(owner, mode):
    found = status(served={"other@1": "d"}, policies=[policy("other", owner)])
    assert choose_mode("auto", found, policy="mine").mode == mode


# -- what is left in a process ---------------------------------------------------------------------


class LeaseServer:
    """Counts heartbeats."""

    base_url = "http://fake:1"

    def __init__(self):
        self.beats = 0

    def ask(self, route, request, **_):
        if route.action == "heartbeat":
            self.beats += 1
            return HeartbeatAnswer(incarnation="i")
        return JoinAnswer(
            epoch=1, incarnation="i", lease_s=0.02, last_version=0, transport=Transport.HTTP
        )


def test_heartbeat_ends_with_the_connection_that_nobody_has_any_more():
    server = LeaseServer()
    connection = Connection(server, SyncConfig(transport="http"), writer="w")
    connection.ensure_channel()
    while not server.beats:
        pass
    stop = connection._stop_heartbeat
    assert stop.alive
    del connection
    gc.collect()
    assert not stop.alive


def test_attach_that_fails_leaves_trainer_and_model_as_they_were(monkeypatch):
    closed = []

    def link(trainer, clients, sync):
        trainer.policy_link = SimpleNamespace(close=lambda: closed.append(True))
        trainer.train = "wrapped"
        return trainer.policy_link

    def refuses(*_):
        raise errors.ConfigError("not so")

    trainer = SimpleNamespace(args=SimpleNamespace(), train="own", use_vllm=False)
    for name in ("check_trainer", "check_arguments"):
        monkeypatch.setattr(trainer_module.checks, name, lambda *_: None)
    monkeypatch.setattr(trainer_module.trl_seam, "check", lambda *_: None)
    monkeypatch.setattr(trainer_module, "clients_of", lambda *_: [])
    monkeypatch.setattr(trainer_module, "link_to", link)
    monkeypatch.setattr(trainer_module.checks, "check_off_policy", refuses)
    with pytest.raises(errors.ConfigError, match="not so"):
        trainer_module.attach(trainer)
    assert closed == [True]
    assert vars(trainer) == {"args": trainer.args, "train": "own", "use_vllm": False}


# -- by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["policy", "--idle"]])
def test_drop_takes_names_or_idle(words, capsys):
    assert cli.main(["drop", "http://127.0.0.1:1", *words]) == 1
    assert "expected names or --idle" in capsys.readouterr().err


def test_drop_of_what_is_not_served_says_what_is(monkeypatch):
    client = VLLMClient("http://fake:1", token="t" * 20)
    found = status(served={"a@1": "d"}, policies=[policy("a", owner="writer 'x'")])
    monkeypatch.setattr(client, "status", lambda: found)
    with pytest.raises(errors.UnknownVersion, match=r"a@7 is not served; served are a@1"):
        client.drop("a@7")
    assert client.drop_idle() == []
