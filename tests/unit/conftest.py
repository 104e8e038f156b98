"""An adapter store, and an adapter to put into it."""

from __future__ import annotations

import pytest

from tests.adapters import write_adapter
from tink_rl.policy.store import AdapterStore


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path):
    return write_adapter(tmp_path / "adapter")
