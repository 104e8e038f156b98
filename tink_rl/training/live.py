"""Completions to look at while a run goes on: a table in the console, a table in wandb."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from tink_rl.training.trl_names import Arguments, State

logger = logging.getLogger("tink_rl")
COLUMNS = ("step", "policy", "prompt", "completion", "reward")


def keep_offline_without_login(args: Arguments) -> None:
    """Let wandb keep the run on disk if the trainer reports there and nobody is logged in.

    A WANDB_MODE or WANDB_API_KEY in the environment is left alone.
    """
    given = {"WANDB_MODE", "WANDB_API_KEY"} & set(os.environ)
    if given or "wandb" not in (args.report_to or ()):
        return
    import wandb
    from requests.utils import get_netrc_auth

    # Not wandb.login(prompt=False): it asks the server, and remembers that this process is online.
    if get_netrc_auth(wandb.Settings().base_url) is None:
        os.environ["WANDB_MODE"] = "offline"
        logger.info(
            "nobody is logged in to wandb: the run stays on disk; send it with `wandb sync`"
        )


def log_table(args: Arguments, state: State, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Send `rows` to wandb as the table `name`, if the run reports there; else nothing.

    Args:
        args: The trainer's arguments.
        state: The trainer's state; the table stands at its step.
        name: Key of the table.
        rows: Rows of a rollout log, or of `PolicySyncCallback.samples`.
    """
    if "wandb" not in (args.report_to or ()):
        return
    import wandb

    if wandb.run is None:
        return
    table = wandb.Table(columns=list(COLUMNS), data=[_cells(row) for row in rows])
    wandb.log({name: table, "train/global_step": state.global_step})


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Show prompts and completions of `rows` in the console."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("prompt", "completion"):
        table.add_column(column, overflow="fold")
    for row in rows:  # Text: brackets in a completion are not markup
        table.add_row(Text(row["prompt"]), Text(row["completion"]))
    Console().print(table)


def _cells(row: dict[str, Any]) -> list[Any]:
    named = {**row, "policy": f"{row['policy']}@{row['version']}"}
    return [named.get(column) for column in COLUMNS]
