"""One name, one set of weights, on a real server: answers that are lost, models that change midway."""

from __future__ import annotations

import pytest

from tests.policies import (
    WholeTwin,
    assert_served,
    random_adapter,
    served_greedy,
    sync_to,
)
from tink_rl import errors

pytestmark = [pytest.mark.server, pytest.mark.home]
LAST = {"adapter": "commit", "merged": "commit", "full": "finish"}
"""The request after which a version is served."""


@pytest.fixture
def server(servers):
    return servers.get("qwen3", mode="both")


@pytest.fixture
def twin(model_dir):
    return WholeTwin(model_dir("qwen3"))


def lose(sync, monkeypatch, *requests, then=lambda: None):
    """Each of `requests`, (action, whether it is handled), gets no answer, once."""
    client, left = sync.fleet.replicas[0].client, list(requests)
    control = client.control

    def lossy(action, *arguments, **settings):
        found = next((item for item in left if item[0] == action), None)
        if found is None:
            return control(action, *arguments, **settings)
        left.remove(found)
        if found[1]:
            control(action, *arguments, **settings)
        then()
        raise errors.RequestTimeout(f"{action}: no answer", replica=client.base_url)

    monkeypatch.setattr(client, "control", lossy)


@pytest.mark.parametrize("mode", ["adapter", "merged", "full"])
def test_name_whose_commit_got_no_answer_is_not_given_to_other_weights(
    server, twin, monkeypatch, mode
):
    with sync_to(server, twin.directory, mode, transport="http") as sync:
        first = sync.publish(random_adapter(twin, 1))
        lose(sync, monkeypatch, ("stage", False), (LAST[mode], True))
        with pytest.raises(errors.PublishFailed):
            sync.publish(random_adapter(twin, 2))
        lost, cases = f"policy@{first.version + 1}", twin.clear_cases()
        assert_served(server, lost, cases)
        third = sync.publish(random_adapter(twin, 3))
        assert third.version == first.version + 2
        assert_served(server, third.name, twin.clear_cases())
        with pytest.raises(errors.UnknownVersion):
            served_greedy(server, lost, cases)


def test_model_that_changes_between_two_tries_has_a_number_of_its_own(server, twin, monkeypatch):
    with sync_to(server, twin.directory, "full") as sync:
        first = sync.publish_full(twin.tensors())
        twin.shake_base(1)
        lose(sync, monkeypatch, ("finish", True), then=lambda: twin.shake_base(2))
        record = sync.publish_full(twin.tensors())
        assert record.version == first.version + 2
        assert_served(server, record.name, twin.base_cases())


def test_lost_full_version_comes_back_under_its_name_only_as_it_was(server, twin):
    with sync_to(server, twin.directory, "full") as sync:
        twin.shake_base(1)
        record, replica = sync.publish_full(twin.tensors()), sync.fleet.replicas[0]
        replica.drop(record.name)
        assert sync.recover()
        assert_served(server, record.name, twin.base_cases())
        replica.drop(record.name)
        twin.shake_base(2)
        with pytest.raises(errors.PublishFailed, match="publish the model again"):
            sync.recover()
        assert record.name not in server.client().status().served
        again = sync.publish_full(twin.tensors())
        assert again.version == record.version + 1
        assert_served(server, again.name, twin.base_cases())


@pytest.mark.parametrize("mode", ["adapter", "merged", "full"])
def test_server_refuses_other_weights_under_a_number_that_it_gave(server, twin, mode):
    with sync_to(server, twin.directory, mode) as sync:
        first = sync.publish(random_adapter(twin, 1))
        cases = twin.clear_cases()
        sync.versions.last = sync.fleet.replicas[0].last_version = first.version - 1
        with pytest.raises(errors.VersionTaken, match="other weights"):
            sync.publish(random_adapter(twin, 2))
        if mode != "full":  # which has written before it is told the digest
            assert_served(server, first.name, cases)
        sync.versions.last = first.version
        assert_served(server, sync.publish(random_adapter(twin, 3)).name, twin.clear_cases())
