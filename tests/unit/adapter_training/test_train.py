"""Adapters are trained into a pool: saved before they are tried, gone on with after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import get_peft_model_state_dict
from typer.testing import CliRunner

from langchain_lora_retriever import AdapterPool
from langchain_lora_retriever.adapter_training import train as train_module
from langchain_lora_retriever.adapter_training.tasks import Task, read_tasks
from langchain_lora_retriever.adapter_training.train import AdapterTrainer, AdapterTrainingConfig
from langchain_lora_retriever.cli import commands
from langchain_lora_retriever.errors import (
    InvalidAdapterError,
    InvalidRequestError,
    InvalidSamplesError,
    UnknownAdapterError,
)
from makers import make_tiny_model, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on disk, with a chat template."""
    folder = tmp_path_factory.mktemp("base")
    make_tiny_model().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two tasks."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("upper", "double"):
        rows = [{"input": f"{name} {i}", "output": str(i)} for i in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "double.json").write_text(json.dumps({**LORA, "r": 3}))
    return folder


def task_of(data: Path, name: str = "upper") -> Task:
    """One of them."""
    return read_tasks(data, lora=LORA, names=[name], max_rows=16, holds_out=True)[0]


def trainer_of(base_model: str, tmp_path: Path, **settings: Any) -> AdapterTrainer:
    """A trainer into `tmp_path / "pool"`."""
    config = AdapterTrainingConfig(**{"batch_size": 4, "num_epochs": 2, "max_new_tokens": 2, **settings})
    return AdapterTrainer(base_model, tmp_path / "pool", config, base_model_name="org/tiny", device="cpu")


def test_tasks_train_into_a_pool(base_model: str, data: Path, tmp_path: Path) -> None:
    """A command: a line of JSON per adapter; the pool has them, with their ranks, samples and base model."""
    arguments = ["train-adapters", tmp_path / "pool", "--data", data, "--base-model", base_model, "--base-model-name",
                 "org/tiny", "--max-steps", 2, "--batch-size", 4, "--rank", 2, "--target-module", "q_proj",
                 "--evaluate", "--max-new-tokens", 2, "--device", "cpu", "--num-samples", 5]  # fmt: skip
    result = CliRunner().invoke(commands, list(map(str, arguments)), catch_exceptions=False)
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(report["name"], report["num_steps"]) for report in reports] == [("double", 2), ("upper", 2)]
    assert all(0 <= report["adapter"] <= 1 and 0 <= report["base"] <= 1 for report in reports)
    assert "2 adapters, 4 steps of 4 rows in all" in result.stderr
    pool = AdapterPool(tmp_path / "pool")
    assert {name: pool[name].rank for name in pool} == {"double": 3, "upper": 2}
    assert len(pool.samples("upper")) == 5
    assert pool["upper"].base_model == "org/tiny"


def test_an_interrupted_training_goes_on_where_it_was(base_model: str, data: Path, tmp_path: Path) -> None:
    """And ends with the very weights of one that was never interrupted."""
    task = task_of(data)
    whole = trainer_of(base_model, tmp_path / "whole")
    whole.train(task)

    def interrupt(step: int, _: int, __: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of(base_model, tmp_path).train(task, on_step=interrupt)
    assert not (tmp_path / "pool" / "upper").exists()
    steps: list[int] = []
    report = trainer_of(base_model, tmp_path).train(task, resume=True, on_step=lambda step, *_: steps.append(step))
    assert steps == list(range(4, report.num_steps + 1))
    resumed, uninterrupted = (AdapterPool(folder / "pool")["upper"] for folder in (tmp_path, tmp_path / "whole"))
    assert resumed.fingerprint == uninterrupted.fingerprint
    assert not list((tmp_path / "pool" / ".training").rglob("*.pt"))


def test_a_finished_adapter_is_left_alone_and_may_still_be_tried(
    base_model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the pool before it is tried; a trial that fails loses nothing, and other settings train anew."""
    task = task_of(data)
    monkeypatch.setattr(AdapterTrainer, "_exact_match", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer_of(base_model, tmp_path).train(task, evaluate=True)
    before = AdapterPool(tmp_path / "pool")["upper"].fingerprint
    monkeypatch.setattr(AdapterTrainer, "_exact_match", lambda *_: 0.5)
    monkeypatch.setattr(AdapterTrainer, "_fit", lambda *_, **__: pytest.fail("trained again"))
    report = trainer_of(base_model, tmp_path).train(task, resume=True, evaluate=True)
    assert (report.adapter, report.base) == (0.5, 0.5)
    assert trainer_of(base_model, tmp_path).train(task, resume=True, evaluate=True) == report
    monkeypatch.undo()
    trainer_of(base_model, tmp_path, seed=1).train(task, resume=True)
    assert AdapterPool(tmp_path / "pool")["upper"].fingerprint != before


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_finished_adapter_is_tried_with_all_its_weights(
    base_model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, bool]
) -> None:
    """Of DoRA the magnitudes too: what was trained just now and what is read from the pool are the same."""
    seen: list[dict[str, torch.Tensor]] = []

    def look(_: AdapterTrainer, model: Any, __: Task) -> dict[str, float]:
        seen.append({name: tensor.bfloat16() for name, tensor in get_peft_model_state_dict(model).items()})
        return {}

    monkeypatch.setattr(AdapterTrainer, "_exact_matches", look)
    task = replace(task_of(data), lora={**LORA, **kind})
    trainer = trainer_of(base_model, tmp_path, learning_rate=0.1)
    trainer.train(task, evaluate=True)
    trainer.train(task, resume=True, evaluate=True)
    trained, read = seen
    assert trained.keys() == read.keys()
    assert [name for name in trained if not torch.equal(trained[name], read[name])] == []


def test_training_is_saved_while_it_runs(base_model: str, data: Path, tmp_path: Path, monkeypatch) -> None:
    """So that a process that is killed loses seconds."""
    monkeypatch.setattr(train_module, "_SAVE_SECONDS", 0)
    seen: list[bool] = []
    state = tmp_path / "pool" / ".training" / "upper" / "state.pt"
    trainer_of(base_model, tmp_path).train(task_of(data), on_step=lambda *_: seen.append(state.exists()))
    assert seen == [False, *[True] * (len(seen) - 1)]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("{", InvalidSamplesError, "line 1 of"),
        ('{"input": "a"}', InvalidSamplesError, "line 1 of"),
        ("", InvalidRequestError, "0 rows"),
        ('{"input": "a", "output": "\\ud800"}', InvalidRequestError, "line 1 of .* half a surrogate pair"),
        ('{"input": "a", "output": "b", "messages": [5]}', InvalidSamplesError, "line 1 of .* messages="),
        ("[" * 100_000, InvalidSamplesError, "line 1 of"),
    ],
)
def test_rows_that_are_none_are_named(data: Path, content: str, error: type[Exception], words: str) -> None:
    """Before anything is trained."""
    (data / "upper.jsonl").write_text(content)
    with pytest.raises(error, match=words):
        read_tasks(data, lora=LORA, max_rows=10)


def test_a_task_whose_name_no_adapter_may_have_is_refused(data: Path) -> None:
    """Before those that come first are trained."""
    (data / "zu:letzt.jsonl").write_text('{"input": "a", "output": "b"}')
    with pytest.raises(InvalidAdapterError, match="'zu:letzt' cannot be the name of a folder"):
        read_tasks(data, lora=LORA, max_rows=10)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, device: str) -> None:
    """Before the base model is loaded."""
    with pytest.raises(InvalidRequestError, match=f"device='{device}' is not allowed"):
        AdapterTrainer("nowhere", tmp_path / "pool", AdapterTrainingConfig(), device=device)


def test_a_base_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    """Rows have nothing to be put into."""
    make_tiny_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(InvalidRequestError, match="has no chat template"):
        trainer_of(str(tmp_path / "base"), tmp_path)


def test_unknown_tasks_and_settings_are_refused(base_model: str, data: Path, tmp_path: Path) -> None:
    """By name, with the names that are near."""
    with pytest.raises(UnknownAdapterError, match="There are upper"):
        read_tasks(data, lora=LORA, names=["Upper"], max_rows=10)
    with pytest.raises(InvalidRequestError, match="holds no task"):
        read_tasks(tmp_path, lora=LORA, max_rows=10)
    with pytest.raises(InvalidRequestError, match="learning_rate"):
        AdapterTrainingConfig(learning_rate=7)
    (data / "upper.json").write_text('{"rnak": 4}')
    with pytest.raises(InvalidRequestError, match="rnak"):
        trainer_of(base_model, tmp_path).train(task_of(data))
