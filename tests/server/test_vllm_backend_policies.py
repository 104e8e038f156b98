"""Versions of several runs on one server, compared through the worker."""

from __future__ import annotations

import pytest

from tests.policies import PeftTwin, sync_to
from tests.server.worker_server import body_for, worker_over

pytestmark = pytest.mark.server


def test_versions_of_two_runs_are_compared_by_name(servers, model_dir, tmp_path):
    server = servers.get("qwen3", mode="adapter", max_loras=2, max_cpu_loras=4)
    twin, expected = PeftTwin(model_dir("qwen3")), {}

    def publish(sync, seed):
        twin.randomise(seed)
        record = sync.publish(twin.model)
        expected[record.name] = (record, twin.clear_cases(count=2))

    with (
        sync_to(server, twin.directory, "adapter", policy="right") as right,
        sync_to(server, twin.directory, "adapter", policy="wrong") as wrong,
        worker_over(server, tmp_path, tmp_path) as command,
        command.http() as http,
    ):
        for sync, seed in ((right, 1), (wrong, 2), (right, 3), (wrong, 4)):
            publish(sync, seed)
        for name, (record, cases) in expected.items():
            answer = http.post("/api/v1/sample", json=body_for(cases, name))
            assert answer.status_code == 200, answer.text
            for found, tokens in zip(answer.json()["completions"], cases.values(), strict=True):
                assert found["token_ids"] == tokens, name
                assert (found["model_id"], found["version"]) == (name, record.version)
                assert found["digest"] == record.digest
        known = {model["model_id"] for model in http.get("/api/v1/models").json()["models"]}
        assert set(expected) <= known
