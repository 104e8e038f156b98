"""One name, one set of weights: whatever is lost on the way, a number is never given to others."""

from __future__ import annotations

import pytest
import torch

from tests.adapters import SHAPES
from tests.fake_vllm import FakeVLLM
from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.policy.adapter import Adapter
from tink_rl.publish.publisher import WeightSync
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.server import numbers
from tink_rl.server.numbers import Numbers

COMMIT, STAGE = "/tink/v1/commit", "/tink/v1/stage"


def adapter(seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in SHAPES.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    return Adapter(tensors=tensors, rank=2)


@pytest.fixture
def fakes(model_dir):
    return [FakeVLLM(str(model_dir("qwen3"))) for _ in range(2)]


def syncing(*servers, **settings):
    clients = [
        VLLMClient(f"http://server-{i}", token="t" * 20, transport=fake.transport())
        for i, fake in enumerate(servers)
    ]
    config = SyncConfig(mode="adapter", transport="http", lease_wait_s=0.0, **settings)
    return WeightSync(clients, base_model=servers[0].root, config=config)


@pytest.mark.parametrize(
    "lost",
    [
        [(STAGE, False), (COMMIT, True)],
        [(COMMIT, True), (COMMIT, True)],
        [(COMMIT, True), (STAGE, False)],
        [(COMMIT, False), (COMMIT, False)],
    ],
)
def test_number_whose_commit_was_sent_is_not_given_to_other_weights(fakes, lost):
    server = fakes[0]
    with syncing(server) as sync:
        sync.publish(adapter(1))
        server.lose = list(lost)
        with pytest.raises(errors.PublishFailed):
            sync.publish(adapter(2))
        before = dict(server.served)
        third = sync.publish(adapter(3))
        assert third.name == "policy@3" and server.served[third.name] == third.digest
        assert set(before) <= {"policy@1", "policy@2"}
        # What became of the second is known no more: it is not left there for ever.
        assert "policy@2" not in server.served and "policy@1" in server.served
        assert sync.publish(adapter(4)).name == "policy@4"


def test_number_that_was_only_staged_is_free(fakes):
    server = fakes[0]
    with syncing(server) as sync:
        server.lose = [(STAGE, True), (STAGE, True)]
        with pytest.raises(errors.PublishFailed):
            sync.publish(adapter(1))
        assert sync.publish(adapter(2)).name == "policy@1"


def test_second_try_has_the_number_of_the_first_for_the_same_weights(fakes):
    server = fakes[0]
    with syncing(server) as sync:
        server.lose = [(COMMIT, True)]
        record = sync.publish(adapter(1))
        assert (record.name, server.served) == ("policy@1", {"policy@1": record.digest})
        assert not sync.publish(adapter(1)).published  # nothing new: no number is taken
        assert sync.publish(adapter(2)).name == "policy@2"


def test_number_that_one_replica_may_serve_is_taken_for_all(fakes):
    first, second = fakes
    with syncing(first, second) as sync:
        second.lose = [(COMMIT, False), (COMMIT, False)]
        with pytest.raises(errors.PublishFailed):
            sync.publish(adapter(1))
        assert set(first.served) == {"policy@1"} and second.served == {}
        second.restart()
        assert sync.publish(adapter(2)).name == "policy@2"


def test_numbers_of_a_server_that_was_restarted_stay_taken(fakes):
    server = fakes[0]
    with syncing(server) as sync:
        sync.publish(adapter(1))
    with syncing(server) as heir:
        server.restart()
        heir.fleet.replicas[0].forget_channel()
        heir.open()
        assert heir.publish(adapter(2)).name == "policy@2"


def test_checkpoint_after_a_lost_commit_counts_on_above_it(fakes):
    server = fakes[0]
    with syncing(server) as sync:
        sync.publish(adapter(1))
        server.lose = [(COMMIT, True), (COMMIT, True)]
        with pytest.raises(errors.PublishFailed):
            sync.publish(adapter(2))
        assert (sync.current.version, sync.versions.last) == (1, 2)
    server.restart()
    with syncing(server) as heir:
        heir.start_after(sync.versions.last)
        assert heir.publish(adapter(3)).version == 3


def test_server_gives_a_number_to_one_set_of_weights():
    taken = Numbers()
    taken.take("p@3", "a" * 64)
    taken.take("p@3", "a" * 64)
    with pytest.raises(errors.VersionTaken, match="a number above 3"):
        taken.take("p@3", "b" * 64)
    taken.take("q@3", "b" * 64)
    taken.take("p@2", "b" * 64)
    assert (taken.last("p"), taken.last("q"), taken.last("r")) == (3, 3, 0)


def test_probes_number_is_given_to_every_probe():
    taken = Numbers()
    for digest in "ab":
        taken.take("p@0", digest * 64)
    assert taken.last("p") == 0


def test_server_remembers_so_many_names_and_every_highest_number(monkeypatch):
    monkeypatch.setattr(numbers, "_MOST_NAMES", 10)
    taken = Numbers()
    for number in range(1, 31):
        taken.take(f"p@{number}", f"{number:064}")
    assert len(taken._digests) == 10 and taken.last("p") == 30
    with pytest.raises(errors.VersionTaken):
        taken.take("p@30", "other")
