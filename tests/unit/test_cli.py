"""The command line around a fake engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path  # noqa: TC003 - fixtures are annotated with it
from typing import Any

import pytest
from typer.testing import CliRunner

from langchain_lora_retriever import AdapterPool
from langchain_lora_retriever.cli import app, commands
from langchain_lora_retriever.demo.report import CONDITIONS, run_demo

SQL = "How many users are in the table?"


@pytest.fixture
def run(engine, llm, monkeypatch) -> Any:
    """Run a command and return its output; prompts are embedded by the words in them."""
    encoder = llm.retriever.encoder
    monkeypatch.setattr("langchain_lora_retriever.retriever.SentenceTransformerEncoder", lambda source: encoder)

    def run_command(*arguments: object, stdin: str | None = None) -> str:
        result = CliRunner().invoke(commands, [str(argument) for argument in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return run_command


@pytest.fixture
def folder(pool: AdapterPool, tmp_path: Path) -> Path:
    """The pool on disk."""
    pool.save(tmp_path / "pool")
    return tmp_path / "pool"


def test_pool_list_names_adapters_and_refusals(run, folder: Path) -> None:
    """A listing shows what can be used, and why the rest cannot."""
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{")
    with pytest.warns(UserWarning, match="broken"):
        listed = json.loads(run("pool", "list", folder, "--json"))
    assert [row["name"] for row in listed["adapters"]] == ["dates", "french", "sql"]
    assert "broken" in listed["rejected"]
    with pytest.warns(UserWarning, match="broken"):
        assert "french" in run("pool", "list", folder)


def test_pool_add_inspect_remove(run, folder: Path, write_adapter, tmp_path: Path) -> None:
    """An adapter can be added with its samples, looked at and removed."""
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"input": "What is the weather?"}\n')
    added = json.loads(run("pool", "add", folder, "weather", write_adapter("weather"), "--samples", samples, "--json"))
    assert added == {"added": "weather", "num_adapters": 4}
    seen = json.loads(run("pool", "inspect", folder, "weather", "--json"))
    assert seen["samples"] == ["What is the weather?"]
    assert seen["modules"] == ["q_proj"]
    assert "3 left" in run("pool", "remove", folder, "weather")
    assert "weather" not in AdapterPool(folder)


def test_route_shows_the_decision(run, folder: Path, engine) -> None:
    """Routing prints adapters and scores and generates nothing."""
    options = ("--base-model", "fake/base", "--pool", folder, "--top-k", 1)
    (routed,) = json.loads(run("route", SQL, *options, "--json"))
    assert (routed["prompt"], routed["adapters"][0]["name"]) == (SQL, "sql")
    assert "sql" in run("route", SQL, *options)
    assert not engine.requests


def test_chat_answers_once(run, folder: Path) -> None:
    """One prompt gets one answer, with its adapters."""
    options = ("--base-model", "fake/base", "--pool", folder)
    answer = json.loads(run("chat", SQL, *options, "--json"))
    assert answer["content"] == "The answer."
    assert answer["adapters"][0]["name"] == "sql"
    assert "The answer." in run("chat", SQL, *options, "--adapter", "dates")


def test_chat_is_a_conversation(run, folder: Path, engine) -> None:
    """Without a prompt every line is a turn, and earlier turns are remembered."""
    run("chat", "--base-model", "fake/base", "--pool", folder, stdin="one\ntwo\n\n")
    assert len(engine.requests) == 2
    assert "one" in engine.requests[1]["prompt"]
    assert "The answer." in engine.requests[1]["prompt"]


def test_bench_reports_throughput(run, folder: Path) -> None:
    """The bench measures the same prompts one by one and together."""
    report = json.loads(run("bench", "--base-model", "fake/base", "--pool", folder, "--prompts", 4, "--json"))
    assert [row["tokens"] for row in report["results"]] == [20, 20, 20]


def test_errors_are_printed_without_a_traceback(tmp_path: Path, capsys) -> None:
    """An error of this package ends the command with its message and status 1."""
    with pytest.raises(SystemExit) as stopped:
        app(["pool", "list", str(tmp_path / "nowhere")])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert "nowhere" in captured.err
    assert "Traceback" not in captured.err


def test_help_loads_no_torch() -> None:
    """The command line answers at once where no model is needed."""
    code = "import sys; import langchain_lora_retriever.cli; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_demo_compares_every_condition(llm, engine) -> None:
    """Each row is answered in every way, equal compositions once, and scored by exact match."""
    turns = [{"role": "user", "content": "Convert the date."}, {"role": "tool", "content": "x"}]
    rows: list[Any] = [
        {
            "input": SQL,
            "output": "right",
            "task": "sql",
            "cluster": "c",
            "messages": [{"role": "user", "content": SQL}],
        },
        {"input": "Convert the date.", "output": "2021", "task": "dates", "cluster": "c", "messages": turns},
    ]
    engine.answer = lambda prompt, names: "right" if names == ["sql"] else "wrong"
    seen: list[tuple[int, int]] = []
    report = run_demo(llm, rows, lambda done, total: seen.append((done, total)))
    assert set(report.exact_match) == set(CONDITIONS)
    assert report.exact_match["oracle"] == 0.5
    assert report.exact_match["base"] == 0
    assert report.per_task["sql"]["selection"] == 1
    assert report.exact_match["masked selection"] == 0
    assert report.top_1 == 1
    assert seen[-1] == (report.num_generated, report.num_generated)
    assert report.num_generated < 2 * len(CONDITIONS)
    assert json.dumps(report.to_dict())
