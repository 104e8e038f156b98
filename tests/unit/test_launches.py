"""What the documented commands start on which machine: a page per machine in `launches/`, to be read.

`TINK_WRITE_LAUNCHES=1 pytest tests/unit/test_launches.py` writes the pages again; look at the difference.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

import pytest

from recipes import demo
from tests.cards import GIB, MODELS, card
from tests.docs.commands import ROOT, blocks
from tink_rl import gpus, memory_plan, placement, serve_options
from tink_rl.cli import serve
from tink_rl.errors import ConfigError
from tink_rl.tools.doctor.memory import describe

PAGES = Path(__file__).parent / "launches"
L4, H100 = "NVIDIA L4", "NVIDIA H100 80GB HBM3"
MACHINES = {
    "no_gpu": ("Two cores, no GPU", []),
    "one_24gb_card": ("One card of 24 GB, shared by server and trainer", [card(24 * GIB, name=L4)]),
    "one_80gb_card": (
        "One card of 80 GB, shared by server and trainer",
        [card(80 * GIB, name=H100)],
    ),
    "two_cards": ("Two cards of 24 GB", [card(24 * GIB, index=i, name=L4) for i in range(2)]),
    "eight_cards": ("Eight cards of 80 GB", [card(80 * GIB, index=i, name=H100) for i in range(8)]),
}
README = {"two_cards": ("scale.md", "--alone", 0), "eight_cards": ("scale.md", "--alone", 1)}
"""Where the README's two terminals are written for that machine: page, a word of it, which one."""


def commands(machine, part):
    """The lines that a user types: the server's, then the trainer's."""
    page, word, number = "quickstart.md", "--mode merged", 0
    if part == "readme":
        page, word, number = README.get(machine, ("README.md", "Qwen", 0))
    found = [b.commands for b in blocks() if b.page == page and "tink-rl serve" in b.commands[0]]
    serving = [c for c in found if word in c[0]][number]
    if len(serving) > 1:
        return serving
    [training] = [
        b.commands[0]
        for b in blocks()
        if b.page == page
        and b.mark.endswith("in_another_terminal")
        and "accelerate" in b.commands[0]
    ]
    return [*serving, training]


def options_of(line):
    """As `tink-rl serve` reads a line, and what CUDA_VISIBLE_DEVICES it begins with."""
    words = shlex.split(line)
    before = [word for word in words if "VISIBLE_DEVICES=" in word]
    parser = argparse.ArgumentParser()
    serve.add(parser.add_subparsers())
    parsed, rest = parser.parse_known_args(words[len(before) + 1 :])
    return serve.options_of(parsed, rest), dict(word.split("=", 1) for word in before)


def server_part(options, cards, visible):
    """How vLLM is started for these options, and who takes what."""
    has_gpu = bool(cards)
    shape = MODELS[next((n for n in MODELS if n in options.model), "tiny base")]
    plan = placement.plan(cores=(0, 1), num_workers=1, has_gpu=has_gpu)
    env = serve_options.environment(
        options,
        {"VLLM_PLUGINS": ""},
        token_file=Path("TOKEN_FILE"),
        server_binding=plan.server_binding if options.shared_with_trainer else None,
        waits_asleep="" if has_gpu else "all" if options.shared_with_trainer else "engine",
        has_gpu=has_gpu,
    )
    memory = memory_plan.plan_memory(shape, options)
    takes = [finding.what for finding in describe(memory, options)]
    if has_gpu:
        takes = memory_plan.gpu_line(memory, options, gpus.select(cards, visible)).split("; ")
    started = in_lines(serve_options.command(options, has_gpu=has_gpu))
    return [*started, *in_environment(env), "takes:", *(f"    {part}" for part in takes)]


def in_lines(command):
    text = shlex.join(["python", *command[1:]]).replace(str(ROOT), ".")
    return ["starts:", *(f"    {part}" for part in text.replace(" --", "\n--").splitlines())]


def in_environment(env):
    return ["with:", *(f"    {name}={env[name]}" for name in sorted(env))]


def a_demo(cards, mode):
    """`make demo MODE=...`: its server and its trainer."""
    arguments = argparse.Namespace(
        mode=mode, seed=0, max_steps=0, max_staleness=0, output=Path("runs/demo")
    )
    options = demo.server_options(Path("TINY_BASE"), arguments, on_gpu=bool(cards))
    train = demo.training_command(options, Path("TOKEN_FILE"), arguments, on_gpu=bool(cards))
    return [*server_part(options, cards, {}), *in_lines(train)]


def typed(line):
    return f"$ {' '.join(line.split())}"


def page_of(machine):
    """The whole page of a machine."""
    title, cards = MACHINES[machine]
    lines = [f"# {title}", "", "## make demo", *a_demo(cards, "auto")]
    for part in ("quickstart", "readme"):
        lines += ["", f"## {part}"]
        first, second = commands(machine, part)
        options, visible = options_of(first)
        serve_options._check_device(options, bool(cards))
        lines += [typed(first), *server_part(options, cards, visible), typed(second)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch):
    for name in [n for n in os.environ if n.startswith(("VLLM_", "TINK_SERVER"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(gpus, "visible_gpus", lambda: [])


@pytest.mark.parametrize("machine", MACHINES)
def test_documented_commands_start_what_the_page_of_the_machine_says(machine):
    page, path = page_of(machine), PAGES / f"{machine}.txt"
    if os.environ.get("TINK_WRITE_LAUNCHES"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(page)
    assert page == path.read_text()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("mode", ["auto", "merged", "adapter"])
def test_demo_trains_in_the_dtype_that_it_serves_on_any_machine(machine, mode):
    cards = MACHINES[machine][1]
    arguments = argparse.Namespace(
        mode=mode, seed=0, max_steps=0, max_staleness=0, output=Path("runs/demo")
    )
    options = demo.server_options(Path("TINY_BASE"), arguments, on_gpu=bool(cards))
    serve_options._check_device(options, bool(cards))
    train = demo.training_command(options, Path("t"), arguments, on_gpu=bool(cards))
    assert ("--dtype" in train) is bool(cards)
    if cards:
        assert train[train.index("--dtype") + 1] == options.dtype
        assert options.dtype == ("float32" if mode == "merged" else "bfloat16")


def test_demo_that_samples_ahead_has_slots_for_its_versions_and_tells_its_trainer():
    arguments = argparse.Namespace(
        mode="adapter", seed=0, max_steps=0, max_staleness=3, output=Path("runs/demo")
    )
    options = demo.server_options(Path("TINY_BASE"), arguments, on_gpu=False)
    train = demo.training_command(options, Path("t"), arguments, on_gpu=False)
    assert options.max_loras == 5 and train[train.index("--max_staleness") + 1] == "3"


def test_demo_on_a_card_without_bfloat16_takes_float16(monkeypatch):
    monkeypatch.setattr(gpus, "visible_gpus", lambda: [card(16 * GIB, capability=(7, 5))])
    arguments = argparse.Namespace(
        mode="auto", seed=0, max_steps=0, max_staleness=0, output=Path("runs/demo")
    )
    options = demo.server_options(Path("TINY_BASE"), arguments, on_gpu=True)
    train = demo.training_command(options, Path("t"), arguments, on_gpu=True)
    assert options.dtype == "float16" and "--fp16" in train and "--bf16" not in train


def test_every_documented_server_starts_on_a_gpu():
    """Their dtypes and modes exist there; what a page refuses on purpose is none of these."""
    found = [c for b in blocks() for c in b.commands if "tink-rl serve" in c and "[" not in c]
    assert len(found) > 8
    for line in found:
        serve_options._check_device(options_of(line)[0], has_gpu=True)
    with pytest.raises(ConfigError, match="LoRA slots"):
        serve_options._check_device(options_of("tink-rl serve m --dtype float32")[0], has_gpu=True)
