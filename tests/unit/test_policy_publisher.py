"""Which versions are probed, and what the other ranks do when a server lost the version."""

from __future__ import annotations

import json
from contextlib import suppress
from types import SimpleNamespace

import pytest

from tests.adapters import tensors_of
from tests.fake_vllm import FakeVLLM
from tink_rl import SyncConfig, errors
from tink_rl.policy.adapter import Adapter
from tink_rl.policy.sharded import Sharding
from tink_rl.publish.publisher import WeightSync
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.training.connect import clients_of
from tink_rl.training.policy_publisher import PolicyPublisher
from tink_rl.training.ranks import Ranks
from tink_rl.training.saving import whole_or_none
from tink_rl.training.trainer import _releasing_lease
from tink_rl.types import SyncMode

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


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), errors.StorageFull),
        (RuntimeError("[enforce fail] PytorchStreamWriter: file write failed"), errors.StorageFull),
        (RuntimeError("something else"), RuntimeError),
    ],
)
@pytest.mark.parametrize("was_there", [False, True])
def test_save_that_fails_leaves_no_half_checkpoint(tmp_path, error, raised, was_there):
    folder = tmp_path / "checkpoint-3"
    if was_there:
        folder.mkdir()

    def save(model, trial):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").touch()
        raise error

    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)),
        state=SimpleNamespace(global_step=3),
        _save_checkpoint=save,
    )
    with pytest.raises(raised) as caught:
        whole_or_none(trainer)(None, trial=None)
    assert folder.exists() is was_there
    assert type(caught.value) is raised
    assert raised is RuntimeError or "checkpoint-3 cannot be written" in str(caught.value)


@pytest.mark.parametrize(
    ("proven_on", "now", "words"),
    [
        (
            None,
            "vllm@4",
            "now holds the whole tensors of 'vllm@4'; this run was proven on the base",
        ),
        (
            "vllm@4",
            None,
            "now holds the base; this run was proven on the whole tensors of 'vllm@4'",
        ),
    ],
)
def test_run_in_slots_whose_base_was_taken_under_way_is_told_by_whom(proven_on, now, words):
    link = follower()
    link._proven_on = link.sync.base_taken_by = proven_on
    link._check_base_is_there("policy@3")
    link.sync.base_taken_by = now
    with pytest.raises(errors.BaseMismatch, match=words):
        link._check_base_is_there("policy@4")


def test_commit_of_a_slot_says_whose_whole_tensors_it_adds_to(model_dir):
    fake = FakeVLLM(str(model_dir("qwen3")))
    client = VLLMClient("http://fake", token="t" * 20, transport=fake.transport())
    config = SyncConfig(mode="adapter", transport="http")
    adapter = Adapter(tensors=tensors_of(), rank=4)
    with WeightSync(client, base_model=fake.root, config=config) as sync:
        sync.publish(adapter)
        assert sync.base_taken_by is None
        fake.full = "vllm@4"
        sync.publish(Adapter(tensors=tensors_of(seed=1), rank=4))
        assert sync.base_taken_by == "vllm@4"


def follower(*replicas, **changes):
    link = object.__new__(PolicyPublisher)
    link._accelerator = SimpleNamespace(is_main_process=False)
    link._config, link._current = SyncConfig(**changes), "policy@3"
    link.sync = SimpleNamespace(fleet=SimpleNamespace(replicas=replicas))
    return link


def test_other_ranks_wait_until_every_server_holds_the_version_again():
    assert follower(_Replica(0), _Replica(2)).recover()


def test_other_ranks_do_not_wait_for_ever():
    with pytest.raises(errors.UnknownVersion, match="--resume_from_checkpoint"):
        follower(_Replica(99), **NO_TIME).recover()


def test_base_is_compared_again_whenever_a_training_begins():
    compared = []
    link = follower()
    link._check_base = lambda: compared.append(True)
    link.ranks = Ranks(0, 1, timeout_s=1.0)
    link._started = link._base_compared = True
    for begins, expected in ((False, 0), (True, 1), (False, 1), (True, 2)):
        if begins:
            link.expect_other_base()
        link.start(lambda status: None)
        assert len(compared) == expected


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
    link.collector = SimpleNamespace(sharding=lambda: sharding)
    found = []
    for num_published in range(4):
        link.records = [object()] * num_published
        found.append(link._probes_now())
    assert found == expected


@pytest.mark.parametrize(("name", "places"), [("default", [""]), ("sft", ["", "sft"])])
def test_checkpoint_says_what_it_holds_where_peft_put_the_adapter(tmp_path, name, places):
    for folder in ("sft", "ref"):
        (tmp_path / folder).mkdir()
    link = follower()
    link._accelerator.is_main_process = True
    link._model = SimpleNamespace(active_adapters=[name])
    link._base_model = str(tmp_path / "snapshots" / ("a" * 40) / "inner")
    record = SimpleNamespace(policy="math", version=3, digest="9f", mode=SyncMode.MERGED)
    link.sync = SimpleNamespace(
        current=record,
        versions=SimpleNamespace(last=3),
        status=SimpleNamespace(base_fingerprint="f" * 32),
    )
    link.save(tmp_path)
    written = sorted(tmp_path.rglob("tink_policy.json"))
    assert written == sorted(tmp_path / place / "tink_policy.json" for place in places)
    for path in written:
        said = json.loads(path.read_text())
        assert (said["base_revision"], said["base_subfolder"]) == ("a" * 40, "inner")


@pytest.mark.parametrize(
    ("said", "number"),
    [('{"version": 7, "last_number": 9}', 9), ('{"version": 7}', 7), (None, None)],
    ids=["written today", "of an earlier release", "of another trainer"],
)
def test_resumed_run_numbers_above_what_its_checkpoint_says(tmp_path, said, number):
    started = []
    link = follower()
    link.sync = SimpleNamespace(start_after=started.append)
    if said is not None:
        (tmp_path / "tink_policy.json").write_text(said)
    link.restore(tmp_path)
    assert started == ([] if number is None else [number])


@pytest.mark.parametrize("said", ["", '{"version": ', "[]", "{}", '{"version": null}'])
def test_checkpoint_that_says_no_version_is_named_and_the_way_out(tmp_path, said):
    (tmp_path / "tink_policy.json").write_text(said)
    with pytest.raises(
        errors.ConfigError, match=r"tink_policy\.json does not say.*remove the file"
    ):
        follower().restore(tmp_path)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_gives_the_lease_back_unless_a_training_holds_it(is_training, fails):
    calls = []

    def evaluate():
        calls.append("evaluate")
        if fails:
            raise errors.SamplingRefused("too long")

    trainer = SimpleNamespace(evaluate=evaluate, _last_loaded_step=7)
    link = follower()
    link.is_training, link._base_compared = is_training, True
    link.sync.close = lambda: calls.append("close")
    with suppress(errors.SamplingRefused):
        _releasing_lease(trainer, link)()
    assert calls == (["evaluate"] if is_training else ["evaluate", "close"])
    assert (trainer._last_loaded_step, link._base_compared) == (
        (7, True) if is_training else (-1, False)
    )
