"""The routes in process: what is refused, and how."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from tests.bad_requests import PARAMS, PROMPTS, bad_request
from tests.fakes import FakeBackend, answer_of
from tests.worker_rig import (
    assert_problem,
    worker,
)
from tink_rl.worker.schemas import MAX_BODY_BYTES, MODEL_ID

NUM_BAD_REQUESTS = 5000


@pytest.fixture(scope="module")
def rig():
    with worker() as found:
        yield found


@pytest.mark.parametrize(("name", "value"), PARAMS, ids=lambda v: str(v)[:20])
def test_a_sampling_parameter_out_of_its_bounds_is_named(rig, name, value):
    before = rig.backend.num_calls
    error = assert_problem(rig.sample(sampling_params={name: value}), 400)
    assert name in error["message"] and len(error["message"]) < 400
    assert rig.backend.num_calls == before


@pytest.mark.parametrize(("prompts", "named"), PROMPTS, ids=lambda v: str(v)[:20])
def test_a_bad_prompt_is_named_by_its_index(rig, prompts, named):
    before = rig.backend.num_calls
    response = rig.http.post("/api/v1/sample", json={"prompts": prompts})
    assert named in assert_problem(response, 400)["message"]
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
    assert named in assert_problem(response, 400, "bad_request")["message"]
    assert rig.backend.num_calls == before


def test_a_pattern_that_was_not_met_is_shown_as_it_is(rig):
    message = assert_problem(rig.sample(model_id="../x"), 400)["message"]
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
    assert_problem(response, status, "invalid_json" if status == 400 else "body_too_large")
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
    assert named in assert_problem(response, 400, "bad_request")["message"]


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
    assert_problem(response, 415, "unsupported_media_type")


def test_five_thousand_generated_bad_requests_reach_no_backend(rig):
    before = (rig.backend.num_calls, rig.adapters.num_calls)
    chance = random.Random(20261124)
    seen: dict[int, int] = {}
    for i in range(NUM_BAD_REQUESTS):
        bad = bad_request(chance)
        response = rig.http.open(bad.path, method=bad.method, headers=bad.headers, data=bad.content)
        assert 400 <= response.status_code < 500, (i, response.status_code, response.text)
        assert_problem(response, response.status_code)
        seen[response.status_code] = seen.get(response.status_code, 0) + 1
    assert (rig.backend.num_calls, rig.adapters.num_calls) == before
    assert sum(seen.values()) == NUM_BAD_REQUESTS and {400, 401, 404, 405, 415} <= set(seen)
    assert rig.sample().status_code == 200
