"""`tink-rl worker` as a process: where it listens, whom it lets in, and how it ends."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from flask import Flask

from tests.adapters import write_adapter
from tests.stub_vllm import BASE, StubVLLM
from tests.worker_rig import WorkerCommand, in_threads, wait_until
from tink_rl import placement
from tink_rl.errors import BadToken, ConfigError, NotSupportedByBackend
from tink_rl.settings import Settings
from tink_rl.vllm_backend import VLLMBackend
from tink_rl.worker import build
from tink_rl.worker.app import blueprint
from tink_rl.worker.auth import Scope, Tokens
from tink_rl.worker.http_server import bind
from tink_rl.worker.options import WorkerOptions, load_options


def test_the_worker_starts_without_its_server_and_says_that_it_is_not_ready(tmp_path):
    with WorkerCommand(tmp_path) as command:
        assert httpx.get(f"{command.url}/livez").status_code == 200
        assert httpx.get(f"{command.url}/readyz").status_code == 503
        response = httpx.post(f"{command.url}/api/v1/sample", json={"prompts": ["x"]})
        assert response.status_code == 503 and "Retry-After" in response.headers
        assert "can't be reached" in response.json()["error"]["message"]
        assert stat.S_IMODE(command.token_file.stat().st_mode) == 0o600
        token = command.token_file.read_text().strip()
        assert token not in command.text and token not in " ".join(command.argv)
        assert str(command.token_file) in command.text
        assert command.stop() == 0


@pytest.mark.parametrize(
    ("vllm", "env", "shares"),
    [
        ("http://127.0.0.1:9", {}, True),
        ("http://127.0.0.1:9", {"TINK_PLACEMENT": "off"}, False),
        ("http://192.0.2.1:9", {}, False),
    ],
)
def test_a_worker_beside_its_server_leaves_it_the_cores_that_it_computes_on(
    tmp_path, monkeypatch, vllm, env, shares
):
    monkeypatch.delenv("TINK_PLACEMENT", raising=False)
    beside = placement.plan_here().trainer_cores if shares else None
    with WorkerCommand(tmp_path, vllm=vllm, **env) as command:
        assert os.sched_getaffinity(command.process.pid) == set(beside or placement.CORES)


def test_sigterm_refuses_new_requests_finishes_those_under_way_and_exits_0(tmp_path):
    with StubVLLM(latency_s=4.0) as vllm, WorkerCommand(tmp_path, vllm=vllm.url) as command:
        url = command.url
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, 20)
        before = vllm.num_completions
        late: list[int] = []

        def client(i):
            if i < 8:
                body = {"prompts": [f"p{i}"], "sampling_params": {"max_tokens": 2}}
                return httpx.post(f"{url}/api/v1/sample", json=body, timeout=30)
            wait_until(lambda: vllm.num_begun == 8)
            command.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "stopping" in command.text)
            late.append(httpx.post(f"{url}/api/v1/sample", json={"prompts": ["x"]}).status_code)
            return None

        responses = in_threads(9, client)[:8]
        assert command.process.wait(25) == 0
        assert [r.status_code for r in responses] == [200] * 8 and late == [503]
        assert vllm.num_completions - before >= 8
        assert "0 requests were cut off" in command.text
        with socket.socket() as port:
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port.bind(("127.0.0.1", httpx.URL(url).port))  # free again


def test_requests_that_outlast_the_drain_are_cut_off_with_503(tmp_path):
    with (
        StubVLLM(latency_s=30.0) as vllm,
        WorkerCommand(tmp_path, "--drain", "0.5", vllm=vllm.url) as command,
    ):
        url = command.url

        def client(i):
            if i == 0:
                body = {"prompts": ["x"], "sampling_params": {"max_tokens": 2}}
                return httpx.post(f"{url}/api/v1/sample", json=body, timeout=30)
            wait_until(lambda: vllm.num_begun == 1)
            return command.stop()

        response, code = in_threads(2, client)
        assert response.status_code == 503 and code == 0
        assert response.json()["error"]["code"] == "shutting_down"


def test_a_worker_with_a_load_that_hangs_ends_within_seconds_of_saying_that_it_stopped(tmp_path):
    adapter = write_adapter(tmp_path / "runs" / "a")
    with (
        StubVLLM(load_s=60.0) as vllm,
        WorkerCommand(
            *(tmp_path, "--adapter-root", str(tmp_path / "runs")),
            vllm=vllm.url,
            TINK_ALLOW_UNVERIFIED_BASE="true",
        ) as command,
    ):
        body = {"adapter_id": "math", "lora_path": str(adapter)}
        with command.http() as http:
            made = http.post("/api/v1/adapters", json=body, headers=command.admin)
            assert made.status_code == 200, made.text
            asked = {"prompts": ["x"], "model_id": "math", "timeout_s": 1.0}
            assert http.post("/api/v1/sample", json=asked).status_code == 504
        assert vllm.num_loads == 1
        command.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopped; 0 requests were cut off" in command.text, 15.0)
        assert command.process.wait(5.0) == 0
        assert "Traceback" not in command.text


def test_a_worker_that_stops_closes_its_backend_once(tmp_path, monkeypatch):
    closed = []
    close = VLLMBackend.close
    monkeypatch.setattr(VLLMBackend, "close", lambda self: (closed.append(self), close(self)))
    options = WorkerOptions(admin_token_file=str(tmp_path / "token"))
    with StubVLLM() as vllm:
        settings = {"base_url": vllm.url, "tink_store_dir": str(tmp_path / "store")}
        service = build.build_service(Settings.load(settings), options).start()
        assert service.models()[0].model_id == BASE and not closed
        assert [service.stop(), service.stop()] == [0, 0]
    [backend] = closed
    assert backend is service.backend.backend
    with pytest.raises(ConfigError, match="was closed"):
        backend.client.model_cards()


def test_more_clients_than_files_are_answered_or_refused_and_the_worker_lives(tmp_path):
    few = (resource.RLIMIT_NOFILE, (128, 128))
    with (
        StubVLLM(latency_s=0.05) as vllm,
        WorkerCommand(tmp_path, vllm=vllm.url, limit=few) as command,
    ):

        def client(i):
            body = {"prompts": [f"p{i}"], "sampling_params": {"max_tokens": 2}}
            with command.http(timeout=30) as http:
                return http.post("/api/v1/sample", json=body).status_code

        statuses = in_threads(200, client)
        assert set(statuses) <= {200, 429, 503} and statuses.count(200) > 0
        wait_until(lambda: client(0) == 200, 5.0)
        assert command.stop() == 0


def test_a_stock_server_is_sampled_through_the_worker(tmp_path):
    with StubVLLM() as vllm, WorkerCommand(tmp_path, vllm=vllm.url) as command:
        answer = httpx.post(f"{command.url}/api/v1/sample", json={"prompts": ["x"]}).json()
        assert answer["completions"][0]["token_ids"] == [1, 2]
        models = httpx.get(f"{command.url}/api/v1/models").json()["models"]
        assert [m["model_id"] for m in models] == [BASE]


@pytest.mark.parametrize("base", ["/models/Llama-3", "./base", "/m/" + "x" * 200])
def test_a_base_that_is_served_as_a_path_is_listed_and_sampled(tmp_path, base):
    with StubVLLM(base=base) as vllm, WorkerCommand(tmp_path, vllm=vllm.url) as command:
        [model] = httpx.get(f"{command.url}/api/v1/models").json()["models"]
        assert model["model_id"] == base and model["kind"] == "base"
        body = {"prompts": ["x"], "model_id": model["model_id"]}
        response = httpx.post(f"{command.url}/api/v1/sample", json=body)
        assert response.status_code == 200, response.text
        [completion] = response.json()["completions"]
        assert completion["token_ids"] == [1, 2] and completion["model_id"] == base


def test_the_blueprint_of_an_existing_app_takes_everything_from_the_environment(
    tmp_path, monkeypatch
):
    with StubVLLM() as vllm:
        monkeypatch.setenv("VLLM_BASE_URL", vllm.url)
        monkeypatch.setenv("TINK_STORE_DIR", str(tmp_path / "store"))
        monkeypatch.setenv("TINK_TOKEN_FILE", str(tmp_path / "token"))
        service = build.service_from_environment()
        monkeypatch.setattr(build, "service_from_environment", lambda: service)
        app = Flask("somebody-elses")
        app.register_blueprint(blueprint())
        http = app.test_client()
        answer = http.post("/api/v1/sample", json={"prompts": ["x"], "sampling_params": {"n": 2}})
        assert [c["token_ids"] for c in answer.json["completions"]] == [[1, 2]] * 2
        token = (tmp_path / "token").read_text().strip()
        assert http.get("/metrics").status_code == 401
        figures = http.get("/metrics", headers={"Authorization": f"Bearer {token}"})
        assert figures.status_code == 200
        service.stop()


_FORKED = """
import os, sys
from flask import Flask
from tests.fakes import FakeBackend
from tink_rl.worker.app import blueprint
from tink_rl.worker.auth import Tokens
from tink_rl.worker.options import WorkerOptions
from tink_rl.worker.service import WorkerService

service = WorkerService(FakeBackend(), None, options=WorkerOptions(), tokens=Tokens(admin="x" * 20))
app = Flask("pre-forking")
app.register_blueprint(blueprint(service))


def ask():
    answer = app.test_client().post("/api/v1/sample", json={"prompts": ["x"]})
    service.stop()
    return answer.status_code


def in_child():
    child = os.fork()
    if child == 0:
        os._exit(ask() // 10)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * 10


if sys.argv[1] == "late":
    service.start()
print(in_child(), in_child(), ask())
"""


@pytest.mark.parametrize(("when", "expected"), [("early", "200 200 200"), ("late", "500 500 200")])
def test_an_app_that_is_made_before_a_fork_serves_in_every_process(when, expected):
    done = subprocess.run(
        [sys.executable, "-c", _FORKED, when], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == expected, done.stderr
    assert ("was forked from it" in done.stderr) == (when == "late")


def test_megatron_is_served_if_the_settings_say_so(tmp_path):
    options = WorkerOptions(admin_token_file=str(tmp_path / "token"))
    service = build.build_service(Settings.load({"use_megatron": True}), options)
    assert service.backend.describe()["backend"] == "megatron"
    with pytest.raises(NotSupportedByBackend, match="no adapters"):
        service.register("x", "/x")


def test_a_taken_port_is_exit_3_and_one_line_before_anything_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = (
            "import sys; from tink_rl.cli import main\n"
            f"code = main(['worker', '--port', '{port}'])\n"
            "print(code, [m for m in ('torch', 'aiohttp', 'vllm') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "3 []"
    [line] = done.stderr.strip().splitlines()
    assert f"port {port}" in line and f"process {os.getpid()}" in line and "--port" in line


def test_an_address_of_another_machine_is_said_and_is_no_taken_port():
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_other_machines_are_not_let_in_without_a_token(host):
    with pytest.raises(ConfigError, match="--sample-token-file"):
        load_options(host=host)
    assert load_options(host=host, sample_token_file="x").host == host


@pytest.mark.parametrize(
    ("name", "value"), [("port", 65536), ("max_queued", 0), ("timeout_s", 0), ("drain_s", -1)]
)
def test_a_bad_option_names_its_variable_and_value(monkeypatch, name, value):
    variable = f"TINK_WORKER_{name.upper()}"
    monkeypatch.setenv(variable, str(value))
    with pytest.raises(ConfigError, match=rf"{variable}='?{value}"):
        load_options()


def test_flags_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("TINK_WORKER_PORT", "9001")
    assert load_options().port == 9001
    assert load_options(port=9002, host=None).port == 9002


def test_the_example_of_the_environment_names_every_option_with_its_default():
    text = (Path(__file__).parents[2] / ".env.example").read_text()
    found = dict(re.findall(r"^# TINK_WORKER_([A-Z_]+)=(.*)$", text, flags=re.MULTILINE))
    defaults = {name.upper(): field.default for name, field in WorkerOptions.model_fields.items()}
    assert found == {name: "" if v is None else str(v) for name, v in defaults.items()}


def test_token_files_are_made_private_and_read_once(tmp_path):
    options = WorkerOptions(
        sample_token_file=str(tmp_path / "sample"), admin_token_file=str(tmp_path / "admin")
    )
    tokens = Tokens.from_options(options)
    for name in ("sample", "admin"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        tokens.require(Scope.SAMPLE, f"Bearer {(tmp_path / name).read_text().strip()}")
    with pytest.raises(BadToken):
        tokens.require(Scope.SAMPLE, None)
    (tmp_path / "admin").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Tokens.from_options(options)


def test_the_http_threads_outnumber_all_that_can_wait():
    options = WorkerOptions(max_running=7, max_queued=11)
    assert options.num_threads > options.max_waiting > 7 + 11


def test_the_rooms_of_the_worker_load_neither_torch_nor_vllm():
    code = (
        "import sys, tink_rl.worker.app, tink_rl.worker.http_server, tink_rl.worker.build, "
        "tink_rl.cli.worker\nprint([m for m in ('torch', 'trl', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
