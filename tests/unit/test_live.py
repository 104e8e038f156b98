"""Tables to look at while a run goes on."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from tink_rl.training import live

ROW = {"step": 3, "policy": "p", "version": 4, "prompt": "1+1=", "completion": "[b]2[/b]"}
STATE = SimpleNamespace(global_step=3)


@pytest.mark.parametrize(
    ("report_to", "given", "mode"),
    [
        (["wandb"], {}, "offline"),
        (["wandb"], {"WANDB_MODE": "online"}, "online"),
        (["wandb"], {"WANDB_API_KEY": "k"}, None),
        ([], {}, None),
    ],
)
def test_wandb_stays_on_disk_where_nobody_is_logged_in(
    tmp_path, monkeypatch, report_to, given, mode
):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")  # put back at the end, whatever happens to it here
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc there
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    live.keep_offline_without_login(SimpleNamespace(report_to=report_to))
    assert os.environ.get("WANDB_MODE") == mode


def test_wandb_table_names_the_version_and_leaves_out_what_a_row_lacks(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.init(dir=tmp_path)
    live.log_table(SimpleNamespace(report_to=["wandb"]), STATE, "samples", [ROW])
    wandb.finish()
    (path,) = tmp_path.rglob("samples_*.table.json")
    table = json.loads(path.read_text())
    assert dict(zip(table["columns"], table["data"][0], strict=True)) == {
        "step": 3,
        "policy": "p@4",
        "prompt": "1+1=",
        "completion": "[b]2[/b]",
        "reward": None,
    }


def test_run_without_wandb_logs_no_table(monkeypatch):
    import wandb

    logged = []
    monkeypatch.setattr(wandb, "log", logged.append)
    for report_to in ([], ["tensorboard"], ["wandb"]):  # the last one has begun no run
        live.log_table(SimpleNamespace(report_to=report_to), STATE, "samples", [ROW])
    assert logged == []


def test_console_shows_completions_as_they_are(capsys):
    live.print_table("step 3, p@4", [ROW])
    shown = capsys.readouterr().out
    assert "step 3, p@4" in shown and "[b]2[/b]" in shown and "1+1=" in shown
