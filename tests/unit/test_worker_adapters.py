"""The routes in process: adapters, readiness, figures and the page."""

from __future__ import annotations

import pytest
from flask import Flask

from tests.fakes import FakeBackend
from tests.worker_rig import (
    admin_header,
    assert_problem,
    in_threads,
    wait_until,
    worker,
)
from tink_rl import errors
from tink_rl.worker.app import blueprint
from tink_rl.worker.readiness import Readiness
from tink_rl.worker.routes import ROUTES
from tink_rl.worker.schemas import MAX_BODY_BYTES


@pytest.fixture(scope="module")
def rig():
    with worker() as found:
        yield found


def test_adapters_are_registered_listed_and_unregistered():
    with worker() as found:
        body = {"adapter_id": "math", "lora_path": "/adapters/math"}
        made = found.http.post("/api/v1/adapters", json=body, headers=admin_header())
        assert made.json == {**body, "version": 1, "digest": "digest-of-/adapters/math"}
        again = found.http.post("/api/v1/adapters", json=body, headers=admin_header()).json
        assert again["version"] == 2
        assert again in found.http.get("/api/v1/adapters").json["adapters"]
        names = [m["model_id"] for m in found.http.get("/api/v1/models").json["models"]]
        assert names == ["base", "a", "b", "math"]
        gone = found.http.delete("/api/v1/adapters/math", headers=admin_header())
        assert gone.json == {"adapter_id": "math", "unregistered": True}
        again = found.http.delete("/api/v1/adapters/math", headers=admin_header())
        assert_problem(again, 404, "unknown_adapter")
        assert_problem(found.sample(model_id="math"), 404, "unknown_adapter")


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (errors.PathNotAllowed("outside"), 403),
        (errors.AdapterPathMissing("LoRA path does not exist: /x"), 422),
        (errors.AdapterFilesInvalid("tink-rl convert DIR", code="pickle_refused"), 422),
        (errors.AdapterConflict("other bytes"), 409),
        (errors.StorageFull("full"), 507),
        (errors.PluginMissing("off", code="runtime_loading_off"), 501),
    ],
)
def test_what_is_wrong_with_an_adapter_is_the_answer(raised, status):
    with worker() as found:
        found.adapters.fails_with = raised
        body = {"adapter_id": "math", "lora_path": "/x"}
        response = found.http.post("/api/v1/adapters", json=body, headers=admin_header())
        assert assert_problem(response, status, raised.code)["message"] == raised.message


def test_a_backend_without_adapters_says_so():
    with worker() as found:
        found.service._adapters = None
        body = {"adapter_id": "math", "lora_path": "/x"}
        response = found.http.post("/api/v1/adapters", json=body, headers=admin_header())
        assert_problem(response, 400, "unsupported_by_backend")
        assert found.http.get("/api/v1/adapters").json == {"adapters": []}


def test_the_worker_is_ready_only_while_generations_succeed():
    def quick(backend):
        return Readiness(backend, interval_s=0.02, max_age_s=0.3)

    with worker(readiness=quick) as found:
        wait_until(lambda: found.http.get("/readyz").status_code == 200)
        found.backend.fails_with = errors.EngineUnavailable("the engine is gone")
        wait_until(lambda: found.http.get("/readyz").status_code == 503)
        error = assert_problem(found.http.get("/readyz"), 503, "not_ready")
        assert "the engine is gone" in error["message"]
        assert found.http.get("/livez").status_code == 200
        found.backend.fails_with = None
        wait_until(lambda: found.http.get("/readyz").status_code == 200)


def test_a_stopping_worker_is_alive_not_ready_and_refuses():
    with worker() as found:
        found.service.queue.begin_shutdown()
        assert found.http.get("/livez").status_code == 200
        assert_problem(found.http.get("/readyz"), 503, "not_ready")
        response = found.sample()
        assert_problem(response, 503, "shutting_down")
        assert response.headers["Retry-After"] == "1"


def test_the_figures_add_up():
    with worker(backend=FakeBackend(["a"], latency_s=0.02), max_running=2, max_queued=3) as found:
        in_threads(20, lambda i: found.sample(model_id="a", request_id=f"r{i % 10}"))
        found.backend.fails_with = errors.SamplingRefused("no")
        found.sample()
        found.backend.fails_with = errors.BackendError("no")
        found.sample()
        text = found.http.get("/metrics", headers=admin_header()).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    ends = {k: float(v) for k, v in values.items() if k.startswith("tink_worker_ended_total")}
    assert float(values["tink_worker_admitted_total"]) == sum(ends.values())
    assert ends['tink_worker_ended_total{state="rejected"}'] == 1
    assert ends['tink_worker_ended_total{state="failed"}'] == 1
    answers = {k: float(v) for k, v in values.items() if 'answers_total{route="sample"' in k}
    assert sum(answers.values()) == 22
    assert values['tink_worker_now{what="running"}'] == "0.0"


def test_the_docs_page_loads_nothing_from_anywhere(rig):
    page = rig.http.get("/docs")
    assert "http://" not in page.text and "https://" not in page.text and "<script" not in page.text
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
    for route in ROUTES:
        assert route.rule.replace("<", "&lt;").replace(">", "&gt;") in page.text


def test_an_existing_flask_app_takes_the_blueprint_in_one_line():
    app = Flask("somebody-elses")
    app.add_url_rule("/mine", view_func=lambda: "mine")
    with worker() as found:
        app.register_blueprint(blueprint(found.service))
        http = app.test_client()
        assert http.get("/mine").text == "mine"
        assert http.post("/api/v1/sample", json={"prompts": ["x"]}).status_code == 200
        assert_problem(http.post("/api/v1/sample", json={"prompts": []}), 400)
        assert_problem(
            http.post(
                "/api/v1/sample", data=b"x" * (MAX_BODY_BYTES + 1), content_type="application/json"
            ),
            413,
        )
        assert http.get("/other").mimetype == "text/html"
