"""`make compat`'s rows: what counts as passed, and that the page holds what was seen."""

from __future__ import annotations

import json

from benchmarks import compat

ROWS = json.loads(compat.RESULTS.read_text())


def test_page_holds_the_rows():
    assert compat.table(ROWS) in compat.PAGE.read_text(), "python -m benchmarks.compat writes them"


def test_no_row_was_seen_with_a_failure():
    assert all(
        not (row["contract"]["failed"] or (row["server"] or {}).get("failed")) for row in ROWS
    )


def test_failed_and_skipped_tests_are_no_passes():
    case = '<testcase classname="tests.{}.test_x" name="y">{}</testcase>'
    ends = [("unit", ""), ("unit", "<skipped/>"), ("server", "<failure/>"), ("server", "<error/>")]
    report = f"<testsuite>{''.join(case.format(*end) for end in ends)}</testsuite>"
    found = compat.count(report)
    assert found == {"unit": {"passed": 1, "failed": 1}, "server": {"passed": 0, "failed": 2}}


def test_row_of_sources_says_that_nothing_was_run():
    [row] = [row for row in ROWS if row["trl"] is None]
    assert row["contract"]["passed"] and row["server"] is None
    assert "not run: its sources were read" in compat.table([row])
