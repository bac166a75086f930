"""Questions about one table to SQL."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from langchain_lora_retriever.demo.tasks.base import Example, Split, Task, draw_int, part
from langchain_lora_retriever.demo.tasks.entities import CITIES, LAST_NAMES, pick

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random


class Table(NamedTuple):
    """A table: its name (also the plural of what a row is), text columns and number columns."""

    name: str
    texts: tuple[str, ...]
    numbers: tuple[str, ...]


SCHEMAS = (
    "employees: name city department; salary age|singers: name country genre; age albums|"
    "students: name city major; grade age|hotels: name city brand; stars rooms|"
    "books: title author publisher; pages price|cars: model maker color; price weight|"
    "films: title director studio; length budget|players: name team position; goals height|"
    "flights: airline origin destination; price duration|houses: owner street city; price rooms|"
    "recipes: title chef cuisine; calories minutes|museums: name city curator; visitors fee|"
    "doctors: name clinic specialty; experience patients|songs: title artist label; length plays|"
    "teams: name coach league; wins points|rivers: name country source; length depth|"
    "orders: customer city product; amount quantity|courses: title teacher faculty; credits seats|"
    "ships: name captain port; tonnage crew|dogs: name breed owner; age weight|"
    "bridges: name city architect; length height|farms: owner region crop; acres cows|"
    "concerts: band venue city; tickets price|phones: model brand seller; price memory|"
    "wines: name grape region; year price|parks: name city warden; area trees|"
    "lawyers: name firm city; fee cases|trains: line operator depot; speed seats"
)


def parse(line: str) -> Table:
    """Read one table of `SCHEMAS`."""
    name, columns = line.split(": ")
    texts, numbers = columns.split("; ")
    return Table(name, tuple(texts.split()), tuple(numbers.split()))


TABLES = [parse(line) for line in SCHEMAS.split("|")]
PLACES = {"city", "country", "origin", "destination", "region", "port", "source", "depot", "clinic", "venue"}


class Draw(NamedTuple):
    """One drawn question's ingredients."""

    rng: Random
    table: Table
    text: str
    value: str
    number: str
    limit: int


def query(columns: str, table: str, rest: str = "") -> str:
    """Write a SELECT statement."""
    parts = ["SELECT", columns, "FROM", table, rest]
    return " ".join(word for word in parts if word)


def select(draw: Draw) -> tuple[str, str]:
    """Rows that meet one condition."""
    t, c, v = draw.table, draw.text, draw.value
    column = draw.rng.choice([x for x in (*t.texts, *t.numbers) if x != c])
    question = draw.rng.choice(
        (
            "Show the {x} of the {t} whose {c} is {v}.",
            "What is the {x} of {t} with {c} {v}?",
            "List the {x} for all {t} where the {c} is {v}.",
            "Find the {x} of every one of the {t} that has {v} as {c}.",
        )
    )
    return question.format(x=column, t=t.name, c=c, v=v), query(column, t.name, f"WHERE {c} = '{v}'")


def count(draw: Draw) -> tuple[str, str]:
    """The number of rows that meet one condition."""
    t, c, v = draw.table, draw.text, draw.value
    question = draw.rng.choice(
        (
            "How many {t} have the {c} {v}?",
            "Count the {t} whose {c} is {v}.",
            "What is the number of {t} with {c} {v}?",
            "How many {t} are there where the {c} is {v}?",
        )
    )
    return question.format(t=t.name, c=c, v=v), query("COUNT(*)", t.name, f"WHERE {c} = '{v}'")


def aggregate(draw: Draw) -> tuple[str, str]:
    """One number over all rows or over those that meet one condition."""
    t, n = draw.table, draw.number
    word, function = draw.rng.choice(
        (("average", "AVG"), ("mean", "AVG"), ("maximum", "MAX"), ("minimum", "MIN"), ("total", "SUM"))
    )
    question = draw.rng.choice(
        (
            "What is the {w} {n} of the {t}",
            "Compute the {w} {n} over the {t}",
            "Give the {w} {n} of all {t}",
        )
    ).format(w=word, n=n, t=t.name)
    if draw.rng.random() < 0.5:
        return f"{question}.", query(f"{function}({n})", t.name)
    condition = f"WHERE {draw.text} = '{draw.value}'"
    return f"{question} whose {draw.text} is {draw.value}.", query(f"{function}({n})", t.name, condition)


def top(draw: Draw) -> tuple[str, str]:
    """The first rows by one column."""
    t, n = draw.table, draw.number
    word, direction = draw.rng.choice(
        (("highest", "DESC"), ("largest", "DESC"), ("lowest", "ASC"), ("smallest", "ASC"))
    )
    question = draw.rng.choice(
        (
            "Which {k} {t} have the {w} {n}? Show the {x}.",
            "List the {x} of the {k} {t} with the {w} {n}.",
            "Top {k} {t} sorted by {w} {n}: give the {x}.",
        )
    )
    return (
        question.format(k=draw.limit, t=t.name, w=word, n=n, x=t.texts[0]),
        query(t.texts[0], t.name, f"ORDER BY {n} {direction} LIMIT {draw.limit}"),
    )


def group(draw: Draw) -> tuple[str, str]:
    """The number of rows for every value of one column."""
    t, c = draw.table, draw.text
    question = draw.rng.choice(
        (
            "How many {t} are there for each {c}?",
            "Count the {t} per {c}.",
            "For every {c}, show the number of {t}.",
            "Group the {t} by {c} and count each group.",
        )
    )
    return question.format(t=t.name, c=c), query(f"{c}, COUNT(*)", t.name, f"GROUP BY {c}")


KINDS: dict[str, Callable[[Draw], tuple[str, str]]] = {
    "select": select,
    "count": count,
    "aggregate": aggregate,
    "top": top,
    "group": group,
}

PROMPTS = (
    "{question} Table: {table}({columns}). Write the SQL query.",
    "{question}\nSQL table {table}: columns {columns}",
    "Write SQL for this question: {question}\nSchema: {table}({columns})",
    "{question}\nAnswer with a SQL query on {table} ({columns}).",
)


def generate(rng: Random, split: Split, *, kind: str) -> Example:
    """Draw a table of `split` and a question of one kind about it."""
    table = rng.choice(part(TABLES, split))
    text = rng.choice(table.texts)
    draw = Draw(
        rng=rng,
        table=table,
        text=text,
        value=pick(rng, CITIES if text in PLACES else LAST_NAMES, split),
        number=rng.choice(table.numbers),
        limit=draw_int(rng, 2, 20, split, "limit"),
    )
    question, answer = KINDS[kind](draw)
    words = re.findall(r"\w+", answer)
    used = [column for column in (*table.texts, *table.numbers) if column in words]
    unused = [column for column in ("id", *table.texts, *table.numbers) if column not in words]
    columns = [*used, *rng.sample(unused, rng.randint(1, 2))]
    rng.shuffle(columns)
    entities = (table.name, *((draw.value,) if draw.value in answer else ()))
    return Example(
        input=rng.choice(PROMPTS).format(question=question, table=table.name, columns=", ".join(columns)),
        output=answer,
        task=f"sql_{kind}",
        entities=entities,
    )


LORA: dict[str, dict[str, object]] = {
    "select": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "count": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "aggregate": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "top": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "group": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
}

TASKS = [Task(f"sql_{kind}", "sql", partial(generate, kind=kind), LORA[kind]) for kind in KINDS]
