"""The worker against its own OpenAPI document, as Schemathesis reads it."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.worker_rig import ADMIN, worker
from tink_rl.worker.routes import ROUTES


@pytest.fixture(scope="module")
def rig():
    with worker(max_queued=256) as found:
        yield found


AUTHORIZATION = {"Authorization": f"Bearer {ADMIN}"}
"""Schemathesis calls without an address, and who comes from nowhere needs a token."""
TAKES_SOMETHING = ("sample", "register_adapter", "unregister_adapter")
CASES = [(route, GenerationMode.POSITIVE) for route in ROUTES]
CASES += [(route, GenerationMode.NEGATIVE) for route in ROUTES if route.name in TAKES_SOMETHING]


@pytest.mark.parametrize(("route", "mode"), CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_every_operation_keeps_what_the_document_says(rig, route, mode):
    schema = schemathesis.openapi.from_wsgi(
        "/openapi.json", rig.http.application, headers=AUTHORIZATION
    )
    path = route.rule.replace("<", "{").replace(">", "}")
    operation = schema[path][route.method]
    num_cases = 0

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        nonlocal num_cases
        num_cases += 1
        # Rules between fields (prompts x n, min_tokens <= max_tokens, ids of this vocabulary) are not
        # said by the schema: a 400 that names the parameter is a right answer to what it allows.
        case.call_and_validate(headers=AUTHORIZATION, excluded_checks=[positive_data_acceptance])

    run()
    assert num_cases


def test_the_document_names_every_route(rig):
    document = rig.http.get("/openapi.json").json
    found = {(path, method) for path, item in document["paths"].items() for method in item}
    assert found == {(r.rule.replace("<", "{").replace(">", "}"), r.method.lower()) for r in ROUTES}


def test_what_the_schema_allows_field_by_field_is_sampled(rig):
    import jsonschema

    document = rig.http.get("/openapi.json").json
    body = document["paths"]["/api/v1/sample"]["post"]["requestBody"]["content"]
    reference = body["application/json"]["schema"]
    validator = jsonschema.Draft202012Validator({**document, **reference})
    request = {
        "prompts": [[1, 2], [3]],
        "model_id": "a",
        "sampling_params": {"max_tokens": 3, "stop": ["a"], "logit_bias": {"5": 1.5}, "seed": 7},
        "request_id": "x",
        "stream": False,
        "timeout_s": 3.5,
    }
    validator.validate(request)
    assert rig.http.post("/api/v1/sample", json=request).status_code == 200
    for bad in ({"prompts": []}, {"prompts": ["x", [1]]}, {"prompts": ["x"], "more": 1}):
        assert not validator.is_valid(bad)
        assert rig.http.post("/api/v1/sample", json=bad).status_code == 400
