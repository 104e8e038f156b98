"""The usage snippets of the vLLM integration that this package replaces, run as they are printed there.

Only host, port, path, model and device are changed, by `_here`; every change is listed in `CHANGES`.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
import torch

from tests.docs.commands import blocks
from tests.policies import NUM_TOKENS, PeftTwin, sync_to
from tests.server.worker_server import worker_over
from tink_rl import vllm_backend as ours
from tink_rl.sampling import default
from tink_rl.settings import Settings

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENT = """
# Enable vLLM backend
export USE_VLLM=true

# vLLM server connection (optional, defaults shown)
export VLLM_BASE_URL="http://localhost:8000"
# OR
export VLLM_HOST="0.0.0.0"
export VLLM_PORT="8000"

# vLLM configuration
export VLLM_GROUP_PORT="51216"  # For weight updates
export VLLM_TIMEOUT="5.0"        # Connection timeout in seconds
export VLLM_ENABLE_LORA="true"   # Enable LoRA support
export VLLM_MAX_LORAS="4"        # Max concurrent LoRA adapters
export VLLM_MAX_LORA_RANK="64"   # Max LoRA rank

# Optionally enable Megatron for training
export USE_MEGATRON=true
export MEGATRON_SERVER_URL="http://localhost:5000"
"""

BASIC_SAMPLING = """
import requests

response = requests.post("http://localhost:8000/api/v1/sample", json={
    "prompts": ["Once upon a time"],
    "sampling_params": {
        "max_tokens": 50,
        "temperature": 0.8,
        "top_p": 0.95,
        "top_k": 40
    }
})

print(response.json())
"""

REGISTER = """
import vllm_backend

# Register a LoRA adapter
vllm_backend.register_lora_adapter(
    adapter_id="my_lora_adapter",
    lora_path="/path/to/lora/weights"
)
"""

SAMPLE_WITH_ADAPTER = """
response = requests.post("http://localhost:8000/api/v1/sample", json={
    "prompts": ["Once upon a time"],
    "model_id": "my_lora_adapter",  # Specify the LoRA adapter
    "sampling_params": {
        "max_tokens": 50,
        "temperature": 0.8
    }
})
"""

MANAGE = """
import vllm_backend

# Register an adapter
vllm_backend.register_lora_adapter(
    adapter_id="adapter_1",
    lora_path="/path/to/lora/adapter_1"
)

# List all registered adapters
adapters = vllm_backend.list_lora_adapters()
print(adapters)
# [{'adapter_id': 'adapter_1', 'lora_path': '/path/to/lora/adapter_1'}]

# Unregister an adapter
vllm_backend.unregister_lora_adapter("adapter_1")
"""

UPDATE_WEIGHTS = """
import vllm_backend
import torch
from transformers import AutoModelForCausalLM

# Initialize communicator
vllm_backend.init_communicator(device="cuda")

# Load a model with updated weights
model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
# ... train the model ...

# Update vLLM server weights
vllm_backend.update_model_weights(model)

# Close communicator when done
vllm_backend.close_communicator()
"""

CREATE_ADAPTER = """
from peft import get_peft_model, LoraConfig
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")

lora_config = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    lora_dropout=0.2,
    bias="none",
    task_type="CAUSAL_LM"
)

peft_model = get_peft_model(model, lora_config)

# Train the model...

# Save LoRA adapter
peft_model.save_pretrained("/path/to/lora/adapter")
"""

CHANGES = {
    "http://localhost:8000/api": "{worker}/api",
    '"http://localhost:8000"': '"{server}"',
    'VLLM_PORT="8000"': 'VLLM_PORT="{port}"',
    "meta-llama/Llama-2-7b-hf": "{model}",
    "/path/to/lora/weights": "{adapters}/0",
    "/path/to/lora/adapter_1": "{adapters}/1",
    '"/path/to/lora/adapter"': '"{adapters}/made"',
    'device="cuda"': 'device="cpu"',
}
SERVER = {"shape": "qwen3", "mode": "adapter", "max_loras": 2, "max_cpu_loras": 4}
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}


def _here(snippet: str, places: dict[str, str]) -> str:
    for theirs, here in CHANGES.items():
        snippet = snippet.replace(theirs, here.format(**places))
    return snippet


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    """Two adapters on disk, and what the first one answers."""
    twin, root = PeftTwin(model_dir("qwen3")), tmp_path_factory.mktemp("lora")
    for seed in (1, 0):
        twin.randomise(seed)
        twin.model.save_pretrained(root / str(seed))
    return root, twin.clear_cases(count=2)


@pytest.fixture
def run(servers, model_dir, adapters, tmp_path, monkeypatch):
    """`run(snippet, names)`: execute one against a real server and worker, as their user would."""
    server = servers.get(**SERVER)
    places = {
        "server": server.url,
        "port": str(server.options.port),
        "model": str(model_dir("qwen3")),
        "adapters": str(adapters[0]),
        "worker": "not started yet",
    }
    store = str(tmp_path / "store")
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in re.findall(r'^export (\w+)="?([^"\s]+)', _here(ENVIRONMENT, places), re.M):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TINK_STORE_DIR", store)
    monkeypatch.setenv("TINK_TOKEN_FILE", str(server.token_file))
    monkeypatch.setattr(default, "_default", None)
    with worker_over(server, adapters[0], tmp_path, TINK_STORE_DIR=store) as command:
        places["worker"] = command.url

        def execute(snippet, names=None):
            names = {} if names is None else names
            exec(compile(_here(snippet, places), "snippet", "exec"), names)
            return names

        execute.worker = command.url
        yield execute
        for entry in ours.list_lora_adapters():
            ours.unregister_lora_adapter(entry["adapter_id"])
        ours.default_backend().close()


def test_environment_of_the_page_is_what_the_settings_read(run):
    settings = Settings.load()
    assert settings.samples_with == "vllm" and settings.use_megatron
    assert settings.url == ours.default_backend().client.base_url
    assert (settings.vllm_group_port, settings.vllm_max_lora_rank) == (51216, 64)


def test_sampling_without_and_with_an_adapter(run, adapters, capsys):
    names = run(BASIC_SAMPLING)
    assert names["response"].status_code == 200, names["response"].text
    [base] = names["response"].json()["completions"]
    assert 0 < len(base["token_ids"]) <= 50 and base["version"] is None
    assert base["text"] in capsys.readouterr().out
    names = run(SAMPLE_WITH_ADAPTER, run(REGISTER, names))
    assert names["response"].status_code == 200, names["response"].text
    [tuned] = names["response"].json()["completions"]
    assert (tuned["model_id"], tuned["version"]) == ("my_lora_adapter", 1)
    # The page samples at temperature 0.8; greedily the answers must be the adapter's own.
    url = names["response"].url
    for prompt, expected in adapters[1].items():
        body = {"prompts": [list(prompt)], "model_id": "my_lora_adapter", "sampling_params": GREEDY}
        [found] = names["requests"].post(url, json=body).json()["completions"]
        assert found["token_ids"] == expected


def test_managing_adapters_prints_what_the_page_says(run, adapters, capsys):
    run(MANAGE)
    path = str(adapters[0] / "1")
    assert capsys.readouterr().out == f"[{{'adapter_id': 'adapter_1', 'lora_path': '{path}'}}]\n"
    assert ours.list_lora_adapters() == []


def test_updating_weights_from_a_transformers_model(run, servers, model_dir):
    names = run(UPDATE_WEIGHTS)
    backend = ours.default_backend()
    try:
        [[found]] = backend.generate("12=", **GREEDY)
        # Which number that is depends on who published to this server before.
        assert backend.server.view(fresh=True).base == f"weights@{found.version}"
        assert len(found.digest) == 64
        ids = torch.tensor([found.prompt_token_ids])
        expected = names["model"].generate(
            ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert found.token_ids == expected[0, ids.shape[1] :].tolist()
    finally:
        with sync_to(servers.get(**SERVER), model_dir("qwen3"), "full", policy="weights"):
            pass  # drops what was published, so that the next test finds the base
    assert backend.generate("12=", **GREEDY)[0][0].version is None


def test_page_of_the_service_leads_to_a_sample(run, adapters):
    page = (ROOT / "docs/sampling_service.md").read_text()
    [code] = [
        c for c in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "register_" in c
    ]
    trained = str(adapters[0] / "0")
    assert "runs/grpo-digits" in code
    answer = run(code.replace("runs/grpo-digits", trained))["answer"]
    assert answer["version"] == 1 and len(answer["token_ids"]) <= 6
    [block] = [
        b
        for b in blocks()
        if b.page == "sampling_service.md" and b.commands[0].startswith("tink-rl worker")
    ]
    [curl] = [shlex.split(command) for command in block.commands if command.startswith("curl")]
    path = curl[2].removeprefix("localhost:8001")
    body = json.loads(curl[curl.index("-d") + 1])
    [completion] = httpx.post(f"{run.worker}{path}", json=body, timeout=60).json()["completions"]
    assert completion["text"] == answer["text"] and completion["digest"] == answer["digest"]


def test_adapter_made_with_peft_as_on_the_page_can_be_registered_and_sampled(run, adapters):
    run(CREATE_ADAPTER)
    ours.register_lora_adapter("made", adapters[0] / "made")
    [[found]] = ours.generate_with_vllm("12=", "made", **GREEDY)
    [[base]] = ours.generate_with_vllm("12=", **GREEDY)
    assert (
        found["version"] == 1 and found["token_ids"] == base["token_ids"]
    )  # a fresh LoRA has B = 0
