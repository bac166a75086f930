"""The demo's task generators: the same everywhere, train apart from test, and answers that are right."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import sqlite3
import subprocess
import sys

import pytest

from langchain_lora_retriever.demo.tasks import TASKS, Example, Task, make_examples
from langchain_lora_retriever.demo.tasks.numbers import english, french

GOLDEN = {
    "date_english": "38a80ebab275717b",
    "date_spanish": "0a13d04d5a829981",
    "date_italian": "d494e2a90c73349b",
    "number_english": "df3d9b97ef94d259",
    "number_french": "9cc01d6917631cb7",
    "json_order": "7c8303bafa3fe3d6",
    "json_contact": "9f61781845da92b6",
    "json_event": "9b177fe510d152a9",
    "sql_equal": "c4494b72b5e67926",
    "sql_compare": "28092c52362a9bc5",
    "unit_length": "88dcf5b6663b8bb4",
    "unit_mass": "7a2c022e4b710a7b",
    "unit_volume": "cfd9b6e44a4111e4",
    "intent_banking": "db225b374a7e745a",
    "intent_travel": "20891b7b34fd9dbe",
    "intent_home": "5af1f897fb3abdeb",
    "intent_shop": "4ac0b51e1d14212a",
    "function_calling": "0a2ef88f2f908bf4",
}


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_share_no_entity(task):
    """No name, number, date, table or tool that a test prompt is filled with is in a training prompt."""
    train, test = make_examples(task, "train", 400), make_examples(task, "test", 50)
    assert all(example.entities for example in (*train, *test))
    seen = {entity for example in train for entity in example.entities}
    assert not seen & {entity for example in test for entity in example.entities}


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_the_same_everywhere(task):
    """A task's first examples hash to what they did when its adapter was trained."""
    examples = [(e.input, e.output, e.messages) for split in ("train", "test") for e in make_examples(task, split, 8)]
    assert hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:16] == GOLDEN[task]


@pytest.mark.parametrize("task", TASKS)
def test_more_examples_begin_with_the_same_ones(task):
    """Asking for more examples adds to those that fewer would have been."""
    assert make_examples(task, "train", 40)[:10] == make_examples(task, "train", 10)


@pytest.mark.parametrize("task", TASKS)
def test_another_seed_gives_other_examples(task):
    """Hardly an example of one seed is among those of another."""
    first, second = ({e.input for e in make_examples(task, "train", 20, seed)} for seed in (0, 1))
    assert len(first & second) <= 2


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", TASKS)
def test_conversations_of_a_split_are_distinct(task, split):
    """No two examples of a split have the same input; where a conversation has tools, not the same messages."""
    examples = make_examples(task, split, 100)
    assert len({repr(example.prompt_messages()) for example in examples}) == 100
    if not examples[0].messages:
        assert len({example.input for example in examples}) == 100


def test_an_unknown_task_is_refused_by_name():
    """The error names the task and lists those there are."""
    with pytest.raises(ValueError, match=r"'french'.*number_french"):
        make_examples("french")


def test_a_task_without_that_many_examples_says_how_many_it_has(monkeypatch):
    """Asking for more examples than a task can make is an error, not an endless loop."""
    examples = [Example(input=f"Question {i}", output="Yes", task="coin") for i in range(2)]
    monkeypatch.setitem(TASKS, "coin", Task("coin", "games", lambda rng, split: rng.choice(examples)))
    assert len(make_examples("coin", num=2)) == 2
    with pytest.raises(ValueError, match="'coin' has only 2 different train examples; 3 were asked for"):
        make_examples("coin", num=3)


def test_there_are_neighbouring_tasks():
    """At least 14 tasks, and at least five clusters with two or more of them."""
    clusters = [task.cluster for task in TASKS.values()]
    assert len(TASKS) >= 14
    assert sum(clusters.count(cluster) >= 2 for cluster in set(clusters)) >= 5


def test_examples_know_their_task():
    """An example carries the name of the task that made it, which is the adapter's name."""
    assert all(example.task == name == task.name for name, task in TASKS.items() for example in make_examples(name))


@pytest.mark.parametrize(
    ("number", "in_english", "in_french"),
    [
        (71, "seventy-one", "soixante et onze"),
        (80, "eighty", "quatre-vingts"),
        (81, "eighty-one", "quatre-vingt-un"),
        (91, "ninety-one", "quatre-vingt-onze"),
        (100, "one hundred", "cent"),
        (121, "one hundred and twenty-one", "cent vingt et un"),
        (200, "two hundred", "deux cents"),
        (217, "two hundred and seventeen", "deux cent dix-sept"),
        (999, "nine hundred and ninety-nine", "neuf cent quatre-vingt-dix-neuf"),
    ],
)
def test_numbers_are_spelled_as_people_do(number, in_english, in_french):
    """The irregular numbers of both languages are right."""
    assert (english(number), french(number)) == (in_english, in_french)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.cluster == "dates"])
def test_dates_are_those_of_the_prompt(task):
    """The answer is an ISO date whose day and year stand in the prompt."""
    for example in make_examples(task, num=50):
        date = dt.date.fromisoformat(example.output)
        assert {str(date.day), str(date.year)} <= set(re.findall(r"\d+", example.input))


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.cluster == "json"])
def test_json_answers_hold_what_the_prompt_says(task):
    """The answer is a JSON object whose keys and values stand in the prompt."""
    for example in make_examples(task, num=50):
        facts = json.loads(example.output)
        assert 2 <= len(facts) <= 4
        assert all(text in example.input for text in (*facts, *map(str, facts.values())))


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.cluster == "intents"])
def test_intents_are_among_those_offered(task):
    """The label to answer with stands in the prompt."""
    assert all(example.output in example.input for example in make_examples(task, num=50))


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.cluster == "sql"])
def test_queries_run_on_the_table_of_the_prompt(task):
    """SQLite runs the answer on a table with just the columns that the prompt lists."""
    for example in make_examples(task, num=50):
        table = example.entities[0]
        listed = re.search(rf"{table} ?\(([^)]+)\)|columns ([\w, ]+)", example.input)
        assert listed
        with sqlite3.connect(":memory:") as connection:
            connection.execute(f"CREATE TABLE {table} ({listed[1] or listed[2]})")
            assert connection.execute(example.output).fetchall() == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_tool_calls_fit_the_schema_of_a_tool_of_the_prompt(split):
    """Every call names an offered tool and gives all its required arguments and no unknown one."""
    num_calls = 0
    for example in make_examples("function_calling", split, 200):
        functions = {tool["function"]["name"]: tool["function"]["parameters"] for tool in example.tools}
        for text in re.findall(r"<tool_call>\n(.*)\n</tool_call>", example.output):
            call = json.loads(text)
            parameters = functions[call["name"]]
            assert set(parameters.get("required", ())) <= call["arguments"].keys() <= parameters["properties"].keys()
            num_calls += 1
        assert all(name in example.messages[0]["content"] for name in functions)
    assert num_calls > 100


def test_generating_examples_loads_no_heavy_library():
    """The generators are pure Python: neither torch nor numpy is imported by them."""
    code = (
        "import sys; from langchain_lora_retriever.demo import demo_test_set; demo_test_set(1); "
        "print(sorted({'torch', 'numpy', 'transformers', 'langchain_core'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
