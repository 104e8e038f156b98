"""A server that changes, and how often it is looked at."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tests.sampling_rig import BOTH, fake_server, sample
from tests.worker_rig import wait_until
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.sampling import server_view


@BOTH
def test_restart_with_other_limits_under_the_same_names_is_noticed(
    make_backend, model_dir, adapters, plugin, monkeypatch
):
    fake = fake_server(model_dir, plugin=plugin)
    backend = make_backend(fake)
    backend.register("math", adapters[0])
    sample(backend, "math")
    fake.max_model_len = 512
    fake.restart()
    sample(backend)
    assert backend.server.limits().max_model_len == 256
    monkeypatch.setattr(backend.server, "_stale_at", 0.0)
    sample(backend)
    wait_until(lambda: backend.server.limits().max_model_len == 512)
    if plugin:  # by its incarnation
        wait_until(lambda: backend._cache.resident() == {})


def test_requests_wait_for_no_look_and_one_look_is_in_flight(make_backend, model_dir, monkeypatch):
    fake = fake_server(model_dir)
    backend = make_backend(fake)
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
    wait_until(
        lambda: fake.count("/v1/models") == looks + 1 and not backend.server._looking.locked()
    )
    sample(backend)
    assert fake.count("/v1/models") == looks + 1


def test_server_that_is_away_leaves_what_is_known_and_is_looked_at_again_later(
    make_backend, model_dir, monkeypatch
):
    fake = fake_server(model_dir)
    backend = make_backend(fake)
    sample(backend)
    fake.away = True
    monkeypatch.setattr(backend.server, "_stale_at", 0.0)
    assert backend.server.limits().max_model_len == 256
    wait_until(lambda: backend.server._stale_at > 0 and not backend.server._looking.locked())
    assert backend.server.limits().max_model_len == 256


def test_look_that_began_before_another_changes_nothing_when_it_ends(make_backend, model_dir):
    fake = fake_server(model_dir)
    backend = make_backend(fake)
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
