"""The script for the day of a GPU, rehearsed on a CPU: every tier says something, none ends the others."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import gpu


@pytest.mark.parametrize("tier", gpu.TIERS)
def test_every_tier_says_json_on_a_cpu(tier, capsys):
    gpu.run_tier(tier, rehearse=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines and {line["tier"] for line in lines} == {tier}


def test_fold_tier_shows_one_rounding():
    found = [line for line in gpu.fold(gpu.Place(rehearse=True)) if "rounding" in line]
    assert found[0]["differs"] < 0.002 and found[0]["largest_relative"] < 2**-6


def test_tier_that_takes_too_long_or_fails_ends_neither_the_others_nor_the_script(
    monkeypatch, capsys
):
    monkeypatch.setattr(gpu, "LIMITS_S", {"facts": 0.01, "unknown": 60})
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse"])
    gpu.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("end") for line in lines] == [None, "gave up after 0.01 s", "failed (2)"]


def test_all_tiers_together_take_less_than_nine_minutes():
    assert set(gpu.LIMITS_S) == set(gpu.TIERS) and sum(gpu.LIMITS_S.values()) < 9 * 60
