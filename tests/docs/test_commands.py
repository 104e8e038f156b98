"""What README and docs tell people to type: run where a CPU can, parsed everywhere."""

from __future__ import annotations

import ast
import glob
import importlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from tests.docs.commands import PAGES, ROOT, blocks, check
from tests.multi.launching import run
from tests.policies import PeftTwin, sync_to
from tink_rl.cli import main

BLOCKS = blocks()
URL = "http://127.0.0.1:8000"
_KINDS = re.compile(
    r"run|run, exit code \d|run with a server|run by (\S+)::(\w+)|not run: [\w ,;/]+"
)


def marked(kind):
    return [b for b in BLOCKS if re.fullmatch(kind, b.mark)]


def ids(block):
    return f"{block.page}-{block.commands[0][:40]}"


def once(found):
    """Blocks whose commands no earlier block has."""
    seen = set()
    return [b for b in found if (key := tuple(b.commands)) not in seen and not seen.add(key)]


@pytest.fixture
def folder(tmp_path, monkeypatch, model_dir):
    """A place like the repository's root after `make demo`, with a tinier model."""
    for name in ("recipes", "accelerate_configs", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".cache/tiny_base").mkdir(parents=True)
    (tmp_path / ".cache/tiny_base/model").symlink_to(model_dir("qwen2"))
    shutil.copytree(ROOT / "tests/report/demo_run", tmp_path / "runs/demo")
    twin = PeftTwin(model_dir("qwen2"))
    twin.randomise(0)
    twin.model.save_pretrained(tmp_path / "runs/demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINK_TOKEN_FILE", str(tmp_path / "token"))
    return tmp_path


def run_here(command):
    """Exit code of a `tink-rl` command, in this process, with the shell's globbing."""
    words = shlex.split(command)
    assert words[0] == "tink-rl", f"only tink-rl runs here, not {command!r}"
    expanded = [path for word in words[1:] for path in (glob.glob(word) or [word])]
    return main(expanded)


@pytest.mark.parametrize("block", once(marked(r"run|run, exit code \d")), ids=ids)
def test_commands_that_are_marked_run(block, folder):
    code = int(block.mark[-1]) if block.mark[-1].isdecimal() else 0
    for command in block.commands:
        assert run_here(command) == code, command


@pytest.mark.server
@pytest.mark.home
@pytest.mark.parametrize("block", once(marked("run with a server")), ids=ids)
def test_commands_that_are_marked_run_against_a_server(block, servers, monkeypatch):
    server = servers.get("qwen3", mode="both")
    monkeypatch.setenv("TINK_TOKEN_FILE", str(server.token_file))
    for command in block.commands:
        assert URL in command
        assert run_here(command.replace(URL, server.url)) == 0, command


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
def test_every_command_is_one_that_its_program_takes(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in block.commands:
        check(command)


def test_marks_are_known_and_name_tests_that_exist():
    for block in BLOCKS:
        match = _KINDS.fullmatch(block.mark) if block.mark else None
        assert match, f"{block.page}: {block.commands[0]}: {block.mark or 'no mark'}"
        if match and match.group(1):
            assert f"def {match.group(2)}(" in (ROOT / match.group(1)).read_text(), block.mark


def test_pages_with_commands_for_a_cpu_are_marked():
    assert len(marked("run.*")) >= 8


@pytest.mark.parametrize(
    "command",
    [
        "tink-rl serve MODEL --no-such-flag 3",
        "tink-rl report",
        "accelerate launch --config_file accelerate_configs/none.yaml recipes/grpo.py",
        "accelerate launch recipes/grpo.py --no_such_flag 3",
        "accelerate launch recipes/grpo.py --config recipes/configs/none.yaml",
        "python -m recipes.demo --no_such_flag",
        "python recipes/none.py",
        "make nothing",
        "pip install 'tink-rl[nothing]'",
        "unheard-of command",
    ],
)
def test_wrong_commands_would_be_found(command):
    with pytest.raises(AssertionError):
        check(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_in_the_pages_compiles_and_imports_what_exists(page):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tink_rl"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.server
@pytest.mark.home
def test_whole_script_of_the_quickstart_trains(servers, model_dir, tmp_path):
    page = (ROOT / "docs/quickstart.md").read_text()
    [code] = [c for c in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if ".train()" in c]
    server = servers.get("qwen3", mode="both")
    for old, new in (
        ("path/to/base", str(model_dir("qwen3"))),
        (URL, server.url),
        ("max_steps=50", "max_steps=2"),
    ):
        assert old in code
        code = code.replace(old, new)
    script = tmp_path / "script.py"
    script.write_text(code)
    line = [sys.executable, str(script)]
    exit_code, output = run(line, tmp_path, TINK_TOKEN_FILE=str(server.token_file))
    assert exit_code == 0, output[-2000:]
    assert "reward" in output
    with sync_to(server, model_dir("qwen3"), "merged"):
        pass  # drops what the script published


@pytest.mark.server
@pytest.mark.recipe
@pytest.mark.long
@pytest.mark.timeout(500)
def test_quickstart_trains_against_a_server_in_another_terminal(tmp_path):
    serve, train = (
        next(
            b.commands[0]
            for b in BLOCKS
            if b.page == "quickstart.md" and b.commands[0].startswith(p)
        )
        for p in ("tink-rl serve", "accelerate launch")
    )
    from recipes.tiny_base import ensure_tiny_base

    base = ensure_tiny_base(cache=ROOT / ".cache/tiny_base")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TINK_TOKEN_FILE": str(tmp_path / "token"),
    }
    words = shlex.split(serve.replace(".cache/tiny_base/*", str(base)))
    server = subprocess.Popen(
        [sys.executable, "-m", "tink_rl.cli", *words[1:], "--port", str(port)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stderr is not None
    try:
        assert any("Ctrl-C stops" in line for line in server.stderr), "the server did not start"
        train = train.replace(".cache/tiny_base/*", str(base))
        words = shlex.split(train.replace(URL, f"http://127.0.0.1:{port}"))
        words[words.index("--output_dir") + 1] = str(tmp_path / "mine")
        words += ["--max_steps", "12"]  # the demo's test and the recipes' ask whether it learns
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *words[2:]],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    assert (tmp_path / "mine/adapter_model.safetensors").is_file()
    assert main(["report", str(tmp_path / "mine")]) == 0
