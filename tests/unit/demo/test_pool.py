"""The demo's shipped adapters, and the pool that is made of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings

import pytest
import torch

from langchain_lora_retriever import demo
from langchain_lora_retriever.demo.model import BASE_MODEL
from langchain_lora_retriever.demo.tasks import TASKS, make_examples
from langchain_lora_retriever.pool.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE
from langchain_lora_retriever.pool.pool import AdapterPool
from langchain_lora_retriever.pool.samples import SAMPLES_FILE

FOLDER = demo.POOL_FOLDER
MAX_BYTES = 16 * 10**6


def read_config(name):
    """The `adapter_config.json` of a shipped adapter."""
    return json.loads((FOLDER / name / CONFIG_FILE).read_text(encoding="utf-8"))


def contents(folder):
    """The hash of every file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def pool():
    """The demo's pool."""
    return demo.demo_pool()


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A copy of three shipped adapters, in place of the package's folder."""
    for name in ("date_english", "json_order", "unit_mass"):
        shutil.copytree(FOLDER / name, tmp_path / "pool" / name)
    monkeypatch.setattr(demo, "POOL_FOLDER", tmp_path / "pool")
    return tmp_path / "pool"


def test_every_task_has_an_adapter_and_every_adapter_a_task():
    """The shipped folder holds one subfolder per task and nothing else."""
    assert {path.name for path in FOLDER.iterdir()} == TASKS.keys()
    files = {CONFIG_FILE, WEIGHTS_FILE, SAMPLES_FILE}
    assert all({path.name for path in (FOLDER / name).iterdir()} == files for name in TASKS)


def test_the_pool_is_small_enough_to_ship():
    """All adapters together take at most 16 MB."""
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= MAX_BYTES


def test_all_adapters_load_and_name_the_demo_base_model():
    """The shipped folder is a pool of the demo's base model of which nothing is refused and nothing warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool = AdapterPool(FOLDER, base_model=BASE_MODEL)
    assert not pool.rejected
    assert set(pool.names) == TASKS.keys()


def test_the_demo_pool_holds_what_is_shipped(pool):
    """The pool in memory is equal to the folder read as a pool."""
    assert pool.path is None
    assert pool.fingerprint == AdapterPool(FOLDER).fingerprint
    assert all(pool[name].path == FOLDER / name for name in pool)


@pytest.mark.parametrize("task", TASKS)
def test_weights_are_finite_and_trained(pool, task):
    """No weight is infinite or NaN, and no `lora_B` is still zero as before training."""
    for weights in pool[task].weights.values():
        assert torch.isfinite(weights.lora_A).all()
        assert torch.isfinite(weights.lora_B).all()
        assert weights.lora_B.any()


@pytest.mark.parametrize("task", TASKS)
def test_adapters_are_configured_as_their_tasks_say(task):
    """A shipped adapter has the rank, alpha, patterns and scaling that its task declares."""
    config, declared = read_config(task), dict(TASKS[task].lora)
    targets = declared.pop("target_modules")
    assert {key: config[key] for key in declared} == declared
    assert targets == "all-linear" or sorted(config["target_modules"]) == sorted(targets)


def test_the_pool_mixes_kinds_of_lora():
    """Several ranks and target sets, rank-stabilised scaling, a rank pattern and an all-linear adapter are there."""
    configs = [read_config(name) for name in TASKS]
    assert len({config["r"] for config in configs}) >= 3
    assert len({tuple(sorted(config["target_modules"])) for config in configs}) >= 3
    assert any(config["use_rslora"] for config in configs)
    assert any(config["rank_pattern"] for config in configs)
    assert any({"q_proj", "gate_proj", "up_proj", "down_proj"} <= set(config["target_modules"]) for config in configs)


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_training_rows(pool, task):
    """An adapter is found by at least 12 whole rows of its training data, none of them a row of the test set."""
    samples = pool.samples(task)
    assert len(samples) >= 12
    train = [(example.input, example.output) for example in make_examples(task, "train", len(samples))]
    assert [(sample.input, sample.output) for sample in samples] == train
    held_out = {example.input for example in make_examples(task, "test", 200)}
    assert not held_out & {sample.input for sample in samples}


def test_a_changed_pool_leaves_the_shipped_folder_as_it_is(shipped):
    """Adding, updating and removing change the caller's pool alone: no file, and no pool made later."""
    before = contents(shipped)
    pool = demo.demo_pool()
    pool.add("copy", shipped / "json_order", samples=["An order"])
    pool.update("unit_mass", samples=["Convert 3 kg to g."])
    pool.remove("date_english")
    assert pool.names == ("copy", "json_order", "unit_mass")
    assert contents(shipped) == before
    assert demo.demo_pool().names == ("date_english", "json_order", "unit_mass")


def test_a_changed_pool_can_be_saved(shipped, tmp_path):
    """The pool in memory is written to a folder of the caller's, with the samples as they were changed."""
    pool = demo.demo_pool()
    pool.update("unit_mass", samples=["Convert 3 kg to g."])
    pool.save(tmp_path / "mine")
    assert AdapterPool(tmp_path / "mine").fingerprint == pool.fingerprint


def test_the_test_set_covers_every_task():
    """Every task gives as many held-out rows as asked for, with its cluster and the messages to send."""
    rows = demo.demo_test_set(2, seed=3)
    assert [row["task"] for row in rows] == [name for name in TASKS for _ in range(2)]
    assert all(row["cluster"] == TASKS[row["task"]].cluster for row in rows)
    assert all(row["messages"][-1]["role"] in {"user", "tool"} for row in rows)
    assert rows != demo.demo_test_set(2)
