"""Every YAML in accelerate_configs/ loads, says only what accelerate knows, and starts what it promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

FOLDER = Path(__file__).resolve().parents[2] / "accelerate_configs"
STARTS = {
    "cpu": ("simple", 1),
    "gpu": ("simple", 1),
    "ddp": ("torchrun", 8),
    "fsdp2": ("fsdp", 8),
    "zero2": ("deepspeed", 8),
    "zero3": ("deepspeed", 8),
    "cpu_2proc": ("torchrun", 2),
    "cpu_zero3": ("deepspeed", 2),
}


def launcher(args):
    """The one of `launch_command`'s branches that these arguments take."""
    branches = {"deepspeed": args.use_deepspeed, "fsdp": args.use_fsdp, "torchrun": args.multi_gpu}
    return next((name for name, taken in branches.items() if taken), "simple")


def test_every_file_is_listed():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(STARTS)


@pytest.mark.parametrize("name", STARTS, ids="{}.yaml".format)
def test_file_loads_and_starts_what_it_promises(name, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = FOLDER / f"{name}.yaml"
    assert load_config_from_file(str(path)).num_processes == STARTS[name][1]
    args = launch_command_parser().parse_args(["--config_file", str(path), "recipes/grpo.py"])
    args, _, _ = _validate_launch_command(args)
    assert (launcher(args), args.num_processes) == STARTS[name]
    assert args.use_cpu == name.startswith("cpu")


@pytest.mark.parametrize("name", STARTS, ids="{}.yaml".format)
def test_nested_keys_are_options_of_accelerate_launch(name):
    given = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    known = {action.dest for action in launch_command_parser()._actions}
    nested = {**given.get("fsdp_config", {}), **given.get("deepspeed_config", {})}
    assert set(nested) <= known


def test_gpu_that_the_user_made_visible_is_the_one_that_trains(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    path = FOLDER / "gpu.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(path), "recipes/grpo.py"])
    args, _, _ = _validate_launch_command(args)
    assert prepare_simple_launcher_cmd_env(args)[1]["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3), ("cpu_zero3", 3)])
def test_deepspeed_stage_is_the_one_in_the_name(name, stage):
    given = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert given["deepspeed_config"]["zero_stage"] == stage
