"""`write_report`: one self-contained HTML page and PNGs of a run, also while it goes on."""

from __future__ import annotations

from pathlib import Path

from tink_rl.tools.report.figures import draw
from tink_rl.tools.report.page import render
from tink_rl.tools.report.run import Run, load_run

__all__ = ["Run", "load_run", "write_report"]

PAGE_FILE = "report.html"
FIGURES_DIR = "report"


def write_report(
    directory: str | Path, output: str | Path | None = None, *, refresh_s: int = 0
) -> Path:
    """The page's path. PNGs of its figures lie in `report/` beside it.

    Args:
        directory: What a run leaves: an output directory of `recipes/grpo.py` or of a TRL trainer.
        output: Folder to write to; None: `directory`.
        refresh_s: While the run goes on, let a browser load the page again after so many seconds.

    Raises:
        ConfigError: there is nothing to look at.
        ImportError: matplotlib or jinja2 is not installed.
    """
    run = load_run(directory)
    target = Path(output) if output is not None else run.directory
    figures = draw(run)
    folder = target / FIGURES_DIR
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (folder / f"{figure.name}.png").write_bytes(figure.png)
    page = target / PAGE_FILE
    partial = page.with_suffix(".tmp")
    partial.write_text(render(run, figures, refresh_s=refresh_s))
    partial.replace(page)  # a browser never sees half a page
    return page
