"""Which paths are read, and that nothing else is: the table of reliability F26."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.adapters import CONFIG, WEIGHTS, write_adapter
from tink_rl import errors
from tink_rl.policy.paths import open_source
from tink_rl.policy.peft_dir import open_peft_dir

SECRET = "the-secret-of-another-tenant"


@pytest.fixture
def root(tmp_path):
    """An adapter root with one adapter, and beside it a directory that is nobody's business."""
    write_adapter(tmp_path / "root" / "mine")
    outside = write_adapter(tmp_path / "outside" / "theirs", config=f'{{"{SECRET}": 1}}')
    (outside / "secret.txt").write_text(SECRET)
    return tmp_path / "root"


def _refusal(path, root):
    with pytest.raises(errors.TinkError) as caught, open_peft_dir(path, roots=[root]):
        pass
    assert caught.value.status in (403, 422)
    assert SECRET not in str(caught.value)
    return caught.value


def test_adapter_under_a_root_opens_by_either_spelling_of_the_root(root, tmp_path):
    link = tmp_path / "link-to-root"
    link.symlink_to(root)
    for path, roots in (
        (root / "mine", [root]),
        (link / "mine", [link]),
        (root / "mine", [tmp_path / "absent", link]),
        (f"{root}//./mine/", [root]),
    ):
        with open_peft_dir(path, roots=roots) as adapter:
            assert len(adapter.modules) == 3


@pytest.mark.parametrize(
    "path",
    [
        "{root}/../outside/theirs",
        "{root}/mine/../../outside/theirs",
        "{root}/mine/../mine",
        "{outside}",
        "{root}suffix/mine",
        "/etc",
        "/proc/self/root/..",
        "/proc/self/cwd",
        "/dev/zero",
        "mine",
        "./mine",
        "../root/mine",
        "~",
        "~root/x",
        "org/name",
        "http://169.254.169.254/latest",
        "https://example.org/adapter",
        "file:///etc/passwd",
        "hf://org/name",
        "{root}/mine\0/etc",
        "{root}/mine\n",
        "",
        "a" * 5000,
        "/" + "d/" * 100_000,
        "{root}/" + "d/" * 2100,
        "{root}/\ud800",
        "%2e%2e/outside/theirs",
        None,
        7,
        b"/etc",
        ["/etc"],
    ],
    ids=lambda value: repr(value)[:40],
)
def test_path_outside_the_root_or_no_path_at_all_is_not_allowed(root, path):
    if isinstance(path, str):
        path = path.replace("{root}", str(root))
        path = path.replace("{outside}", str(root.parent / "outside/theirs"))
    error = _refusal(path, root)
    assert isinstance(error, errors.PathNotAllowed)
    assert "theirs" not in str(error) and "/etc" not in str(error)


def test_percent_encoding_is_letters_not_a_way_up(root):
    assert isinstance(_refusal(f"{root}/%2e%2e/outside/theirs", root), errors.AdapterPathMissing)


def test_answer_is_the_same_whether_the_outside_path_exists_or_not(root):
    there = _refusal(root.parent / "outside" / "theirs", root)
    absent = _refusal(root.parent / "outside" / "nobody", root)
    assert (there.message, there.code, there.details) == (
        absent.message,
        absent.code,
        absent.details,
    )


def test_missing_path_under_the_root_says_the_known_sentence(root):
    error = _refusal(f"{root}/absent", root)
    assert isinstance(error, ValueError)
    assert str(error).startswith(f"LoRA path does not exist: {root}/absent")


def _link_directory(root):
    (root / "bad").symlink_to(root.parent / "outside" / "theirs")


def _link_inside(root):
    (root / "bad").symlink_to(root / "mine")


def _link_above(root):
    (root / "above").symlink_to(root.parent / "outside")
    (root / "bad").mkdir()


def _link_file(root):
    _break_weights(root, lambda path: path.symlink_to(root.parent / "outside/theirs" / WEIGHTS))


def _link_config(root):
    write_adapter(root / "bad")
    (root / "bad" / CONFIG).unlink()
    (root / "bad" / CONFIG).symlink_to(root.parent / "outside/theirs/secret.txt")


def _hard_link(root):
    _break_weights(root, lambda path: path.hardlink_to(root.parent / "outside/theirs" / WEIGHTS))


def _fifo(root):
    _break_weights(root, os.mkfifo)


def _fifo_config(root):
    write_adapter(root / "bad")
    (root / "bad" / CONFIG).unlink()
    os.mkfifo(root / "bad" / CONFIG)


def _fifo_as_directory(root):
    os.mkfifo(root / "bad")


def _directory_as_file(root):
    _break_weights(root, Path.mkdir)


def _socket(root):
    import socket

    def bind(path):
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)  # the name of a socket has at most 107 bytes
            try:
                server.bind(path.name)
            finally:
                os.chdir(here)

    _break_weights(root, bind)


def _device_link(root):
    _break_weights(root, lambda path: path.symlink_to("/dev/zero"))


def _file_as_directory(root):
    (root / "bad").write_text("x")


def _break_weights(root, make):
    write_adapter(root / "bad")
    (root / "bad" / WEIGHTS).unlink()
    make(root / "bad" / WEIGHTS)


@pytest.mark.parametrize(
    "make",
    [
        _link_directory,
        _link_inside,
        _link_file,
        _link_config,
        _hard_link,
        _fifo,
        _fifo_config,
        _fifo_as_directory,
        _directory_as_file,
        _socket,
        _device_link,
        _file_as_directory,
    ],
)
@pytest.mark.timeout(20)
def test_what_is_no_plain_file_or_directory_is_refused_at_once(root, make):
    make(root)
    error = _refusal(f"{root}/bad", root)
    assert isinstance(error, errors.PathNotAllowed)
    assert "outside/theirs" not in str(error)


def test_link_in_the_middle_of_a_path_is_refused_whatever_lies_behind(root):
    _link_above(root)
    there, absent = (_refusal(f"{root}/above/{name}", root) for name in ("theirs", "nobody"))
    assert isinstance(there, errors.PathNotAllowed) and type(there) is type(absent)


def _swap_until(stop, path, good, bad):
    """Let `path` be a link to one, then the real thing, again and again, by atomic renames."""
    while not stop.is_set():
        os.rename(path, good)
        os.rename(bad, path)
        os.rename(path, bad)
        os.rename(good, path)


@pytest.mark.parametrize("what", ["directory", "file"])
def test_swapping_a_link_in_during_validation_never_reads_outside(root, what):
    path = root / "mine" if what == "directory" else root / "mine" / CONFIG
    bad = root / "swap"
    target = root.parent / "outside" / "theirs"
    bad.symlink_to(target if what == "directory" else target / CONFIG)
    stop = threading.Event()
    swapper = threading.Thread(target=_swap_until, args=(stop, path, root / "kept", bad))
    swapper.start()
    outcomes = {"read": 0, "refused": 0}
    rounds, deadline = 0, time.monotonic() + 60
    try:
        # At least a thousand, and until both outcomes were seen: a race that never happens shows nothing.
        while rounds < 1000 or (not all(outcomes.values()) and time.monotonic() < deadline):
            rounds += 1
            try:
                with open_source(f"{root}/mine", [root]) as directory:
                    file = directory.open(CONFIG, 1 << 16)
                    if file is not None:
                        with file:
                            assert SECRET.encode() not in file.read()
                        outcomes["read"] += 1
            except (errors.PathNotAllowed, errors.AdapterPathMissing):
                outcomes["refused"] += 1
    finally:
        stop.set()
        swapper.join()
    assert all(outcomes.values()), outcomes


def test_trusted_caller_may_use_links_relative_paths_and_home(root, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(root / "mine")
    (root / "mine" / "blob").write_bytes((root / "mine" / WEIGHTS).read_bytes())
    (root / "mine" / WEIGHTS).unlink()
    (root / "mine" / WEIGHTS).symlink_to("blob")  # as in a hub cache
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    for path in (tmp_path / "link", "mine", "../root/mine", "~/mine"):
        with open_peft_dir(path) as adapter:
            assert adapter.rank == 4


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("absent", errors.AdapterPathMissing),
        ("org/name", errors.AdapterPathMissing),
        ("~nobody-of-that-name/x", errors.AdapterPathMissing),
        ("http://169.254.169.254/", errors.PathNotAllowed),
        ("file:///etc", errors.PathNotAllowed),
        ("/dev/zero", errors.AdapterFilesInvalid),
        ("mine\0", errors.PathNotAllowed),
    ],
)
def test_trusted_caller_gets_a_reason_too(root, monkeypatch, path, error):
    monkeypatch.chdir(root)
    with pytest.raises(error), open_source(path, None):
        pass


def test_trusted_path_that_is_a_fifo_does_not_hang(root):
    os.mkfifo(root / "mine" / "pipe")
    with (
        open_source(root / "mine", None) as directory,
        pytest.raises(errors.PathNotAllowed, match="regular"),
    ):
        directory.open("pipe", 100)


def test_file_above_the_cap_is_refused_before_it_is_read(root):
    with open(root / "mine" / WEIGHTS, "r+b") as file:
        file.truncate(600 << 20)  # sparse
    assert _refusal(f"{root}/mine", root).code == "adapter_too_large"


_AUDITED = """
import sys
from pathlib import Path
from tink_rl.errors import TinkError
from tink_rl.policy.peft_dir import open_peft_dir
from tink_rl.policy import paths, support, tensor_file
events = []
sys.addaudithook(lambda event, args: events.append((event, str(args[0]) if args else "")))
root, paths = sys.argv[1], sys.argv[2:]
for path in paths:
    try:
        with open_peft_dir(path, roots=[Path(root)]):
            print("opened", path)
    except TinkError:
        pass
touched = [e for e in events if e[0].startswith(("open", "os.", "socket."))]
for name, value in touched:
    print(name, value)
"""


def test_no_refused_path_makes_us_open_a_file_outside_or_a_socket(root):
    (root / "link").symlink_to(root.parent / "outside" / "theirs")
    outside = str(root.parent / "outside")
    paths = [
        f"{root}/../outside/theirs",
        f"{outside}/theirs",
        f"{root}/link",
        "http://169.254.169.254/",
        "org/name",
        f"{root}/mine",
    ]
    result = subprocess.run(
        [sys.executable, "-c", _AUDITED, str(root), *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert (
        f"opened {root}/mine" in lines and f"open {CONFIG}" in lines
    )  # the hook sees what happens
    assert not [line for line in lines if outside in line or line.startswith("socket.")]
