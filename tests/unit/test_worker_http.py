"""The routes in process: what is answered, what is refused and how, and who may ask."""

from __future__ import annotations

import json
import random
import tracemalloc

import pytest
from flask import Flask

from tests.bad_requests import PARAMS, PROMPTS, bad_request
from tests.fakes import FakeBackend, answer_of
from tests.worker_rig import ADMIN, SAMPLE, in_threads, wait_until, worker
from tink_rl import errors
from tink_rl.worker.app import blueprint
from tink_rl.worker.auth import Scope, Tokens
from tink_rl.worker.ledger import State
from tink_rl.worker.readiness import Readiness
from tink_rl.worker.routes import ROUTES
from tink_rl.worker.schemas import MAX_BODY_BYTES, MODEL_ID

NUM_BAD_REQUESTS = 5000


@pytest.fixture(scope="module")
def rig():
    with worker() as found:
        yield found


def _admin(token=ADMIN):
    return {"Authorization": f"Bearer {token}"}


def _assert_problem(response, status, code=None):
    assert response.status_code == status, response.text
    assert response.mimetype == "application/json"
    error = response.json["error"]
    assert set(response.json) == {"error"} and set(error) == {"code", "message", "request_id"}
    assert error["request_id"] and "Traceback" not in error["message"]
    if code is not None:
        assert error["code"] == code, error
    return error


# -- answers --------------------------------------------------------------------------------------


def test_the_seeds_request_is_answered(rig):
    params = {"max_tokens": 5, "temperature": 0.8, "top_p": 0.95, "top_k": 40}
    answer = rig.sample(["Once upon a time"], model_id="a", sampling_params=params).json
    [completion] = answer["completions"]
    assert completion["token_ids"] == answer_of("a", "Once upon a time")[:5]
    assert (completion["version"], completion["digest"]) == (1, "digest-of-a")
    assert answer["model_id"] == "a" and answer["usage"]["completion_tokens"] == 5


def test_completions_come_prompt_major_with_logprobs_if_asked(rig):
    answer = rig.sample([[5, 6], [7]], sampling_params={"n": 3, "logprobs": 0}).json
    found = [(c["prompt_index"], c["index"]) for c in answer["completions"]]
    assert found == [(p, i) for p in (0, 1) for i in range(3)]
    assert all(len(c["logprobs"]) == len(c["token_ids"]) for c in answer["completions"])
    assert [c["prompt_token_ids"] for c in answer["completions"][::3]] == [[5, 6], [7]]
    assert rig.sample().json["completions"][0]["logprobs"] is None


@pytest.mark.parametrize(
    "prompt", ["é", "👩‍👩‍👧", "שלום", "\x00", "<|im_start|>", " ", "\U0001d54f"]
)
def test_any_text_arrives_as_it_was_sent(rig, prompt):
    for body in (
        json.dumps({"prompts": [prompt]}),
        json.dumps({"prompts": [prompt]}, ensure_ascii=False),
    ):
        answer = rig.http.post(
            "/api/v1/sample", data=body.encode(), content_type="application/json; charset=utf-8"
        )
        assert answer.json["completions"][0]["token_ids"] == answer_of(None, prompt)


def test_a_stream_is_the_pieces_and_then_the_whole_answer(rig):
    response = rig.sample(["x", "y"], model_id="b", stream=True)
    assert response.mimetype == "text/event-stream"
    events = _events(response.text)
    assert [name for name, _ in events] == ["delta"] * 16 + ["done"]
    whole = events[-1][1]["completions"]
    for i, prompt in enumerate("xy"):
        pieces = [
            t for n, d in events if n == "delta" if d["prompt_index"] == i for t in d["token_ids"]
        ]
        assert pieces == whole[i]["token_ids"] == answer_of("b", prompt)


def test_a_stream_that_fails_says_so_by_status_before_and_by_event_after_its_first_piece(rig):
    backend = FakeBackend()
    backend.fails_with = errors.EngineUnavailable("the engine is gone")
    with worker(backend=backend) as broken:
        events = _events(broken.sample(stream=True, request_id="mine").text)
        assert events[-1][0] == "error"
        assert events[-1][1]["error"] == {
            "code": "engine_unavailable",
            "message": "the engine is gone",
            "request_id": "mine",
        }
        _assert_problem(broken.sample([[0]], stream=True, sampling_params={"n": 17}), 400)
        broken.backend.admit = _raise(errors.UnknownAdapter("no"))
        _assert_problem(broken.sample(stream=True), 404, "unknown_adapter")
        assert broken.service.queue.depth()["connections"] == 0


def test_a_stream_that_nobody_reads_gives_its_place_back(rig):
    response = rig.http.post(
        "/api/v1/sample", json={"prompts": ["x"], "stream": True}, buffered=False
    )
    response.close()
    wait_until(lambda: rig.service.queue.depth()["connections"] == 0)


def _events(text):
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def _raise(error):
    def raising(*args, **kwargs):
        raise error

    return raising


def test_logprobs_that_are_not_finite_are_the_backends_fault():
    backend = FakeBackend()
    backend.changes = lambda found: [_with_nan(c) for c in found]
    with worker(backend=backend) as broken:
        _assert_problem(broken.sample(), 502, "backend_error")


def _with_nan(completion):
    from dataclasses import replace

    return replace(completion, logprobs=[float("nan")] * len(completion.token_ids))


def test_a_crash_behind_a_route_is_one_code_and_no_secret():
    backend = FakeBackend()
    backend.fails_with = RuntimeError("/home/me/secret")
    with worker(backend=backend) as broken:
        error = _assert_problem(broken.sample(), 500, "internal")
        assert "secret" not in error["message"]
        broken.adapters.list = _raise(ZeroDivisionError("/home/me/secret"))
        error = _assert_problem(broken.http.get("/api/v1/adapters"), 500, "internal")
        assert "secret" not in error["message"]


def test_overload_is_429_with_retry_after_and_everybody_else_is_answered():
    backend = FakeBackend(["a"], latency_s=0.05)
    with worker(backend=backend, max_running=4, max_queued=12) as small:
        responses = in_threads(120, lambda i: small.sample([f"p{i}"], model_id="a"))
        answered = [i for i, r in enumerate(responses) if r.status_code == 200]
        for i in answered:
            assert responses[i].json["completions"][0]["token_ids"] == answer_of("a", f"p{i}")
        refused = [r for r in responses if r.status_code != 200]
        assert answered and refused
        for response in refused:
            _assert_problem(response, 429, "overloaded")
            assert int(response.headers["Retry-After"]) >= 1
        assert backend.num_calls == len(answered) == small.service.ledger.num_admitted
        assert small.sample().status_code == 200


def _kinds(cls=errors.TinkError):
    return [cls, *(kind for sub in cls.__subclasses__() for kind in _kinds(sub))]


_ENDS_EARLY = errors.RequestCancelled


@pytest.mark.parametrize("kind", _kinds(), ids=lambda kind: kind.__name__)
def test_the_workers_trouble_with_its_server_is_no_4xx_of_a_sampling_client(rig, kind):
    rig.backend.fails_with = kind("why it is so")
    before = rig.service.ledger.ends[State.FAILED], rig.service.ledger.ends[State.REJECTED]
    try:
        response = rig.sample()
    finally:
        rig.backend.fails_with = None
    error = _assert_problem(response, response.status_code)
    assert error["message"] == "why it is so"
    assert response.status_code in ROUTES[0].statuses()
    ends = rig.service.ledger.ends
    if issubclass(
        kind, (errors.UnknownAdapter, errors.SamplingRefused, errors.NotSupportedByBackend)
    ):
        assert (response.status_code, error["code"]) == (kind.status, kind.code)
        assert (ends[State.FAILED], ends[State.REJECTED]) == (before[0], before[1] + 1)
    elif not issubclass(kind, _ENDS_EARLY):
        assert response.status_code >= 500
        assert ("Retry-After" in response.headers) == (response.status_code == 503)
        if not issubclass(kind, TimeoutError):
            assert (ends[State.FAILED], ends[State.REJECTED]) == (before[0] + 1, before[1])


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (errors.BadToken, 502, "backend_error"),
        (errors.ModeUnavailable, 502, "backend_error"),
        (errors.RankExceeded, 502, "backend_error"),
        (errors.ProtocolMismatch, 502, "backend_error"),
        (errors.TinkError, 502, "backend_error"),
        (errors.LeaseHeld, 503, "engine_unavailable"),
        (errors.StaleEpoch, 503, "engine_unavailable"),
    ],
)
def test_trouble_that_passes_may_be_tried_again_and_other_trouble_not(rig, kind, status, code):
    rig.backend.fails_with = kind("why it is so")
    try:
        _assert_problem(rig.sample(), status, code)
        streamed = rig.sample(stream=True).text
    finally:
        rig.backend.fails_with = None
    assert streamed.startswith("event: delta") and f'"code": "{code}"' in streamed


@pytest.mark.parametrize("kind", _kinds(), ids=lambda kind: kind.__name__)
def test_every_route_answers_only_what_the_document_lists(kind):
    with worker() as found:
        found.adapters.fails_with = kind("why it is so")

        async def fails():
            raise kind("why it is so")

        found.backend.models = fails
        by_name = {route.name: route for route in ROUTES}
        body = {"adapter_id": "math", "lora_path": "/x"}
        registered = found.http.post("/api/v1/adapters", json=body, headers=_admin())
        models = found.http.get("/api/v1/models")
    for response, name in ((registered, "register_adapter"), (models, "models")):
        assert response.status_code in by_name[name].statuses(), (name, response.status_code)
        assert response.json["error"]["message"] == "why it is so"
    assert models.status_code >= 500 and registered.status_code != 401


# -- retries --------------------------------------------------------------------------------------


def test_a_retry_is_answered_though_its_adapter_has_gone_meanwhile():
    with worker() as found:
        first = found.sample(model_id="a", request_id="r")
        found.adapters.unregister("a")
        retry = found.sample(model_id="a", request_id="r")
        assert retry.data == first.data and retry.headers["Tink-Replayed"] == "true"
        _assert_problem(found.sample(["other"], model_id="a", request_id="r"), 404)
        _assert_problem(found.sample(model_id="a", request_id="new"), 404, "unknown_adapter")


def test_requests_with_one_id_are_one_generation_and_equal_bodies():
    with worker(backend=FakeBackend(["a"], latency_s=0.2)) as found:
        body = {"request_id": "job-7", "model_id": "a"}
        responses = in_threads(6, lambda _: found.sample(**body))
        responses.append(found.sample(**body))
        assert len({r.data for r in responses}) == 1
        assert responses[0].json["request_id"] == "job-7"
        replayed = sorted(r.headers["Tink-Replayed"] for r in responses)
        assert replayed == ["false", *["true"] * 6]
        assert found.backend.num_calls == 1
        error = _assert_problem(found.sample(["other"], **body), 409, "request_id_reused")
        assert error["request_id"] == "job-7"


def test_a_restarted_worker_runs_a_known_id_again_and_says_so():
    for _ in range(2):
        with worker() as found:
            answer = found.sample(["x"], request_id="job-7")
            assert answer.headers["Tink-Replayed"] == "false"
            assert answer.json["completions"][0]["token_ids"] == answer_of(None, "x")


def test_equal_requests_in_another_notation_are_the_same_request(rig):
    first = rig.sample(["x"], request_id="n1", sampling_params={"temperature": 1, "stop": "a"})
    second = rig.http.post(
        "/api/v1/sample",
        data=b'{"sampling_params": {"stop": ["a"], "temperature": 1.0, "max_tokens": 16},'
        b' "request_id": "n1", "prompts": ["x"]}',
        content_type="application/json",
    )
    assert second.data == first.data and second.headers["Tink-Replayed"] == "true"


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), PARAMS, ids=lambda v: str(v)[:20])
def test_a_sampling_parameter_out_of_its_bounds_is_named(rig, name, value):
    before = rig.backend.num_calls
    error = _assert_problem(rig.sample(sampling_params={name: value}), 400)
    assert name in error["message"] and len(error["message"]) < 400
    assert rig.backend.num_calls == before


@pytest.mark.parametrize(("prompts", "named"), PROMPTS, ids=lambda v: str(v)[:20])
def test_a_bad_prompt_is_named_by_its_index(rig, prompts, named):
    before = rig.backend.num_calls
    response = rig.http.post("/api/v1/sample", json={"prompts": prompts})
    assert named in _assert_problem(response, 400)["message"]
    assert rig.backend.num_calls == before


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_id": ""}, "model_id"),
        ({"model_id": "../x"}, "model_id"),
        ({"model_id": "./../x"}, "model_id"),
        ({"model_id": "//x"}, "model_id"),
        ({"model_id": "/"}, "model_id"),
        ({"model_id": "x" * 256}, "model_id"),
        ({"model_id": "/" + "x" * 255}, "model_id"),
        ({"model_id": "a\x00"}, "model_id"),
        ({"model_id": 5}, "model_id"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "x\n"}, "request_id"),
        ({"stream": 1}, "stream"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": True}, "timeout_s"),
        ({"sampling_params": []}, "sampling_params"),
        ({"sampling_params": None}, "sampling_params"),
        ({"prompt": "x"}, "'prompt'"),
        ({"sampling_params": {"temperature": 0, "n": 2}}, "sampling_params.n"),
        ({"prompts": ["x"] * 17, "sampling_params": {"n": 16}}, "256"),
    ],
    ids=str,
)
def test_a_bad_field_is_named(rig, fields, named):
    before = rig.backend.num_calls
    response = rig.http.post("/api/v1/sample", json={"prompts": ["x"], **fields})
    assert named in _assert_problem(response, 400, "bad_request")["message"]
    assert rig.backend.num_calls == before


def test_a_pattern_that_was_not_met_is_shown_as_it_is(rig):
    message = _assert_problem(rig.sample(model_id="../x"), 400)["message"]
    assert message == f"model_id='../x': string should match pattern '{MODEL_ID}'"


@pytest.mark.parametrize(
    "name",
    ["/models/Llama-3", "./base", "/" + "x" * 254, "meta/Llama-3", "llama:8b", ".cache/base"],
)
def test_a_name_that_the_server_serves_by_path_is_sampled(name):
    with worker(backend=FakeBackend([name])) as found:
        response = found.sample(["x"], model_id=name)
        assert response.status_code == 200, response.text
        [completion] = response.json["completions"]
        assert completion["token_ids"] == answer_of(name, "x")


_BODIES = [
    (b"", 400),
    (b"{", 400),
    (b'{"prompts": ["x"], "model_id": "a" "b"}', 400),
    (b'{"prompts": ["x"]} x', 400),
    (b'{"prompts": ["x"], "prompts": ["y"]}', 400),
    (b'{"prompts": ["x"], "sampling_params": {"n": 1, "n": 2}}', 400),
    (b'{"prompts": ["x"], "timeout_s": NaN}', 400),
    (b'{"prompts": ["x"], "timeout_s": Infinity}', 400),
    (b'{"prompts": ["\xff"]}', 400),
    (b'\xef\xbb\xbf{"prompts": ["x"]}', 400),
    (b'{"prompts": ["\\ud800"]}', 400),
    (b'{"prompts": ["\\udc00\\ud800"]}', 400),
    (b'{"\\ud800": 1}', 400),
    (b'{"prompts": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
    (b"{" + b",".join(b'"k%d":1' % i for i in range(600_000)) + b"}", 400),
    (b'{"prompts": [' + b"[]," * 2_000_000 + b"[]]}", 400),
    (b'{"prompts": [' + b'"ab",' * 1_500_000 + b'"ab"]}', 400),
    (b'{"prompts": ["' + b'\\"' * 4_000_000, 400),
    (b'{"prompts": [1' + b"0" * 100_000 + b"]}", 400),
    (b'{"prompts": ["' + b"x" * MAX_BODY_BYTES + b'"]}', 413),
]


@pytest.mark.parametrize(("body", "status"), _BODIES, ids=lambda v: str(v)[:24])
def test_a_body_that_is_no_sane_json_is_refused_and_costs_little(rig, body, status):
    before = rig.backend.num_calls
    tracemalloc.start()
    response = rig.http.post("/api/v1/sample", data=body, content_type="application/json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    _assert_problem(response, status, "invalid_json" if status == 400 else "body_too_large")
    assert peak < 64 * 2**20 and rig.backend.num_calls == before


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"null", "object"),
        (b'"x"', "object"),
        (b"[]", "object"),
        (b'{"prompts": ["x"], "timeout_s": 1e999}', "timeout_s"),
        (b'{"prompts": ["x"], "sampling_params": {"temperature": 1e999}}', "temperature"),
        (b'{"prompts": ["x"], "sampling_params": {"logit_bias": {"1": -1e999}}}', "logit_bias"),
    ],
)
def test_json_of_another_kind_is_named(rig, body, named):
    response = rig.http.post("/api/v1/sample", data=body, content_type="application/json")
    assert named in _assert_problem(response, 400, "bad_request")["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
    ids=str,
)
def test_other_content_types_and_compressed_bodies_are_415(rig, headers):
    response = rig.http.post("/api/v1/sample", data=b'{"prompts": ["x"]}', headers=headers)
    _assert_problem(response, 415, "unsupported_media_type")


def test_five_thousand_generated_bad_requests_reach_no_backend(rig):
    before = (rig.backend.num_calls, rig.adapters.num_calls)
    chance = random.Random(20261124)
    seen: dict[int, int] = {}
    for i in range(NUM_BAD_REQUESTS):
        bad = bad_request(chance)
        response = rig.http.open(bad.path, method=bad.method, headers=bad.headers, data=bad.content)
        assert 400 <= response.status_code < 500, (i, response.status_code, response.text)
        _assert_problem(response, response.status_code)
        seen[response.status_code] = seen.get(response.status_code, 0) + 1
    assert (rig.backend.num_calls, rig.adapters.num_calls) == before
    assert sum(seen.values()) == NUM_BAD_REQUESTS and {400, 401, 404, 405, 415} <= set(seen)
    assert rig.sample().status_code == 200


# -- who may ask ----------------------------------------------------------------------------------


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
                _assert_problem(response, 401, "bad_token")
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
                response = found.http.open(path, method=route.method, headers=_admin(SAMPLE))
                _assert_problem(response, 403, "wrong_scope")
        assert found.adapters.num_calls == 0


def test_a_token_is_read_from_the_header_only():
    with worker(sample_token=SAMPLE) as found:
        for query in (
            f"token={SAMPLE}",
            f"access_token={SAMPLE}",
            f"Authorization=Bearer {SAMPLE}",
        ):
            response = found.http.post(f"/api/v1/sample?{query}", json={"prompts": ["x"]})
            _assert_problem(response, 401)


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
                error = _assert_problem(response, 401, "bad_token")
                assert "TINK_WORKER_SAMPLE_TOKEN_FILE" in error["message"]
    assert rig.backend.num_calls - before == (status == 200)
    assert http.get("/livez", environ_overrides=environ).status_code == 200
    known = http.get("/api/v1/models", headers=_admin(), environ_overrides=environ)
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
                message = _assert_problem(response, 401, "bad_token")["message"]
                assert f"names host {host!r}" in message and "http://127.0.0.1:PORT" in message
                assert "TINK_WORKER_SAMPLE_TOKEN_FILE" in message
    assert rig.backend.num_calls - before == (status == 200)
    known = rig.http.get("/api/v1/models", headers={"Host": host, **_admin()})
    assert known.status_code == 200


def test_a_request_without_a_host_needs_a_token():
    tokens = Tokens(admin=ADMIN)
    tokens.require(Scope.SAMPLE, f"Bearer {ADMIN}", "127.0.0.1", None)
    with pytest.raises(errors.BadToken, match="names host ''"):
        tokens.require(Scope.SAMPLE, None, "127.0.0.1", None)


def test_a_sample_token_is_good_under_every_name():
    with worker(sample_token=SAMPLE) as found:
        headers = {"Host": "worker.example:8001", **_admin(SAMPLE)}
        assert found.http.get("/api/v1/models", headers=headers).status_code == 200


def test_a_sample_token_is_good_from_everywhere():
    with worker(sample_token=SAMPLE) as found:
        for token, status in ((SAMPLE, 200), ("wrong", 401)):
            response = found.http.get(
                "/api/v1/models",
                headers=_admin(token),
                environ_overrides={"REMOTE_ADDR": "10.0.0.7"},
            )
            assert response.status_code == status


# -- adapters and the rest ------------------------------------------------------------------------


def test_adapters_are_registered_listed_and_unregistered():
    with worker() as found:
        body = {"adapter_id": "math", "lora_path": "/adapters/math"}
        made = found.http.post("/api/v1/adapters", json=body, headers=_admin())
        assert made.json == {**body, "version": 1, "digest": "digest-of-/adapters/math"}
        again = found.http.post("/api/v1/adapters", json=body, headers=_admin()).json
        assert again["version"] == 2
        assert again in found.http.get("/api/v1/adapters").json["adapters"]
        names = [m["model_id"] for m in found.http.get("/api/v1/models").json["models"]]
        assert names == ["base", "a", "b", "math"]
        gone = found.http.delete("/api/v1/adapters/math", headers=_admin())
        assert gone.json == {"adapter_id": "math", "unregistered": True}
        again = found.http.delete("/api/v1/adapters/math", headers=_admin())
        _assert_problem(again, 404, "unknown_adapter")
        _assert_problem(found.sample(model_id="math"), 404, "unknown_adapter")


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
        response = found.http.post("/api/v1/adapters", json=body, headers=_admin())
        assert _assert_problem(response, status, raised.code)["message"] == raised.message


def test_a_backend_without_adapters_says_so():
    with worker() as found:
        found.service._adapters = None
        body = {"adapter_id": "math", "lora_path": "/x"}
        response = found.http.post("/api/v1/adapters", json=body, headers=_admin())
        _assert_problem(response, 400, "unsupported_by_backend")
        assert found.http.get("/api/v1/adapters").json == {"adapters": []}


def test_the_worker_is_ready_only_while_generations_succeed():
    def quick(backend):
        return Readiness(backend, interval_s=0.02, max_age_s=0.3)

    with worker(readiness=quick) as found:
        wait_until(lambda: found.http.get("/readyz").status_code == 200)
        found.backend.fails_with = errors.EngineUnavailable("the engine is gone")
        wait_until(lambda: found.http.get("/readyz").status_code == 503)
        error = _assert_problem(found.http.get("/readyz"), 503, "not_ready")
        assert "the engine is gone" in error["message"]
        assert found.http.get("/livez").status_code == 200
        found.backend.fails_with = None
        wait_until(lambda: found.http.get("/readyz").status_code == 200)


def test_a_stopping_worker_is_alive_not_ready_and_refuses():
    with worker() as found:
        found.service.queue.begin_shutdown()
        assert found.http.get("/livez").status_code == 200
        _assert_problem(found.http.get("/readyz"), 503, "not_ready")
        response = found.sample()
        _assert_problem(response, 503, "shutting_down")
        assert response.headers["Retry-After"] == "1"


def test_the_figures_add_up():
    with worker(backend=FakeBackend(["a"], latency_s=0.02), max_running=2, max_queued=3) as found:
        in_threads(20, lambda i: found.sample(model_id="a", request_id=f"r{i % 10}"))
        found.backend.fails_with = errors.SamplingRefused("no")
        found.sample()
        found.backend.fails_with = errors.BackendError("no")
        found.sample()
        text = found.http.get("/metrics", headers=_admin()).text
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
        _assert_problem(http.post("/api/v1/sample", json={"prompts": []}), 400)
        _assert_problem(
            http.post(
                "/api/v1/sample", data=b"x" * (MAX_BODY_BYTES + 1), content_type="application/json"
            ),
            413,
        )
        assert http.get("/other").mimetype == "text/html"
