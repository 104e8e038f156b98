"""The routes in process: who may ask."""

from __future__ import annotations

import pytest
from flask import Flask

from tests.worker_rig import (
    ADMIN,
    SAMPLE,
    admin_header,
    assert_problem,
    worker,
)
from tink_rl import errors
from tink_rl.worker.app import blueprint
from tink_rl.worker.auth import Scope, Tokens
from tink_rl.worker.routes import ROUTES


@pytest.fixture(scope="module")
def rig():
    with worker() as found:
        yield found


def test_no_route_but_the_two_health_routes_answers_without_a_token():
    with worker(sample_token=SAMPLE) as found:
        for route in ROUTES:
            path = route.rule.replace("<adapter_id>", "a")
            response = found.http.open(path, method=route.method, json={"prompts": ["x"]})
            if route.scope is Scope.OPEN:
                assert path in ("/livez", "/readyz")
                assert (
                    response.json in ({"status": "ok"}, response.json)
                    and response.status_code != 401
                )
            else:
                assert_problem(response, 401, "bad_token")
                assert response.headers["WWW-Authenticate"] == "Bearer"
        assert found.backend.num_calls == 0 and found.adapters.num_calls == 0


def test_the_walk_above_covers_every_rule_of_the_app(rig):
    rules = {
        (rule.rule, method)
        for rule in rig.http.application.url_map.iter_rules()
        for method in rule.methods - {"HEAD"}
    }
    assert rules == {(route.rule, route.method) for route in ROUTES}


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {SAMPLE}", 200),
        (f"bearer {SAMPLE}", 200),
        (f"Bearer {ADMIN}", 200),
        (f"Bearer  {SAMPLE} ", 200),
        (f"Bearer {SAMPLE}x", 401),
        (f"Bearer {SAMPLE[:-1]}", 401),
        (f"Basic {SAMPLE}", 401),
        (SAMPLE, 401),
        ("Bearer", 401),
        ("", 401),
        ("Bearer \xff\xfe", 401),
        (f"Bearer {SAMPLE}, Bearer {SAMPLE}", 401),
    ],
)
def test_a_sample_token_opens_sampling(header, status):
    with worker(sample_token=SAMPLE) as found:
        headers = {"Authorization": header}
        response = found.http.post("/api/v1/sample", json={"prompts": ["x"]}, headers=headers)
        assert response.status_code == status


def test_a_sample_token_does_not_open_administration():
    with worker(sample_token=SAMPLE) as found:
        for route in ROUTES:
            if route.scope is Scope.ADMIN:
                path = route.rule.replace("<adapter_id>", "a")
                response = found.http.open(path, method=route.method, headers=admin_header(SAMPLE))
                assert_problem(response, 403, "wrong_scope")
        assert found.adapters.num_calls == 0


def test_a_token_is_read_from_the_header_only():
    with worker(sample_token=SAMPLE) as found:
        for query in (
            f"token={SAMPLE}",
            f"access_token={SAMPLE}",
            f"Authorization=Bearer {SAMPLE}",
        ):
            response = found.http.post(f"/api/v1/sample?{query}", json={"prompts": ["x"]})
            assert_problem(response, 401)


@pytest.mark.parametrize(
    "path", ["//api/v1/sample", "/api//v1/sample", "/api/v1/sample/", "/livez/../x"]
)
def test_another_spelling_of_a_path_opens_nothing(path):
    with worker(sample_token=SAMPLE) as found:
        response = found.http.post(path, json={"prompts": ["x"]}, headers={"Host": "x/livez?"})
        assert response.status_code in (401, 404)


@pytest.mark.parametrize(
    ("remote", "status"),
    [
        ("127.0.0.1", 200),
        ("127.8.8.8", 200),
        ("::1", 200),
        ("::ffff:127.0.0.1", 200),
        ("10.0.0.7", 401),
        ("::ffff:10.0.0.7", 401),
        ("2001:db8::1", 401),
        ("", 401),
    ],
)
def test_without_a_sample_token_only_this_machine_samples(rig, remote, status):
    app = Flask("listens-anywhere")
    app.register_blueprint(blueprint(rig.service))
    before = rig.backend.num_calls
    http, environ = app.test_client(), {"REMOTE_ADDR": remote}
    for route in ROUTES:
        if route.scope is Scope.SAMPLE:
            body = {"prompts": ["x"]}
            response = http.open(
                route.rule, method=route.method, json=body, environ_overrides=environ
            )
            assert response.status_code == status, route.rule
            if status == 401:
                error = assert_problem(response, 401, "bad_token")
                assert "TINK_WORKER_SAMPLE_TOKEN_FILE" in error["message"]
    assert rig.backend.num_calls - before == (status == 200)
    assert http.get("/livez", environ_overrides=environ).status_code == 200
    known = http.get("/api/v1/models", headers=admin_header(), environ_overrides=environ)
    assert known.status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8001", 200),
        ("LocalHost:8001", 200),
        ("127.0.0.1:8001", 200),
        ("127.8.8.8", 200),
        ("[::1]:8001", 200),
        ("evil.example:8001", 401),
        ("localhost.evil.example", 401),
        ("127.0.0.1.evil.example", 401),
        ("10.0.0.7:8001", 401),
        ("evil.example@127.0.0.1", 401),
        ("127.0.0.1/evil.example", 401),
        ("[::1", 401),
        ("", 401),
    ],
)
def test_without_a_sample_token_a_page_whose_name_was_pointed_here_does_not_sample(
    rig, host, status
):
    before = rig.backend.num_calls
    for route in ROUTES:
        if route.scope is Scope.SAMPLE:
            response = rig.http.open(
                route.rule, method=route.method, json={"prompts": ["x"]}, headers={"Host": host}
            )
            assert response.status_code == status, route.rule
            if status == 401:
                message = assert_problem(response, 401, "bad_token")["message"]
                assert f"names host {host!r}" in message and "http://127.0.0.1:PORT" in message
                assert "TINK_WORKER_SAMPLE_TOKEN_FILE" in message
    assert rig.backend.num_calls - before == (status == 200)
    known = rig.http.get("/api/v1/models", headers={"Host": host, **admin_header()})
    assert known.status_code == 200


def test_a_request_without_a_host_needs_a_token():
    tokens = Tokens(admin=ADMIN)
    tokens.require(Scope.SAMPLE, f"Bearer {ADMIN}", "127.0.0.1", None)
    with pytest.raises(errors.BadToken, match="names host ''"):
        tokens.require(Scope.SAMPLE, None, "127.0.0.1", None)


def test_a_sample_token_is_good_under_every_name():
    with worker(sample_token=SAMPLE) as found:
        headers = {"Host": "worker.example:8001", **admin_header(SAMPLE)}
        assert found.http.get("/api/v1/models", headers=headers).status_code == 200


def test_a_sample_token_is_good_from_everywhere():
    with worker(sample_token=SAMPLE) as found:
        for token, status in ((SAMPLE, 200), ("wrong", 401)):
            response = found.http.get(
                "/api/v1/models",
                headers=admin_header(token),
                environ_overrides={"REMOTE_ADDR": "10.0.0.7"},
            )
            assert response.status_code == status
