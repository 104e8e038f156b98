"""A long wait is shown: in place on a terminal, as lines elsewhere."""

from __future__ import annotations

import io
import logging
import time

import httpx
import pytest

from tink_rl import VLLMClient
from tink_rl.cli import console, main
from tink_rl.errors import ServerUnreachable
from tink_rl.transport import server_client


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_line_renews_itself_and_ends_with_ready(monkeypatch):
    monkeypatch.setattr(console.sys, "stderr", terminal := Terminal())
    line = console.WaitLine("vllm")
    for what, seconds in (("importing vLLM", 1.0), ("importing vLLM", 2.0), ("ready", 3.0)):
        line(what, seconds)
    console.say("ready at URL")
    assert terminal.getvalue() == (
        "\r\x1b[Kvllm: importing vLLM (1 s)\r\x1b[Kvllm: importing vLLM (2 s)"
        "\r\x1b[Kvllm: ready (3 s)\n\r\x1b[Ktink-rl: ready at URL\n"
    )


def test_pipe_gets_a_line_per_stage_and_one_every_ten_seconds(monkeypatch):
    monkeypatch.setattr(console.sys, "stderr", pipe := io.StringIO())
    line = console.WaitLine("vllm")
    for seconds in range(25):
        line("importing vLLM", seconds)
    for seconds in (25, 26):
        line("loading the model", seconds)
    line("importing vLLM", 0)  # another server starts
    assert pipe.getvalue().splitlines() == [
        *(f"vllm: importing vLLM ({s} s)" for s in (0, 10, 20)),
        "vllm: loading the model (25 s)",
        "vllm: importing vLLM (0 s)",
    ]


def test_error_takes_the_place_of_the_wait(monkeypatch):
    monkeypatch.setattr(console.sys, "stderr", terminal := Terminal())
    assert main(["serve", "./nowhere"]) == 4
    assert terminal.getvalue().startswith("\r\x1b[Ktink-rl: model './nowhere' was not found")


def test_waiting_for_a_server_is_said_in_the_log(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="tink_rl")
    monkeypatch.setattr(server_client, "_SAY_EVERY_S", 0.0)

    def refuse(request):
        raise httpx.ConnectError("refused")

    client = VLLMClient(transport=httpx.MockTransport(refuse))
    with pytest.raises(ServerUnreachable):
        client.wait_until_reachable(0.3)
    assert "waiting for the vLLM server at http://127.0.0.1:8000" in caplog.text


def test_share_of_a_stage_is_no_new_line_in_a_pipe(monkeypatch):
    monkeypatch.setattr(console.sys, "stderr", pipe := io.StringIO())
    line = console.WaitLine("vllm")
    for seconds in range(15):
        line(f"downloading: {seconds} % of 2.9 GiB", seconds)
    line("ready", 15)
    assert pipe.getvalue().splitlines() == [
        "vllm: downloading: 0 % of 2.9 GiB (0 s)",
        "vllm: downloading: 10 % of 2.9 GiB (10 s)",
        "vllm: ready (15 s)",
    ]


def test_silence_is_broken_by_what_goes_on_and_only_silence(monkeypatch):
    monkeypatch.setattr(console.sys, "stderr", pipe := io.StringIO())
    with console.Heartbeat("trainer", "importing TRL", every_s=0.2) as heartbeat:
        while "importing TRL" not in pipe.getvalue():
            time.sleep(0.01)
        heartbeat.said("training")
        while "training" not in pipe.getvalue():
            time.sleep(0.01)
    assert pipe.getvalue().startswith("trainer: importing TRL (0 s)\n")
    silent = io.StringIO()
    monkeypatch.setattr(console.sys, "stderr", silent)
    with console.Heartbeat("trainer", "importing TRL", every_s=3600) as heartbeat:
        heartbeat.said("training")
    assert silent.getvalue() == ""
