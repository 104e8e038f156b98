"""A row of several steps: what is a mean, what the last, what the largest."""

from __future__ import annotations

import math
from collections import defaultdict

from tink_rl.training import metrics


def row(*steps):
    """What a trainer logs of these steps: the mean of each list."""
    found = defaultdict(list)
    for step in steps:
        metrics.add(found, step)
    return {key: sum(values) / len(values) for key, values in found.items()}


def test_a_row_says_last_versions_largest_gaps_and_mean_seconds():
    steps = [
        {"sync/policy_version": 3.0, "rollout/logprob_gap": 0.5, "sync/seconds": 1.0},
        {"sync/policy_version": 4.0, "rollout/logprob_gap": 0.1, "sync/seconds": 3.0},
        {"sync/bytes_total": 10.0},
    ]
    assert row(*steps) == {
        "sync/policy_version": 4.0,
        "rollout/logprob_gap": 0.5,
        "sync/seconds": 2.0,
        "sync/bytes_total": 10.0,
    }


def test_a_gap_that_is_no_number_is_not_lost_in_the_largest():
    gaps = [{"sync/probe_gap": value} for value in (0.1, math.nan, 0.2)]
    assert math.isnan(row(*gaps)["sync/probe_gap"])
