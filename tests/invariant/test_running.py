"""What the comparison of runs tells apart, without a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.invariant.running import REFERENCES, Outcome, assert_begins_alike

KNOWN = Outcome(**json.loads(REFERENCES.read_text())["outcomes"]["plain"])


def test_run_on_another_machine_may_differ_by_rounding_and_after_its_first_step():
    elsewhere = replace(
        KNOWN,
        rewards=[KNOWN.rewards[0], *(reward + 1 for reward in KNOWN.rewards[1:])],
        grad_norms=[norm * (1 + 1e-5) for norm in KNOWN.grad_norms],
        first_logprobs=[logprob + 1e-4 for logprob in KNOWN.first_logprobs],
        logprobs=[logprob + 1 for logprob in KNOWN.logprobs],
    )
    assert_begins_alike(elsewhere, KNOWN)


@pytest.mark.parametrize("field", ["rewards", "grad_norms", "first_logprobs"])
def test_run_that_begins_otherwise_is_told(field):
    first, *rest = getattr(KNOWN, field)
    with pytest.raises(AssertionError):
        assert_begins_alike(replace(KNOWN, **{field: [first + 0.01, *rest]}), KNOWN)


def test_run_of_fewer_steps_is_told():
    with pytest.raises(AssertionError):
        assert_begins_alike(replace(KNOWN, rewards=KNOWN.rewards[:3]), KNOWN)
