"""Both loaders against a server that loses replies, and one whose base changes."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest

from tests.fake_vllm import FakeVLLM
from tests.refusals import refused
from tests.sampling_rig import BOTH, fake_server, sample
from tests.tiny_models import make_model
from tink_rl import errors
from tink_rl.policy.fingerprint import base_fingerprint
from tink_rl.sampling import backend as sampling_backend
from tink_rl.sampling.resolver import MAX_TRIES


@BOTH
def test_adapter_is_loaded_on_first_use_and_sampled_under_its_own_name(
    make_backend, model_dir, adapters, plugin
):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make_backend(fake)
    registered = backend.register("math", adapters[0])
    assert fake.served == {}
    for _ in range(3):
        found = sample(backend, "math")
        assert (found.text, found.version) == (f"math.{registered.digest[:12]}@1", 1)
    assert list(fake.served) == [found.text]
    assert fake.count("/tink/v1/commit" if plugin else "/v1/load_lora_adapter") == 1
    if not plugin:
        assert fake.served[found.text] == str(backend.store.open(registered.digest))


@BOTH
@pytest.mark.parametrize("handled", [True, False], ids=["handled", "unhandled"])
def test_lost_reply_of_a_load_is_settled_by_looking(
    make_backend, model_dir, adapters, plugin, handled
):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make_backend(fake)
    backend.register("math", adapters[0])
    path = "/tink/v1/commit" if plugin else "/v1/load_lora_adapter"
    fake.lose.append((path, handled))
    assert sample(backend, "math").version == 1
    assert fake.count(path) == (1 if handled else 2) and len(fake.served) == 1


@BOTH
def test_load_whose_reply_is_always_lost_ends_with_the_reason(
    make_backend, model_dir, adapters, plugin
):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make_backend(fake)
    backend.register("math", adapters[0])
    path = "/tink/v1/commit" if plugin else "/v1/load_lora_adapter"
    fake.lose += [(path, False)] * 9
    with pytest.raises(errors.RequestTimeout):
        sample(backend, "math")
    fake.lose.clear()
    assert sample(backend, "math").version == 1


@BOTH
def test_restarted_server_gets_its_adapters_again_and_nothing_is_sampled_twice(
    make_backend, model_dir, adapters, plugin
):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make_backend(fake)
    for i in range(3):
        backend.register(f"a{i}", adapters[i])
        sample(backend, f"a{i}")
    fake.restart()
    fake.generated.clear()
    assert sample(backend, "a1").text in fake.served
    if plugin:  # the new incarnation says that the others are gone too
        assert list(backend._cache.resident()) == [sample(backend, "a1").text]
    assert sample(backend, "a2").version == sample(backend, "a0").version == 1
    assert len(fake.generated) == len(set(fake.generated)) + (1 if plugin else 0)


def test_server_that_forgets_every_time_is_an_error_not_a_loop(make_backend, model_dir, adapters):
    fake = fake_server(model_dir)
    backend = make_backend(fake)
    backend.register("math", adapters[0])
    fake.hooks["/v1/completions"] = fake.served.clear
    with pytest.raises(errors.EngineUnavailable, match="TINK_MAX_RESIDENT_ADAPTERS"):
        sample(backend, "math")
    assert fake.generated == [] and fake.count("/v1/completions") == MAX_TRIES


def test_another_process_that_loads_the_same_version_is_waited_for(
    make_backend, model_dir, adapters
):
    fake = fake_server(model_dir)
    backend = make_backend(fake)
    registered = backend.register("math", adapters[0])
    name = f"math.{registered.digest[:12]}@1"
    lease, _ = fake.leases.take(name.partition("@")[0], "somebody else")
    digest = []

    def finish():
        fake.hooks.clear()
        fake.served[name] = digest[0]
        fake.leases.release(lease.policy, lease.epoch)

    def learn_digest():
        from tink_rl.sampling.loaders import PluginLoader

        header, _ = PluginLoader(backend.client, backend.store)._pack(
            backend.registry.current("math"), backend.client.status()
        )
        digest.append(header.digest)

    learn_digest()
    threading.Timer(0.3, finish).start()
    assert sample(backend, "math").text == name
    assert fake.count("/tink/v1/commit") == 0 and fake.count("/tink/v1/join") >= 1


def test_other_bytes_under_our_name_are_never_sampled(make_backend, model_dir, adapters):
    for plugin in (True, False):
        fake = fake_server(model_dir, plugin=plugin)
        backend = make_backend(fake)
        registered = backend.register("math", adapters[0])
        fake.served[f"math.{registered.digest[:12]}@1"] = "something else"
        with pytest.raises(errors.DigestMismatch):
            sample(backend, "math")
        assert fake.generated == []


def test_two_registries_on_one_server_never_mix(make_backend, model_dir, adapters, tmp_path):
    fake = fake_server(model_dir)
    one, two = make_backend(fake), make_backend(fake, tink_store_dir=str(tmp_path / "other"))
    one.register("math", adapters[0])
    two.register("math", adapters[1])
    first, second = sample(one, "math"), sample(two, "math")
    assert first.text != second.text and first.version == second.version == 1
    assert sample(one, "math").text == first.text


def test_what_another_process_registers_and_unregisters_counts_at_once(
    make_backend, model_dir, adapters
):
    fake = fake_server(model_dir)
    one, two = make_backend(fake), make_backend(fake)
    one.register("math", adapters[0])
    assert sample(two, "math").version == 1
    one.register("math", adapters[1])
    assert sample(two, "math").version == 2
    two._cache.settle()
    assert len(fake.served) == 1  # the replaced version left, although `one` replaced it
    one.unregister("math")
    with pytest.raises(errors.UnknownAdapter):
        sample(two, "math")
    two._cache.settle()
    assert fake.served == {}


def test_stock_server_without_runtime_loading_says_which_switch_is_missing(
    make_backend, model_dir, adapters
):
    fake = fake_server(model_dir, plugin=False, runtime_loading=False)
    backend = make_backend(fake)
    backend.register("math", adapters[0])
    with refused("runtime_loading_off", match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        sample(backend, "math")
    assert sample(backend).text == "base"
    missing = backend.info()["missing"]
    assert len(missing) == 5 and any("no weight updates" in line for line in missing)
    with pytest.raises(errors.PluginMissing, match="tink-rl serve MODEL --mode full"):
        backend.init_communicator("cpu")


def test_what_stock_vllm_says_of_an_adapter_is_passed_on(make_backend, model_dir, adapters):
    fake = fake_server(model_dir, plugin=False)
    fake.lora_error = "LoRA rank 64 is greater than max_lora_rank 16"
    backend = make_backend(fake)
    backend.register("math", adapters[0])
    with pytest.raises(errors.BackendError, match="greater than max_lora_rank 16"):
        sample(backend, "math")


def _make_old(backend):
    for digest in backend.store.digests():
        os.utime(backend.store.open(digest), (0, 0))


def test_replaced_version_that_was_stored_long_ago_is_sampled_while_its_id_is_registered(
    make_backend, model_dir, adapters, monkeypatch
):
    backend = make_backend(fake_server(model_dir, plugin=False))
    first = backend.register("math", adapters[0])
    admitted = backend.resolver.find("math")
    _make_old(backend)
    backend.register("math", adapters[1])
    assert backend.resolver.with_target(admitted, lambda target: target.digest) == first.digest
    monkeypatch.setattr(sampling_backend, "KEPT_DAYS", -1)  # a week later
    backend.register("math", adapters[2])
    assert [sample(backend, f"math@{n}").version for n in (1, 2, 3)] == [1, 2, 3]


def test_bytes_leave_the_store_a_week_after_their_id_was_unregistered_if_no_server_lists_them(
    make_backend, model_dir, adapters, monkeypatch
):
    fake = fake_server(model_dir, plugin=False)
    backend = make_backend(fake)
    gone = backend.register("gone", adapters[0])
    listed = backend.register("other", adapters[1])
    sample(backend, "other")
    for name in ("gone", "other"):
        make_backend(fake).registry.unregister(
            name
        )  # by a process that does not know what the server holds
    _make_old(backend)
    current = backend.register("math", adapters[2])
    assert gone.digest in backend.store.digests()
    monkeypatch.setattr(sampling_backend, "KEPT_DAYS", -1)  # a week later
    backend.register("math", adapters[2])
    assert backend.store.digests() == sorted([listed.digest, current.digest])


# -- the base ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sibling(tmp_path_factory):
    """A base of the same shapes as the one that the adapters fit, with other weights."""
    return make_model("qwen3", tmp_path_factory.mktemp("sibling"), seed=1)


def restart_on(fake, base):
    """The server comes back with another base under the same name."""
    fake.root, fake.fingerprint = str(base), base_fingerprint(base)
    fake.restart()


@BOTH
def test_adapter_is_refused_on_a_sibling_of_the_base_that_it_was_registered_for(
    make_backend, model_dir, adapters, sibling, plugin
):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make_backend(fake)
    registered = backend.register("math", adapters[0])
    backend.register("late", adapters[1])
    assert sample(backend, "math").version == 1
    restart_on(fake, sibling)
    with pytest.raises(errors.BaseMismatch, match="adapter 'late'"):
        sample(backend, "late")  # no refused name has said that the server is new
    for process in (backend, make_backend(fake)):
        with pytest.raises(
            errors.BaseMismatch, match=r"adapter 'math'.*register_lora_adapter"
        ) as no:
            sample(process, "math")
        assert no.value.details["given"] == registered.base_fingerprint
        assert no.value.details["expected"] == fake.fingerprint
    assert fake.served == {}
    again = backend.register("math", adapters[0])
    assert (again.version, again.base_fingerprint) == (1, fake.fingerprint)
    assert sample(backend, "math").version == 1


def test_base_that_changes_after_the_look_is_left_to_the_server_to_refuse(
    make_backend, model_dir, adapters
):
    from tink_rl.sampling.loaders import PluginLoader

    backend = make_backend(fake_server(model_dir))
    wanted = backend.register("math", adapters[0])
    later = replace(backend.client.status(), base_fingerprint="e" * 32)
    header, _ = PluginLoader(backend.client, backend.store)._pack(wanted, later)
    assert header.base_fingerprint == wanted.base_fingerprint != "e" * 32


def test_adapter_that_was_registered_unchecked_is_held_against_a_base_that_can_be_read(
    make_backend, model_dir, adapters, tmp_path
):
    fake = FakeVLLM("org/unknown-model", plugin=False)
    backend = make_backend(fake, tink_allow_unverified_base=True)
    assert backend.register("math", adapters[0]).base_fingerprint is None
    assert sample(backend, "math").version == 1
    fake.root = str(make_model("qwen3", tmp_path / "small", hidden_size=64))
    fake.restart()
    with pytest.raises(errors.BaseMismatch, match="trained on another base"):
        sample(backend, "math")
    fake.root = str(model_dir("qwen3"))
    assert sample(backend, "math").version == 1


def test_damaged_store_is_never_sent_to_a_server(make_backend, model_dir, adapters):
    for plugin in (True, False):
        fake = fake_server(model_dir, plugin=plugin)
        backend = make_backend(fake)
        registered = backend.register("math", adapters[0])
        file = backend.store.open(registered.digest) / "adapter_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.chmod(0o600)
        file.write_bytes(data)
        with pytest.raises(errors.StoreDamaged):
            sample(backend, "math")
        assert fake.served == {}
        data[-1] ^= 1
        file.write_bytes(data)
