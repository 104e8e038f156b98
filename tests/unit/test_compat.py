"""`make compat`: what counts as passed."""

from __future__ import annotations

from benchmarks import compat


def test_failed_and_skipped_tests_are_no_passes():
    case = '<testcase classname="tests.{}.test_x" name="y">{}</testcase>'
    ends = [("unit", ""), ("unit", "<skipped/>"), ("server", "<failure/>"), ("server", "<error/>")]
    report = f"<testsuite>{''.join(case.format(*end) for end in ends)}</testsuite>"
    found = compat.count(report)
    assert found == {"unit": {"passed": 1, "failed": 1}, "server": {"passed": 0, "failed": 2}}
