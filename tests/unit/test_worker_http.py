"""The routes in process: what is answered, and what a retry gets."""

from __future__ import annotations

import json

import pytest

from tests.fakes import FakeBackend, answer_of
from tests.worker_rig import (
    admin_header,
    assert_problem,
    in_threads,
    wait_until,
    worker,
)
from tink_rl import errors
from tink_rl.worker.ledger import State
from tink_rl.worker.routes import ROUTES


@pytest.fixture(scope="module")
def rig():
    with worker() as found:
        yield found


# -- answers --------------------------------------------------------------------------------------


def test_request_of_the_existing_integration_is_answered(rig):
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
        assert_problem(broken.sample([[0]], stream=True, sampling_params={"n": 17}), 400)
        broken.backend.admit = _raise(errors.UnknownAdapter("no"))
        assert_problem(broken.sample(stream=True), 404, "unknown_adapter")
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
        assert_problem(broken.sample(), 502, "backend_error")


def _with_nan(completion):
    from dataclasses import replace

    return replace(completion, logprobs=[float("nan")] * len(completion.token_ids))


def test_a_crash_behind_a_route_is_one_code_and_no_secret():
    backend = FakeBackend()
    backend.fails_with = RuntimeError("/home/me/secret")
    with worker(backend=backend) as broken:
        error = assert_problem(broken.sample(), 500, "internal")
        assert "secret" not in error["message"]
        broken.adapters.list = _raise(ZeroDivisionError("/home/me/secret"))
        error = assert_problem(broken.http.get("/api/v1/adapters"), 500, "internal")
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
            assert_problem(response, 429, "overloaded")
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
    error = assert_problem(response, response.status_code)
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
        assert_problem(rig.sample(), status, code)
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
        registered = found.http.post("/api/v1/adapters", json=body, headers=admin_header())
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
        assert_problem(found.sample(["other"], model_id="a", request_id="r"), 404)
        assert_problem(found.sample(model_id="a", request_id="new"), 404, "unknown_adapter")


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
        error = assert_problem(found.sample(["other"], **body), 409, "request_id_reused")
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
