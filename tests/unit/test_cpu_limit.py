"""Cores as containers give them: a mask, a limit below it, or one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tink_rl import placement
from tink_rl.cpu_limit import affinity, cpu_quota, usable_cores

EIGHT = tuple(range(8))


@pytest.fixture
def cgroups(tmp_path):
    """`cgroups(mine, files)`: the limit that they amount to."""

    def quota(mine, files):
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "mine").write_text(mine)
        return cpu_quota(tmp_path / "cgroup", tmp_path / "mine")

    return quota


@pytest.mark.parametrize(
    ("mine", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/pods/a\n", {"pods/a/cpu.max": "max 100000", "pods/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ("0::/../host\n", {"cpu.max": "300000 100000"}, 3.0),
        (
            "4:cpu,cpuacct:/box\n0::/\n",
            {"cpu/box/cpu.cfs_quota_us": "250000", "cpu/box/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("7:memory:/box\n", {"cpu.max": "100000 100000"}, None),
    ],
)
def test_limit_is_the_least_of_the_cgroups_above_a_process(cgroups, mine, files, cores):
    assert cgroups(mine, files) == cores


def test_system_without_cgroups_has_no_limit(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("quota", "count"), [(None, 8), (8.0, 8), (64.0, 8), (2.0, 2), (1.5, 2), (0.2, 1)]
)
def test_so_many_cores_are_used_as_the_limit_is_worth(quota, count):
    found = usable_cores(EIGHT, quota, "box")
    assert len(found) == count == len(set(found)) and set(found) <= set(EIGHT)
    assert found == usable_cores(EIGHT, quota, "box")  # every process of the container agrees


def test_containers_of_one_machine_do_not_all_take_its_first_cores():
    assert len({usable_cores(EIGHT, 2.0, f"pod-{i}") for i in range(32)}) > 3


def test_limit_splits_server_and_trainer_within_it():
    cores = usable_cores(tuple(range(64)), 2.0, "box")
    found = placement.plan(cores=cores, num_workers=1, has_gpu=False)
    assert found.server_binding == str(cores[0]) and found.trainer_cores == (cores[1],)


def test_on_one_core_nobody_spins_and_nobody_is_pinned_beside_the_server(monkeypatch):
    monkeypatch.setattr(placement, "has_gpu", lambda: False)
    monkeypatch.delenv("TINK_PLACEMENT", raising=False)
    found = placement.plan(cores=(5,), num_workers=1, has_gpu=False)
    assert (found.server_binding, found.trainer_cores) == ("5", None)
    assert placement.who_waits_asleep(cores=(5,)) == "all"


def test_process_of_one_core_sees_one():
    core = affinity()[0]
    code = "from tink_rl import placement; print(placement.CORES, placement.plan_here())"
    line = ["taskset", "-c", str(core), sys.executable, "-c", code]
    found = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert found.startswith(f"({core},)") and "trainer_cores=None" in found
