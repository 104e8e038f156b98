"""What ended a server: the cause, not the last line with "Error" in it; a signal by its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tink_rl import errors, launch, post_mortem
from tink_rl.errors import ConfigError
from tink_rl.launch import VLLMServer
from tink_rl.post_mortem import cause_in, count_oom_kills, explain

SHM = """\
(APIServer pid=8) INFO 11-28 13:05:01 [utils.py:233] non-default args: {}
(EngineCore pid=9) ERROR 11-28 13:05:09 [core.py:1141] EngineCore failed to start.
(EngineCore pid=9) ERROR 11-28 13:05:09 [core.py:1141] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-28 13:05:09 [core.py:1141]   File "shm_broadcast.py", line 248, in check
(EngineCore pid=9) ERROR 11-28 13:05:09 [core.py:1141]     raise RuntimeError(
(EngineCore pid=9) ERROR 11-28 13:05:09 [core.py:1141] RuntimeError: Insufficient space in /dev/shm for the \
message queue: 160 MiB required, 64 MiB free. Increase /dev/shm (e.g. --shm-size or --ipc=host).
(EngineCore pid=9)     raise RuntimeError(
(APIServer pid=8) Traceback (most recent call last):
(APIServer pid=8)     raise RuntimeError(
(APIServer pid=8) RuntimeError: Engine core initialization failed. See root cause above. Failed core \
proc(s): {'EngineCore_DP0': 1}
(APIServer pid=8)     raise RuntimeError(
"""
CHAIN = """\
Traceback (most recent call last):
KeyError: 'qwen9'
During handling of the above exception, another exception occurred:
Traceback (most recent call last):
    raise ValueError(
ValueError: model type 'qwen9' is not known to this release
Traceback (most recent call last):
BrokenPipeError: [Errno 32] Broken pipe
"""
ULIMIT = (
    "(APIServer pid=8) WARNING 11-28 13:05:01 [system_utils.py:250] Found ulimit of 20000 and failed to "
    "increase with error x. This can cause errors like `OSError: [Errno 24] Too many open files`.\n"
)
PYDANTIC = """\
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, rope_scaling has no factor [type=value_error]
"""
USAGE = "usage: api_server.py [-h]\napi_server.py: error: argument --dtype: invalid choice: 'fp9'\n"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (SHM, "RuntimeError: Insufficient space in /dev/shm for the message queue: 160 MiB"),
        (CHAIN, "ValueError: model type 'qwen9' is not known"),
        (PYDANTIC, "ModelConfig Value error, rope_scaling has no factor"),
        (USAGE, "argument --dtype: invalid choice"),
        ("torch.cuda.CudaError: driver too old", "driver too old"),
        ("(Worker_TP0 pid=3) KeyError: 'layers.0'", "'layers.0'"),
        (ULIMIT, ""),
        ("x = 1  # Error: no\n    raise ValueError(\n", ""),
    ],
)
def test_cause_is_the_first_exception_and_no_line_of_source_or_warning(log, cause):
    found = cause_in(log)
    assert cause in found and bool(found) == bool(cause) and "\n" not in found


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("OSError: [Errno 28] No space left on device", "free space"),
        ("OSError: [Errno 24] Too many open files", "ulimit -n 65536"),
        ("ValueError: Model architectures ['Foo'] are not supported for now. X", "another model"),
        ("huggingface_hub.errors.GatedRepoError: 403 Client Error.", "hf auth login"),
        ("safetensors_rust.SafetensorError: incomplete metadata", "download or copy it again"),
        ("RuntimeError: Insufficient space in /dev/shm: 160 MiB required", "--shm-size"),
        ("api_server.py: error: unrecognized arguments: --foo", "vllm serve --help"),
    ],
)
def test_known_cause_names_the_next_step(line, remedy):
    said = explain("vLLM ended", f"(APIServer pid=1) {line}\n", "LOG", exit_code=1).message
    assert line in said and remedy in said.removeprefix(line) and said.endswith("; log: LOG")


def test_exception_without_a_word_is_told_by_the_line_that_raised_it():
    log = "(EngineCore pid=1) ERROR     assert rows == width\n(EngineCore pid=1) AssertionError\n"
    assert "AssertionError (" in cause_in(log) and "assert rows == width" in cause_in(log)


def test_start_without_room_for_shared_memory_says_what_it_needs():
    found = explain("vLLM ended while starting", SHM, "x.log", exit_code=1)
    assert "160 MiB required, 64 MiB free" in str(found) and "--shm-size" in str(found)
    assert "raise" not in str(found) and str(found).endswith("log: x.log")


WORKER = (
    "(EngineCore pid=9) ERROR 11-28 13:05:09 [multiproc_executor.py:314] Worker proc VllmWorker-0 died "
    "unexpectedly (exit code: -{}), shutting down executor.\n"
    "(APIServer pid=8) vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n"
)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (signal.SIGILL, "--dtype float32"),
        (signal.SIGKILL, "dmesg"),
        (signal.SIGSEGV, "native code"),
        (signal.SIGBUS, "--shm-size"),
        (signal.SIGABRT, "native code"),
    ],
)
def test_worker_that_dies_of_a_signal_is_reported_by_it_with_the_remedy(number, remedy):
    found = str(explain("the server ended", WORKER.format(int(number)), "x.log", exit_code=1))
    assert f"process VllmWorker-0 was ended by {number.name}" in found and remedy in found


@pytest.mark.parametrize(
    ("log", "who"),
    [
        ("RuntimeError: Failed core proc(s): {'EngineCore_DP0': -4}", "EngineCore_DP0"),
        ("RuntimeError: Process ApiServer_0 (PID: 77) died with exit code -4", "ApiServer_0"),
        ("Fatal Python error: Illegal instruction\n\nThread 0x1:\n", "a process"),
        (WORKER.format(15) + WORKER.format(4).replace("Worker-0", "Worker-1"), "VllmWorker-1"),
    ],
)
def test_other_ways_in_which_vllm_tells_of_a_signal_are_read(log, who):
    assert f"{who} was ended by SIGILL" in str(explain("it ended", log, "x.log"))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (137, "the API server was ended by SIGKILL"),
        (132, "the API server was ended by SIGILL"),
        (-9, "its watchdog was ended by SIGKILL"),
        (143, "SIGTERM: another process asked it to stop"),
        (128 + 77, "signal 77"),
    ],
)
def test_servers_own_end_by_a_signal_is_read_from_its_code_whatever_the_log_warns_of(code, said):
    found = explain("the server ended", ULIMIT + WORKER.format(15), "x.log", exit_code=code)
    assert said in str(found) and "ulimit" not in str(found)


def test_kill_is_out_of_memory_only_where_the_kernel_counted_one():
    log = WORKER.format(9)
    counted = explain("it ended", log, "x.log", oom_kills=1)
    assert counted.code == "out_of_memory" and "VllmWorker-0 with SIGKILL" in str(counted)
    for kills in (0, None):
        assert type(explain("it ended", log, "x.log", oom_kills=kills)) is errors.LaunchFailed
    assert count_oom_kills() is None or count_oom_kills() >= 0


@pytest.mark.parametrize(("code", "status"), [("os.kill(os.getpid(), 9)", 137), ("exit(3)", 3)])
def test_watchdog_hands_on_how_its_server_ended(code, status):
    line = [sys.executable, "-m", "tink_rl.watchdog", str(os.getpid())]
    line += [sys.executable, "-c", f"import os; {code}"]
    assert subprocess.run(line, start_new_session=True, timeout=60).returncode == status


def test_server_that_is_killed_while_it_starts_says_so(model_dir, monkeypatch, tmp_path):
    code = textwrap.dedent("""
        import os
        print("WARNING 11-28 13:05:01 [x.py:1] errors like OSError: [Errno 24]", flush=True)
        os.kill(os.getpid(), 4)
    """)
    monkeypatch.setattr(launch, "command", lambda *_, **__: [sys.executable, "-c", code])
    server = VLLMServer(model_dir("qwen3"), token_file=str(tmp_path / "token"))
    with pytest.raises(errors.LaunchFailed, match=r"API server was ended by SIGILL.*float32"):
        server.start()


@pytest.mark.parametrize("name", ["file/server.log", "directory"])
def test_log_file_that_cannot_be_written_is_one_line(model_dir, tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    server = VLLMServer(
        model_dir("qwen3"),
        token_file=str(tmp_path / "token"),
        log_file=str(tmp_path / name),
    )
    with pytest.raises(ConfigError, match=rf"--log-file .*{name} cannot be written .*--log-file"):
        server.start()
    assert server.pid is None


def test_names_of_the_processes_are_those_that_vllm_logs():
    import inspect

    executor = pytest.importorskip("vllm.v1.executor.multiproc_executor")
    source = inspect.getsource(executor)
    assert '"Worker proc %s died unexpectedly (exit code: %s), "' in source
    from vllm.v1.engine import utils

    assert "Failed core proc(s)" in inspect.getsource(utils)
    assert post_mortem.cause_in(SHM)
