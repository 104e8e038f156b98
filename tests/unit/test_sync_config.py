"""What a `SyncConfig` takes, and where its token comes from."""

from __future__ import annotations

import pytest

from tink_rl import errors
from tink_rl.config import SyncConfig


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "half"},
        {"bucket_mib": 0},
        {"transport": "carrier-pigeon"},
        {"on_running": "ignore"},
        {"policy": "a@b"},
        {"policy": ""},
        {"keep_versions": 0},
        {"probe_every": -1},
        {"max_staleness": -1},
        {"probe_tolerance": 0.0},
        {"probe_tolerance": float("nan")},
        {"stage_timeout_s": -1.0},
        {"stage_timeout_s": "soon"},
    ],
)
def test_wrong_setting_names_the_field(wrong):
    with pytest.raises(errors.ConfigError, match=next(iter(wrong))):
        SyncConfig(**wrong)


def test_token_comes_from_argument_file_or_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("TINK_TOKEN", raising=False)
    monkeypatch.delenv("TINK_TOKEN_FILE", raising=False)
    (tmp_path / "token").write_text("from-file\n")
    assert SyncConfig(token="given").read_token() == "given"
    assert SyncConfig(token_file=str(tmp_path / "token")).read_token() == "from-file"
    monkeypatch.setenv("TINK_TOKEN", "from-environment")
    assert SyncConfig().read_token() == "from-environment"
    with pytest.raises(errors.ConfigError, match="tink-rl serve"):
        SyncConfig(token_file=str(tmp_path / "none")).read_token()


@pytest.mark.parametrize("mode", ["merged", "full"])
def test_more_than_one_version_old_needs_versions_side_by_side(mode):
    assert SyncConfig(mode=mode, max_staleness=1).max_staleness == 1
    assert SyncConfig(mode="adapter", max_staleness=3).max_staleness == 3
    with pytest.raises(errors.ConfigError, match=r"one version at a time.*mode='adapter'"):
        SyncConfig(mode=mode, max_staleness=2)
