"""Which adapters lie on a server: the table's races, and both loaders against a server that loses replies."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.fake_vllm import FakeVLLM
from tests.policies import PeftTwin
from tests.refusals import refused
from tests.tiny_models import make_model
from tink_rl import errors, launch, serve_options, vllm_backend
from tink_rl.adapters.registry import Registration
from tink_rl.policy.fingerprint import base_fingerprint
from tink_rl.publish.publisher import WeightSync
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.sampling import backend as sampling_backend
from tink_rl.sampling import default, server_view
from tink_rl.sampling.cache import AdapterCache
from tink_rl.sampling.resolver import MAX_TRIES
from tink_rl.vllm_backend import VLLMBackend

# -- the table ----------------------------------------------------------------------------------------


def version(name: str, number: int = 1) -> Registration:
    return registration(name, number, f"{number:012x}" + "0" * 52)


def registration(adapter_id: str, number: int, digest: str) -> Registration:
    return Registration(
        adapter_id=adapter_id,
        version=number,
        digest=digest,
        lora_path="/adapters/x",
        registered_at=0.0,
        active=True,
    )


class CountingLoader:
    """A server in memory that notices what must never happen."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.there: set[str] = set()
        self.loads: list[str] = []
        self.drops: list[str] = []
        self.users: dict[str, int] = {}
        self.wrong: list[str] = []
        self.load_may_go = threading.Event()
        self.drop_may_go = threading.Event()
        self.load_may_go.set()
        self.drop_may_go.set()
        self.load_began = threading.Event()
        self.drop_began = threading.Event()
        self.failures: list[errors.TinkError] = []

    def load(self, wanted: Registration) -> None:
        self.load_began.set()
        assert self.load_may_go.wait(10)
        with self.lock:
            self.loads.append(wanted.server_name)
            if self.failures:
                raise self.failures.pop(0)
            if wanted.server_name in self.there:
                self.wrong.append(f"{wanted.server_name} was loaded twice")
            self.there.add(wanted.server_name)

    def drop(self, name: str) -> None:
        self.drop_began.set()
        assert self.drop_may_go.wait(10)
        with self.lock:
            if self.users.get(name):
                self.wrong.append(f"{name} was dropped in use")
            self.drops.append(name)
            self.there.discard(name)

    def use(self, name: str, change: int) -> None:
        with self.lock:
            if name not in self.there:
                self.wrong.append(f"{name} was used and is not there")
            self.users[name] = self.users.get(name, 0) + change


@pytest.fixture
def loader():
    return CountingLoader()


def table(loader, capacity=4, **more):
    return AdapterCache(loader, capacity=capacity, **more)


def test_name_on_the_server_is_unique_per_bytes():
    one = registration("math", 3, "0123456789abcdef" * 4)
    assert one.server_name == "math.0123456789ab@3"


def test_concurrent_acquires_of_one_name_load_it_once(loader):
    cache = table(loader)
    loader.load_may_go.clear()
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(cache.acquire, version("a")) for _ in range(16)]
        assert loader.load_began.wait(5) and cache.pin_if_resident(version("a")) is None
        loader.load_may_go.set()
        entries = [future.result() for future in waiting]
    assert loader.loads == [version("a").server_name] and len({id(e) for e in entries}) == 1
    assert cache.resident() == {version("a").server_name: 16}


def test_failed_load_is_told_to_everybody_who_waited_and_tried_again_by_the_next(loader):
    cache = table(loader)
    loader.failures = [errors.RankExceeded("too large")]
    loader.load_may_go.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(cache.acquire, version("a")) for _ in range(8)]
        assert loader.load_began.wait(5)
        loader.load_may_go.set()
        failures = [future.exception() for future in waiting]
    told = [failure for failure in failures if isinstance(failure, errors.RankExceeded)]
    assert len(told) >= 1 and len(told) == len([f for f in failures if f is not None])
    cache.release(cache.acquire(version("a")))
    assert version("a").server_name in cache.resident()


def test_least_recently_used_leaves_first(loader):
    cache = table(loader, capacity=2)
    for name in ("a", "b", "a", "c"):
        cache.release(cache.acquire(version(name)))
    cache.settle()
    assert loader.drops == [version("b").server_name]
    assert loader.there == {version("a").server_name, version("c").server_name}


def test_pinned_ones_may_exceed_the_capacity_and_leave_when_released(loader):
    cache = table(loader, capacity=1)
    pinned = [cache.acquire(version(name)) for name in "abc"]
    cache.settle()
    assert loader.drops == [] and len(cache.resident()) == 3
    for entry in pinned:
        cache.release(entry)
    cache.settle()
    assert loader.there == {version("c").server_name}


def test_replaced_version_is_dropped_only_after_its_last_request(loader):
    cache = table(loader)
    first, second = (cache.acquire(version("a", 1)) for _ in range(2))
    cache.retire("a", keep=2)
    cache.release(first)
    cache.settle()
    assert loader.drops == []
    cache.release(second)
    cache.settle()
    assert loader.drops == [version("a", 1).server_name]


def test_retiring_spares_other_ids_and_the_version_to_keep(loader):
    cache = table(loader)
    for wanted in (version("a", 1), version("a", 2), version("b", 1)):
        cache.release(cache.acquire(wanted))
    cache.retire("a", keep=2)
    cache.settle()
    assert loader.there == {version("a", 2).server_name, version("b", 1).server_name}
    cache.retire("a")
    cache.settle()
    assert loader.there == {version("b", 1).server_name}


def test_acquire_while_it_is_being_dropped_waits_and_loads_again(loader):
    cache = table(loader)
    cache.release(cache.acquire(version("a")))
    loader.drop_may_go.clear()
    cache.retire("a")
    assert loader.drop_began.wait(5) and cache.pin_if_resident(version("a")) is None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.acquire, version("a"))
        assert not waiting.done()
        loader.drop_may_go.set()
        cache.release(waiting.result(5))
    assert loader.loads == [version("a").server_name] * 2 and loader.wrong == []


def test_drop_that_fails_is_logged_and_forgotten(loader, caplog):
    cache = table(loader)
    cache.release(cache.acquire(version("a")))

    def fail(name):
        raise errors.ServerUnreachable("gone")

    loader.drop = fail
    cache.retire("a")
    cache.settle()
    assert cache.resident() == {} and "was not dropped: gone" in caplog.text


def test_load_and_drop_that_never_end_are_errors_within_the_deadline(loader):
    cache = table(loader, wait_s=0.05)
    loader.load_may_go.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.acquire, version("a"))
        assert loader.load_began.wait(5)
        with pytest.raises(errors.DeadlineExceeded, match="its load did not end within"):
            cache.acquire(version("a"))
        loader.load_may_go.set()
        cache.release(first.result(5))
    loader.drop_may_go.clear()
    cache.retire("a")
    with pytest.raises(errors.DeadlineExceeded, match="its drop did not end within"):
        cache.acquire(version("a"))
    loader.drop_may_go.set()


def test_forgotten_entry_is_loaded_again_and_its_pins_harm_nobody(loader):
    cache = table(loader)
    old = cache.acquire(version("a"))
    loader.there.clear()  # the server was restarted
    cache.discard(old)
    new = cache.acquire(version("a"))
    cache.discard(old)  # a second request that failed on the old life
    cache.release(old)
    assert new is not old and cache.resident() == {version("a").server_name: 1}
    cache.discard_all()
    assert cache.resident() == {}


def test_releases_after_the_table_was_closed_harm_nobody_and_leave_nothing_half_dropped(loader):
    cache = table(loader, capacity=1)
    for name in ("a", "b"):
        cache.release(cache.acquire(version(name)))  # "a" is dropped
    loader.drop_may_go.clear()
    held = cache.acquire(version("c"))  # so "b" is being dropped
    cache.release(cache.acquire(version("d")))  # its drop waits behind that of "b"
    cache.close()
    cache.retire("c")
    cache.release(held)
    assert version("c").server_name not in cache.resident()
    loader.drop_may_go.set()
    for name in "bcd":
        cache.release(cache.acquire(version(name)))


def test_pinned_versions_are_never_dropped_under_random_use(loader):
    cache = table(loader, capacity=3)
    names = [f"a{i}" for i in range(8)]

    def work(seed):
        draw = random.Random(seed)
        for _ in range(150):
            wanted = version(draw.choice(names), draw.choice((1, 1, 2)))
            entry = cache.acquire(wanted)
            loader.use(wanted.server_name, 1)
            if draw.random() < 0.05:
                cache.retire(wanted.adapter_id, keep=draw.choice((1, 2)))
            if draw.random() < 0.1:
                time.sleep(0.0005)
            loader.use(wanted.server_name, -1)
            cache.release(entry)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    cache.settle()
    assert loader.wrong == [] and len(loader.drops) > 20
    assert len(cache.resident()) <= 3 and set(cache.resident()) == loader.there


# -- a backend over a server that misbehaves ------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    """Three PEFT directories of the tiny base."""
    twin, root = PeftTwin(model_dir("qwen3")), tmp_path_factory.mktemp("adapters")
    for seed in range(3):
        twin.randomise(seed)
        twin.model.save_pretrained(root / str(seed))
    return [root / str(seed) for seed in range(3)]


@pytest.fixture
def make(model_dir, tmp_path):
    """`make(fake, **settings)`: a backend of the fake server; all of them share one store."""
    opened = []

    def make(fake, **settings):
        backend = VLLMBackend(
            {"tink_store_dir": str(tmp_path / "store"), **settings},
            client=VLLMClient("http://fake:1", token="t" * 20, transport=fake.transport()),
        )
        opened.append(backend)
        return backend

    yield make
    for backend in opened:
        backend.close()


def fake_server(model_dir, **options):
    return FakeVLLM(str(model_dir("qwen3")), **options)


BOTH = pytest.mark.parametrize("plugin", [True, False], ids=["plugin", "stock"])


def sample(backend, name=None):
    [[found]] = backend.generate([[5, 6]], name, max_tokens=1)
    return found


@BOTH
def test_adapter_is_loaded_on_first_use_and_sampled_under_its_own_name(
    make, model_dir, adapters, plugin
):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make(fake)
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
def test_lost_reply_of_a_load_is_settled_by_looking(make, model_dir, adapters, plugin, handled):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make(fake)
    backend.register("math", adapters[0])
    path = "/tink/v1/commit" if plugin else "/v1/load_lora_adapter"
    fake.lose.append((path, handled))
    assert sample(backend, "math").version == 1
    assert fake.count(path) == (1 if handled else 2) and len(fake.served) == 1


@BOTH
def test_load_whose_reply_is_always_lost_ends_with_the_reason(make, model_dir, adapters, plugin):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make(fake)
    backend.register("math", adapters[0])
    path = "/tink/v1/commit" if plugin else "/v1/load_lora_adapter"
    fake.lose += [(path, False)] * 9
    with pytest.raises(errors.RequestTimeout):
        sample(backend, "math")
    fake.lose.clear()
    assert sample(backend, "math").version == 1


@BOTH
def test_restarted_server_gets_its_adapters_again_and_nothing_is_sampled_twice(
    make, model_dir, adapters, plugin
):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make(fake)
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


def test_server_that_forgets_every_time_is_an_error_not_a_loop(make, model_dir, adapters):
    fake = fake_server(model_dir)
    backend = make(fake)
    backend.register("math", adapters[0])
    fake.hooks["/v1/completions"] = fake.served.clear
    with pytest.raises(errors.EngineUnavailable, match="TINK_MAX_RESIDENT_ADAPTERS"):
        sample(backend, "math")
    assert fake.generated == [] and fake.count("/v1/completions") == MAX_TRIES


def test_another_process_that_loads_the_same_version_is_waited_for(make, model_dir, adapters):
    fake = fake_server(model_dir)
    backend = make(fake)
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


def test_other_bytes_under_our_name_are_never_sampled(make, model_dir, adapters):
    for plugin in (True, False):
        fake = fake_server(model_dir, plugin=plugin)
        backend = make(fake)
        registered = backend.register("math", adapters[0])
        fake.served[f"math.{registered.digest[:12]}@1"] = "something else"
        with pytest.raises(errors.DigestMismatch):
            sample(backend, "math")
        assert fake.generated == []


def test_two_registries_on_one_server_never_mix(make, model_dir, adapters, tmp_path):
    fake = fake_server(model_dir)
    one, two = make(fake), make(fake, tink_store_dir=str(tmp_path / "other"))
    one.register("math", adapters[0])
    two.register("math", adapters[1])
    first, second = sample(one, "math"), sample(two, "math")
    assert first.text != second.text and first.version == second.version == 1
    assert sample(one, "math").text == first.text


def test_what_another_process_registers_and_unregisters_counts_at_once(make, model_dir, adapters):
    fake = fake_server(model_dir)
    one, two = make(fake), make(fake)
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
    make, model_dir, adapters
):
    fake = fake_server(model_dir, plugin=False, runtime_loading=False)
    backend = make(fake)
    backend.register("math", adapters[0])
    with refused("runtime_loading_off", match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        sample(backend, "math")
    assert sample(backend).text == "base"
    missing = backend.info()["missing"]
    assert len(missing) == 5 and any("no weight updates" in line for line in missing)
    with pytest.raises(errors.PluginMissing, match="tink-rl serve MODEL --mode full"):
        backend.init_communicator("cpu")


def test_what_stock_vllm_says_of_an_adapter_is_passed_on(make, model_dir, adapters):
    fake = fake_server(model_dir, plugin=False)
    fake.lora_error = "LoRA rank 64 is greater than max_lora_rank 16"
    backend = make(fake)
    backend.register("math", adapters[0])
    with pytest.raises(errors.BackendError, match="greater than max_lora_rank 16"):
        sample(backend, "math")


def _make_old(backend):
    for digest in backend.store.digests():
        os.utime(backend.store.open(digest), (0, 0))


def test_replaced_version_that_was_stored_long_ago_is_sampled_while_its_id_is_registered(
    make, model_dir, adapters, monkeypatch
):
    backend = make(fake_server(model_dir, plugin=False))
    first = backend.register("math", adapters[0])
    admitted = backend.resolver.find("math")
    _make_old(backend)
    backend.register("math", adapters[1])
    assert backend.resolver.with_target(admitted, lambda target: target.digest) == first.digest
    monkeypatch.setattr(sampling_backend, "KEPT_DAYS", -1)  # a week later
    backend.register("math", adapters[2])
    assert [sample(backend, f"math@{n}").version for n in (1, 2, 3)] == [1, 2, 3]


def test_bytes_leave_the_store_a_week_after_their_id_was_unregistered_if_no_server_lists_them(
    make, model_dir, adapters, monkeypatch
):
    fake = fake_server(model_dir, plugin=False)
    backend = make(fake)
    gone = backend.register("gone", adapters[0])
    listed = backend.register("other", adapters[1])
    sample(backend, "other")
    for name in ("gone", "other"):
        make(fake).registry.unregister(
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
    make, model_dir, adapters, sibling, plugin
):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make(fake)
    registered = backend.register("math", adapters[0])
    backend.register("late", adapters[1])
    assert sample(backend, "math").version == 1
    restart_on(fake, sibling)
    with pytest.raises(errors.BaseMismatch, match="adapter 'late'"):
        sample(backend, "late")  # no refused name has said that the server is new
    for process in (backend, make(fake)):
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
    make, model_dir, adapters
):
    from tink_rl.sampling.loaders import PluginLoader

    backend = make(fake_server(model_dir))
    wanted = backend.register("math", adapters[0])
    later = replace(backend.client.status(), base_fingerprint="e" * 32)
    header, _ = PluginLoader(backend.client, backend.store)._pack(wanted, later)
    assert header.base_fingerprint == wanted.base_fingerprint != "e" * 32


def test_adapter_that_was_registered_unchecked_is_held_against_a_base_that_can_be_read(
    make, model_dir, adapters, tmp_path
):
    fake = FakeVLLM("org/unknown-model", plugin=False)
    backend = make(fake, tink_allow_unverified_base=True)
    assert backend.register("math", adapters[0]).base_fingerprint is None
    assert sample(backend, "math").version == 1
    fake.root = str(make_model("qwen3", tmp_path / "small", hidden_size=64))
    fake.restart()
    with pytest.raises(errors.BaseMismatch, match="trained on another base"):
        sample(backend, "math")
    fake.root = str(model_dir("qwen3"))
    assert sample(backend, "math").version == 1


def test_damaged_store_is_never_sent_to_a_server(make, model_dir, adapters):
    for plugin in (True, False):
        fake = fake_server(model_dir, plugin=plugin)
        backend = make(fake)
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


# -- names ----------------------------------------------------------------------------------------------


def test_trainers_versions_and_static_names_can_be_sampled(make, model_dir):
    fake = fake_server(model_dir)
    fake.served["policy@17"] = "9f" * 32
    backend = make(fake)
    found = sample(backend, "policy@17")
    assert (found.text, found.version, found.digest) == ("policy@17", 17, "9f" * 32)
    fake.served["policy@18"] = fake.served.pop("policy@17")
    assert sample(backend, "policy@18").version == 18
    with pytest.raises(errors.UnknownAdapter, match="policy@17"):
        sample(backend, "policy@17")


def test_merged_policy_means_that_there_is_no_base(make, model_dir):
    fake = fake_server(model_dir)
    fake.served["policy@3"], fake.merged = "9f" * 32, "policy@3"
    backend = make(fake)
    with pytest.raises(errors.ModeUnavailable, match="policy@3 is folded into the weights"):
        sample(backend)
    assert sample(backend, "policy@3").version == 3


def test_whole_weights_that_were_published_are_the_base(make, model_dir):
    fake = fake_server(model_dir)
    backend = make(fake)
    assert (sample(backend).text, sample(backend).version) == ("base", None)
    fake.served["policy@4"], fake.full = "9f" * 32, "policy@4"
    found = sample(backend)
    assert (found.text, found.version, found.digest) == ("policy@4", 4, "9f" * 32)


def test_server_names_of_other_registrations_are_not_model_ids(make, model_dir, adapters):
    fake = fake_server(model_dir)
    backend = make(fake)
    backend.register("math", adapters[0])
    name = sample(backend, "math").text
    with pytest.raises(errors.UnknownAdapter):
        sample(backend, name)


def test_adapter_that_took_the_name_of_the_base_while_the_server_was_away_is_refused(
    make, model_dir, adapters
):
    fake = fake_server(model_dir)
    backend = make(fake, tink_base_model=str(model_dir("qwen3")))
    fake.away = True
    for name in ("base", "static"):
        backend.register(name, adapters[0])
    fake.away = False
    fake.served["static"] = "9f" * 32
    for process in (backend, make(fake)):
        for name in ("base", "static"):
            with pytest.raises(errors.AdapterConflict, match=f"unregister_lora_adapter.'{name}'"):
                sample(process, name)
        with pytest.raises(errors.AdapterConflict):
            process.resolver.resolve("base")
    for name in ("base", "static"):
        with pytest.raises(errors.AdapterConflict):
            make(fake).generate("text, so that nothing was known", name, max_tokens=1)
    assert fake.generated == [] and set(fake.served) == {"static"}
    assert sample(backend).text == "base"
    for name in ("base", "static"):
        backend.unregister(name)
        assert sample(backend, name).text == name


# -- a server that changes ------------------------------------------------------------------------------


def until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@BOTH
def test_restart_with_other_limits_under_the_same_names_is_noticed(
    make, model_dir, adapters, plugin, monkeypatch
):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make(fake)
    backend.register("math", adapters[0])
    sample(backend, "math")
    fake.max_model_len = 512
    fake.restart()
    sample(backend)
    assert backend.server.limits().max_model_len == 256
    monkeypatch.setattr(backend.server, "_stale_at", 0.0)
    sample(backend)
    until(lambda: backend.server.limits().max_model_len == 512)
    if plugin:  # by its incarnation
        until(lambda: backend._cache.resident() == {})


def test_requests_wait_for_no_look_and_one_look_is_in_flight(make, model_dir, monkeypatch):
    fake = fake_server(model_dir)
    backend = make(fake)
    sample(backend)
    looks, go = fake.count("/v1/models"), threading.Event()
    fake.hooks["/v1/models"] = lambda: go.wait(10)
    monkeypatch.setattr(server_view, "STALE_S", 0.0)
    monkeypatch.setattr(backend.server, "_stale_at", 0.0)
    with ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        list(pool.map(lambda _: sample(backend), range(40)))
        assert time.monotonic() - began < 5
    assert [t.name for t in threading.enumerate()].count("tink-look") == 1
    monkeypatch.setattr(server_view, "STALE_S", 60.0)
    go.set()
    until(lambda: fake.count("/v1/models") == looks + 1 and not backend.server._looking.locked())
    sample(backend)
    assert fake.count("/v1/models") == looks + 1


def test_server_that_is_away_leaves_what_is_known_and_is_looked_at_again_later(
    make, model_dir, monkeypatch
):
    fake = fake_server(model_dir)
    backend = make(fake)
    sample(backend)
    fake.away = True
    monkeypatch.setattr(backend.server, "_stale_at", 0.0)
    assert backend.server.limits().max_model_len == 256
    until(lambda: backend.server._stale_at > 0 and not backend.server._looking.locked())
    assert backend.server.limits().max_model_len == 256


def test_look_that_began_before_another_changes_nothing_when_it_ends(make, model_dir):
    fake = fake_server(model_dir)
    backend = make(fake)
    sample(backend)
    began, go = threading.Event(), threading.Event()
    first = [True]

    def hold():
        if first.pop() if first else False:
            began.set()
            assert go.wait(10)

    fake.after["/tink/v1/status"] = hold
    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(backend.server.view, fresh=True)
        assert began.wait(10)
        fake.max_model_len = 512
        fake.restart()
        backend.server.view(fresh=True)
        go.set()
        assert old.result(10).max_model_len == 256
    assert backend.server.limits().max_model_len == 512


# -- registering ------------------------------------------------------------------------------------------


def test_missing_path_and_unreachable_server_keep_the_seeds_sentences(make, model_dir, tmp_path):
    backend = make(fake_server(model_dir))
    path = tmp_path / "nothing"
    with pytest.raises(ValueError, match="LoRA path does not exist: ") as caught:
        backend.register("math", path)
    assert str(caught.value).splitlines()[0] == f"LoRA path does not exist: {path}"
    lonely = VLLMBackend({"port": 9, "timeout": 0.2, "tink_store_dir": str(tmp_path / "s")})
    for ask in (lonely.connect, lambda: lonely.generate("a"), lambda: lonely.register("a", path)):
        with pytest.raises(ConnectionError) as unreachable:
            ask()
        first, second = str(unreachable.value).splitlines()
        assert first == "The vLLM server can't be reached at http://127.0.0.1:9"
        assert "`tink-rl serve MODEL" in second
    lonely.close()


def test_adapter_needs_a_base_that_can_be_read_or_the_word_of_the_user(
    make, model_dir, adapters, tmp_path
):
    fake = FakeVLLM("org/unknown-model")
    with pytest.raises(errors.BaseMismatch, match="TINK_BASE_MODEL"):
        make(fake).register("math", adapters[0])
    assert make(fake, tink_allow_unverified_base=True).register("a", adapters[0]).version == 1
    assert make(fake, tink_base_model=str(model_dir("qwen3"))).register("b", adapters[0])
    smaller = make_model("qwen3", tmp_path / "small", hidden_size=64)
    with pytest.raises(errors.BaseMismatch):
        make(FakeVLLM(str(smaller))).register("c", adapters[0])


def test_registering_needs_no_server_if_the_base_is_named(model_dir, adapters, tmp_path):
    with VLLMBackend(
        {
            "port": 9,
            "timeout": 0.2,
            "tink_store_dir": str(tmp_path / "s"),
            "tink_base_model": str(model_dir("qwen3")),
        }
    ) as backend:
        assert backend.register("math", adapters[0]).version == 1
        assert backend.info()["reachable"] is False


def test_rank_above_the_servers_slots_is_refused_at_once(make, model_dir, tmp_path):
    twin = PeftTwin(model_dir("qwen3"), r=32, target_modules=["q_proj"])
    twin.model.save_pretrained(tmp_path / "large")
    with pytest.raises(errors.RankExceeded):
        make(fake_server(model_dir)).register("math", tmp_path / "large")
    with pytest.raises(errors.RankExceeded):
        make(fake_server(model_dir), max_lora_rank=64).register("math", tmp_path / "large")


@BOTH
def test_rank_above_what_the_user_allows_is_refused_though_the_server_has_room(
    make, model_dir, adapters, plugin
):
    fake = fake_server(model_dir, plugin=plugin)
    assert make(fake).register("math", adapters[0]).version == 1  # of rank 8
    with pytest.raises(errors.RankExceeded):
        make(fake, max_lora_rank=1).register("math", adapters[0])


def test_adapters_that_are_switched_off_are_not_sampled_and_the_servers_own_names_are(
    make, model_dir, adapters
):
    fake = fake_server(model_dir)
    fake.served["policy@17"] = "9f" * 32
    make(fake).register("math", adapters[0])
    off = make(fake, enable_lora=False)
    for name in ("math", "math@1"):
        with pytest.raises(errors.ConfigError, match="VLLM_ENABLE_LORA=true"):
            sample(off, name)
    with pytest.raises(errors.UnknownAdapter):
        sample(off, "nobody")
    assert (sample(off).text, sample(off, "policy@17").text) == ("base", "policy@17")


def test_ids_that_are_taken_switched_off_or_malformed_are_refused(make, model_dir, adapters):
    backend = make(fake_server(model_dir))
    for bad in ("", "../x", "a@1", "x" * 101, "ü", "a\0b"):
        with pytest.raises(errors.BadRequest):
            backend.register(bad, adapters[0])
    with pytest.raises(errors.BadRequest, match="itself serves"):
        backend.register("base", adapters[0])
    with pytest.raises(errors.ConfigError, match="VLLM_ENABLE_LORA"):
        make(fake_server(model_dir), enable_lora=False).register("a", adapters[0])
    with pytest.raises(errors.UnknownAdapter):
        backend.unregister("nobody")


def test_paths_outside_the_adapter_roots_are_refused(make, model_dir, adapters, tmp_path):
    backend = make(fake_server(model_dir), tink_adapter_roots=str(tmp_path))
    with pytest.raises(errors.PathNotAllowed):
        backend.register("math", adapters[0])
    root = adapters[0].parent
    assert backend.register("math", adapters[0], roots=[root]).version == 1


# -- the module's functions ---------------------------------------------------------------------------


def test_functions_are_a_thin_face_over_one_default_object(make, model_dir, adapters, monkeypatch):
    import vllm_backend as seed

    fake = fake_server(model_dir)
    monkeypatch.setattr(default, "_default", make(fake))
    found = seed.register_lora_adapter(adapter_id="my_lora", lora_path=str(adapters[0]))
    assert (found["adapter_id"], found["version"]) == ("my_lora", 1)
    assert seed.list_lora_adapters() == [{"adapter_id": "my_lora", "lora_path": str(adapters[0])}]
    [[answer]] = seed.generate_with_vllm(["Once"], adapter_id="my_lora", max_tokens=1)
    assert answer["text"].startswith("my_lora.") and answer["version"] == 1
    assert seed.get_client_info()["adapters"] == 1
    seed.unregister_lora_adapter("my_lora")
    assert seed.list_lora_adapters() == []
    seed.close_communicator()


def test_initialize_replaces_the_default_only_if_the_server_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(default, "_default", None)
    with pytest.raises(ConnectionError, match=r"can.t be reached at http://127\.0\.0\.1:9\n"):
        vllm_backend.initialize_vllm_client(
            {"port": 9, "timeout": 0.2, "tink_store_dir": str(tmp_path)}
        )
    assert default._default is None


@pytest.fixture
def initialize(monkeypatch, model_dir, tmp_path):
    """`initialize(fake, **settings)`: `initialize_vllm_client` for that server."""
    monkeypatch.setattr(default, "_default", None)
    made = []

    def initialize(fake, **settings):
        def client(settings, token, api_key):
            return VLLMClient(settings.url, token=token, transport=fake.transport())

        monkeypatch.setattr(sampling_backend, "_client", client)
        given = {"tink_store_dir": str(tmp_path / "store"), **settings}
        made.append(vllm_backend.initialize_vllm_client(given))
        return made[-1]

    yield initialize
    for backend in made:
        backend.close()


def test_initialize_with_the_same_settings_keeps_the_backend_and_asks_its_server(
    initialize, model_dir, tmp_path
):
    fake = fake_server(model_dir)
    token = tmp_path / "token"
    token.write_text("t" * 32)
    token.chmod(0o600)
    settings = {"timeout": 0.2, "tink_token_file": str(token)}
    fake.hooks["/health"] = lambda: time.sleep(0.02)
    with ThreadPoolExecutor(8) as pool:
        [first] = set(pool.map(lambda _: initialize(fake, **settings), range(8)))
    assert vllm_backend.default_backend() is first and not first._closed
    fake.away = True
    with pytest.raises(ConnectionError):
        initialize(fake, **settings)
    fake.away = False
    token.write_text("u" * 32)  # the server was started anew
    second = initialize(fake, **settings)
    assert second is not first and first._closed
    second.close()
    assert initialize(fake, **settings) is not second


def test_initialize_closes_the_old_backend_after_its_last_call(initialize, model_dir):
    old_fake, new_fake = fake_server(model_dir), fake_server(model_dir)
    old = initialize(old_fake)
    entered, go = threading.Semaphore(0), threading.Event()

    def hold():
        entered.release()
        assert go.wait(10)

    old_fake.hooks["/v1/completions"] = hold
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(vllm_backend.generate_with_vllm, [[5, 6]], None, 1) for _ in range(8)]
        assert all(entered.acquire(timeout=10) for _ in calls)
        new = initialize(new_fake, port=8123)
        assert vllm_backend.default_backend() is new and not old._closed
        assert vllm_backend.generate_with_vllm([[5, 6]], None, 1)[0][0]["text"] == "base"
        go.set()
        assert all(call.result(10)[0][0]["text"] == "base" for call in calls)
    until(lambda: old._closed)
    assert len(old_fake.generated) == 8 and len(new_fake.generated) == 1


def test_no_call_is_lost_while_the_backend_is_replaced_again_and_again(initialize, model_dir):
    fake = fake_server(model_dir)
    backends = [initialize(fake)]
    done = threading.Event()

    def work(_):
        count = 0
        while not done.is_set():
            assert vllm_backend.generate_with_vllm([[5, 6]], None, 1)[0][0]["text"] == "base"
            count += 1
        return count

    with ThreadPoolExecutor(8) as pool:
        counts = [pool.submit(work, i) for i in range(8)]
        for number in range(20):
            backends.append(initialize(fake, port=8100 + number))
        done.set()
        assert sum(count.result(30) for count in counts) == len(fake.generated) > 0
    until(lambda: all(backend._closed for backend in backends[:-1]))
    assert not backends[-1]._closed


def test_call_that_took_the_old_backend_just_before_it_was_replaced_ends_well(
    initialize, model_dir, monkeypatch
):
    fake = fake_server(model_dir)
    old, take = initialize(fake), vllm_backend.default_backend

    def take_and_be_late():
        found = take()
        if found is old:
            initialize(fake, port=8123)
        return found

    monkeypatch.setattr(default, "default_backend", take_and_be_late)
    assert vllm_backend.generate_with_vllm([[5, 6]], None, 1)[0][0]["text"] == "base"
    until(lambda: old._closed)
    with default.lent() as present:
        initialize(fake, port=8124)
        time.sleep(0.05)
        assert not present._closed
    until(lambda: present._closed)


def test_call_that_never_ends_keeps_an_old_backend_for_its_request_timeout(initialize, model_dir):
    old = initialize(fake_server(model_dir), tink_request_timeout=0.1)
    with old.calls.one():
        initialize(fake_server(model_dir), port=8123)
        until(lambda: old._closed)


def test_serving_without_vllm_says_what_the_seed_says_and_what_to_install(model_dir, monkeypatch):
    monkeypatch.setattr(serve_options, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as caught:
        launch.VLLMServer(model_dir("qwen3")).start()
    first, second = str(caught.value).splitlines()
    assert first == "vLLM is not available" and "pip install 'tink-rl[gpu]'" in second


def test_sampling_and_the_worker_need_neither_vllm_nor_trl_nor_peft():
    code = (
        "import sys\nfor m in ('vllm', 'trl', 'peft'): sys.modules[m] = None\n"
        "import vllm_backend, tink_rl.worker.backends.vllm\n"
        "print(callable(vllm_backend.generate_with_vllm), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"


def test_the_seeds_names_are_all_there():
    names = (
        "initialize_vllm_client generate_with_vllm register_lora_adapter unregister_lora_adapter "
        "list_lora_adapters update_model_weights init_communicator close_communicator "
        "reset_prefix_cache get_client_info"
    )
    import vllm_backend as seed

    for name in names.split():
        assert getattr(seed, name) is getattr(vllm_backend, name)


def test_device_that_is_not_there_is_named(make, model_dir, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = make(fake_server(model_dir))
    for device in ("cuda", "cuda:1", "tpu"):
        with pytest.raises(errors.ConfigError, match=f"device='{device}'.*expected 'cpu'"):
            backend.init_communicator(device)


def test_communicator_that_could_not_be_opened_is_opened_anew(make, model_dir, monkeypatch):
    calls = []

    def open_(sync):
        calls.append("open")
        if calls == ["open"]:
            raise errors.LeaseHeld("somebody else updates the weights")

    monkeypatch.setattr(WeightSync, "open", open_)
    monkeypatch.setattr(WeightSync, "close", lambda sync: calls.append("close"))
    backend = make(fake_server(model_dir))
    with pytest.raises(errors.LeaseHeld):
        backend.init_communicator("cpu")
    assert calls == ["open", "close"] and not backend.info()["communicator"]
    backend.init_communicator("cpu")
    assert calls == ["open", "close", "open"] and backend.info()["communicator"]
    backend.init_communicator("cpu")
    assert len(calls) == 3


def test_look_that_is_doubted_while_it_is_taken_is_taken_again(monkeypatch):
    known = server_view.KnownServer(VLLMClient("http://127.0.0.1:9"), None, lambda: None)
    views = [
        server_view.ServerView(plugin=False, base="base", root="base", max_model_len=length)
        for length in (8, 16)
    ]
    looks = iter(views)

    def fetch_view(client):
        view = next(looks)
        if view is views[0]:
            known.invalidate()  # another request was refused a name meanwhile
        return view

    monkeypatch.setattr(server_view, "fetch_view", fetch_view)
    assert known.view() is views[1] and known.cached() is views[1]
