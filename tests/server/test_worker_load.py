"""Many clients, more adapters than slots, more requests than room: nothing lost, doubled or mixed up."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from tests.server.worker_server import body_for, figures, register, worker_over
from tests.worker_rig import in_threads

pytestmark = pytest.mark.server
NUM_CLIENTS = 100
NUM_COPIES = 7
# As many requests as `make test` has time for, and as many as a service sees in a minute.
REQUESTS_EACH = pytest.mark.parametrize(
    "requests_each", [2, pytest.param(20, marks=pytest.mark.long)]
)


def _register_all(command, goldens):
    for golden in goldens:
        register(command, golden.path, golden.name)


def _run(command, goldens, *, num_clients, requests_each, seed):
    """Every client's (id, status, problem) in order; a problem is what was wrong with a 200."""

    def client(c):
        chance = random.Random(seed + c)
        seen = []
        with command.http() as http:
            for i in range(requests_each):
                golden = chance.choice(goldens)
                prompt, expected = chance.choice(list(golden.cases.items()))
                body = body_for([prompt], golden.name, request_id=f"{seed}-{c}-{i}")
                answer = http.post("/api/v1/sample", json=body)
                seen.append(
                    (body["request_id"], answer.status_code, _check(answer, golden, expected))
                )
        return seen

    return [entry for seen in in_threads(num_clients, client) for entry in seen]


def _check(answer, golden, expected):
    if answer.status_code != 200:
        return answer.text
    [completion] = answer.json()["completions"]
    found = (completion["model_id"], completion["token_ids"], answer.headers["Tink-Replayed"])
    return None if found == (golden.name, expected, "false") else f"{golden.name}: {found}"


def _assert_all_answered(command, results, before, server):
    """Set equality on both sides, and vLLM's own count of generations."""
    assert [entry for entry in results if entry[1] != 200 or entry[2]] == []
    ids = [entry[0] for entry in results]
    assert len(set(ids)) == len(ids)
    ledger = command.token_file.parent.parent / "ledger"
    events = [json.loads(line) for line in ledger.read_text().splitlines()]
    counts = Counter((event["request_id"], event["event"]) for event in events)
    assert counts == Counter([(i, e) for i in ids for e in ("admitted", "done")])
    generated = figures(server)["finished"] - before["finished"]
    assert len(ids) <= generated <= len(ids) + 100  # and the worker's canaries
    assert figures(server)["running"] == figures(server)["waiting"] == 0


@REQUESTS_EACH
def test_32_adapters_on_2_slots_give_every_client_its_own_answers(
    servers, golden_adapters, tmp_path, requests_each
):
    server = servers.get("qwen3", mode="adapter", max_loras=2, max_cpu_loras=4)
    with worker_over(server, golden_adapters[0].path.parent, tmp_path) as command:
        _register_all(command, golden_adapters)
        before = figures(server)
        results = _run(
            command,
            golden_adapters,
            num_clients=NUM_CLIENTS,
            requests_each=requests_each,
            seed=1,
        )
        assert len(results) == NUM_CLIENTS * requests_each
        _assert_all_answered(command, results, before, server)


@REQUESTS_EACH
def test_hundreds_of_adapters_are_loaded_as_they_are_asked_for(
    servers, golden_adapters, tmp_path, requests_each
):
    server = servers.get("qwen3", mode="adapter", max_loras=2, max_cpu_loras=4)
    goldens = [replace(g, name=f"{g.name}-{i}") for i in range(NUM_COPIES) for g in golden_adapters]
    random.Random(4).shuffle(goldens)
    with worker_over(server, golden_adapters[0].path.parent, tmp_path) as command:
        _register_all(command, goldens)
        results = _run(command, goldens, num_clients=16, requests_each=requests_each, seed=4)
        assert [entry for entry in results if entry[1] != 200 or entry[2]] == []
        with command.http() as http:
            assert len(http.get("/api/v1/adapters").json()["adapters"]) == len(goldens) == 224


@REQUESTS_EACH
def test_requests_of_100_clients_over_16_adapters_are_all_answered_right(
    servers, golden_adapters, tmp_path, requests_each
):
    server = servers.get("qwen3", mode="adapter", max_loras=4)
    with worker_over(server, golden_adapters[0].path.parent, tmp_path) as command:
        _register_all(command, golden_adapters[:16])
        before = figures(server)
        results = _run(
            command,
            golden_adapters[:16],
            num_clients=NUM_CLIENTS,
            requests_each=requests_each,
            seed=2,
        )
        assert len(results) == NUM_CLIENTS * requests_each
        _assert_all_answered(command, results, before, server)


def test_five_times_more_than_fits_is_answered_or_refused_and_the_worker_lives(
    servers, golden_adapters, tmp_path
):
    server = servers.get("qwen3", mode="adapter", max_loras=4)
    limits = ("--max-running", "8", "--max-queued", "12")
    root = golden_adapters[0].path.parent
    with worker_over(server, root, tmp_path, *limits) as command:
        goldens = golden_adapters[:8]
        _register_all(command, goldens)
        results = _run(command, goldens, num_clients=100, requests_each=5, seed=3)
        statuses = Counter(entry[1] for entry in results)
        assert statuses[200] + statuses[429] == len(results) == 500 and statuses[429] > 0
        assert [entry for entry in results if entry[1] == 200 and entry[2]] == []
        ledger = (command.token_file.parent.parent / "ledger").read_text()
        assert ledger.count('"admitted"') == ledger.count('"done"') == statuses[200]
        again = _run(command, goldens, num_clients=4, requests_each=2, seed=4)
        assert [entry for entry in again if entry[1] != 200 or entry[2]] == []
