"""`tink-rl doctor`: what is wrong with this environment, server, model or adapter, and what mends it."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from typing import TYPE_CHECKING

from tink_rl.config import SyncConfig

if TYPE_CHECKING:
    from tink_rl.tools.doctor.finding import Finding

_WIDTH_OF_A_PIPE = 140


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    doctor = commands.add_parser(
        "doctor",
        help="what is wrong, and the command that mends it",
        description="Without arguments: this environment; with URL a server, with --model what "
        "serving it takes, with --adapter what each mode does with a PEFT directory, with --trl "
        "what stock TRL's server mode would send. Exit code 1 on a blocker.",
        allow_abbrev=False,
    )
    doctor.add_argument("url", nargs="?", help="a server, such as http://127.0.0.1:8000")
    doctor.add_argument("--token-file", help="token of the control routes")
    doctor.add_argument(
        "--ca-file", metavar="PEM", help="authorities to trust for https (default: TINK_CA_FILE)"
    )
    doctor.add_argument(
        "--model",
        help="base model, directory or hub id: memory plan, and is it what URL serves?",
    )
    doctor.add_argument(
        "--revision", help="of --model or --trl, where that is a hub id: branch, tag or commit"
    )
    doctor.add_argument("--subfolder", default="", help="of --model or --trl")
    doctor.add_argument(
        "--adapter", metavar="DIR", help="PEFT directory: what each mode does with it"
    )
    doctor.add_argument(
        "--trl", metavar="MODEL", help="how many LoRA tensors stock TRL sends unmerged"
    )
    doctor.add_argument("--mode", default="both", choices=("merged", "adapter", "both", "full"))
    doctor.add_argument("--max-lora-rank", type=int, default=32)
    doctor.add_argument("--max-loras", type=int, default=4)
    doctor.add_argument("--max-model-len", type=int, help="default: the model's, at most 4096")
    doctor.add_argument("--dtype", default="auto")
    doctor.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    doctor.add_argument(
        "--alone",
        dest="shared_with_trainer",
        action="store_false",
        help="no trainer shares the GPU",
    )
    doctor.add_argument("--gpu-memory-utilization", type=float, help="as `tink-rl serve`")
    doctor.add_argument("--golden-tier", default="auto", choices=("auto", "device", "host", "file"))
    doctor.add_argument("--port", type=int, default=8000, help="port that a server will want")
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print what was found; 1 if something blocks."""
    from tink_rl.tools.doctor.finding import Level

    findings = examine(arguments)
    show(findings)
    blockers = sum(finding.level is Level.BLOCKER for finding in findings)
    return 1 if blockers else 0


def examine(arguments: argparse.Namespace) -> list[Finding]:
    """The findings that the arguments ask for; without any, of the environment."""
    from tink_rl.memory_plan import ServePlan
    from tink_rl.tools.doctor.adapter import check_adapter
    from tink_rl.tools.doctor.environment import check_environment
    from tink_rl.tools.doctor.memory import check_memory
    from tink_rl.tools.doctor.server import check_server
    from tink_rl.transport.sampling_client import SamplingClient

    findings: list[Finding] = []
    status = None
    _resolve(arguments)
    if arguments.trl:
        from tink_rl.tools.doctor.trl_sync import check_trl

        _quiet()
        dtype = None if arguments.dtype == "auto" else arguments.dtype
        return check_trl(arguments.trl, dtype=dtype)
    if arguments.url:
        token = SyncConfig(token_file=arguments.token_file).read_token()
        with SamplingClient(arguments.url, token=token, ca_file=arguments.ca_file) as client:
            findings, status = check_server(client, base_model=arguments.model)
    elif not (arguments.adapter or arguments.model):
        findings = check_environment(port=arguments.port)
    if arguments.model and not arguments.url:
        plan = ServePlan(**{f.name: getattr(arguments, f.name) for f in fields(ServePlan)})
        findings += check_memory(arguments.model, plan)
    if arguments.adapter:
        findings += check_adapter(arguments.adapter, status)
    return findings


def _resolve(arguments: argparse.Namespace) -> None:
    """Put the directory in the place of a model at a revision or in a subfolder."""
    from tink_rl.policy.model_dir import local_model_dir

    where = {"revision": arguments.revision, "subfolder": arguments.subfolder}
    for name in ("model", "trl"):
        if (model := getattr(arguments, name)) and any(where.values()):
            setattr(arguments, name, str(local_model_dir(model, **where)))


def _quiet() -> None:
    """Keep the chatter of the libraries out of the table."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("DS_LOG_LEVEL", "ERROR")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def show(findings: list[Finding]) -> None:
    """A table on standard output, and a line that sums up."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tink_rl.tools.doctor.finding import Level

    marks = {
        Level.OK: Text("✓ ok", "green"),
        Level.NOTE: Text("· note", "dim"),
        Level.WARNING: Text("! warning", "yellow"),
        Level.BLOCKER: Text("✗ blocker", "bold red"),
    }
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "what", "found", "what mends it"):
        table.add_column(name, overflow="fold", no_wrap=name in ("", "what"))
    for finding in findings:
        table.add_row(marks[finding.level], *map(Text, (finding.area, finding.what, finding.fix)))
    console.print(table)
    blockers = sum(finding.level is Level.BLOCKER for finding in findings)
    warnings = sum(finding.level is Level.WARNING for finding in findings)
    if blockers:
        console.print(f"\n{blockers} blockers, {warnings} warnings", style="bold red")
    else:
        console.print(f"\nno blocker, {warnings} warnings", style="green")
