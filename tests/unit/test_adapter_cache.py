"""Which adapter versions lie on a server: the races of the cache."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tink_rl import errors
from tink_rl.adapters.registry import Registration
from tink_rl.sampling.cache import AdapterCache


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
