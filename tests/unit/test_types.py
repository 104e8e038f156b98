"""Names of versions, and errors on their way between processes."""

from __future__ import annotations

import json

import pytest

from tink_rl import errors
from tink_rl.types import PolicyVersion


def test_versions_are_written_and_read():
    assert str(PolicyVersion.parse("my.policy@17")) == "my.policy@17"
    for wrong in ("policy", "@3", "policy@-1", "policy@x", "a b@1"):
        with pytest.raises(ValueError):
            PolicyVersion.parse(wrong)


def test_every_error_survives_the_wire():
    for code, cls in errors.by_code().items():
        sent = cls("why", code=code, a=1)
        found = errors.from_wire(json.loads(json.dumps(sent.to_wire())), sent.status)
        assert type(found) is cls and found.message == "why" and found.details == {"a": 1}
        assert (found.code, found.status) == (code, sent.status)
    assert "502" in str(errors.from_wire("<html>", 502))
