"""Pickles become safetensors in a process of their own, or nothing at all."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file

from langchain_lora_retriever.errors import InvalidAdapterError, UnsupportedAdapterError
from langchain_lora_retriever.pool import conversion
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.pool.checkpoint_files import PICKLE_FILE, WEIGHTS_FILE
from langchain_lora_retriever.pool.conversion import convert_pickle
from langchain_lora_retriever.pool.pool import AdapterPool


@pytest.fixture
def checkpoint(tmp_path, make_checkpoint):
    """A checkpoint with its weights in a pickle, and what they are."""
    folder = make_checkpoint(tmp_path / "old")
    tensors = load_file(folder / WEIGHTS_FILE)
    torch.save(OrderedDict(tensors), folder / PICKLE_FILE)
    (folder / WEIGHTS_FILE).unlink()
    return folder, tensors


def test_a_pickle_of_tensors_is_converted(checkpoint):
    """Bit for bit, beside it; a second time there is nothing to do, and until then it is refused unopened."""
    folder, tensors = checkpoint
    with pytest.raises(UnsupportedAdapterError, match=r"pickle.*pool convert .*convert=True"):
        read_adapter(folder)
    assert convert_pickle(folder, "old") == folder / WEIGHTS_FILE
    written = load_file(folder / WEIGHTS_FILE)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    assert read_adapter(folder).rank == 4
    assert convert_pickle(folder, "old") is None
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_pools_convert_what_they_add_if_they_are_told_to(tmp_path, checkpoint):
    """On disk and in memory."""
    folder, _ = checkpoint
    pool = AdapterPool(tmp_path / "pool", create=True)
    with pytest.raises(UnsupportedAdapterError, match="pickle"):
        pool.add("a", folder)
    assert pool.add("a", folder, convert=True).rank == 4
    assert not (tmp_path / "pool" / "a" / PICKLE_FILE).exists()
    assert AdapterPool().add("a", folder, convert=True) == pool["a"]
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(UnsupportedAdapterError, match="pickle"):
        pool.update("a", folder)
    assert pool.update("a", folder, convert=True) == pool["a"]


class Bomb:
    """Runs a command when it is unpickled by anybody who lets it."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        """What pickle writes."""
        return os.system, (self.command,)


class Fat:
    """Asks for memory when it is unpickled, also by those who know tensors alone."""

    def __reduce__(self):
        """What pickle writes."""
        return bytearray, (8 << 30,)


def as_archive(data, *, deflated=b""):
    """What torch.save writes, around a pickle of one's own."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", sys.byteorder)
        if deflated:
            archive.writestr("archive/data/0", deflated, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def make_bombs(marker):
    """Pickles that would do something, in both formats that torch reads."""
    code = pickle.dumps(Bomb(f"touch {marker}"), protocol=2)
    fat = pickle.dumps({"x": Fat()}, protocol=2)
    old = (
        pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2) + pickle.dumps({}, protocol=2)
    )
    return {
        "code": as_archive(code),
        "code, bare": code,
        "code, old format": old + code,
        "memory": as_archive(fat),
        "memory, old format": old + fat,
        "a list": as_archive(pickle.dumps([1, 2], protocol=2)),
        "numbers": as_archive(pickle.dumps({"x": 5}, protocol=2)),
        "nothing": b"",
        "noise": struct.pack("<40Q", *range(40)),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "code", "code, bare", "code, old format", "memory", "memory, old format", "a list", "numbers", "nothing",
        "noise",
    ],
)  # fmt: skip
def test_a_pickle_bomb_is_refused_and_nothing_is_executed(tmp_path, checkpoint, kind):
    """In words, by the adapter's name; no file is left, and the pool goes on."""
    folder, _ = checkpoint
    marker = tmp_path / "executed"
    (folder / PICKLE_FILE).write_bytes(make_bombs(marker)[kind])
    with pytest.raises(UnsupportedAdapterError, match=r"adapter 'old'.*is refused.*Nothing of it was executed"):
        convert_pickle(folder, "old")
    assert not marker.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_config.json", PICKLE_FILE]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited there alone")
def test_an_archive_that_swells_is_refused(checkpoint):
    """A few hundred kilobytes that would be 400 MB of numbers: its process may not have so much, and ends."""
    folder, _ = checkpoint
    saved = io.BytesIO()
    torch.save({"x": torch.zeros(100 << 20)}, saved)
    with zipfile.ZipFile(saved) as archive:
        state = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    (folder / PICKLE_FILE).write_bytes(as_archive(state, deflated=bytes(400 << 20)))
    assert (folder / PICKLE_FILE).stat().st_size < 1 << 20
    with pytest.raises(UnsupportedAdapterError, match=r"adapter 'old'.*is refused.*limits: 26\d,\d{3},\d{3} bytes"):
        convert_pickle(folder, "old")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_config.json", PICKLE_FILE]


def test_what_takes_too_long_is_killed(checkpoint):
    """The process does not outlive its time."""
    folder, _ = checkpoint
    with pytest.raises(UnsupportedAdapterError, match=r"more than 0\.01 seconds, and its process was killed"):
        convert_pickle(folder, "old", max_seconds=0.01)
    assert not (folder / WEIGHTS_FILE).exists()


def test_only_a_file_is_converted(tmp_path, checkpoint, monkeypatch):
    """No pipe, nothing too large, nothing that is not there."""
    folder, _ = checkpoint
    monkeypatch.setattr(conversion, "MAX_WEIGHTS_BYTES", 10)
    with pytest.raises(InvalidAdapterError, match="allowed are 10"):
        convert_pickle(folder, "old")
    (folder / PICKLE_FILE).unlink()
    with pytest.raises(InvalidAdapterError, match=PICKLE_FILE):
        convert_pickle(folder, "old")
    os.mkfifo(folder / PICKLE_FILE)
    with pytest.raises(InvalidAdapterError, match="named pipe"):
        convert_pickle(folder, "old")
    with pytest.raises(InvalidAdapterError, match="adapter 'x'"):
        convert_pickle(tmp_path / "nowhere", "x")
