"""Start-up checks, command and environment, the token file, and that nothing is left behind."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cards import card
from tests.fakes import status
from tests.hub_cache import cache_snapshot
from tests.refusals import code_of, refused
from tink_rl import errors, launch, placement, post_mortem, serve_options, tokens
from tink_rl.cli import serve
from tink_rl.config import SyncConfig
from tink_rl.errors import ConfigError
from tink_rl.launch import VLLMServer
from tink_rl.placement import plan
from tink_rl.serve_options import ServerOptions
from tink_rl.tokens import ensure_token_file
from tink_rl.transport import payloads


def _options(model_dir, **changes):
    return ServerOptions(model=str(model_dir("qwen3")), **changes)


def test_taken_port_is_named_before_loading(model_dir):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with refused("port_taken", match=f"port {port} .*{os.getpid()}.*--port"):
            launch.check_options(_options(model_dir, port=port))


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "org/not-cached"])
def test_missing_model_is_named_before_loading(model):
    with refused("model_not_found", match="was not found"):
        launch.check_options(ServerOptions(model=model))


def test_directory_that_is_no_model_is_named(tmp_path):
    with refused("model_not_found", match=r"config\.json"):
        launch.check_options(ServerOptions(model=str(tmp_path)))


@pytest.mark.parametrize(("rank", "hint"), [(12, "--max-lora-rank 16"), (600, "512"), (0, "1, 8")])
def test_rank_without_kernels_is_refused_with_the_next_one(model_dir, rank, hint):
    with refused("rank_not_allowed", match=hint):
        launch.check_options(_options(model_dir, max_lora_rank=rank))


def test_unknown_mode_lists_the_modes(model_dir):
    with pytest.raises(ConfigError, match="merged, adapter, both, full"):
        launch.check_options(_options(model_dir, mode="magic"))


def test_vllm_that_is_not_installed_is_an_import_error(model_dir, monkeypatch):
    monkeypatch.setattr(serve_options, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="vLLM is not available"):
        launch.check_options(_options(model_dir))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("[::1]", "http://[::1]:8000"),
        ("2001:db8::1", "http://[2001:db8::1]:8000"),
        ("server.example", "http://server.example:8000"),
    ],
)
def test_url_of_a_server_can_be_dialled_whatever_its_host(host, url):
    assert ServerOptions(model="m", host=host, port=8000).url == url


@pytest.mark.parametrize(
    ("beside", "extra", "expected"),
    [
        (None, (), []),
        ("consolidated.safetensors", (), ["--config-format", "hf", "--load-format", "hf"]),
        ("consolidated.safetensors", ("--load-format=dummy",), ["--config-format", "hf"]),
        ("consolidated.safetensors", ("--load_format", "dummy"), ["--config-format", "hf"]),
        ("adapter_model.safetensors", (), []),
    ],
)
def test_mistrals_own_files_are_not_what_is_served(beside, extra, expected, tmp_path):
    if beside:
        (tmp_path / beside).touch()
    options = ServerOptions(model=str(tmp_path), extra_args=extra)
    line = launch.command(options, has_gpu=False)
    assert [word for word in line if word in ("--config-format", "--load-format", "hf")] == [
        word for word in [*expected, *extra] if word in ("--config-format", "--load-format", "hf")
    ]
    assert "--load-format" in launch.command(ServerOptions(model="acme/tiny"), has_gpu=False)


@pytest.fixture
def only_v2_is_cached(model_dir, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    (tmp_path / "repo").mkdir()
    shutil.copytree(model_dir("qwen3"), tmp_path / "repo" / "inner")
    cache_snapshot(cache, "acme/many", tmp_path / "repo", "v2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return cache_snapshot(cache, "acme/tiny", model_dir("qwen3"), "v2", "refs/pr/1")


def test_revision_is_looked_for_and_handed_on(only_v2_is_cached):
    for revision in ("v2", "refs/pr/1", only_v2_is_cached.name):
        options = launch.check_options(ServerOptions(model="acme/tiny", revision=revision))
        line = launch.command(options, has_gpu=False)
        assert line[line.index("--revision") + 1] == revision
        assert line[line.index("--model") + 1] == "acme/tiny"
    with refused("model_not_found", match=r"'acme/tiny' was not found.*cached: .*v2"):
        launch.check_options(ServerOptions(model="acme/tiny"))
    with refused("model_not_found", match="--revision v3"):
        launch.check_options(ServerOptions(model="acme/tiny", revision="v3"))


def test_subfolder_is_served_as_a_directory(only_v2_is_cached, tmp_path):
    given = {"subfolder": "inner", "revision": "v2"}
    options = launch.check_options(ServerOptions(model="acme/many", **given))
    line = launch.command(options, has_gpu=False)
    assert line[line.index("--model") + 1].endswith("/inner")
    local = launch.check_options(ServerOptions(model=str(tmp_path / "repo"), subfolder="inner"))
    assert local.model == str(tmp_path / "repo" / "inner")
    with refused("model_not_found", match=r"no config.json.*--subfolder inner"):
        launch.check_options(ServerOptions(model=str(tmp_path / "repo")))
    with refused("model_not_found", match="no subfolder 'outer'"):
        launch.check_options(ServerOptions(model="acme/many", revision="v2", subfolder="outer"))


def test_command_has_the_flags_of_its_mode(model_dir):
    merged = launch.command(
        _options(model_dir, mode="merged", extra_args=("--seed", "3")), has_gpu=False
    )
    assert "--enable-lora" not in merged and merged[-2:] == ["--seed", "3"]
    both = launch.command(_options(model_dir, mode="both"), has_gpu=True)
    assert "--enable-lora" in both and "--enforce-eager" not in both
    shared = launch.command(_options(model_dir, shared_with_trainer=True), has_gpu=True)
    assert shared[shared.index("--gpu-memory-utilization") + 1] == "0.45"


def test_environment_drops_what_is_not_the_servers_and_extends_the_plugins(model_dir, tmp_path):
    current = {
        **{"VLLM_PORT": "1", "VLLM_HOST": "x", "USE_VLLM": "true", "RANK": "0", "TINK_TOKEN": "s"},
        **{"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PATH": "p", "VLLM_PLUGINS": "mine"},
    }
    env = launch.environment(
        _options(model_dir, mode="both"),
        current,
        token_file=tmp_path / "token",
        server_binding="0",
        waits_asleep="engine",
        has_gpu=False,
    )
    assert not set(current) - {"PATH", "VLLM_PLUGINS"} & set(env)
    assert env["PATH"] == "p" and env["VLLM_PLUGINS"] == "mine,tink_rl"
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0" and env["TINK_SERVER_WAITS_ASLEEP"] == "engine"
    assert float(env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 10 * payloads.IDLE_CONNECTION_S
    assert env["TINK_SERVER_MODES"] == "adapter,merged,full"
    assert not {"VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"} & set(env)


def test_vllm_spins_as_ever_where_it_has_cores_to_spin_on(model_dir, tmp_path):
    env = launch.environment(
        _options(model_dir),
        {},
        token_file=tmp_path / "token",
        server_binding=None,
        waits_asleep="",
        has_gpu=False,
    )
    assert env["TINK_SERVER_WAITS_ASLEEP"] == "" and "VLLM_CPU_OMP_THREADS_BIND" not in env


def test_the_key_of_vllm_itself_is_the_one_that_the_server_is_given(model_dir, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert _options(model_dir).api_key is None
    assert _options(model_dir, extra_args=("--api-key", "k", "--seed", "1")).api_key == "k"
    assert _options(model_dir, extra_args=("--seed", "1", "--api-key=k")).api_key == "k"
    assert _options(model_dir, env={"VLLM_API_KEY": "e"}).api_key == "e"
    monkeypatch.setenv("VLLM_API_KEY", "o")
    assert _options(model_dir).api_key == "o" and SyncConfig().read_api_key() == "o"


def test_path_with_a_slip_in_its_last_part_is_no_hub_id(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with refused("model_not_found", match="models/bsae"):
        launch.check_options(ServerOptions(model="models/bsae"))
    launch.check_options(ServerOptions(model="org/model"))  # nothing of that name here


def test_failure_of_the_engine_is_told_by_its_cause():
    log = (
        "(EngineCore pid=1) ValueError: rope_scaling has no factor\n"
        "(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert "rope_scaling" in str(post_mortem.explain("vLLM ended", log, "server.log"))


@pytest.mark.parametrize(
    ("num_cores", "gpu", "placed", "shares", "asleep"),
    [
        (2, False, "", False, "engine"),
        (8, False, "", False, "engine"),
        (2, False, "", True, "all"),
        (2, False, "off", False, "all"),
        (9, False, "off", True, ""),
        (2, True, "", True, ""),
    ],
)
def test_who_shares_a_core_waits_asleep(monkeypatch, num_cores, gpu, placed, shares, asleep):
    monkeypatch.setattr(placement, "has_gpu", lambda: gpu)
    monkeypatch.setenv("TINK_PLACEMENT", placed)
    cores = tuple(range(num_cores))
    assert placement.who_waits_asleep(shares_cores=shares, cores=cores) == asleep


@pytest.mark.parametrize(
    ("options", "binding", "asleep"),
    [
        ({}, "0", "all"),
        ({"shared_with_trainer": False}, None, "engine"),
        ({"tensor_parallel_size": 2}, "0|1", "all"),
    ],
)
def test_server_beside_a_trainer_keeps_to_its_cores_and_waits_asleep(
    model_dir, tmp_path, monkeypatch, options, binding, asleep
):
    monkeypatch.setattr(placement, "has_gpu", lambda: False)
    monkeypatch.setattr(placement, "CORES", (0, 1))
    for name in ("TINK_PLACEMENT", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    started = {}
    server = VLLMServer(model_dir("qwen3"), token_file=str(tmp_path / "token"), **options)
    monkeypatch.setattr(server, "_popen", lambda line, *, env, log: started.update(env))
    server.token_file = tmp_path / "token"
    server._spawn()
    assert started.get("VLLM_CPU_OMP_THREADS_BIND") == binding
    assert started["TINK_SERVER_WAITS_ASLEEP"] == asleep


@pytest.mark.parametrize(
    ("max_staleness", "placed", "cores", "said"),
    [
        (0, "", None, "all 2 for the trainer"),
        (1, "", {1}, "1 for the trainer, 0 for vLLM (max_staleness=1)"),
        (1, "off", None, ""),
    ],
)
def test_trainer_leaves_the_server_its_cores_where_both_compute_at_once(
    monkeypatch, max_staleness, placed, cores, said
):
    kept = []
    monkeypatch.setattr(placement, "has_gpu", lambda: False)
    monkeypatch.setattr(placement, "CORES", (0, 1))
    monkeypatch.setattr(placement, "keep_to", lambda wanted: kept.append(set(wanted)))
    monkeypatch.setenv("TINK_PLACEMENT", placed)
    line = placement.place_trainer(max_staleness=max_staleness)
    assert said in line and bool(said) == bool(line)
    assert kept == ([cores] if cores else [])


@pytest.mark.parametrize(
    ("num_cores", "gpu", "given", "policy"),
    [
        (2, False, None, "passive"),
        (2, False, "active", "active"),
        (64, False, None, None),
        (2, True, None, None),
    ],
)
def test_threads_of_a_trainer_wait_asleep_on_a_small_machine(
    monkeypatch, num_cores, gpu, given, policy
):
    monkeypatch.setattr(placement, "has_gpu", lambda: gpu)
    monkeypatch.setattr(placement, "CORES", tuple(range(num_cores)))
    monkeypatch.setattr(os, "environ", {} if given is None else {"OMP_WAIT_POLICY": given})
    placement.let_threads_sleep()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_every_thread_of_a_trainer_and_torch_keep_to_its_cores():
    code = (
        "import os, threading, torch; from tink_rl import placement\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "core = placement.CORES[-1]; placement.keep_to([core])\n"
        "masks = [os.sched_getaffinity(int(t)) for t in os.listdir('/proc/self/task')]\n"
        "print(len(masks) > 1, all(m == {core} for m in masks), torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "1"]


def test_two_cores_are_split_between_server_and_trainer():
    assert plan(cores=(0, 1), num_workers=1, has_gpu=False).server_binding == "0"
    assert plan(cores=(0, 1), num_workers=1, has_gpu=False).trainer_cores == (1,)
    assert plan(cores=(0, 1), num_workers=2, has_gpu=False).server_binding == "0|1"
    assert plan(cores=(3,), num_workers=1, has_gpu=False).trainer_cores is None
    assert plan(cores=(0, 1), num_workers=1, has_gpu=True).server_binding is None
    assert plan(cores=tuple(range(64)), num_workers=1, has_gpu=False).server_binding is None


def test_token_file_is_made_once_and_refused_if_others_can_read_it(tmp_path):
    path = ensure_token_file(tmp_path / "deep" / "token")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ensure_token_file(path).read_text() == path.read_text()
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        ensure_token_file(path)


def test_token_file_that_another_process_is_still_writing_is_waited_for(tmp_path):
    path = tmp_path / "token"
    path.touch(0o600)
    writer = threading.Timer(0.1, path.write_text, ["t" * 20 + "\n"])
    writer.start()
    assert ensure_token_file(path) == path
    writer.join()


@pytest.mark.parametrize("content", ["", "short"])
def test_token_file_that_stays_too_short_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr(tokens, "_WRITTEN_S", 0.05)
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(content)
    with pytest.raises(ConfigError, match="fewer than 16 characters; delete it"):
        ensure_token_file(path)


def test_processes_that_start_together_agree_on_one_token(tmp_path):
    path = tmp_path / "deep" / "token"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ensure_token_file(path).read_text(), range(8)))
    assert len(set(found)) == 1 and len(found[0].strip()) >= 16


def test_token_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    def full(handle, mode):
        os.close(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokens.os, "fdopen", full)
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match="No space left on device"):
        ensure_token_file(path)
    assert not path.exists()


@pytest.mark.parametrize("name", ["file/token", "directory"])
def test_token_file_that_cannot_be_made_or_read_is_named_with_the_way_out(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir(0o700)
    with pytest.raises(ConfigError, match=f"{name} cannot .*TINK_TOKEN_FILE or --token-file"):
        ensure_token_file(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "error", "text"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried",
            "out_of_memory",
            "--max-model-len",
        ),
        ("ValueError: No available memory for the cache blocks.", "out_of_memory", "smaller"),
        ("X: golden_does_not_fit: need 3 GiB", "golden_does_not_fit", "need 3 GiB"),
        ("ERROR [x] KeyError: 'oops'", errors.LaunchFailed, "oops"),
        ("nothing", errors.LaunchFailed, "no error line"),
    ],
)
def test_log_of_a_failed_start_becomes_one_line(line, error, text):
    found = post_mortem.explain("vLLM ended while starting", line, "server.log")
    assert found.code == code_of(error) and text in str(found) and "\n" not in str(found)


_FAKE = textwrap.dedent("""
    import os, signal, time
    if os.fork() == 0:  # like vLLM's engine: a child that outlives its parent
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("started", flush=True)
    time.sleep(600)
""")


def _fake_server(model_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "command", lambda *_, **__: [sys.executable, "-c", _FAKE])
    # counted, not matched: an unbuffered Python writes a line and its end apart
    monkeypatch.setattr(launch, "_answers", lambda *_: server.log_tail().count("started") == 2)
    monkeypatch.setattr(launch.VLLMClient, "generate", lambda *_, **__: {})
    server = VLLMServer(model_dir("qwen3"), token_file=str(tmp_path / "token"))
    return server


def test_stop_ends_the_whole_group_children_that_ignore_sigterm_included(
    model_dir, monkeypatch, tmp_path
):
    monkeypatch.setattr(launch, "_end_group", _quick(launch._end_group))
    with _fake_server(model_dir, monkeypatch, tmp_path) as server:
        pid = server.pid
        assert len(launch.group_members(pid)) == 3  # watchdog, server, engine
    assert launch.group_members(pid) == [] and not server.alive


def _quick(end_group):
    return lambda group, number, timeout_s: end_group(group, number, min(timeout_s, 2.0))


def test_start_that_fails_leaves_nothing_and_says_why(model_dir, monkeypatch, tmp_path):
    crash = [sys.executable, "-c", "raise SystemExit('ValueError: bad flag')"]
    monkeypatch.setattr(launch, "command", lambda *_, **__: crash)
    server = VLLMServer(model_dir("qwen3"), token_file=str(tmp_path / "token"))
    with pytest.raises(errors.LaunchFailed, match="bad flag"):
        server.start()
    assert server.pid is None


def test_server_does_not_outlive_a_killed_parent(tmp_path):
    script = textwrap.dedent("""
        import subprocess, sys, os, time
        child = subprocess.Popen([sys.executable, "-m", "tink_rl.watchdog", str(os.getpid()),
                                  sys.executable, "-c", "import time; time.sleep(600)"],
                                 start_new_session=True)
        print(child.pid, flush=True)
        time.sleep(600)
    """)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    while len(launch.group_members(group)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(launch.group_members(group)) == 2
    parent.kill()
    parent.wait()
    while launch.group_members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert launch.group_members(group) == []


# -- on a GPU, as far as can be known without one -------------------------------------------------


@pytest.mark.parametrize("mode", ["merged", "adapter", "both", "full"])
@pytest.mark.parametrize("dtype", ["auto", "half", "float16", "bfloat16", "float", "float32"])
@pytest.mark.parametrize("shared", [True, False])
def test_slots_in_float32_are_refused_on_a_gpu_and_only_there(model_dir, mode, dtype, shared):
    options = _options(model_dir, mode=mode, dtype=dtype, shared_with_trainer=shared)
    launch.check_options(options, has_gpu=False)
    if mode in ("adapter", "both") and dtype in ("float", "float32"):
        with pytest.raises(ConfigError, match=f"--dtype {dtype} .*bfloat16, or --mode merged"):
            launch.check_options(options, has_gpu=True)
    else:
        launch.check_options(options, has_gpu=True)


@pytest.mark.parametrize("given", [("--dtype", "float32"), ("--dtype=float",)])
def test_dtype_among_vllms_own_flags_counts(model_dir, given):
    with pytest.raises(ConfigError, match="LoRA slots"):
        launch.check_options(_options(model_dir, extra_args=given), has_gpu=True)


def test_vllm_for_gpus_without_one_is_told_before_it_is_started(model_dir, monkeypatch):
    monkeypatch.setattr(launch.gpus, "vllm_build", lambda: "cuda")
    monkeypatch.setattr(serve_options, "entry_points", lambda group: [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES=''.*tink-rl\[cpu\]"):
        launch.check_options(_options(model_dir), has_gpu=False)
    launch.check_options(_options(model_dir), has_gpu=True)
    monkeypatch.setattr(serve_options, "entry_points", lambda group: ["another platform"])
    launch.check_options(_options(model_dir), has_gpu=False)


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, "0.45"),
        ({"shared_with_trainer": False}, None),
        ({"gpu_memory_utilization": 0.7}, "0.7"),
        ({"gpu_memory_utilization": 0.7, "shared_with_trainer": False}, "0.7"),
    ],
)
def test_share_of_the_gpu_is_the_trainers_too_unless_the_server_is_alone(model_dir, changes, share):
    options = _options(model_dir, **changes)
    line = launch.command(options, has_gpu=True)
    found = dict(zip(line, [*line[1:], ""], strict=True)).get("--gpu-memory-utilization")
    assert found == share
    assert "--gpu-memory-utilization" not in launch.command(options, has_gpu=False)


def _environment(options, tmp_path, *, has_gpu):
    return launch.environment(
        options,
        {},
        token_file=tmp_path / "token",
        server_binding=None,
        waits_asleep="",
        has_gpu=has_gpu,
    )


@pytest.mark.parametrize(("shared", "told"), [(True, "1"), (False, "0")])
@pytest.mark.parametrize("has_gpu", [True, False])
def test_server_knows_whether_what_it_leaves_free_is_a_trainers(
    model_dir, tmp_path, shared, told, has_gpu
):
    env = _environment(_options(model_dir, shared_with_trainer=shared), tmp_path, has_gpu=has_gpu)
    assert env["TINK_SERVER_SHARED"] == told and env["TINK_SERVER_GOLDEN_TIER"] == "auto"
    assert ("VLLM_CPU_KVCACHE_SPACE" in env) is not has_gpu


def test_server_in_this_process_shares_its_gpu_and_one_from_the_shell_says_alone(model_dir):
    assert VLLMServer(model_dir("qwen3")).options.shared_with_trainer
    parser = argparse.ArgumentParser()
    serve.add(parser.add_subparsers())
    for flags, alone in (([], False), (["--alone"], True)):
        options = serve.options_of(parser.parse_args(["serve", "m", *flags]), [])
        assert options.shared_with_trainer is not alone


@pytest.mark.parametrize(
    ("changes", "address"),
    [
        ({}, "127.0.0.1"),
        ({"host": "10.0.0.9"}, "127.0.0.1"),
        ({"host": "0.0.0.0"}, "127.0.0.1"),
        (
            {"host": "10.0.0.9", "extra_args": ("--distributed-executor-backend", "ray")},
            "10.0.0.9",
        ),
        ({"host": "10.0.0.9", "extra_args": ("--nnodes=2",)}, "10.0.0.9"),
        ({"host": "0.0.0.0", "extra_args": ("--distributed-executor-backend=ray",)}, None),
    ],
)
def test_vllms_processes_meet_on_loopback_unless_some_are_on_other_machines(
    model_dir, tmp_path, changes, address
):
    env = _environment(_options(model_dir, **changes), tmp_path, has_gpu=True)
    assert env.get("VLLM_HOST_IP") == address


@pytest.mark.parametrize(
    ("model", "given", "has_gpu", "seconds"),
    [
        ("DIR", None, False, 600),
        ("DIR", None, True, 1800),
        ("org/model", None, False, 1800),
        ("org/model", 60.0, True, 60),
    ],
)
def test_compiling_and_capturing_have_the_time_that_they_take(
    model_dir, model, given, has_gpu, seconds
):
    name = str(model_dir("qwen3")) if model == "DIR" else model
    options = ServerOptions(model=name, startup_timeout_s=given)
    assert options.startup_timeout(has_gpu=has_gpu) == seconds


@pytest.mark.parametrize(
    ("served", "state", "ready"),
    [("mine", "ready", True), ("another's", "ready", False), ("mine", "not_ready", False)],
)
def test_launcher_is_ready_when_its_own_server_answers(monkeypatch, served, state, ready):
    found = status(state=state, launch_id=served)
    monkeypatch.setattr(launch.VLLMClient, "status", lambda *_, **__: found)
    with launch.VLLMClient("http://127.0.0.1:1", token="t" * 20) as client:
        assert launch._answers(client, "mine") is ready


def test_start_that_takes_too_long_names_its_stage_and_the_flag(model_dir, monkeypatch, tmp_path):
    slow = "import time; print('Initializing a V1 LLM engine', flush=True); time.sleep(600)"
    monkeypatch.setattr(launch, "command", lambda *_, **__: [sys.executable, "-c", slow])
    monkeypatch.setattr(launch, "_answers", lambda *_: False)
    monkeypatch.setattr(launch, "_end_group", _quick(launch._end_group))
    token = str(tmp_path / "token")
    server = VLLMServer(model_dir("qwen3"), token_file=token, startup_timeout_s=2.0)
    with refused("start_timeout", match=r"after 2 s \(.*\); raise --startup-timeout"):
        server.start()


def test_who_takes_what_of_the_gpu_is_said_before_vllm_is_started(model_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(launch.gpus, "has_gpu", lambda: True)
    monkeypatch.setattr(launch.gpus, "visible_gpus", lambda: [card(24 * 2**30)])
    token = str(tmp_path / "token")
    server = VLLMServer(model_dir("qwen3"), token_file=token).prepare()
    assert server.memory_line.startswith("GPU 0 (NVIDIA L4, 24.0 GiB): server 10.8 GiB = weights")
    assert "trainer" in server.memory_line and server.pid is None
    odd = VLLMServer(tmp_path, token_file=token, mode="adapter")
    (tmp_path / "config.json").write_text("{}")  # a model that only vLLM can read
    assert odd.prepare().memory_line == ""
