"""Several processes on one pool's folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import time

import pytest

from langchain_lora_retriever.errors import DuplicateAdapterError, PoolError, UnknownAdapterError
from langchain_lora_retriever.pool.folder import folder_lock
from langchain_lora_retriever.pool.pool import AdapterPool


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, make_checkpoint):
    """Two adapters that differ in configuration and in weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    return [make_checkpoint(root / str(i), seed=i, lora_alpha=8 * 10**i) for i in range(2)]


@pytest.fixture
def folder(tmp_path, checkpoints):
    """A pool with one adapter."""
    AdapterPool(tmp_path / "pool", create=True).add("x", checkpoints[0], samples=["sample 0"])
    return tmp_path / "pool"


def start(code, *arguments):
    """Run code in another process."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(processes):
    """Return once all of them have said that they are ready."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"


def test_the_second_add_of_a_name_is_refused(folder, checkpoints):
    """A pool that was loaded before another process added a name gets the error, and the first one's adapter stays."""
    late, first = AdapterPool(folder), AdapterPool(folder)
    first.add("new", checkpoints[0], samples=["of the first"])
    with pytest.raises(DuplicateAdapterError, match="another process"):
        late.add("new", checkpoints[1], samples=["of the second"])
    assert late.names == ("x",)
    assert AdapterPool(folder).fingerprint == first.fingerprint


def test_a_name_that_was_refused_and_is_good_by_now_is_taken(folder, checkpoints):
    """Replacing what was refused is allowed as long as nobody else has replaced it."""
    (folder / "new").mkdir()
    (folder / "new" / "adapter_config.json").write_text("{")
    with pytest.warns(UserWarning, match="new"):
        late, first = AdapterPool(folder), AdapterPool(folder)
    first.add("new", checkpoints[0])
    with pytest.raises(DuplicateAdapterError):
        late.add("new", checkpoints[1])


def test_a_folder_that_is_no_adapter_is_not_replaced(folder, checkpoints):
    """What else lies in a pool's folder stays there."""
    (folder / "notes").mkdir()
    (folder / "notes" / "precious.txt").write_text("x")
    with pytest.raises(DuplicateAdapterError, match="notes"):
        AdapterPool(folder).add("notes", checkpoints[0])
    assert (folder / "notes" / "precious.txt").is_file()


def test_update_builds_on_what_is_on_disk(folder, checkpoints):
    """What is not given stays as another process has left it; what it has removed is unknown."""
    late, first = AdapterPool(folder), AdapterPool(folder)
    adapter = first.update("x", checkpoints[1])
    late.update("x", samples=["mine"])
    assert late["x"].fingerprint == adapter.fingerprint
    first.remove("x")
    with pytest.raises(UnknownAdapterError, match="another process has removed it"):
        late.update("x", samples=["mine"])


def test_adapters_that_were_replaced_elsewhere_are_still_served(folder, checkpoints):
    """Who has loaded a version runs it on after another process has put a new one in its place."""
    pool = AdapterPool(folder)
    module = next(iter(pool["x"].weights))
    before = pool["x"].weights[module].lora_A.clone()
    AdapterPool(folder).update("x", checkpoints[1])
    assert (pool["x"].weights[module].lora_A == before).all()
    assert pool.update("x").fingerprint == AdapterPool(folder)["x"].fingerprint


@pytest.mark.slow
def test_of_processes_that_add_a_name_at_once_one_does(folder, checkpoints):
    """Three that add different adapters at the same moment: one succeeds, two are told, the folder is whole."""
    code = """
        import sys
        from langchain_lora_retriever import AdapterPool
        from langchain_lora_retriever.errors import DuplicateAdapterError
        pool = AdapterPool(sys.argv[1])
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            print(pool.add("new", sys.argv[2], samples=[sys.argv[3]]).fingerprint)
        except DuplicateAdapterError:
            print("duplicate")
    """
    processes = [start(code, folder, checkpoints[i % 2], f"sample {i}") for i in range(3)]
    wait_for(processes)
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outcomes.count("duplicate") == 2
    (fingerprint,) = set(outcomes) - {"duplicate"}
    assert AdapterPool(folder)["new"].fingerprint == fingerprint


@pytest.mark.slow
def test_readers_see_one_version_beside_a_writer(folder, checkpoints):
    """While another process replaces an adapter over and over, each load finds it, whole, of one version."""
    code = """
        import sys
        from langchain_lora_retriever import AdapterPool
        pool = AdapterPool(sys.argv[1])
        print("ready", flush=True)
        while True:
            for i in (1, 0):
                pool.update("x", sys.argv[2 + i], samples=[f"sample {i}"])
    """
    versions = {}
    for i, checkpoint in enumerate(checkpoints):
        pool = AdapterPool()
        versions[pool.add("x", checkpoint, samples=["a"]).fingerprint] = f"sample {i}"
    writer = start(code, folder, *checkpoints)
    try:
        wait_for([writer])
        seen, num_loads, deadline = set(), 0, time.monotonic() + 120
        while num_loads < 60 or len(seen) < 2:
            assert time.monotonic() < deadline, "the writer never came to write"
            num_loads += 1
            pool = AdapterPool(folder)
            assert pool.names == ("x",)
            adapter = pool["x"]
            assert pool.samples("x")[0].input == versions[adapter.fingerprint]
            assert len(dict(adapter.weights)) == 4
            seen.add(adapter.fingerprint)
    finally:
        writer.kill()
        writer.communicate()
    assert AdapterPool(folder).names == ("x",)  # also after a writer that was killed in the middle


def test_a_lock_that_is_held_for_ever_is_said(folder, checkpoints, monkeypatch):
    """A writer that never ends makes the next one give up, with the file to look at."""
    monkeypatch.setattr("langchain_lora_retriever.pool.folder._LOCK_SECONDS", 0.1)
    pool = AdapterPool(folder)
    with folder_lock(folder), pytest.raises(PoolError, match=r"\.lock is locked by another process"):
        pool.update("x", checkpoints[1])
    pool.update("x", checkpoints[1])


def test_a_pool_follows_its_folder(folder, checkpoints):
    """What another pool on it adds, changes and removes is found, and nothing is read where nothing has changed."""
    pool, other = AdapterPool(folder), AdapterPool(folder)
    assert not pool.refresh()
    kept = pool["x"]
    other.add("new", checkpoints[1], samples=["of the other"])
    assert pool.refresh()
    assert pool.state.changed_since(pool.version - 1) == {"new"}
    assert pool.names == ("new", "x")
    assert pool["x"] is kept
    assert not pool.refresh()
    version = pool.version
    other.update("new", samples=["others"])
    assert pool.refresh()
    assert [sample.input for sample in pool.samples("new")] == ["others"]
    other.update("new", checkpoints[0])
    assert pool.refresh()
    assert pool["new"].fingerprint == other["new"].fingerprint
    other.remove("new")
    assert pool.refresh()
    assert pool.names == ("x",)
    assert pool.version > version
    pool.add("own", checkpoints[1], samples=["its own"])
    assert not pool.refresh()  # it knows
    assert AdapterPool().refresh() is False


def test_a_copy_that_is_still_written_is_found_once_it_is_whole(folder, checkpoints):
    """It is refused at first, and the others stay."""
    pool = AdapterPool(folder)
    shutil.copytree(checkpoints[1], folder / "late")
    weights = folder / "late" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.warns(UserWarning, match="late"):
        pool.refresh()
    assert "late" in pool.rejected
    weights.write_bytes(whole)
    assert pool.refresh()
    assert pool.names == ("late", "x")


def test_a_lock_that_is_a_link_or_a_pipe_is_no_way_out(folder, checkpoints, tmp_path):
    """A stranger's `.lock` neither hangs a writer nor makes it write elsewhere."""
    pool = AdapterPool(folder)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / ".lock").unlink(missing_ok=True)
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(PoolError, match="cannot write"):
        pool.update("x", checkpoints[1])
    assert victim.read_text() == "precious"
    (folder / ".lock").unlink()
    shutil.rmtree(folder / ".lock", ignore_errors=True)
    (folder / ".lock").mkdir()
    with pytest.raises(PoolError):
        pool.update("x", checkpoints[1])
    assert AdapterPool(folder).names == ("x",)
