"""Ranks as threads over a real key-value store: they end a turn together, and fail together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType

from tink_rl import errors
from tink_rl.policy.sharded import refuse_flat_parameters
from tink_rl.training import ranks as module
from tink_rl.training.policy_publisher import _warn_if_fsdp_was_left_out
from tink_rl.training.ranks import Ranks


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))


def side_by_side(store, turn, count=3, timeout_s=20.0):
    """`turn(ranks)` of each rank in a thread; what each returned or raised."""
    members = [Ranks(i, count, timeout_s=timeout_s, store=store) for i in range(count)]
    for member in members:
        member._prefix = "tink_rl/test"  # processes count their links; threads share the counter

    def run(member):
        try:
            with member.failing_together():
                return turn(member)
        except BaseException as error:  # noqa: BLE001 - what each rank raised is the result
            return error
        finally:
            member.close()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, members))


def test_every_rank_gets_what_the_leader_returned(store):
    def turn(ranks):
        first = ranks.on_leader(lambda: {"name": "policy@1"})
        second = ranks.on_leader(lambda: ["again", ranks.index])
        return first, second

    assert side_by_side(store, turn) == [({"name": "policy@1"}, ["again", 0])] * 3


def test_what_each_does_is_done_by_all_before_the_next_thing_is_done_by_any(store):
    done = {0: [], 1: [], 2: []}

    def turn(ranks):
        def note(word):
            done[ranks.index].append(word)
            return f"{word} by {ranks.index}"

        first = ranks.each(lambda: note("collect"))
        found = ranks.on_leader(lambda: [list(words) for words in done.values()])
        return first, found, ranks.each(lambda: note("probe"))

    assert side_by_side(store, turn) == [
        (f"collect by {i}", [["collect"]] * 3, f"probe by {i}") for i in range(3)
    ]
    assert done == {i: ["collect", "probe"] for i in range(3)}


def test_one_process_makes_plain_calls():
    ranks = Ranks(0, 1, timeout_s=1.0)
    with ranks.failing_together():
        assert ranks.on_leader(lambda: ranks.each(lambda: 2 * 4)) == 8


def test_error_of_the_leader_is_raised_by_all_with_class_message_and_details(store):
    def turn(ranks):
        def work():
            raise errors.PublishFailed("policy@3 could not be published", replica="http://x")

        ranks.on_leader(work)

    found = side_by_side(store, turn)
    assert [type(e) for e in found] == [errors.PublishFailed] * 3
    assert {str(e) for e in found} == {"policy@3 could not be published"}
    assert {e.details["replica"] for e in found} == {"http://x"}


def test_foreign_error_of_the_leader_reaches_the_others_as_rank_failed(store):
    def turn(ranks):
        ranks.on_leader(lambda: 1 // 0)

    leader, *others = side_by_side(store, turn)
    assert isinstance(leader, ZeroDivisionError)
    assert {type(e) for e in others} == {errors.RankFailed}
    assert "rank 0 failed: ZeroDivisionError" in str(others[0])


def test_what_fails_on_a_follower_is_raised_by_all(store):
    def turn(ranks):
        def collect():
            if ranks.index == 2:
                raise errors.UnsupportedAdapter("merged on rank 2")

        ranks.each(collect)

    found = side_by_side(store, turn)
    assert {(type(e), str(e)) for e in found} == {(errors.UnsupportedAdapter, "merged on rank 2")}


def test_broken_collective_of_the_leader_is_explained_by_the_rank_that_broke_it(store):
    ended = threading.Event()

    def turn(ranks):
        def collect():
            if ranks.index == 1:
                ended.set()
                raise ValueError("out of memory")
            assert ended.wait(10)
            if ranks.index == 0:
                # Its peer's process ended: only then does a collective break.
                while ranks._posted() is None:
                    pass
                raise RuntimeError("Connection closed by peer")

        ranks.each(collect)

    leader, failed, other = side_by_side(store, turn)
    assert isinstance(failed, ValueError)
    for error in (leader, other):
        assert isinstance(error, errors.RankFailed)
        assert str(error) == "rank 1 failed: ValueError: out of memory"


def test_failure_outside_of_a_turn_reaches_a_leader_that_waits(store):
    def turn(ranks):
        if ranks.index == 1:
            raise KeyError("reward")
        ranks.each(lambda: None)

    leader, failed, other = side_by_side(store, turn)
    assert isinstance(failed, KeyError)
    assert "rank 1 failed: KeyError: 'reward'" in str(leader)
    assert str(other) == str(leader)


def test_rank_that_never_comes_is_named_after_the_deadline(store, monkeypatch):
    monkeypatch.setattr(module, "_FAREWELL_S", 0.1)

    def turn(ranks):
        if ranks.index != 1:
            ranks.each(lambda: None)

    leader, _, _ = side_by_side(store, turn, timeout_s=0.5)
    assert isinstance(leader, errors.RankFailed)
    assert "rank 1 did not answer rank 0 within 0.5 s" in str(leader)
    assert "ddp_timeout" in str(leader)


def test_fsdp_config_that_accelerate_leaves_out_is_told(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for kind in (DistributedType.FSDP, DistributedType.MULTI_CPU):
        caplog.clear()
        _warn_if_fsdp_was_left_out(SimpleNamespace(distributed_type=kind))
        assert ("accelerate runs MULTI_CPU" in caplog.text) == (kind == DistributedType.MULTI_CPU)


def test_fsdp1_is_refused_with_the_setting_to_change():
    class FullyShardedDataParallel(torch.nn.Module):
        pass

    with pytest.raises(errors.ConfigError, match="fsdp_version: 2"):
        refuse_flat_parameters(torch.nn.Sequential(FullyShardedDataParallel()))
