"""The adapter store under many writers, after a crash, and on a full disk (F27)."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.adapters import (
    CONFIG,
    WEIGHTS,
    names_in,
    write_adapter,
)
from tink_rl import errors
from tink_rl.adapters import store as store_module
from tink_rl.adapters.store import AdapterStore

# -- many at once, and what a crash leaves --------------------------------------------------------


def test_twenty_threads_that_add_the_same_adapter_make_one_copy(store, source):
    with ThreadPoolExecutor(20) as pool:
        digests = {s.digest for s in pool.map(lambda _: store.add(source), range(20))}
    assert store.digests() == sorted(digests) and len(digests) == 1
    assert not [name for name in names_in(store) if name.startswith(".tmp")]


def test_many_processes_add_remove_and_collect_without_breaking_a_copy(store, tmp_path):
    for seed in range(3):
        write_adapter(tmp_path / str(seed), seed=seed)
    code = (
        "import sys\nfrom tink_rl.adapters.store import AdapterStore\n"
        "store = AdapterStore(sys.argv[1])\n"
        "for i in range(12):\n"
        "    store.read(store.add(f'{sys.argv[2]}/{i % 3}').digest)\n"
        "    store.clean(); store.gc([])\n"
    )
    command = [sys.executable, "-c", code, str(store.root), str(tmp_path)]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for child in children:
        assert child.communicate(timeout=120)[1] == "" and child.returncode == 0
    assert len(store.digests()) == 3
    assert not [name for name in names_in(store) if name.startswith(".tmp")]


def test_copies_of_dead_writers_are_cleaned_and_those_under_way_are_not(store, source):
    store.add(source)
    (store.root / ".tmp-dead").mkdir()
    (store.root / ".tmp-dead" / WEIGHTS).write_bytes(b"half")
    with store._temporary() as under_way:
        assert store.clean() == 1
        assert under_way.is_dir()
    (store.root / ".tmp-dead").mkdir()
    AdapterStore(store.root).add(source)  # a new process cleans up before its first copy
    assert not [name for name in names_in(store) if name.startswith(".tmp")]


def test_lock_that_a_stuck_process_holds_ends_in_an_error(store, source, monkeypatch):
    import fcntl

    store.add(source)
    monkeypatch.setattr(store_module, "_LOCK_S", 0.05)
    with open(store.root / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(errors.DeadlineExceeded, match="fuser"):
            store.add(source)


# -- a disk that is full or read-only (F27) -------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_failed_write_leaves_the_store_as_it_was(
    store, source, tmp_path, monkeypatch, call, number
):
    kept = store.add(write_adapter(tmp_path / "other", seed=1))

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, call, fail)
        with pytest.raises(errors.StorageFull, match="TINK_STORE_DIR") as caught:
            store.add(source)
    assert caught.value.status == 507 and isinstance(caught.value, OSError)
    assert store.digests() == [kept.digest]
    assert not [name for name in names_in(store) if name.startswith(".tmp")]
    assert store.read(kept.digest).rank == 4
    assert store.read(store.add(source).digest).rank == 4


@pytest.mark.parametrize("root", ["/proc/self/store", "{file}/store", "/sys/store"])
def test_store_that_cannot_be_made_says_so(source, root):
    store = AdapterStore(root.replace("{file}", str(source / CONFIG)))
    with pytest.raises(errors.StorageFull, match="TINK_STORE_DIR"):
        store.add(source)


_FILLED = """
import os, resource, sys
from pathlib import Path
from tests.adapters import SHAPES, tensors_of, write_adapter
from tink_rl.errors import StorageFull
from tink_rl.adapters.store import AdapterStore

root, sources, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
big = {name: (6000, 4000) for name in SHAPES}
def source(seed):
    return write_adapter(sources / str(seed), tensors=tensors_of(seed=seed, shapes=big))
store = AdapterStore(root)
kept = [store.add(source(0)).digest]
paths = [source(seed) for seed in range(1, 2 if limit else 20)]
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for path in paths:
    try:
        kept.append(store.add(path).digest)
    except StorageFull as error:
        assert error.status == 507
        break
else:
    raise SystemExit("the disk never became full")
assert store.digests() == sorted(kept), "a version is lost or half there"
assert not [n for n in os.listdir(root) if n.startswith(".tmp")], "a copy was left"
assert all(store.read(digest).rank == 4 for digest in kept)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
if not limit:
    assert store.gc(kept[1:], min_age_s=-1) == kept[:1]
assert store.read(store.add(path).digest).rank == 4
print("held", len(kept))
"""


def _tmpfs_allowed(tmp_path):
    command = f"mount -t tmpfs -o size=2m none {tmp_path}"
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True).returncode
        == 0
    )


def test_full_disk_is_survived_and_space_mends_it(tmp_path):
    """On a real file system of 2 MB where this machine lets us mount one, else by a limit of file size."""
    disk, sources = tmp_path / "disk", tmp_path / "sources"
    disk.mkdir()
    mounted = _tmpfs_allowed(disk)
    arguments = [sys.executable, "-c", _FILLED, str(disk / "s"), str(sources)]
    if mounted:
        script = f'mount -t tmpfs -o size=2m none {disk} && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", script, "sh", *arguments, "0"]
    else:
        command = [*arguments, "200000"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[1]) >= 1


def test_file_size_limit_is_said_as_a_full_store(tmp_path):
    sources = tmp_path / "sources"
    command = [sys.executable, "-c", _FILLED, str(tmp_path / "s"), str(sources), "200000"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
