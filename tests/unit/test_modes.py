"""Which mode is taken."""

from __future__ import annotations

import pytest

from tests.fakes import status
from tink_rl import errors
from tink_rl.publish.modes import choose_mode
from tink_rl.types import SyncMode


@pytest.mark.parametrize(
    ("wanted", "server", "mode"),
    [
        ("auto", status(), SyncMode.MERGED),
        ("auto", status(("adapter",)), SyncMode.ADAPTER),
        ("auto", status(served={"other@3": "d"}), SyncMode.ADAPTER),
        ("auto", status(served={"p@3": "d"}, merged="p@3"), SyncMode.MERGED),
        ("adapter", status(), SyncMode.ADAPTER),
    ],
)
def test_mode_follows_what_the_server_offers(wanted, server, mode):
    assert choose_mode(wanted, server).mode is mode


def test_mode_that_is_not_offered_is_refused():
    with pytest.raises(errors.ModeUnavailable, match="--mode merged"):
        choose_mode("merged", status(("adapter",)))
