"""The doctor at a real server."""

from __future__ import annotations

import pytest
import torch

from tests.policies import PeftTwin, random_adapter, sync_to
from tink_rl.cli import main
from tink_rl.memory_plan import ServePlan, plan_memory, read_shape
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.tools.doctor.finding import Level
from tink_rl.tools.doctor.server import check_server

pytestmark = [pytest.mark.server, pytest.mark.home]


@pytest.fixture
def server(servers):
    return servers.get("qwen3", mode="both")


def test_server_of_tink_rl_serve_has_nothing_to_mend(server, model_dir):
    with server.client() as client:
        findings, status = check_server(client, base_model=str(model_dir("qwen3")))
    assert {f.level for f in findings} == {Level.OK}
    areas = {f.area for f in findings}
    assert areas >= {"server", "modes", "slots", "dtype", "logprobs", "clock", "base", "network"}
    # The plan made from headers is what the workers really keep.
    plan = plan_memory(read_shape(model_dir("qwen3")), ServePlan(dtype="float32"))
    assert plan.golden == status.golden["bytes"]


def test_worker_may_use_the_tile_registers_of_its_cpu(server):
    has_amx = torch.cpu._is_amx_tile_supported()
    assert server.client().status().amx is (True if has_amx else None)


def test_other_base_and_wrong_token_are_blockers(server, model_dir):
    with server.client() as client:
        findings, _ = check_server(client, base_model=str(model_dir("llama")))
    assert [f.area for f in findings if f.level is Level.BLOCKER] == ["base"]
    with VLLMClient(server.url, token="wrong" * 8) as client:
        findings, status = check_server(client)
    assert status is None and "--token-file" in findings[0].fix


def test_command_names_what_is_served_and_what_an_adapter_gets(server, model_dir, tmp_path, capsys):
    twin = PeftTwin(model_dir("qwen3"))
    with sync_to(server, twin.directory, "adapter", policy="seen") as sync:
        name = sync.publish(random_adapter(twin, 1)).name
        twin.model.save_pretrained(tmp_path)
        line = ["doctor", server.url, "--token-file", str(server.token_file)]
        assert main([*line, "--adapter", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert name in printed and "mode adapter" in printed and "no blocker" in printed
    assert main(["doctor", "http://127.0.0.1:9", "--token-file", str(server.token_file)]) == 1
    assert "tink-rl serve MODEL" in capsys.readouterr().out
