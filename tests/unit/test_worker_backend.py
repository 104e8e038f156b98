"""vLLM behind the worker: what an unknown model costs, and what a canary says of a full server."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.fake_vllm import FakeVLLM
from tests.fakes import FakeBackend
from tests.worker_rig import ADMIN, in_threads, wait_until, worker
from tink_rl import errors
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.vllm_backend import VLLMBackend
from tink_rl.worker import readiness
from tink_rl.worker.app import create_app
from tink_rl.worker.auth import Tokens
from tink_rl.worker.backends import vllm
from tink_rl.worker.options import WorkerOptions
from tink_rl.worker.readiness import Readiness
from tink_rl.worker.service import WorkerService

ONE = SamplingParams(max_tokens=1)


@pytest.fixture
def fake():
    return FakeVLLM("base")


@pytest.fixture
def sampler(fake, tmp_path):
    client = VLLMClient("http://fake:1", token="t" * 20, transport=fake.transport())
    backend = VLLMBackend({"tink_store_dir": str(tmp_path / "store")}, client=client)
    yield vllm.VLLMSampler(backend)
    backend.close()


@pytest.fixture
def service(sampler):
    """A worker over the fake server whose canaries go elsewhere."""
    found = WorkerService(
        sampler,
        None,
        options=WorkerOptions(),
        tokens=Tokens(admin=ADMIN),
        readiness=Readiness(FakeBackend()),
    )
    yield found
    found.stop()


def _ask(service, model_id):
    body = {"prompts": ["x"], "model_id": model_id}
    return create_app(service).test_client().post("/api/v1/sample", json=body)


# -- unknown models -------------------------------------------------------------------------------


def test_unknown_models_are_refused_before_the_queue_and_cost_one_look(service, fake, monkeypatch):
    monkeypatch.setattr(vllm, "_NEWS_S", 60.0)
    for i in range(30):
        response = _ask(service, f"nobody-{i}")
        assert response.status_code == 404, response.text
        error = response.json["error"]
        assert error["code"] == "unknown_adapter" and f"nobody-{i}" in error["message"]
    assert fake.calls == ["/v1/models", "/tink/v1/status"]
    assert service.ledger.num_admitted == 0


def test_the_server_is_looked_at_again_once_the_news_is_old(service, fake, monkeypatch):
    monkeypatch.setattr(vllm, "_NEWS_S", 0.0)
    assert [_ask(service, "nobody").status_code for _ in range(3)] == [404] * 3
    assert fake.count("/v1/models") == 3 and service.ledger.num_admitted == 0


def test_unknown_models_at_once_share_a_look(service, fake, monkeypatch):
    monkeypatch.setattr(vllm, "_NEWS_S", 60.0)
    fake.hooks["/v1/models"] = lambda: time.sleep(0.3)
    found = in_threads(20, lambda i: _ask(service, f"nobody-{i}").status_code)
    assert found == [404] * 20 and fake.count("/v1/models") == 1


def test_a_server_that_is_slow_to_look_at_holds_no_thread_of_http_for_long(
    service, fake, monkeypatch
):
    monkeypatch.setattr(vllm, "_LOOK_S", 0.05)
    fake.hooks["/v1/models"] = lambda: time.sleep(0.5)
    began = time.monotonic()
    assert service.backend.admit(["x"], "nobody", ONE).model is None
    assert time.monotonic() - began < 0.4
    assert _ask(service, "nobody").status_code == 404


def test_what_a_trainer_has_just_published_is_looked_for(sampler, fake, monkeypatch):
    monkeypatch.setattr(vllm, "_NEWS_S", 60.0)
    for model_id in ("nobody", "policy@1"):
        with pytest.raises(errors.UnknownAdapter, match=model_id):
            sampler.admit(["x"], model_id, ONE)
    fake.served["policy@1"] = "digest"
    assert sampler.admit(["x"], "policy@1", ONE).model.model_id == "policy@1"


def test_an_unreachable_server_is_said_by_the_request_itself(service, fake):
    fake.lose = [("/v1/models", False)] * 9
    response = _ask(service, "nobody")
    assert response.status_code >= 503 and service.ledger.num_admitted == 1


# -- readiness ------------------------------------------------------------------------------------


class _Full(FakeBackend):
    """Answers requests, and lets every canary wait."""

    async def canary(self, timeout_s):
        if self.fails_with is not None:
            raise self.fails_with
        await asyncio.sleep(3600)


def _reasons(backend, *, deltas, seconds=0.4):
    """What a `Readiness` says at last, while pieces of answers come in or not."""
    found = Readiness(backend, interval_s=0.01, max_age_s=0.2)

    async def watch():
        task = asyncio.create_task(found.run())
        for _ in range(round(seconds / 0.02)):
            if deltas:
                found.note_delta()
            await asyncio.sleep(0.02)
        task.cancel()

    asyncio.run(watch())
    return found


def test_a_full_server_that_streams_answers_is_ready(monkeypatch):
    monkeypatch.setattr(readiness, "_TIMEOUT_S", 0.05)
    found = _reasons(_Full(), deltas=True)
    assert found.reason is None
    time.sleep(0.25)
    assert "no token within" in found.reason


def test_a_server_from_which_nothing_comes_is_not_ready(monkeypatch):
    monkeypatch.setattr(readiness, "_TIMEOUT_S", 0.05)
    assert "no token within" in _reasons(_Full(), deltas=False).reason


def test_streamed_answers_excuse_no_canary_that_was_refused():
    backend = _Full()
    backend.fails_with = errors.EngineUnavailable("the engine is gone")
    assert "the engine is gone" in _reasons(backend, deltas=True).reason


def test_pieces_from_before_the_canary_prove_nothing(monkeypatch):
    monkeypatch.setattr(readiness, "_TIMEOUT_S", 0.05)
    found = Readiness(_Full())
    found.note_delta()
    asyncio.run(found._try_once())
    assert "no token within" in found.reason


def test_the_worker_notes_the_pieces_that_it_passes_on(monkeypatch):
    monkeypatch.setattr(readiness, "_TIMEOUT_S", 0.2)

    def quick(backend):
        return Readiness(backend, interval_s=0.01, max_age_s=5.0)

    with worker(backend=_Full(latency_s=2.0), readiness=quick) as found:
        assert found.http.get("/readyz").status_code == 503
        body = {"prompts": ["x"], "stream": True}
        response = found.http.post("/api/v1/sample", json=body, buffered=False)
        wait_until(lambda: found.http.get("/readyz").status_code == 200)
        assert found.service.ledger.num_admitted == 1 and not found.service.ledger.ends
        response.close()
