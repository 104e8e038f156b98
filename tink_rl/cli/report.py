"""`tink-rl report`: one page and PNGs of a run, also while it goes on."""

from __future__ import annotations

import argparse
import time

from tink_rl.cli.console import say


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    report = commands.add_parser(
        "report",
        help="one HTML page and PNGs of a run",
        description="Write RUN_DIR/report.html (one file, nothing loaded from elsewhere) and its "
        "figures as PNGs in RUN_DIR/report/. Works while the run goes on.",
        allow_abbrev=False,
    )
    report.add_argument("run_dir", help="output_dir of a run")
    report.add_argument("--output", help="folder to write to; default: RUN_DIR")
    report.add_argument(
        "--watch",
        type=int,
        default=0,
        metavar="SECONDS",
        help="write it again every so many seconds until the run ends, or has long been silent; an "
        "open page follows",
    )
    report.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Write the report; with `--watch` until the run ends (0) or has no news for too long (1)."""
    from tink_rl.tools.report import load_run, write_report

    while True:
        page = write_report(arguments.run_dir, arguments.output, refresh_s=arguments.watch)
        say(f"report: {page}   figures: {page.parent / 'report'}/*.png")
        if not arguments.watch:
            return 0
        watched = load_run(arguments.run_dir)
        if watched.finished:
            say(f"the run failed: {watched.error}" if watched.error else "the run has ended")
            return 0
        silent = time.time() - watched.updated
        if silent > watched.patience_s:
            say(
                f"nothing new for {silent / 60:.0f} min since step {watched.last_step}: the run may have "
                "stopped, so this watch has; if it goes on, call `tink-rl report --watch` again"
            )
            return 1
        time.sleep(arguments.watch)
