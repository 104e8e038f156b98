"""`tink-rl convert`: pickles become safetensors, and never run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters import BASE, CONFIG, WEIGHTS, config_of, tensors_of, write_adapter
from tests.refusals import refused
from tink_rl import errors
from tink_rl.adapters import convert as convert_module
from tink_rl.adapters.convert import convert
from tink_rl.adapters.pickle_scan import scanned
from tink_rl.adapters.store import AdapterStore
from tink_rl.cli import main

BIN = "adapter_model.bin"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def folder(tmp_path, forked_conversions):
    """A PEFT directory without weights."""
    write_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    return tmp_path / "adapter"


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "payload-ran"


def _save(value, path, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)


def _with_metadata(tensors):
    state = OrderedDict(tensors)
    state._metadata = OrderedDict({"": {"version": 1}})
    return state


def _sharing(tensors):
    both = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    found, at = {}, 0
    for name, tensor in tensors.items():
        found[name] = both[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    return found


SHAPES_OF_STATE = {
    "dict": dict,
    "ordered": _with_metadata,
    "parameters": lambda tensors: {k: torch.nn.Parameter(v) for k, v in tensors.items()},
    "shared storage": _sharing,
    "transposed": lambda tensors: {k: v.t().contiguous().t() for k, v in tensors.items()},
    "half": lambda tensors: {k: v.half() for k, v in tensors.items()},
    "bfloat16": lambda tensors: {k: v.bfloat16() for k, v in tensors.items()},
}


@pytest.mark.parametrize(
    ("shape", "legacy"),
    [*((shape, False) for shape in SHAPES_OF_STATE), ("dict", True), ("ordered", True)],
)
def test_what_torch_saved_becomes_the_same_tensors(folder, shape, legacy):
    tensors = SHAPES_OF_STATE[shape](tensors_of())
    _save(tensors, folder / BIN, legacy)
    before = (folder / BIN).read_bytes()
    done = convert(folder)
    kept = load_file(done.path)
    assert done.num_tensors == 6 and set(kept) == set(tensors)
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    assert all(kept[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert (folder / BIN).read_bytes() == before
    assert sorted(os.listdir(folder)) == [CONFIG, BIN, WEIGHTS]


def test_real_peft_bin_is_registered_after_the_command_that_the_refusal_names(
    model_dir, tmp_path, capsys
):
    from tests.policies import PeftTwin
    from tink_rl.policy.adapter import AdapterCollector, from_peft_dir
    from tink_rl.policy.shapes import BaseShapes

    base = model_dir("qwen3")
    twin = PeftTwin(base, use_rslora=True)
    twin.randomise(3)
    twin.model.save_pretrained(tmp_path / "a", safe_serialization=False)
    store, shapes = AdapterStore(tmp_path / "store"), BaseShapes.from_model_dir(base)
    with refused("pickle_refused") as caught:
        store.add(tmp_path / "a", base=shapes)
    command = f"tink-rl convert {tmp_path / 'a'}"
    assert f"`{command}`" in str(caught.value)
    assert main(command.split()[1:]) == 0
    assert "28 tensors" in capsys.readouterr().err
    kept, live = (
        from_peft_dir(store.add(tmp_path / "a", base=shapes).path),
        AdapterCollector(twin.model).collect(),
    )
    for name, tensor in live.tensors.items():
        torch.testing.assert_close(kept.tensors[name], tensor, atol=0, rtol=1e-6)


def _payload_in_dict(marker):
    return {**tensors_of(), "x": Payload(marker)}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_payload_in_a_checkpoint_never_runs(folder, marker, legacy):
    _save(_payload_in_dict(marker), folder / BIN, legacy)
    with refused("pickle_refused", match=r"mkdir.*nothing of it was run"):
        convert(folder)
    assert not marker.exists() and sorted(os.listdir(folder)) == [CONFIG, BIN]


def _refused_as_damaged():
    codes = ("pickle_refused", "adapter_corrupt")
    return pytest.raises(errors.AdapterFilesInvalid, check=lambda error: error.code in codes)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickle_of_any_protocol_never_runs(folder, marker, protocol):
    (folder / BIN).write_bytes(pickle.dumps(Payload(marker), protocol))
    with _refused_as_damaged():
        convert(folder)
    assert not marker.exists()


@pytest.mark.parametrize("position", range(5))
def test_payload_in_any_of_the_legacy_pickles_never_runs(folder, marker, position):
    stream = io.BytesIO()
    _save(tensors_of(), stream, legacy=True)
    data, starts = stream.getvalue(), [0]
    reader = io.BytesIO(data)
    for _ in range(5):
        list(pickletools.genops(reader))
        starts.append(reader.tell())
    evil = pickle.dumps(Payload(marker), 2)
    (folder / BIN).write_bytes(data[: starts[position]] + evil + data[starts[position + 1] :])
    with refused("pickle_refused", match="mkdir"):
        convert(folder)
    assert not marker.exists()


def _zip_of(entries, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return stream.getvalue()


def _entries():
    stream = io.BytesIO()
    _save(tensors_of(), stream)
    with zipfile.ZipFile(stream) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def _tar():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return stream.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"hello world, this is no checkpoint",
        _zip_of([]),
        _zip_of(_entries())[:2000],
        _zip_of(_entries(), zipfile.ZIP_DEFLATED),
        _zip_of([*_entries(), ("archive/code/__torch__.py", b"import os")]),
        _zip_of([*_entries(), ("archive/constants.pkl", b"\x80\x02.")]),
        _zip_of([*_entries(), ("other/data.pkl", b"\x80\x02.")]),
        _zip_of([*_entries(), ("archive/data/../../x", b"")]),
        _zip_of([entry for entry in _entries() if not entry[0].endswith("data.pkl")]),
        _tar(),
        b"\x80\x02" + b"K\x01" * (3 << 20),
    ],
    ids=[f"file{number}" for number in range(13)],
)
def test_what_torch_save_does_not_write_is_refused(folder, data):
    (folder / BIN).write_bytes(data)
    with _refused_as_damaged() as caught:
        convert(folder)
    assert caught.value.status == 422 and sorted(os.listdir(folder)) == [CONFIG, BIN]


def test_second_entry_of_one_name_is_refused(folder):
    name, content = next(e for e in _entries() if e[0].endswith("data.pkl"))
    with pytest.warns(UserWarning, match="Duplicate"):
        data = _zip_of([*_entries(), (name, content)])
    (folder / BIN).write_bytes(data)
    with refused("adapter_corrupt", match="equal entries"):
        convert(folder)


def test_archive_is_rebuilt_from_what_was_scanned():
    hidden = b"PK\x03\x04 only another reader would find this"
    stream = io.BytesIO(_zip_of(_entries()))
    with zipfile.ZipFile(stream, "a") as archive:
        archive.comment = hidden
    clean = scanned(stream.getvalue(), "x")
    assert hidden in stream.getvalue() and hidden not in clean
    assert set(torch.load(io.BytesIO(clean), weights_only=True)) == set(tensors_of())


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([torch.ones(2)], "list, expected a dict"),
        (torch.ones(2), "Tensor, expected a dict"),
        ({"a": {"b": torch.ones(2)}}, "is a dict, expected a tensor"),
        ({"a": 1}, "is a int, expected a tensor"),
        ({1: torch.ones(2)}, "expected a tensor"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "LongStorage"),
        ({"a": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"a": torch.nn.Linear(2, 2)}, "Linear"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_anything_but_a_flat_dict_of_float_tensors_is_refused(folder, value, match):
    _save(value, folder / BIN)
    with refused("pickle_refused", match=match):
        convert(folder)
    assert sorted(os.listdir(folder)) == [CONFIG, BIN]


def test_claim_of_a_huge_storage_ends_in_the_childs_limit_not_in_our_memory(folder):
    stream = io.BytesIO()
    _save({"a": torch.ones(7, 11)}, stream, legacy=True)
    # 77 elements become 2**31 - 1: eight gigabytes
    small, huge = b"K\x4dN", b"J\xff\xff\xff\x7fN"
    data = stream.getvalue()
    assert data.count(small) == 1
    (folder / BIN).write_bytes(data.replace(small, huge))
    with refused("pickle_refused", match="was not converted"):
        convert(folder)


def test_nothing_to_convert_is_said_and_safetensors_are_never_overwritten(folder, tmp_path, capsys):
    with pytest.raises(errors.AdapterFilesInvalid, match="neither"):
        convert(folder)
    with pytest.raises(errors.AdapterPathMissing, match="LoRA path does not exist"):
        convert(tmp_path / "absent")
    _save(tensors_of(), folder / BIN)
    (folder / WEIGHTS).write_bytes(b"mine")
    assert main(["convert", str(folder)]) == 1
    assert "already" in capsys.readouterr().err
    assert (folder / WEIGHTS).read_bytes() == b"mine"


def test_fifo_in_place_of_the_file_does_not_hang(folder):
    os.mkfifo(folder / BIN)
    with pytest.raises(errors.PathNotAllowed, match="regular"):
        convert(folder)


def test_pt_file_is_converted_too(folder):
    _save(tensors_of(), folder / "adapter_model.pt")
    assert convert(folder).source.name == "adapter_model.pt"
    assert AdapterStore(folder.parent / "s").add(folder, base=BASE).rank == config_of()["r"]


def test_what_the_child_wrote_is_compared_before_it_appears(folder, monkeypatch):
    _save(tensors_of(), folder / BIN)
    honest = convert_module._load_in_child

    def lying(clean, out, source):
        answer = honest(clean, out, source)
        with open(out, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        return answer

    monkeypatch.setattr(convert_module, "_load_in_child", lying)
    with refused("adapter_corrupt", match="convert again"):
        convert(folder)
    assert sorted(os.listdir(folder)) == [CONFIG, BIN]


def test_child_that_does_not_end_is_ended(folder, monkeypatch):
    _save(tensors_of(), folder / BIN)
    monkeypatch.undo()  # the child that users have
    monkeypatch.setattr(convert_module, "CHILD_TIMEOUT_S", 0.01)
    with pytest.raises(errors.DeadlineExceeded):
        convert(folder)
    assert sorted(os.listdir(folder)) == [CONFIG, BIN]


def test_full_disk_is_said_and_leaves_nothing(folder, monkeypatch):
    _save(tensors_of(), folder / BIN)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module.os, "rename", full)
    with pytest.raises(errors.StorageFull, match="No space"):
        convert(folder)
    assert sorted(os.listdir(folder)) == [CONFIG, BIN]


def test_modules_of_the_users_directory_are_not_imported(folder, tmp_path, marker):
    _save(tensors_of(), folder / BIN)
    (tmp_path / "torch.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    root = Path(convert_module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tink_rl.cli", "convert", str(folder)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not marker.exists() and (folder / WEIGHTS).is_file()
