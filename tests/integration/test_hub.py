"""Adapters from a hub on loopback, and from its cache with the hub off limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import pytest
from hub_server import HubServer, Repository, files_of

from langchain_lora_retriever import AdapterPool
from langchain_lora_retriever.errors import (
    AdapterError,
    DuplicateAdapterError,
    HubError,
    InvalidAdapterError,
    InvalidRequestError,
    InvalidSamplesError,
    PoolError,
    UnsupportedAdapterError,
)
from langchain_lora_retriever.pool.hub import Hub
from langchain_lora_retriever.pool.samples import Sample
from makers import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CARD = b"---\ntags: [sql]\nwidget:\n- text: How many users are there?\n---\n# Queries\n\nIt writes queries.\n"
PROSE = b"---\ntags: [lora, sql]\n---\n# Queries\n\nIt writes queries for people.\n"
SAMPLES = b'{"input": "How many cats are there?", "output": "3"}\n'


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """The files of two adapters, without a card."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = [files_of(make_checkpoint(root / str(seed), seed=seed)) for seed in range(2)]
    return [{name: data for name, data in files.items() if name != "README.md"} for files in found]


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A hub without repositories."""
    with HubServer().running() as server:
        yield server


@pytest.fixture
def hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """How it is reached, with a cache of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return Hub(endpoint=server.endpoint, token=False, cache_dir=tmp_path / "cache")


def test_an_adapter_is_fetched_pinned_and_recorded(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """Its own files and no others; the commit is recorded, and is there when the pool is loaded again."""
    commit = server.push("user/sql", {**checkpoints[0], "samples.jsonl": SAMPLES, "model.py": b"raise SystemExit"})
    pool = AdapterPool(tmp_path / "pool", create=True)
    adapter = pool.add("sql", "user/sql", hub=hub)
    assert pool.samples("sql") == (Sample("How many cats are there?", "3"),)
    for entry in (pool.state["sql"], AdapterPool(tmp_path / "pool").state["sql"]):
        assert entry.adapter.fingerprint == adapter.fingerprint
        assert (entry.hub.repo_id, entry.hub.revision, entry.hub.commit) == ("user/sql", "main", commit)
        assert entry.described_by == "samples"
    assert not any("model.py" in path for path in server.paths)
    assert all(f"/resolve/{commit}/" in path for path in server.paths if "/resolve/" in path)


def test_a_revision_is_a_branch_a_tag_or_a_commit(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]]
) -> None:
    """Each gives its own; an update takes what a branch has become, and only when it is asked for."""
    first = server.push("user/sql", {**checkpoints[0], "samples.jsonl": SAMPLES})
    server.models["user/sql"].refs["v1"] = first
    second = server.push("user/sql", checkpoints[1])
    pool = AdapterPool()
    fingerprints = [
        pool.add(f"a{i}", "user/sql", revision=revision, hub=hub).fingerprint
        for i, revision in enumerate([None, "main", "v1", first, second])
    ]
    assert fingerprints[0] == fingerprints[1] == fingerprints[4]
    assert fingerprints[2] == fingerprints[3] != fingerprints[0]
    assert pool.state["a2"].hub.commit == first
    server.models["user/sql"].refs["v1"] = second
    assert pool.update("a2").fingerprint == fingerprints[2]
    assert pool.update("a2", "user/sql", revision="v1", hub=hub).fingerprint == fingerprints[0]
    assert pool.state["a2"].hub.commit == second
    assert pool.samples("a2") == (Sample("How many cats are there?", "3"),)


REPRESENTATIONS: dict[str, tuple[dict[str, bytes], str | None, tuple[str, ...]]] = {
    "samples": ({"samples.jsonl": SAMPLES, "README.md": CARD}, "samples", ("How many cats are there?",)),
    "examples": ({"README.md": CARD}, "card examples", ("How many users are there?",)),
    "prose": ({"README.md": PROSE}, "card text", ("Queries, sql", "It writes queries for people.")),
    "nothing": ({"README.md": b"---\nlibrary_name: peft\n---\n"}, None, ()),
    "no card": ({}, None, ()),
    "broken": (
        {"README.md": b"---\ntags: [\n---\nIt writes queries for people.\n"},
        "card text",
        ("It writes queries for people.",),
    ),
}


@pytest.mark.parametrize("name", REPRESENTATIONS)
@pytest.mark.parametrize("is_on_disk", [True, False])
def test_what_an_adapter_is_found_by_is_looked_for_in_order(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]], tmp_path: Path, name: str, is_on_disk: bool
) -> None:
    """Samples, then the card's examples, then its prose; recorded, and replaced by samples that are given later."""
    files, described_by, texts = REPRESENTATIONS[name]
    server.push("user/sql", {**checkpoints[0], **files})
    pool = AdapterPool(tmp_path / "pool", create=True) if is_on_disk else AdapterPool()
    pool.add("sql", "user/sql", hub=hub)
    pools = [pool, AdapterPool(tmp_path / "pool")] if is_on_disk else [pool]
    for each in pools:
        entry = each.state["sql"]
        assert (entry.described_by, entry.routing_texts) == (described_by, texts)
        assert entry.is_described == (described_by is not None)
        assert bool(entry.note) == (name == "broken")
    pool.update("sql", samples=["How many orders are open?"])
    assert pool.state["sql"].described_by == "samples"
    assert pool.state["sql"].hub.repo_id == "user/sql"
    if is_on_disk:
        entry = AdapterPool(tmp_path / "pool").state["sql"]
        assert (entry.described_by, entry.routing_texts) == ("samples", ("How many orders are open?",))
        (tmp_path / "pool" / "sql" / "samples.jsonl").write_text('{"input": "Written by hand, later."}\n')
        assert AdapterPool(tmp_path / "pool").state["sql"].described_by == "samples"


def test_an_embedding_in_the_repository_is_taken(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """Before anything that the card says."""
    np.save(tmp_path / "embedding.npy", np.ones(8, np.float32))
    files = {"embedding.npy": (tmp_path / "embedding.npy").read_bytes(), "embedding.json": b'{"encoder": "words"}'}
    server.push("user/sql", {**checkpoints[0], **files, "README.md": CARD})
    pool = AdapterPool()
    pool.add("sql", "user/sql", hub=hub)
    assert pool.state["sql"].described_by == "embedding"
    assert pool.state["sql"].encoder == "words"


def test_the_cache_serves_with_the_hub_off_limits(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By HF_HUB_OFFLINE or because nobody answers; what is not in the cache is refused in words."""
    commit = server.push("user/sql", {**checkpoints[0], "README.md": PROSE})
    server.models["user/sql"].refs["v1"] = commit
    online = AdapterPool().add("sql", "user/sql", hub=hub)
    nowhere = Hub(endpoint="http://127.0.0.1:9", token=False, cache_dir=hub.cache_dir)
    monkeypatch.setattr(huggingface_hub.constants, "DEFAULT_ETAG_TIMEOUT", 1)
    assert AdapterPool().add("sql", "user/sql", hub=nowhere).fingerprint == online.fingerprint
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.paths.clear()
    pool = AdapterPool()
    for name, revision in (("sql", None), ("pinned", commit)):
        assert pool.add(name, "user/sql", revision=revision, hub=hub).fingerprint == online.fingerprint
        assert pool.state[name].described_by == "card text"
        assert pool.state[name].hub.commit == commit
    for repo_id, revision in (("user/sql", "v1"), ("user/other", None)):
        with pytest.raises(HubError, match=rf"'x': .*{repo_id}.*not in the cache.*HF_HUB_OFFLINE"):
            pool.add("x", repo_id, revision=revision, hub=hub)
    assert server.paths == []


def test_a_process_with_the_environment_of_the_hub(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """HF_ENDPOINT, HF_TOKEN and HF_HOME count, as everywhere; then HF_HUB_OFFLINE against what is in HF_HOME."""
    server.models["user/sql"] = Repository(token="hf_secret")
    server.push("user/sql", {**checkpoints[0], "README.md": PROSE})
    code = "from langchain_lora_retriever import AdapterPool; print(AdapterPool().add('sql', 'user/sql').fingerprint)"
    shared = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.endpoint, "HF_TOKEN": "hf_secret"}
    shared.pop("HF_HUB_CACHE", None)
    printed = []
    for offline in ("0", "1"):
        environment = {**shared, "HF_HUB_OFFLINE": offline}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        printed.append(run.stdout)
        assert ("hf_secret" in server.tokens) == (offline == "0")
        server.tokens.clear()
    assert printed[0] == printed[1] != ""


def test_bad_repositories_are_refused_in_words(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """Who is not there, needs a token or is gated; holds no adapter, two, or a pickle; is too large. The pool stays."""
    good = checkpoints[0]
    nested = {f"{place}/{name}": data for place in ("first", "second") for name, data in good.items()}
    server.push("user/none", {"config.json": b"{}"})
    server.push("user/two", nested)
    server.push("user/half", {"adapter_config.json": good["adapter_config.json"]})
    pickle = {**good, "adapter_model.bin": b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."}
    pickle.pop("adapter_model.safetensors")
    server.push("user/pickle", pickle)
    server.push("user/large", {**good, "samples.jsonl": b" " * ((16 << 20) + 1)})
    server.push("user/config", {**good, "adapter_config.json": b"{}"})
    server.models["user/private"] = Repository(token="hf_secret")
    server.push("user/private", good)
    server.models["user/gated"] = Repository(is_gated=True)
    server.push("user/gated", good)
    server.push("user/good", good)
    pool = AdapterPool(tmp_path / "pool", create=True)
    expected: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("user/nobody", {}, HubError, "no repository 'user/nobody'.*needs a token.*no folder user/nobody"),
        ("user/private", {}, HubError, "no repository 'user/private', or it is private and needs a token"),
        ("user/gated", {}, HubError, "gated: accept its terms"),
        ("user/none", {}, HubError, "holds no adapter: it has no adapter_config.json"),
        ("user/two", {}, HubError, "holds 2 adapters: 'first', 'second'.*subfolder=, or --subfolder"),
        ("user/two", {"subfolder": "third"}, HubError, "no adapter in 'third'. Allowed are 'first', 'second'"),
        ("user/half", {}, HubError, "no adapter_model.safetensors"),
        ("user/pickle", {}, UnsupportedAdapterError, "a pickle"),
        ("user/large", {}, HubError, "samples.jsonl has 16,777,217 bytes; allowed are 16,777,216"),
        ("user/config", {}, AdapterError, "adapter 'x'"),
        ("user/good", {"revision": "v9"}, HubError, "'user/good' at 'v9': there is no such revision"),
        ("user/good", {"revision": "0" * 40}, HubError, "there is no such revision"),
        ("user/--", {}, HubError, "name that the hub does not allow|cannot be fetched"),
        ("no such folder", {}, InvalidAdapterError, "no such folder"),
        ("a/b/c", {}, InvalidAdapterError, "a/b/c"),
    ]
    for repo_id, arguments, error, match in expected:
        with pytest.raises(error, match=match) as info:
            pool.add("x", repo_id, hub=hub, **arguments)
        assert "'x'" in str(info.value)
    assert len(pool) == 0
    assert not (tmp_path / "pool" / "x").exists()
    assert not any("adapter_model.bin" in path for path in server.paths)
    assert pool.add("second", "user/two", subfolder="second", hub=hub).fingerprint
    assert pool.state["second"].hub.subfolder == "second"
    token = Hub(endpoint=hub.endpoint, token="hf_secret", cache_dir=hub.cache_dir)
    assert "hf_secret" not in repr(token)
    assert pool.add("private", "user/private", hub=token).fingerprint
    with pytest.raises(DuplicateAdapterError):
        pool.add("private", "user/nobody", hub=hub)


def test_a_repository_that_changes_meanwhile_is_read_as_one_commit(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]]
) -> None:
    """A branch that moves once is followed; one that moves on and on is refused; nothing is mixed."""
    server.push("user/sql", {**checkpoints[0], "samples.jsonl": SAMPLES})
    second = {**checkpoints[1], "samples.jsonl": SAMPLES.replace(b"cats", b"dogs")}
    moves = [lambda: server.push("user/sql", second)]
    server.models["user/sql"].on_listed = lambda: moves.pop()() if moves else None  # type: ignore[func-returns-value]
    pool = AdapterPool()
    adapter = pool.add("sql", "user/sql", hub=hub)
    alone = AdapterPool().add("sql", "user/sql", hub=hub)
    assert adapter.fingerprint == alone.fingerprint
    assert pool.samples("sql")[0].input == "How many dogs are there?"
    counts = iter(range(100))
    server.models["user/sql"].on_listed = lambda: (
        server.push("user/sql", {**second, "x": str(next(counts)).encode()}) and None
    )
    with pytest.raises(HubError, match=r"'other': .*changed again and again.*Pass a commit"):
        pool.add("other", "user/sql", hub=hub)


def test_a_file_that_is_not_the_commits_is_refused(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]]
) -> None:
    """Weights that changed under a commit do not have the hash that the hub lists for it."""
    commit = server.push("user/sql", checkpoints[0])
    good = checkpoints[0]["adapter_model.safetensors"]
    other = checkpoints[1]["adapter_model.safetensors"]
    assert len(good) == len(other)
    server.sends = lambda name, data: other if name.endswith(".safetensors") else data
    with pytest.raises(HubError, match=f"is not what the hub lists for commit {commit}"):
        AdapterPool().add("sql", "user/sql", revision=commit, hub=hub)


def test_a_download_that_breaks_off_is_told(server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]]) -> None:
    """As an error of the repository, with the cause."""
    server.push("user/sql", checkpoints[0])
    server.sends = lambda name, data: data[:100] if name.endswith(".safetensors") else data
    with pytest.raises(HubError, match="'user/sql' cannot be fetched"):
        AdapterPool().add("sql", "user/sql", hub=hub)


def test_a_pool_of_repositories(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """Each under its name; those that cannot be had are in `rejected`; what a folder has is not fetched again."""
    server.push("ann/sql", {**checkpoints[0], "samples.jsonl": SAMPLES})
    server.push("bob/sql", {**checkpoints[1], "README.md": PROSE})
    tagged = server.push("bob/dates", checkpoints[1], ref="v1")
    names = ["ann/sql", "bob/sql", "bob/dates@v1", "bob/nobody"]
    with pytest.warns(UserWarning, match="bob/nobody"):
        pool = AdapterPool.from_hub(names, hub=hub, path=tmp_path / "pool")
    assert pool.names == ("ann--sql", "bob--sql", "dates")
    assert pool.state["dates"].hub.commit == tagged
    assert isinstance(pool.rejected["nobody"], HubError)
    assert not pool.refresh()
    server.paths.clear()
    with pytest.warns(UserWarning, match="bob/nobody"):
        again = AdapterPool.from_hub(names, hub=hub, path=tmp_path / "pool")
    assert again.fingerprint == pool.fingerprint
    assert not any("sql" in path or "dates" in path for path in server.paths)
    assert AdapterPool.from_hub({"mine": "ann/sql"}, hub=hub).names == ("mine",)
    with pytest.raises(PoolError, match="no adapter of 1 repositories"), pytest.warns(UserWarning, match="nobody"):
        AdapterPool.from_hub(["bob/nobody"], hub=hub)
    for bad in ([], "ann/sql", 3):
        with pytest.raises(PoolError, match="repositories"):
            AdapterPool.from_hub(bad, hub=hub)  # type: ignore[arg-type]


def test_a_look_at_the_folder_keeps_what_the_hub_refused(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """Until an adapter of that name is there, or it is removed from what was refused."""
    server.push("ann/sql", {**checkpoints[0], "samples.jsonl": SAMPLES})
    with pytest.warns(UserWarning, match="bob/"):
        pool = AdapterPool.from_hub(["ann/sql", "bob/one", "bob/two", "bob/three"], hub=hub, path=tmp_path / "pool")
    other = AdapterPool(tmp_path / "pool")
    other.add("dates", "ann/sql", hub=hub)
    assert pool.refresh()
    assert pool.names == ("dates", "sql")
    assert list(pool.rejected) == ["one", "three", "two"]
    other.add("one", "ann/sql", hub=hub)
    pool.remove("two")
    assert pool.refresh()
    assert list(pool.rejected) == ["three"]
    other.remove("one")
    assert pool.refresh()
    assert list(pool.rejected) == ["three"]


DRAW = """
import json, sys
from pathlib import Path
from langchain_lora_retriever import AdapterPool
from langchain_lora_retriever.errors import LoraRetrieverError

def described(pool, name):
    entry = pool.state[name]
    return [entry.described_by, entry.note, [[s.input, s.output] for s in entry.samples]]

folder = Path(sys.argv[1])
pool, other = AdapterPool(folder, create=True), AdapterPool()
for each in (pool, other):
    each.add("sql", "user/sql", samples_from="dataset")
other.add("prose", "user/sql")
told = {"pool": described(pool, "sql"), "read": described(AdapterPool(folder), "sql"), "again": described(other, "sql")}
told["before"] = described(other, "prose")
other.update("prose", samples_from="dataset")
told["after"] = described(other, "prose")
other.add("both", "user/both", samples_from="dataset")
told["both"] = described(other, "both")
for name in sys.argv[2:]:
    try:
        other.add("bad", name, samples_from="dataset")
    except LoraRetrieverError as error:
        told[name] = [type(error).__name__, str(error), []]
print(json.dumps(told))
"""
BAD_DATASETS = {
    "user/nobody": "data set 'user/nobody' cannot be had: RepositoryNotFound",
    "json": "data set 'json' cannot be had: RepositoryNotFound",
    "/etc/passwd": "no name of a data set on the hub",
    "../secret": "cannot be had",
    "user/empty": "holds no texts",
    "user/here": "no name that leads to the hub alone",
    "": "names no data set",
}


def test_samples_are_drawn_from_the_data_set_of_the_card(
    server: HubServer, checkpoints: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """Twenty, the same each time, where it is asked for and nothing better is there. Others are told in words.

    A name that leads elsewhere than to the hub is not followed, whatever lies there.
    """
    pytest.importorskip("datasets")
    rows = [{"question": f"How many {i} are there?", "sql": f"SELECT {i}"} for i in range(300)]
    contents = {
        "user/queries": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "user/empty": b'{"label": 3}\n' * 3,
        "user/here": b'{"text": "a folder of that name lies here"}\n',
    }
    for name, content in contents.items():
        server.datasets[name] = Repository()
        server.datasets[name].push({"train.jsonl": content})
    (tmp_path / "user" / "here").mkdir(parents=True)
    (tmp_path / "user" / "here" / "train.jsonl").write_text('{"text": "this is secret"}\n')
    card = PROSE.replace(b"tags:", b"datasets: user/queries\ntags:")
    server.push("user/sql", {**checkpoints[0], "README.md": card})
    server.push("user/both", {**checkpoints[0], "README.md": card, "samples.jsonl": SAMPLES})
    bad = {f"user/bad{i}": match for i, match in enumerate(BAD_DATASETS.values())}
    for repo_id, named in zip(bad, BAD_DATASETS, strict=True):
        named_card = PROSE.replace(b"tags:", f"datasets: ['{named}']\ntags:".encode()) if named else PROSE
        server.push(repo_id, {**checkpoints[0], "README.md": named_card})
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", DRAW, str(tmp_path / "pool"), *bad]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    described_by, note, samples = told["pool"]
    assert described_by == "dataset"
    assert "user/queries" in note
    assert len(samples) == 20
    assert all(output == f"SELECT {text.split()[2]}" for text, output in samples)
    assert told["pool"] == told["read"] == told["again"] == told["after"]
    assert told["before"][0] == "card text"
    assert told["both"][0] == "samples"
    for repo_id, match in bad.items():
        assert told[repo_id][0] == "InvalidSamplesError", told[repo_id]
        assert match in told[repo_id][1]
        assert "secret" not in told[repo_id][1].replace("../secret", "")
    server.paths.clear()
    pool = AdapterPool(tmp_path / "pool")
    for call in (
        lambda: pool.update("sql", samples_from="elsewhere"),
        lambda: pool.add("x", "user/sql", samples_from=""),
    ):
        with pytest.raises(InvalidRequestError, match=r"samples_from='(elsewhere)?'"):
            call()
    assert not server.paths


def test_data_sets_are_streamed_from_where_the_environment_says(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]]
) -> None:
    """Not from another place than a call's hub is: that is refused before anything is drawn."""
    pytest.importorskip("datasets")
    server.push("user/sql", {**checkpoints[0], "README.md": PROSE.replace(b"tags:", b"datasets: user/queries\ntags:")})
    with pytest.raises(InvalidSamplesError, match=f"streamed from https://.*set HF_ENDPOINT to {server.endpoint}"):
        AdapterPool().add("sql", "user/sql", samples_from="dataset", hub=hub)


def test_an_update_to_a_revision_alone_is_of_the_same_repository(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """And of the same place in it; what is not from the hub has no revision, which is said."""
    nested = [{f"best/{name}": data for name, data in files.items()} for files in checkpoints]
    server.models["user/sql"] = Repository()
    first = server.push("user/sql", nested[0])
    second = server.push("user/sql", nested[1])
    pool = AdapterPool(tmp_path / "pool", create=True)
    old = pool.add("sql", "user/sql", revision=first, subfolder="best", hub=hub)
    assert pool.update("sql", revision="main", hub=hub).fingerprint != old.fingerprint
    origin = AdapterPool(tmp_path / "pool").state["sql"].hub
    assert (origin.commit, origin.revision, origin.subfolder) == (second, "main", "best")
    with pytest.raises(HubError, match=r"no adapter in 'worst'. Allowed are 'best'"):
        pool.update("sql", subfolder="worst", hub=hub)
    folder = tmp_path / "plain"
    folder.mkdir()
    for name, data in checkpoints[0].items():
        (folder / name).write_bytes(data)
    pool.add("own", folder)
    for call in (lambda: pool.update("own", revision="main"), lambda: pool.update("own", subfolder="best")):
        with pytest.raises(HubError, match=r"'own' is not from the hub, so it has no revision\. Pass a repository"):
            call()
    for path, arguments in ((folder, {"revision": "v1"}), (str(folder), {"subfolder": "best"})):
        with pytest.raises(HubError, match=r"'x': a revision and a subfolder are of a repository.*is none\. Leave"):
            pool.add("x", path, hub=hub, **arguments)  # type: ignore[arg-type]
    assert pool.names == ("own", "sql")


def test_pickles_of_the_hub_are_converted_if_that_is_asked_for(
    server: HubServer, hub: Hub, checkpoints: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """By `add`, `update` and `from_hub`; the weights are the same, and without asking each is refused unopened."""
    import io

    import torch
    from safetensors.torch import load

    stream = io.BytesIO()
    torch.save(load(checkpoints[0]["adapter_model.safetensors"]), stream)
    files = {name: data for name, data in checkpoints[0].items() if name != "adapter_model.safetensors"}
    server.push("user/old", {**files, "adapter_model.bin": stream.getvalue(), "samples.jsonl": SAMPLES})
    server.push("user/new", checkpoints[0])
    expected = AdapterPool().add("new", "user/new", hub=hub).weights
    with pytest.raises(UnsupportedAdapterError, match=r"a pickle.*convert=True"):
        AdapterPool().add("old", "user/old", hub=hub)
    with pytest.warns(UserWarning, match="convert=True"):
        assert list(AdapterPool.from_hub(["user/new", "user/old"], hub=hub).rejected) == ["old"]
    pool = AdapterPool.from_hub({"old": "user/old"}, hub=hub, path=tmp_path / "pool", convert=True)
    pool.add("again", "user/old", hub=hub, convert=True)
    pool.update("again", "user/old", hub=hub, convert=True)
    for name in ("old", "again"):
        weights = pool[name].weights
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[module].lora_A, expected[module].lora_A) for module in expected)
        assert pool.state[name].described_by == "samples"
        assert not (tmp_path / "pool" / name / "adapter_model.bin").exists()


def test_a_folder_goes_before_a_repository_of_its_name(
    server: HubServer, hub: Hub, write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A path that is there is read; nothing is asked of the hub."""
    folder = write_checkpoint(tmp_path / "user" / "sql")
    monkeypatch.chdir(tmp_path)
    pool = AdapterPool()
    pool.add("sql", "user/sql", hub=hub)
    pool.add("other", folder)
    assert pool["sql"] == pool["other"]
    assert pool.state["sql"].hub is None
    with pytest.raises(InvalidAdapterError):
        pool.add("path", Path("user/nobody"), hub=hub)
    assert server.paths == []


@pytest.fixture
def write_checkpoint() -> Callable[..., Path]:
    """Write a PEFT checkpoint."""
    return make_checkpoint
