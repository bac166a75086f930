"""Questions about one table to SQL."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from langchain_lora_retriever.demo.tasks.base import Example, Split, Task, draw_int, part
from langchain_lora_retriever.demo.tasks.entities import CITIES, FIRST_NAMES, LAST_NAMES, pick

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
    column: str

    def fill(self, template: str) -> str:
        """Put the ingredients into a question or a query."""
        return template.format(t=self.table.name, x=self.column, c=self.text, v=self.value, n=self.number, k=self.limit)


def query(columns: str, table: str, rest: str = "") -> str:
    """Write a SELECT statement."""
    parts = ["SELECT", columns, "FROM", table, rest]
    return " ".join(word for word in parts if word)


def equal(draw: Draw) -> tuple[str, str]:
    """A column of the rows whose text is a value."""
    question = draw.rng.choice(
        (
            "Show the {x} of the {t} whose {c} is {v}.",
            "What is the {x} of {t} with {c} {v}?",
            "List the {x} for all {t} where the {c} is {v}.",
            "Find the {x} of the {t} that have {v} as {c}.",
        )
    )
    return draw.fill(question), query(draw.column, draw.table.name, draw.fill("WHERE {c} = '{v}'"))


def compare(draw: Draw) -> tuple[str, str]:
    """A column of the rows whose number is above or below a limit."""
    over, sign = draw.rng.choice((("more than", ">"), ("over", ">"), ("less than", "<"), ("below", "<")))
    question = draw.rng.choice(
        (
            "Show the {x} of the {t} whose {n} is {over} {k}.",
            "Which {t} have a {n} of {over} {k}? Give the {x}.",
            "List the {x} for all {t} where the {n} is {over} {k}.",
            "Find the {x} of {t} with {over} {k} {n}.",
        )
    ).replace("{over}", over)
    return draw.fill(question), query(draw.column, draw.table.name, draw.fill(f"WHERE {{n}} {sign} {{k}}"))


KINDS: dict[str, Callable[[Draw], tuple[str, str]]] = {
    "equal": equal,
    "compare": compare,
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
    number = rng.choice(table.numbers)
    draw = Draw(
        rng=rng,
        table=table,
        text=text,
        value=pick(rng, CITIES if text in PLACES else [*LAST_NAMES, *FIRST_NAMES], split),
        number=number,
        limit=draw_int(rng, 2, 999, split, "limit"),
        column=rng.choice([x for x in (*table.texts, *table.numbers) if x not in (text, number)]),
    )
    question, answer = KINDS[kind](draw)
    words = re.findall(r"\w+", answer)
    used = [column for column in (*table.texts, *table.numbers) if column in words]
    unused = [column for column in ("id", *table.texts, *table.numbers) if column not in words]
    columns = [*used, *rng.sample(unused, rng.randint(1, 2))]
    rng.shuffle(columns)
    entities = (table.name, *(str(x) for x in (draw.value, draw.limit) if str(x) in words))
    return Example(
        input=rng.choice(PROMPTS).format(question=question, table=table.name, columns=", ".join(columns)),
        output=answer,
        task=f"sql_{kind}",
        entities=entities,
    )


LORA: dict[str, dict[str, object]] = {
    "equal": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "compare": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
}

TASKS = [Task(f"sql_{kind}", "sql", partial(generate, kind=kind), LORA[kind]) for kind in KINDS]
