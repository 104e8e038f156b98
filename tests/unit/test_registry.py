"""Which adapter an id means: versions, conflicts, many processes; and a model that checks it all."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from tests.adapters import write_adapter
from tink_rl import errors
from tink_rl.adapters import registry as registry_module
from tink_rl.adapters.registry import FILE_NAME, AdapterRegistry, Registration, check_adapter_id
from tink_rl.adapters.store import AdapterStore

A, B, C = (letter * 64 for letter in "abc")


@pytest.fixture
def registry(tmp_path):
    registry = AdapterRegistry(tmp_path)
    yield registry
    registry.close()


def test_first_registration_is_version_one_and_others_follow(registry):
    first = registry.register("math", A, "/data/math", expected_version=0)
    assert (first.version, first.digest, first.lora_path, first.active) == (
        1,
        A,
        "/data/math",
        True,
    )
    assert registry.register("math", B, Path("/data/new"), expected_version=1).version == 2
    assert registry.current("math").digest == B
    old = registry.get("math", 1)
    assert (old.digest, old.active) == (A, False)
    assert registry.get("math", 3) is None and registry.current("other") is None


def test_same_bytes_keep_their_version_whatever_was_expected(registry):
    registry.register("math", A, "/a", 0)
    for expected in (None, 0, 1, 7):
        assert registry.register("math", A, "/elsewhere", expected).version == 1


def test_other_bytes_since_the_version_was_read_are_a_conflict(registry):
    registry.register("math", A, "/a", 0)
    with pytest.raises(errors.AdapterConflict, match="version 1") as caught:
        registry.register("math", B, "/b", expected_version=0)
    assert caught.value.status == 409 and registry.current("math").digest == A
    assert registry.register("math", B, "/b", expected_version=None).version == 2


def test_versions_are_not_reused_after_unregister(registry):
    registry.register("math", A, "/a", 0)
    assert registry.unregister("math").version == 1
    assert registry.current("math") is None and registry.list() == []
    again = registry.register("math", A, "/a", 0)
    assert again.version == 2 and registry.get("math", 1).digest == A


def test_unregistering_what_is_not_there_is_unknown(registry):
    for name in ("math", "", "a@1", "../x", None):
        with pytest.raises(errors.UnknownAdapter, match="list_lora_adapters"):
            registry.unregister(name)


def test_list_and_digests_name_what_is_current(registry):
    registry.register("b", A, "/b", 0)
    registry.register("a", B, "/a", 0)
    registry.register("a", C, "/a", 1)
    assert [(r.adapter_id, r.version) for r in registry.list()] == [("a", 2), ("b", 1)]
    assert registry.digests() == {A, C}
    assert registry.digests(active_only=False) == {A, B, C}


def test_base_of_the_same_bytes_is_that_of_the_last_registration_that_knew_it(registry):
    assert registry.register("a", A, "/a").base_fingerprint is None
    for given, kept in (("one", "one"), (None, "one"), ("two", "two")):
        found = registry.register("a", A, "/a", base_fingerprint=given)
        assert (found.version, found.base_fingerprint) == (1, kept)
        assert registry.current("a") == registry.get("a", 1) == found
    registry.register("a", B, "/a")
    assert registry.current("a").base_fingerprint is None
    assert registry.get("a", 1).base_fingerprint == "two"


def test_needed_is_every_version_of_a_registered_id_and_what_was_let_go_since(registry):
    registry.register("kept", A, "/a")
    registry.register("kept", B, "/b")
    registry.register("gone", C, "/c")
    before = time.time()
    registry.unregister("gone")
    assert registry.needed(before - 1) == {A, B, C}
    assert registry.needed(time.time() + 1) == {A, B}
    registry.register("gone", A, "/a")
    assert registry.needed(time.time() + 1) == {A, B, C}


_EARLIER_SCHEMA = """
CREATE TABLE versions (
    adapter_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    digest TEXT NOT NULL,
    lora_path TEXT NOT NULL,
    registered_at REAL NOT NULL,
    active INTEGER NOT NULL,
    PRIMARY KEY (adapter_id, version)
) WITHOUT ROWID;
CREATE UNIQUE INDEX one_active ON versions (adapter_id) WHERE active;
"""


def test_file_of_an_earlier_release_opens_and_what_was_replaced_ages_from_now(tmp_path):
    with sqlite3.connect(tmp_path / FILE_NAME) as old:
        old.executescript(_EARLIER_SCHEMA)
        rows = [("a", 1, A, "/a", 1.0, 0), ("b", 1, B, "/b", 1.0, 1)]
        old.executemany("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", rows)
    old.close()
    before = time.time()
    registries = [AdapterRegistry(tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda registry: registry.current("b"), registries))
    assert {item.base_fingerprint for item in found} == {None}
    assert registries[0].needed(before - 1) == {A, B}
    assert registries[0].needed(time.time() + 1) == {B}
    assert registries[1].register("b", B, "/b", base_fingerprint="f").version == 1
    assert registries[2].current("b").base_fingerprint == "f"
    for registry in registries:
        registry.close()


@pytest.mark.parametrize(
    "name",
    ["", ".a", "-a", "a@1", "../x", "a/b", "a b", "a\0", "a\n", "ä", "\ud800", "x" * 101, None, 7],
    ids=ascii,
)
def test_bad_ids_are_refused_and_mean_nothing(registry, name):
    with pytest.raises(errors.BadRequest, match="1-100 letters") as caught:
        registry.register(name, A, "/a")
    assert caught.value.status == 400 and str(caught.value).isprintable()
    assert registry.current(name) is None and registry.get(name, 1) is None


def test_good_ids_pass():
    for name in ("a", "0", "My.Adapter_1-x", "x" * 100):
        assert check_adapter_id(name) == name


def test_versions_that_no_integer_column_holds_are_none(registry):
    registry.register("a", A, "/a")
    assert [registry.get("a", version) for version in (-1, 0, 2**63, 10**30)] == [None] * 4


def test_paths_with_bytes_that_are_no_text_are_kept_readable(registry):
    assert registry.register("a", A, "/data/\udcff").lora_path == "/data/?"


def test_another_object_sees_every_write_at_once(registry, tmp_path):
    other = AdapterRegistry(tmp_path / FILE_NAME)
    for version, stored in enumerate((A, B, C), start=1):
        registry.register("a", stored, "/a")
        assert other.current("a").version == version
        assert other.current("a").digest == stored
    other.unregister("a")
    assert registry.current("a") is None
    other.close()


def test_registry_survives_closing_and_a_new_process(registry, tmp_path):
    registry.register("a", A, "/a")
    registry.close()
    code = (
        "import sys; from tink_rl.adapters.registry import AdapterRegistry\n"
        "print(AdapterRegistry(sys.argv[1]).current('a').digest)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == A
    assert registry.current("a").version == 1  # opens again by itself


def test_twenty_threads_that_register_one_id_have_one_winner(registry):
    start = threading.Barrier(20)

    def attempt(i):
        start.wait(timeout=30)
        try:
            return registry.register("a", f"{i:064x}", "/a", expected_version=0)
        except errors.AdapterConflict as error:
            return error

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(attempt, range(20)))
    won = [answer for answer in answers if isinstance(answer, Registration)]
    assert len(won) == 1 and len(answers) == 20
    assert registry.current("a") == won[0] and won[0].version == 1


_RACER = """
import sys
from pathlib import Path
from tink_rl.errors import AdapterConflict
from tink_rl.adapters.registry import AdapterRegistry
from tink_rl.adapters.store import AdapterStore

root, source = sys.argv[1:]
store, registry = AdapterStore(root), AdapterRegistry(root)
print("ready", flush=True)
sys.stdin.readline()
expected = 0
stored = store.add(source).digest
try:
    print("won", registry.register("a", stored, source, expected).version)
except AdapterConflict:
    print("lost")
for i in range(30):
    name = f"busy{i % 3}"
    registry.register(name, stored, source)
    assert registry.current(name) is not None
"""


def test_processes_that_register_one_id_with_other_bytes_have_one_winner(tmp_path):
    root = tmp_path / "store"
    children = []
    for seed in range(4):
        source = write_adapter(tmp_path / str(seed), seed=seed)
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", _RACER, str(root), str(source)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    for child in children:
        assert child.stdout.readline() == "ready\n"
    outputs = [child.communicate("go\n", timeout=120)[0].split() for child in children]
    assert [child.returncode for child in children] == [0] * 4
    assert sorted(output[0] for output in outputs) == ["lost", "lost", "lost", "won"]
    registry = AdapterRegistry(root)
    assert registry.current("a").version == 1
    assert AdapterStore(root).read(registry.current("a").digest).rank == 4
    for name in ("busy0", "busy1", "busy2"):
        last = registry.current(name).version
        rows = [registry.get(name, version) for version in range(1, last + 1)]
        assert all(rows) and [row.active for row in rows] == [False] * (last - 1) + [True]
    registry.close()


def test_forked_child_opens_the_file_anew(registry):
    registry.register("a", A, "/a")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            registry.register("a", B, "/b")
            code = 0 if registry.current("a").version == 2 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert registry.current("a").version == 2
    assert registry.register("a", C, "/c").version == 3


def test_file_that_is_no_database_is_said(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"not a database at all" * 100)
    with pytest.raises(errors.StoreDamaged, match="move it away"):
        AdapterRegistry(tmp_path).current("a")


@pytest.mark.parametrize("root", ["/proc/self/registry", "{file}/registry"])
def test_place_that_cannot_be_written_is_said(tmp_path, root):
    (tmp_path / "file").write_text("x")
    registry = AdapterRegistry(root.replace("{file}", str(tmp_path / "file")))
    with pytest.raises(errors.StorageFull, match="TINK_STORE_DIR"):
        registry.register("a", A, "/a")


def test_lock_held_by_another_process_ends_in_an_error(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(registry_module, "_BUSY_S", 0.05)
    registry.register("a", A, "/a")
    registry.close()
    other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(errors.DeadlineExceeded, match="locked"):
        registry.register("a", B, "/b")
    assert registry.current("a").version == 1  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    assert registry.register("a", B, "/b").version == 2


def test_full_disk_leaves_the_current_version_and_a_later_try_works(registry):
    registry.register("a", A, "/a")
    with registry._connections.lent() as connection:  # this thread gets the same one again
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(errors.StorageFull, match="full"):
        for i in range(1000):
            registry.register(f"b{i}", B, "/long" * 200)
    assert registry.current("a").digest == A
    connection.execute("PRAGMA max_page_count = 100000")
    assert registry.register("a", C, "/c").version == 2


class RegistryMachine(RuleBasedStateMachine):
    """Two objects on one file against a dict of version lists."""

    seen = Bundle("seen")
    ids = st.sampled_from(["x", "y", "z"])
    digests = st.sampled_from([A, B, C])

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.objects = [AdapterRegistry(self.folder.name) for _ in range(2)]
        self.versions: dict[str, list[str]] = {}
        self.active: dict[str, int] = {}

    def teardown(self):
        for registry in self.objects:
            registry.close()
        self.folder.cleanup()

    @rule(target=seen, name=ids)
    def read(self, name):
        return name, self.active.get(name, 0)

    @rule(which=st.integers(0, 1), name=ids, stored=digests)
    def register_blindly(self, which, name, stored):
        self._register(which, name, stored, None)

    @rule(which=st.integers(0, 1), earlier=seen, stored=digests)
    def register_what_was_read(self, which, earlier, stored):
        self._register(which, earlier[0], stored, earlier[1])

    def _register(self, which, name, stored, expected):
        versions, current = self.versions.setdefault(name, []), self.active.get(name, 0)
        registry = self.objects[which]
        if current and versions[current - 1] == stored:
            assert registry.register(name, stored, "/p", expected).version == current
        elif current and expected not in (None, current):
            with pytest.raises(errors.AdapterConflict):
                registry.register(name, stored, "/p", expected)
        else:
            versions.append(stored)
            self.active[name] = len(versions)
            assert registry.register(name, stored, "/p", expected).version == len(versions)

    @rule(which=st.integers(0, 1), name=ids)
    def unregister(self, which, name):
        current = self.active.pop(name, 0)
        if current:
            assert self.objects[which].unregister(name).version == current
        else:
            with pytest.raises(errors.UnknownAdapter):
                self.objects[which].unregister(name)

    @rule(which=st.integers(0, 1))
    def reopen(self, which):
        self.objects[which].close()

    @invariant()
    def both_agree_with_the_model(self):
        for registry in self.objects:
            listed = {r.adapter_id: (r.version, r.digest) for r in registry.list()}
            assert listed == {n: (v, self.versions[n][v - 1]) for n, v in self.active.items()}
            for name, versions in self.versions.items():
                rows = [registry.get(name, i + 1) for i in range(len(versions))]
                assert [row.digest for row in rows] == versions
                current = registry.current(name)
                assert (current.version if current else 0) == self.active.get(name, 0)


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_older_versions_of_an_unregistered_id_are_needed_for_as_long_as_the_last(registry):
    registry.register("math", A, "/a")
    registry.register("math", B, "/b")
    time.sleep(0.01)
    before = time.time()
    registry.unregister("math")
    assert registry.needed(before) == {A, B}
