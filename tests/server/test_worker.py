"""`tink-rl worker` over a real vLLM server: right answers, one generation per request, none left."""

from __future__ import annotations

import json
import os
import random
import signal
import socket

import httpx
import pytest

from tests.bad_requests import bad_request
from tests.server.worker_server import GREEDY, body_for, figures, register, worker_over
from tests.worker_rig import in_threads, wait_until
from tink_rl.launch import group_members

pytestmark = pytest.mark.server
LONG = {"temperature": 1.0, "max_tokens": 200, "ignore_eos": True}


@pytest.fixture
def server(servers):
    return servers.get("qwen3", mode="adapter", max_loras=2, max_cpu_loras=4)


@pytest.fixture
def command(server, golden_adapters, tmp_path):
    with worker_over(server, golden_adapters[0].path.parent, tmp_path) as found:
        yield found


def test_answers_are_those_of_the_adapter_that_was_asked_whole_or_streamed(
    command, golden_adapters
):
    golden = golden_adapters[0]
    entry = register(command, golden.path, "math")
    prompts, expected = list(golden.cases), list(golden.cases.values())
    with command.http() as http:
        whole = http.post("/api/v1/sample", json=body_for(prompts, "math")).json()
        base = http.post("/api/v1/sample", json=body_for(prompts)).json()
        streamed = http.post("/api/v1/sample", json=body_for(prompts, "math", stream=True)).text
        models = http.get("/api/v1/models").json()["models"]
    assert [c["token_ids"] for c in whole["completions"]] == expected
    assert {(c["version"], c["digest"]) for c in whole["completions"]} == {(1, entry["digest"])}
    assert all(c["token_ids"] not in expected for c in base["completions"])
    events = [block.split("\ndata: ") for block in streamed.strip().split("\n\n")]
    assert json.loads(events[-1][1])["completions"] == whole["completions"]
    for i, tokens in enumerate(expected):
        deltas = [json.loads(data) for name, data in events if name == "event: delta"]
        assert [t for d in deltas if d["prompt_index"] == i for t in d["token_ids"]] == tokens
    assert [m["kind"] for m in models] == ["base", "adapter"]
    assert models[1]["digest"] == entry["digest"]


def test_other_bytes_under_a_known_id_are_a_new_version_that_old_requests_may_still_name(
    command, golden_adapters
):
    first, second = golden_adapters[:2]
    assert [register(command, g.path, "math")["version"] for g in (first, first, second)] == [
        1,
        1,
        2,
    ]
    with command.http() as http:
        for golden, name in ((second, "math"), (first, "math@1"), (second, "math@2")):
            answer = http.post("/api/v1/sample", json=body_for(golden.cases, name)).json()
            found = [c["token_ids"] for c in answer["completions"]]
            assert found == list(golden.cases.values()), name
        assert http.delete("/api/v1/adapters/math", headers=command.admin).status_code == 200
        gone = http.post("/api/v1/sample", json=body_for(first.cases, "math"))
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "unknown_adapter"


def test_adapters_outlive_the_worker(server, golden_adapters, tmp_path):
    golden, root = golden_adapters[0], golden_adapters[0].path.parent
    with worker_over(server, root, tmp_path) as first:
        entry = register(first, golden.path, "math")
        assert first.stop() == 0
    with worker_over(server, root, tmp_path) as second, second.http() as http:
        assert http.get("/api/v1/adapters").json()["adapters"] == [entry]
        answer = http.post("/api/v1/sample", json=body_for(golden.cases, "math")).json()
        assert [c["token_ids"] for c in answer["completions"]] == list(golden.cases.values())


@pytest.mark.chaos
def test_adapters_outlive_a_restart_of_vllm(server, command, golden_adapters):
    goldens = golden_adapters[:3]
    for golden in goldens:
        register(command, golden.path, golden.name)

    def ask():
        with command.http() as http:
            for golden in goldens:
                answer = http.post("/api/v1/sample", json=body_for(golden.cases, golden.name))
                assert answer.status_code == 200, answer.text
                found = [c["token_ids"] for c in answer.json()["completions"]]
                assert found == list(golden.cases.values()), golden.name

    ask()
    server.stop()
    server.start()  # on the same port
    wait_until(lambda: httpx.get(f"{command.url}/readyz").status_code == 200, 60)
    ask()


def test_a_path_outside_the_roots_is_refused_over_http(command, golden_adapters, tmp_path):
    root = golden_adapters[0].path.parent
    outside = (tmp_path, f"{root}/..", "/etc", "org/name", "http://169.254.169.254/", "~")
    tricks = ("/proc/self/root/etc", f"{root}/\x00", "/dev/zero", "x" * 4000, f"{root}/../../etc")
    with command.http() as http:
        for path in (*outside, *tricks):
            body = {"adapter_id": "math", "lora_path": str(path)}
            answer = http.post("/api/v1/adapters", json=body, headers=command.admin)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (403, "path_not_allowed"), (path, error)
        body = {"adapter_id": "math", "lora_path": f"{root}/missing"}
        missing = http.post("/api/v1/adapters", json=body, headers=command.admin)
        assert (missing.status_code, missing.json()["error"]["code"]) == (422, "lora_path_missing")
        assert http.get("/api/v1/adapters").json() == {"adapters": []}


def test_what_vllm_refuses_is_a_400_and_ends_as_rejected(command):
    with command.http() as http:
        too_long = http.post("/api/v1/sample", json=body_for(["5" * 300]))
        assert too_long.status_code == 400, too_long.text
        assert _ended(http, command, "rejected") == 1
        text = http.get("/metrics", headers=command.admin).text
        assert 'tink_worker_ended_total{state="failed"} 0.0' in text
        assert http.post("/api/v1/sample", json=body_for([[5] * 30])).status_code == 200


def test_bad_requests_reach_no_vllm(command, server):
    before = figures(server)["finished"]
    chance = random.Random(5)
    token = command.token_file.read_text().strip()
    with command.http() as http:
        statuses = []
        for _ in range(300):
            bad = bad_request(chance, token)
            answer = http.request(bad.method, bad.path, headers=bad.headers, content=bad.content)
            statuses.append(answer.status_code)
        assert all(400 <= status < 500 for status in statuses), sorted(set(statuses))
    # the worker's own canaries are the only generations in that time
    assert figures(server)["finished"] - before <= 60
    ledger = command.token_file.parent.parent / "ledger"
    assert '"admitted"' not in ledger.read_text()


def test_one_request_id_is_one_generation(command, server, golden_adapters):
    golden = golden_adapters[0]
    register(command, golden.path, "math")
    body = body_for(golden.cases, "math", request_id="job-1")
    with command.http() as http:
        answers = in_threads(8, lambda _: http.post("/api/v1/sample", json=body))
        answers.append(http.post("/api/v1/sample", json=body))
        other = http.post("/api/v1/sample", json={**body, "model_id": None})
    assert len({answer.content for answer in answers}) == 1 and answers[0].status_code == 200
    assert sorted(a.headers["Tink-Replayed"] for a in answers) == ["false", *["true"] * 8]
    assert other.status_code == 409
    ledger = (command.token_file.parent.parent / "ledger").read_text()
    assert ledger.count('"admitted"') == ledger.count('"done"') == 1


def test_a_hundred_clients_that_leave_leave_nothing_running(command, server, golden_adapters):
    register(command, golden_adapters[0].path, "math")
    url = httpx.URL(command.url)

    def ask(i):
        body = body_for([[5 + i % 40, 6]], "math" if i % 2 else None, LONG, stream=i % 4 < 2)
        content = json.dumps(body).encode()
        connection = socket.create_connection((url.host, url.port), timeout=10)
        connection.sendall(
            b"POST /api/v1/sample HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
            b"\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
        )
        return connection

    with command.http() as http:
        connections = in_threads(100, ask)
        wait_until(lambda: _now(http, command, "queued") + _now(http, command, "running") >= 60, 30)
        for connection in connections:
            connection.close()
        wait_until(lambda: figures(server)["running"] + figures(server)["waiting"] == 0, 30.0)
        wait_until(lambda: _ended(http, command, "cancelled") >= 50, 30.0)
        text = http.get("/metrics", headers=command.admin).text
        assert 'tink_worker_now{what="running"} 0.0' in text
        golden = golden_adapters[0]
        answer = http.post("/api/v1/sample", json=body_for(golden.cases, "math")).json()
        assert [c["token_ids"] for c in answer["completions"]] == list(golden.cases.values())


def _ended(http, command, state):
    return _metric(http, command, f'tink_worker_ended_total{{state="{state}"}} ')


def _now(http, command, what):
    return _metric(http, command, f'tink_worker_now{{what="{what}"}} ')


def _metric(http, command, mark):
    text = http.get("/metrics", headers=command.admin).text
    return float(next(line for line in text.splitlines() if line.startswith(mark)).split()[-1])


def test_a_wedged_engine_is_not_ready_while_vllm_says_it_is_healthy(command, server):
    [engine] = [pid for pid in group_members(server.pid) if "EngineCore" in _title(pid)]
    os.kill(engine, signal.SIGSTOP)
    try:
        with command.http() as http:
            late = http.post("/api/v1/sample", json=body_for([[5]], timeout_s=1.0))
            assert late.status_code == 504
            wait_until(lambda: http.get("/readyz").status_code == 503, 20.0)
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert http.get("/livez").status_code == 200
    finally:
        os.kill(engine, signal.SIGCONT)
    with command.http() as http:
        wait_until(lambda: http.get("/readyz").status_code == 200, 20.0)
        assert http.post("/api/v1/sample", json=body_for([[5]])).status_code == 200


def _title(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            return line.read().decode(errors="replace")
    except OSError:
        return ""


def test_a_request_that_was_cut_off_answers_its_retry(command, golden_adapters):
    golden = golden_adapters[0]
    register(command, golden.path, "math")
    body = body_for(golden.cases, "math", {**GREEDY, "max_tokens": 100}, request_id="cut")
    with command.http(timeout=0.05) as hasty, pytest.raises(httpx.TimeoutException):
        hasty.post("/api/v1/sample", json=body)
    with command.http() as http:
        retry = http.post("/api/v1/sample", json=body)
    assert retry.status_code == 200 and retry.headers["Tink-Replayed"] == "true"
    for completion, tokens in zip(retry.json()["completions"], golden.cases.values(), strict=True):
        assert completion["token_ids"][: len(tokens)] == tokens
