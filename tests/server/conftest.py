"""The server that the tests of the trainers train against."""

from __future__ import annotations

import pytest

from tests.trainers import left_clean


@pytest.fixture
def server(servers):
    """The tiny Qwen3 in both modes; afterwards nothing of the test stays served."""
    with left_clean(servers.get("qwen3", mode="both")) as server:
        yield server
