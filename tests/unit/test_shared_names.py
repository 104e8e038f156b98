"""What a killed server leaves in /dev/shm, and who removes it."""

from __future__ import annotations

import json
import os
from multiprocessing import resource_tracker, shared_memory

import pytest

from tink_rl import shared_names


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tink_rl" / "shared_memory"


@pytest.fixture
def segment():
    """Mapped by this process, as vLLM's processes map theirs."""
    held = shared_memory.SharedMemory(create=True, size=4096)
    yield held
    held.close()
    if os.path.exists(f"/dev/shm/{held.name}"):
        held.unlink()
    else:
        resource_tracker.unregister(f"/{held.name}", "shared_memory")


@pytest.fixture
def left(segment, folder):
    """The same, noted for this process."""
    shared_names.note(os.getpid(), [os.getpid(), 2**22 + 1])  # the second is no process
    return f"/dev/shm/{segment.name}"


def test_names_go_once_their_processes_are_gone(left, folder, segment):
    asked = []
    assert shared_names.remove_left(lambda group: asked.append(group) or True) == []
    assert asked == [os.getpid()] and os.path.exists(left)
    assert shared_names.remove_left(lambda group: False) == [segment.name]
    assert not os.path.exists(left) and not list(folder.iterdir())


def test_name_that_is_another_segments_by_now_stays(left, folder):
    [record] = folder.iterdir()
    names = json.loads(record.read_text())
    record.write_text(json.dumps({name: inode + 1 for name, inode in names.items()}))
    assert shared_names.remove_left(lambda group: False) == []
    assert os.path.exists(left) and not list(folder.iterdir())


@pytest.mark.parametrize("text", ["", "[]", '{"../../etc/passwd": 1}'])
def test_record_that_is_none_removes_nothing(folder, text):
    folder.mkdir(parents=True)
    (folder / "7.json").write_text(text)
    assert shared_names.remove_left(lambda group: False) == []


def test_folder_that_cannot_be_written_stops_nothing(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    shared_names.note(os.getpid(), [os.getpid()])
    assert shared_names.remove_left(lambda group: False) == []
