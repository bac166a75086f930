"""The pool: loading, changing, surviving crashes, refusing by name."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from langchain_lora_retriever.errors import (
    DuplicateAdapterError,
    InvalidAdapterError,
    InvalidSamplesError,
    PoolError,
    UnknownAdapterError,
    UnsupportedAdapterError,
)
from langchain_lora_retriever.pool import pool as pool_module
from langchain_lora_retriever.pool.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE
from langchain_lora_retriever.pool.folder import FingerprintCache
from langchain_lora_retriever.pool.pool import AdapterPool, PoolState, Sample
from langchain_lora_retriever.pool.regular_files import AdapterFolder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, make_checkpoint):
    """Three checkpoints, without samples."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(root / name, seed=i) for i, name in enumerate(["sql", "dates", "units"])}


@pytest.fixture
def folder(tmp_path, checkpoints):
    """A pool on disk of `sql` and `dates`."""
    root = tmp_path / "pool"
    for name in ("sql", "dates"):
        shutil.copytree(checkpoints[name], root / name)
        rows = [{"input": f"{name} question {i}", "output": "answer"} for i in range(3)]
        (root / name / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def adapters_in(folder):
    """What lies in a pool's folder, but for the lock of those who have written."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def known_fingerprint(folder, name):
    """What the cache beside a pool says of an adapter."""
    with AdapterFolder(folder / name) as opened:
        return FingerprintCache(folder).get(opened)


def test_loads_a_folder(folder):
    """Every checkpoint of the folder is there, with its samples, by the folder's name."""
    pool = AdapterPool(folder)
    assert pool.names == ("dates", "sql") == tuple(pool)
    assert len(pool) == 2
    assert "sql" in pool
    assert pool["sql"].path == folder / "sql"
    assert pool.samples("sql")[1] == Sample("sql question 1", "answer")
    assert pool.embedding("sql") is None
    assert not pool.rejected


def test_a_bad_adapter_is_refused_and_the_rest_loads(folder, checkpoints):
    """A bad adapter is named in one warning and in `rejected`; the others load."""
    shutil.copytree(checkpoints["units"], folder / "units")
    config = json.loads((folder / "units" / CONFIG_FILE).read_text())
    (folder / "units" / CONFIG_FILE).write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    with pytest.warns(UserWarning, match="adapter 'units'") as warned:
        pool = AdapterPool(folder)
    assert len([w for w in warned if w.category is UserWarning]) == 1
    assert pool.names == ("dates", "sql")
    assert isinstance(pool.rejected["units"], UnsupportedAdapterError)
    with pytest.raises(UnknownAdapterError, match=r"was refused.*modules_to_save"):
        pool["units"]
    pool.remove("units")
    assert not pool.rejected
    assert not (folder / "units").exists()


def test_a_refused_adapter_holds_no_file(folder, checkpoints):
    """The error that says why is kept, and not the frames that it came from."""
    for name in ("one", "two", "three"):
        copied = shutil.copytree(checkpoints["sql"], folder / name)
        tensors = load_file(copied / "adapter_model.safetensors")
        save_file({key: tensor * torch.nan for key, tensor in tensors.items()}, copied / "adapter_model.safetensors")
    pool = AdapterPool(folder)
    assert set(pool.rejected) == {"one", "two", "three"}
    for error in pool.rejected.values():
        chain = [error]
        for one in chain:
            assert one.__traceback__ is None
            chain += [other for other in (one.__cause__, one.__context__) if other is not None and other not in chain]


def test_another_process_s_new_outputs_are_read(folder):
    """Of samples whose inputs stay, and of tasks': what a router weighs answers by."""
    reader, writer = AdapterPool(folder), AdapterPool(folder)
    before = reader.fingerprint
    samples = [{"input": sample.input, "output": f"new {i}"} for i, sample in enumerate(reader.samples("sql"))]
    adapter = reader["sql"]
    writer.update("sql", samples=samples)
    assert reader.refresh()
    assert [sample.output for sample in reader.samples("sql")] == [sample["output"] for sample in samples]
    assert reader["sql"].weights is adapter.weights
    assert reader.fingerprint == AdapterPool(folder).fingerprint != before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_has_a_lock_of_its_own(folder, monkeypatch):
    """The parent's was held by a thread that the child does not have."""
    pool = AdapterPool(folder)
    inside, go = threading.Event(), threading.Event()
    read_entry = pool_module.read_entry

    def read_late(*args, **options):
        inside.set()
        assert go.wait(30)
        return read_entry(*args, **options)

    monkeypatch.setattr(pool_module, "read_entry", read_late)
    shutil.copytree(folder / "sql", folder / "more")
    thread = threading.Thread(target=pool.refresh)
    thread.start()
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(pool_module, "read_entry", read_entry)
            signal.alarm(20)
            pool.refresh()
            os._exit(0)
        finally:
            os._exit(1)
    go.set()
    thread.join(30)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"plain text", "line 1"),
        (b'{"input": "a"}\n["b"]', "line 2"),
        (b'{"input": "a"}\n\n{"output": "b"}', "line 3"),
        (b'{"input": 7}', "input=7"),
        (b'{"input": "a", "output": 7}', "output=7"),
        (b'{"input": "  "}', "blank"),
        (rb'{"input": "\ud800 abc"}', "surrogate"),
        (rb'{"input": "a", "output": "b \udfff"}', "surrogate"),
        (b"", "empty"),
        (b"\xff\xfe", "cannot read"),
    ],
)
def test_bad_samples_are_refused_by_line(folder, content, named):
    """A samples file that is not JSON lines of inputs refuses its adapter, and names the line."""
    (folder / "sql" / "samples.jsonl").write_bytes(content)
    with pytest.warns(UserWarning, match="adapter 'sql'"):
        pool = AdapterPool(folder)
    assert pool.names == ("dates",)
    assert isinstance(pool.rejected["sql"], InvalidSamplesError)
    assert named in str(pool.rejected["sql"])


def test_an_adapter_without_samples_is_there(folder, checkpoints, caplog):
    """A checkpoint as PEFT writes it is loaded and named in the log; `update` describes it."""
    (folder / "sql" / "samples.jsonl").unlink()
    pool = AdapterPool(folder)
    assert pool.names == ("dates", "sql")
    assert not pool.rejected
    assert "'sql' has neither samples nor an embedding" in caplog.text
    assert set(pool.undescribed) == {"sql"}
    assert "pool.update('sql', samples=[...])" in pool.undescribed["sql"]
    pool.add("units", checkpoints["units"])
    pool.update("sql", samples=["a question"])
    again = AdapterPool(folder)
    assert set(again.undescribed) == set(pool.undescribed) == {"units"}
    assert not again.state["units"].is_described


def test_many_adapters_without_samples_are_one_line(folder, caplog):
    """The log names the first of them and counts the rest; at INFO it says what was read."""
    caplog.set_level("INFO")
    for index in range(12):
        shutil.copytree(folder / "sql", folder / f"plain{index:02}")
        (folder / f"plain{index:02}" / "samples.jsonl").unlink()
    AdapterPool(folder)
    told, warned = (record.getMessage() for record in caplog.records)
    assert "14 adapters read in" in told
    assert "12 of them undescribed; 0 refused" in told
    assert "12 adapters have neither samples nor an embedding" in warned
    assert "plain09 and 2 more." in warned


def test_samples_may_hold_line_separators(folder):
    """Only line feeds end a line; Unicode's other separators belong to the text."""
    (folder / "sql" / "samples.jsonl").write_text('{"input": "a\u2028b\x85c"}\r\n', encoding="utf-8")
    assert AdapterPool(folder).samples("sql") == (Sample("a\u2028b\x85c"),)


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "unrelated"])
def test_no_pool_there(tmp_path, kind):
    """A path that is missing, no folder, or holds no adapter is a PoolError that says so."""
    path = tmp_path / "pool"
    if kind == "file":
        path.write_text("x")
    if kind in {"empty", "unrelated"}:
        path.mkdir()
    if kind == "unrelated":
        (path / "__pycache__").mkdir()
        (path / "README.md").write_text("x")
    with pytest.raises(PoolError, match=str(path)):
        AdapterPool(path)


def test_no_usable_adapter(folder):
    """A pool whose every adapter is refused is a PoolError that gives the reasons."""
    with (
        pytest.warns(UserWarning, match="refused"),
        pytest.raises(PoolError, match=r"2 were refused:\n.*org/tiny-llama"),
    ):
        AdapterPool(folder, base_model="org/other")


def test_an_adapter_is_no_pool(checkpoints):
    """Passing one adapter's folder says to pass its parent."""
    with pytest.raises(PoolError, match="is one adapter, not a pool"):
        AdapterPool(checkpoints["sql"])


def test_add_is_persistent(folder, checkpoints):
    """An added adapter is copied into the folder and is there at the next start."""
    pool = AdapterPool(folder)
    version = pool.version
    adapter = pool.add("units", checkpoints["units"], samples=["3 km in miles", {"input": "2 lb", "output": "0.9 kg"}])
    assert pool.version > version
    assert adapter.path == folder / "units"
    again = AdapterPool(folder)
    assert again.names == ("dates", "sql", "units")
    assert again.samples("units") == (Sample("3 km in miles"), Sample("2 lb", "0.9 kg"))
    assert again.fingerprint == pool.fingerprint
    assert adapters_in(folder) == ["dates", "sql", "units"]


def test_create_starts_a_pool(tmp_path, checkpoints):
    """`create` makes the folder, and allows it to be empty until the first add."""
    pool = AdapterPool(tmp_path / "a" / "pool", create=True)
    assert len(pool) == 0
    pool.add("sql", checkpoints["sql"], embedding=[3.0, 4.0], encoder="org/encoder")
    again = AdapterPool(tmp_path / "a" / "pool")
    assert np.allclose(again.embedding("sql"), [0.6, 0.8])
    assert again.state["sql"].encoder == "org/encoder"
    assert again.samples("sql") == ()


def test_memory_pool_references_its_checkpoints(checkpoints):
    """A pool in memory may be empty, and reads adapters where they lie."""
    pool = AdapterPool()
    assert pool.names == ()
    assert pool.add("x", checkpoints["sql"], samples=["a"]).path == checkpoints["sql"]


def test_duplicate_names(folder, checkpoints):
    """A name that is taken is refused, and the one that has it stays."""
    pool = AdapterPool(folder)
    before = pool.fingerprint
    with pytest.raises(DuplicateAdapterError, match="'sql'"):
        pool.add("sql", checkpoints["units"], samples=["a"])
    assert pool.fingerprint == before


@pytest.mark.parametrize("name", ["", " ", ".hidden", "a/b", "a\\b", "..", "a\0b", "a\nb", "x" * 300, 7, None])
def test_bad_names(checkpoints, name):
    """A name that cannot name a folder is refused."""
    with pytest.raises(InvalidAdapterError, match="adapter name"):
        AdapterPool().add(name, checkpoints["sql"], samples=["a"])


@pytest.mark.parametrize(
    "given",
    [
        {"samples": []},
        {"samples": "one string"},
        {"samples": [""]},
        {"samples": [3]},
        {"samples": [{"text": "a"}]},
        {"samples": ["half a pair: \ud800"]},
        {"samples": [{"input": "a", "output": "\udfff"}]},
        {"samples": ["a" * 100_001]},
        {"samples": itertools.repeat("for ever")},
        {"samples": 5},
        {"embedding": []},
        {"embedding": [[1.0]]},
        {"embedding": [0.0, 0.0]},
        {"embedding": [float("nan")]},
        {"embedding": ["a"]},
        {"embedding": [10**400]},
        {"embedding": np.ones(300_000)},
    ],
)
def test_bad_routing_leaves_the_pool_alone(folder, checkpoints, given):
    """Samples or an embedding that cannot be used are refused, and nothing is written."""
    pool = AdapterPool(folder)
    with pytest.raises(InvalidSamplesError, match="adapter 'units'"):
        pool.add("units", checkpoints["units"], **given)
    assert pool.names == ("dates", "sql")
    assert adapters_in(folder) == ["dates", "sql"]


def test_unknown_names_are_answered_with_near_ones(folder):
    """An unknown name says what was probably meant."""
    pool = AdapterPool(folder)
    for meant in ("date", "DATES", "dates_and_times", "dat"):
        with pytest.raises(UnknownAdapterError, match=r"Near names: 'dates'\.$"):
            pool[meant]
    with pytest.raises(UnknownAdapterError, match=r"It has 'dates', 'sql'\.$"):
        pool["weather"]
    for call in (pool.samples, pool.embedding, pool.remove, pool.update):
        with pytest.raises(UnknownAdapterError):
            call("nothing")


def test_remove_deletes_the_folder_and_spares_its_users(folder):
    """After removal the adapter is gone from memory and disk; whoever holds it still has its weights."""
    pool = AdapterPool(folder)
    held = pool["sql"]
    module = next(iter(held.weights))
    before = held.weights[module].lora_A.clone()
    pool.remove("sql")
    assert pool.names == ("dates",) == AdapterPool(folder).names
    assert not (folder / "sql").exists()
    assert torch.equal(held.weights[module].lora_A, before)


def test_update_replaces_weights_and_keeps_samples(folder, checkpoints):
    """New weights under an old name change the fingerprint; samples not given stay."""
    pool = AdapterPool(folder)
    old, samples, version = pool["sql"], pool.samples("sql"), pool.version
    new = pool.update("sql", checkpoints["units"])
    assert new.fingerprint != old.fingerprint
    assert pool.samples("sql") == samples
    assert pool.version > version
    assert AdapterPool(folder).fingerprint == pool.fingerprint


def test_update_samples_and_embedding(folder):
    """New samples drop the old embedding; a new embedding keeps the samples; the weights stay."""
    pool = AdapterPool(folder)
    fingerprint = pool["sql"].fingerprint
    pool.update("sql", embedding=[1.0, 0.0])
    assert pool.embedding("sql") is not None
    assert len(pool.samples("sql")) == 3
    pool.update("sql", samples=["new"])
    assert pool.embedding("sql") is None
    assert AdapterPool(folder).samples("sql") == (Sample("new"),)
    assert pool["sql"].fingerprint == fingerprint


def test_update_reads_again(folder, checkpoints):
    """Without arguments the adapter's folder is read again."""
    pool = AdapterPool(folder)
    before = pool["sql"].fingerprint
    aside = folder / "sql" / "new"
    shutil.copyfile(checkpoints["units"] / WEIGHTS_FILE, aside)
    aside.replace(folder / "sql" / WEIGHTS_FILE)
    assert pool.update("sql").fingerprint != before


def test_a_failed_update_changes_nothing(folder, checkpoints, tmp_path):
    """If the new checkpoint is bad the old one stays, in memory and on disk."""
    bad = shutil.copytree(checkpoints["units"], tmp_path / "bad")
    (bad / WEIGHTS_FILE).write_bytes(b"broken")
    pool = AdapterPool(folder)
    before = pool.fingerprint
    with pytest.raises(InvalidAdapterError):
        pool.update("sql", bad)
    assert pool.fingerprint == before == AdapterPool(folder).fingerprint


def test_add_may_replace_a_refused_one(folder, checkpoints):
    """A name whose adapter was refused is free."""
    (folder / "sql" / WEIGHTS_FILE).write_bytes(b"broken")
    with pytest.warns(UserWarning, match="corrupt"):
        pool = AdapterPool(folder)
    pool.add("sql", checkpoints["sql"], samples=["a"])
    assert not pool.rejected
    assert AdapterPool(folder).names == ("dates", "sql")


def test_recovers_from_crashes(folder):
    """A half-written folder is deleted; one that was on its way out with nothing in its place is put back."""
    shutil.copytree(folder / "sql", folder / ".incoming-new")
    (folder / ".incoming-new" / WEIGHTS_FILE).write_bytes(b"half")
    (folder / "dates").rename(folder / ".replaced-dates")
    shutil.copytree(folder / "sql", folder / ".replaced-sql")
    assert AdapterPool(folder).names == ("dates", "sql")
    assert adapters_in(folder) == ["dates", "sql"]


def test_a_crash_while_writing_is_undone(folder, checkpoints, monkeypatch):
    """If renaming the new folder into place fails, the old one is back."""
    pool = AdapterPool(folder)
    before = pool.fingerprint
    real = Path.rename

    def failing(self, target):
        if self.name.startswith(".incoming-"):
            raise OSError("disk gone")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PoolError, match="disk gone"):
        pool.update("sql", checkpoints["units"])
    monkeypatch.undo()
    assert pool.fingerprint == before == AdapterPool(folder).fingerprint


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (["x" * 99_000] * 200, r"^adapter '(sql|units)' has samples of more than 16,777,216 bytes in all"),
        (["fine", {"input": "\1" * 99_000, "output": "\1" * 99_000}], r"^adapter '(sql|units)': sample 1 has 1,188,"),
    ],
    ids=["all", "one"],
)
def test_samples_that_could_not_be_read_again_are_refused_at_once(folder, checkpoints, samples, said):
    """By the adapter's name, and in memory as on disk."""
    for pool in (AdapterPool(folder), AdapterPool()):
        with pytest.raises(InvalidSamplesError, match=said):
            pool.add("units", checkpoints["units"], samples=samples)
        assert "units" not in pool
    with pytest.raises(InvalidSamplesError, match=said):
        AdapterPool(folder).update("sql", samples=samples)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_an_embedding_has_one_limit_in_memory_and_on_disk(folder, checkpoints, dtype):
    """What is given and what lies beside weights, in floats or doubles: as many numbers, and one error beyond."""
    largest, larger = (np.ones(num, dtype) for num in (262_144, 262_145))
    for pool in (AdapterPool(), AdapterPool(folder)):
        pool.add("units", checkpoints["units"], embedding=largest)
        with pytest.raises(InvalidSamplesError, match=r"up to 262,144 numbers\.$"):
            pool.update("units", embedding=larger)
        assert pool.embedding("units").shape == (262_144,)
    np.save(folder / "sql" / "embedding.npy", largest)
    assert AdapterPool(folder).embedding("sql").shape == (262_144,)
    np.save(folder / "sql" / "embedding.npy", larger)
    with pytest.warns(UserWarning, match=r"'sql': the embedding has shape .* up to 262,144 numbers"):
        assert list(AdapterPool(folder).rejected) == ["sql"]


@pytest.mark.parametrize("given", [{}, {"samples": ["3 km in miles"]}], ids=["alone", "samples"])
def test_an_encoder_without_an_embedding_is_refused(folder, checkpoints, given):
    """It names what made the embedding; samples are embedded by a retriever's, whatever is said here."""
    pool = AdapterPool(folder)
    before = pool.fingerprint
    for call in (
        lambda: pool.add("units", checkpoints["units"], encoder="e", **given),
        lambda: pool.update("sql", encoder="e", **given),
    ):
        with pytest.raises(InvalidSamplesError, match=r"adapter '(units|sql)': encoder='e' .*Pass embedding="):
            call()
    assert pool.fingerprint == before


def test_save_and_load(folder, tmp_path):
    """A saved pool loads as the same; an existing folder is not overwritten."""
    pool = AdapterPool(folder)
    pool.update("dates", embedding=[1.0, 2.0], encoder="e")
    pool.save(tmp_path / "copy")
    assert AdapterPool(tmp_path / "copy").fingerprint == pool.fingerprint
    with pytest.raises(PoolError, match="not an empty folder"):
        pool.save(tmp_path / "copy")
    pool.save(folder)
    assert AdapterPool(folder).fingerprint == pool.fingerprint


def test_fingerprint_is_of_all_contents(checkpoints):
    """Equal contents have equal fingerprints whatever the order of adding; names, samples, embeddings count."""

    def build(*names, **routing):
        pool = AdapterPool()
        for name in names:
            pool.add(name, checkpoints[name], **(routing or {"samples": ["a"]}))
        return pool.fingerprint

    assert build("sql", "dates") == build("dates", "sql")
    assert len({build("sql"), build("dates"), build("sql", samples=["b"]), build("sql", embedding=[1.0])}) == 4


def test_readers_keep_their_snapshot(folder):
    """A state taken before a change is not touched by it."""
    pool = AdapterPool(folder)
    state = pool.state
    pool.remove("sql")
    assert state.names == ("dates", "sql")
    assert state["sql"].adapter.name == "sql"


def test_changes_are_told_whole_or_not_at_all():
    """Who followed a state is told every name that changed since, or that there were too many."""
    first = PoolState(0, {}, {}).changed("a")
    assert first.changed_since(0) == {"a"}
    many = first.changed(*map(str, range(2000)))
    assert many.changed_since(1) is None
    assert many.changed_since(2) == frozenset()
    later = many.changed("b", "c")
    assert later.changed_since(2) == {"b", "c"}
    assert later.changed_since(1) is None


def test_many_threads(checkpoints):
    """Readers beside a writer always see whole states."""
    pool = AdapterPool()
    pool.add("sql", checkpoints["sql"], samples=["a"])
    stop, errors = threading.Event(), []

    def read():
        while not stop.is_set():
            time.sleep(0.001)
            state = pool.state
            try:
                assert [state[name].adapter.name for name in state.names] == list(state.names)
                assert state.fingerprint
            except Exception as error:  # noqa: BLE001
                errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        pool.add("dates", checkpoints["dates"], samples=["b"])
        pool.remove("dates")
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.fixture
def big_pool(folder, monkeypatch):
    """A pool whose fingerprints are kept, of files that were written a while ago."""
    monkeypatch.setattr("langchain_lora_retriever.pool.folder._CACHE_ABOVE_BYTES", 1)
    monkeypatch.setattr("langchain_lora_retriever.pool.regular_files._SETTLED_NS", -(10**9))
    return folder


def test_known_fingerprints_spare_hashing(big_pool):
    """A big pool remembers fingerprints of unchanged files; a changed file is hashed again."""
    first = AdapterPool(big_pool)
    assert known_fingerprint(big_pool, "sql") == first["sql"].fingerprint
    (big_pool / "sql" / WEIGHTS_FILE).write_bytes((big_pool / "sql" / WEIGHTS_FILE).read_bytes())
    assert known_fingerprint(big_pool, "sql") is None
    assert known_fingerprint(big_pool, "dates") == first["dates"].fingerprint
    assert AdapterPool(big_pool).fingerprint == first.fingerprint


def test_a_full_disk_keeps_no_half_of_the_fingerprints(big_pool, monkeypatch):
    """The pool is read all the same, and nothing is left beside it."""

    def write(_, stream):
        stream.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("langchain_lora_retriever.pool.folder.json.dump", write)
    assert len(AdapterPool(big_pool)) == 2
    assert not [path for path in big_pool.iterdir() if path.name.startswith(".fingerprints")]


def test_files_written_a_moment_ago_are_not_remembered(folder, monkeypatch):
    """They might be written to again without another time."""
    monkeypatch.setattr("langchain_lora_retriever.pool.folder._CACHE_ABOVE_BYTES", 1)
    AdapterPool(folder)
    assert known_fingerprint(folder, "sql") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 100_000, b"[]", b'{"sql": 5}', b'{"sql": []}', b'{"sql": [5]}', b'{"sql": {"a": 1}}', b"\xff", None],
)
def test_known_fingerprints_that_are_none_are_made_again(big_pool, content):
    """Whatever lies in place of the cache, adapters are read and it is replaced."""
    first = AdapterPool(big_pool).fingerprint
    cache = big_pool / ".fingerprints.json"
    cache.unlink()
    if content is None:
        os.mkfifo(cache)
    else:
        cache.write_bytes(content)
    assert AdapterPool(big_pool).fingerprint == first
    assert known_fingerprint(big_pool, "sql") is not None


def test_a_cache_that_others_may_write_is_not_believed(big_pool):
    """Only the owner's word for a file's content spares looking at it."""
    first = AdapterPool(big_pool)
    cache = big_pool / ".fingerprints.json"
    known = json.loads(cache.read_text())
    known["sql"][0] = "f" * 64
    cache.write_text(json.dumps(known))
    cache.chmod(0o666)
    assert AdapterPool(big_pool)["sql"].fingerprint == first["sql"].fingerprint


def test_small_pools_are_left_clean(folder):
    """Loading a small pool writes nothing into it."""
    before = sorted(folder.rglob("*"))
    AdapterPool(folder)
    assert sorted(folder.rglob("*")) == before


def test_embedding_file_that_is_no_array(folder):
    """A stored embedding that cannot be read refuses its adapter by name."""
    (folder / "sql" / "embedding.npy").write_bytes(b"no array")
    with pytest.warns(UserWarning, match=r"adapter 'sql'.*embedding\.npy"):
        assert AdapterPool(folder).names == ("dates",)


def big_file(size):
    """A change that makes a file as large as it can be without taking disk."""

    def change(file):
        file.touch()
        os.truncate(file, size)

    return change


def content(data):
    """A change that replaces a file's content."""
    return lambda file: file.write_bytes(data)


def in_its_place(make):
    """A change that puts something else in a file's place."""

    def change(file):
        file.unlink(missing_ok=True)
        make(file)

    return change


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, "samples.jsonl", "embedding.npy"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (big_file(1 << 40), "1,099,511,627,776 bytes"),
        (in_its_place(os.mkfifo), "named pipe"),
        (in_its_place(Path.mkdir), "folder"),
        (in_its_place(lambda file: file.symlink_to("/dev/zero")), "device"),
        (in_its_place(lambda file: file.symlink_to("nowhere")), "link to what is not there"),
        (in_its_place(lambda file: file.symlink_to(file)), "symbolic link"),
    ],
    ids=["huge", "pipe", "folder", "device", "dangling", "loop"],
)
def test_files_that_are_none_are_refused_by_name(folder, name, change, named):
    """Every file must be a regular one of bounded size; the others are loaded at once."""
    change(folder / "sql" / name)
    start = time.perf_counter()
    with pytest.warns(UserWarning, match="refused: adapter 'sql'"):
        pool = AdapterPool(folder)
    assert time.perf_counter() - start < 10
    assert pool.names == ("dates",)
    assert named in str(pool.rejected["sql"])


def test_links_to_files_are_followed(folder, tmp_path):
    """As the hub's cache has them."""
    before = AdapterPool(folder).fingerprint
    for name in (CONFIG_FILE, WEIGHTS_FILE, "samples.jsonl"):
        (folder / "sql" / name).rename(tmp_path / name)
        (folder / "sql" / name).symlink_to(tmp_path / name)
    (folder / "dates").rename(tmp_path / "dates")
    (folder / "dates").symlink_to(tmp_path / "dates")
    pool = AdapterPool(folder)
    assert pool.fingerprint == before
    pool.remove("dates")
    assert (tmp_path / "dates" / CONFIG_FILE).is_file()
    assert adapters_in(folder) == ["sql"]


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("samples.jsonl", b"\n" * 20_001, "20,000 lines"),
        ("samples.jsonl", b'{"input": "a"}\n' * 10_001, "10,000 samples"),
        ("samples.jsonl", b'{"input": "' + b"a" * 2_000_000 + b'"}', "1,048,576"),
        ("samples.jsonl", b'{"input": "' + b"a" * 100_001 + b'"}', "100,000"),
        ("samples.jsonl", b'{"input": "a", "x": [' + b"[]," * 200_001 + b"[]]}", "200,000 lists"),
        ("samples.jsonl", b"[" * 200_000, "recursion"),
        ("samples.jsonl", b'{"input": ' + b"[" * 50_000, "nested|recursion"),
        ("samples.jsonl", b'{"input": "\\ud800 abc"}', "half a surrogate pair"),
        ("samples.jsonl", b'{"input": "a", "output": "\\udfff"}', "half a surrogate pair"),
        ("samples.jsonl", b'{"input": ' + b"9" * 5000 + b"}", "4300"),
        (CONFIG_FILE, b'{"x": [' + b"[]," * 10_000 + b"[]]}", "10,000 lists"),
        (CONFIG_FILE, b"[" * 9000, "recursion"),
        (CONFIG_FILE, b'{"r": ' + b"9" * 5000 + b"}", "4300"),
        (WEIGHTS_FILE, (1 << 62).to_bytes(8, "little") + b"{}", "header's length"),
        (WEIGHTS_FILE, (9000).to_bytes(8, "little") + b"[" * 9000, "recursion"),
        ("embedding.npy", b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16, "cannot read"),
    ],
)
def test_what_parsers_make_of_bytes_is_a_refusal(folder, name, data, named):
    """Whatever a parser raises, the message names adapter and cause."""
    content(data)(folder / "sql" / name)
    with pytest.warns(UserWarning, match="refused: adapter 'sql'"):
        pool = AdapterPool(folder)
    assert pool.names == ("dates",)
    assert re.search(named, str(pool.rejected["sql"]))


def test_texts_full_of_brackets_are_samples(folder):
    """What bounds the nesting of JSON does not count against texts of usual length."""
    (folder / "sql" / "samples.jsonl").write_text(json.dumps({"input": "[{" * 40_000}))
    assert AdapterPool(folder).samples("sql")[0].input.startswith("[{[{")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", os.fsdecode(b"\xff\xfe")])
def test_folders_whose_names_cannot_be_printed_are_refused(folder, name, caplog):
    """Their names reach no terminal, and no hash that is made of Unicode."""
    (folder / "sql").rename(folder / name)
    with pytest.warns(UserWarning, match="cannot be printed"):
        pool = AdapterPool(folder)
    assert list(pool.rejected) == [name]
    assert pool.fingerprint
    assert caplog.text.isascii()


def test_a_link_to_nowhere_hides_no_change(folder, checkpoints):
    """Such as an editor's lock beside a samples.jsonl: what another process changes is seen all the same."""
    (folder / "sql" / ".#samples.jsonl").symlink_to("somebody@somewhere.1234")
    pool = AdapterPool(folder)
    assert not pool.refresh()
    AdapterPool(folder).add("units", checkpoints["units"])
    assert pool.refresh()
    assert "units" in pool
    assert not pool.refresh()


def test_a_folder_that_cannot_be_looked_at_is_read_again(folder, checkpoints, monkeypatch):
    """Where the system does not tell what files are like, a change is found by reading them."""
    monkeypatch.setattr("langchain_lora_retriever.pool.pool.look", lambda _: None)
    pool = AdapterPool(folder)
    AdapterPool(folder).add("units", checkpoints["units"])
    assert pool.refresh()
    assert "units" in pool


def test_odd_leftovers_are_cleared(folder, tmp_path):
    """Whatever has a leftover's name is deleted, links without what they lead to."""
    (tmp_path / "precious").write_text("x")
    for name in (".incoming-", ".replaced-", ".replaced-.", ".replaced-..", ".incoming-x"):
        (folder / name).mkdir()
    for name in (".incoming-a", ".replaced-sql"):
        (folder / name).symlink_to(tmp_path)
    assert AdapterPool(folder).names == ("dates", "sql")
    assert adapters_in(folder) == ["dates", "sql"]
    assert (tmp_path / "precious").is_file()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda pool, _: AdapterPool(5), PoolError),
        (lambda pool, _: AdapterPool("a\0b"), PoolError),
        (lambda pool, _: AdapterPool("a\0b", create=True), PoolError),
        (lambda pool, _: AdapterPool(base_model=5), PoolError),
        (lambda pool, _: AdapterPool.unread(5), PoolError),
        (lambda pool, _: AdapterPool.unread(None), PoolError),
        (lambda pool, _: AdapterPool.unread("x" * 300), PoolError),
        (lambda pool, _: pool[["sql"]], UnknownAdapterError),
        (lambda pool, _: pool["x" * 10_000_000], UnknownAdapterError),
        (lambda pool, _: pool.remove(["sql"]), UnknownAdapterError),
        (lambda pool, _: pool.save(5), PoolError),
        (lambda pool, _: pool.save("a\0b"), PoolError),
        (lambda pool, _: pool.save("."), PoolError),
        (lambda pool, _: pool.save("x" * 300), PoolError),
        (lambda pool, _: pool.add("x", 5), InvalidAdapterError),
        (lambda pool, _: pool.add("x", "a\0b"), InvalidAdapterError),
        (lambda pool, path: pool.add("\ud800", path), InvalidAdapterError),
        (lambda pool, path: pool.add(["x"], path), InvalidAdapterError),
        (lambda pool, path: pool.add("x", path, embedding=[1.0], encoder=object()), InvalidSamplesError),
        (lambda pool, path: pool.update("sql", 5), InvalidAdapterError),
    ],
    ids=range(20),
)
def test_odd_arguments_are_documented_errors(folder, checkpoints, call, error):
    """No argument brings out a bare TypeError or ValueError."""
    with pytest.raises(error) as caught:
        call(AdapterPool(folder), checkpoints["units"])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("repositories", "said"),
    [
        (["user/sql@v1", "user/sql@v2"], "'user/sql@v1' and 'user/sql@v2', which would both be named 'user--sql'"),
        ([["user/sql"]], "strings"),
        ({"sql": 5}, "strings"),
    ],
    ids=str,
)
def test_repositories_that_cannot_be_named_are_refused(repositories, said):
    """None of two is left out without a word."""
    with pytest.raises(PoolError, match=said):
        AdapterPool.from_hub(repositories)


@pytest.mark.parametrize("path", ["nowhere", "a/b/nowhere", __file__])
def test_a_checkpoint_that_is_not_there_is_told_in_words(path):
    """With what to pass, not that it be copied again."""
    with pytest.raises(InvalidAdapterError, match=r"Pass a folder that is there.* user/repo"):
        AdapterPool().add("x", path)


def test_refusals_are_logged(folder, caplog):
    """A server's log has them, whatever becomes of warnings."""
    (folder / "sql" / WEIGHTS_FILE).write_bytes(b"broken")
    with pytest.warns(UserWarning, match="corrupt"):
        AdapterPool(folder)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "refused: adapter 'sql'" in caplog.text


def test_saving_an_adapter_whose_file_was_changed_is_refused(folder, tmp_path):
    """A copy is what was read, or none."""
    pool = AdapterPool(folder)
    data = (folder / "sql" / WEIGHTS_FILE).read_bytes()
    (folder / "sql" / WEIGHTS_FILE).write_bytes(data[:-4] + b"\1\2\3\4")
    with pytest.raises(InvalidAdapterError, match=r"'sql'.*changed"):
        pool.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("make", [AdapterPool, AdapterPool.unread])
@pytest.mark.parametrize("path", ["a\udfff", "a\0b", "nowhere"])
def test_a_folder_that_cannot_be_is_told_in_words(make, path):
    """Words that can be printed: what wraps them (pydantic does) must be able to encode them."""
    with pytest.raises(PoolError) as info:
        make(path)
    str(info.value).encode()
