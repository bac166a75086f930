"""Dates as people write them in several languages, to ISO 8601."""

from __future__ import annotations

import datetime as dt
from functools import partial
from typing import TYPE_CHECKING

from langchain_lora_retriever.demo.tasks.base import Example, Split, Task, draw_int

if TYPE_CHECKING:
    from random import Random

MONTHS: dict[str, str] = {
    "English": "January February March April May June July August September October November December",
    "Spanish": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "Italian": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
}

WEEKDAYS: dict[str, str] = {
    "English": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "Spanish": "lunes martes miércoles jueves viernes sábado domingo",
    "Italian": "lunedì martedì mercoledì giovedì venerdì sabato domenica",
}

STYLES: dict[str, tuple[str, ...]] = {
    "English": ("{m} {d}, {y}", "{d} {m} {y}", "{w}, {m} {d}, {y}"),
    "Spanish": ("{d} de {m} de {y}", "{w}, {d} de {m} de {y}", "el {d} de {m} de {y}"),
    "Italian": ("{d} {m} {y}", "{w} {d} {m} {y}", "il {d} {m} {y}"),
}

PROMPTS = (
    "Write the {lang} date '{date}' in ISO format (YYYY-MM-DD).",
    "A letter in {lang} is dated {date}. Give the date as YYYY-MM-DD.",
    "Convert this {lang} date to YYYY-MM-DD: {date}",
    "{date}\nThis is a date in {lang}. What is it in ISO 8601?",
    "Normalize the date from a {lang} document to YYYY-MM-DD: {date}",
)

NATIVE_PROMPTS: dict[str, tuple[str, ...]] = {
    "English": ("The English contract was signed on {date}. Date in ISO format?",),
    "Spanish": ("Escribe la fecha en formato ISO: {date}", "La carta lleva la fecha {date}. ¿Fecha en formato ISO?"),
    "Italian": ("Scrivi la data in formato ISO: {date}", "La lettera porta la data {date}. Data in formato ISO?"),
}


def generate(rng: Random, split: Split, *, language: str) -> Example:
    """Draw one date of `split` and a sentence that asks for it in ISO 8601."""
    first = dt.date(1950, 1, 1).toordinal()
    last = dt.date(2049, 12, 31).toordinal()
    day = dt.date.fromordinal(draw_int(rng, first, last, split, "date"))
    text = rng.choice(STYLES[language]).format(
        d=day.day,
        m=MONTHS[language].split()[day.month - 1],
        y=day.year,
        w=WEEKDAYS[language].split()[day.weekday()],
    )
    prompt = rng.choice((*PROMPTS, *NATIVE_PROMPTS[language]))
    return Example(
        input=prompt.format(lang=language, date=text),
        output=day.isoformat(),
        task=f"date_{language.lower()}",
        entities=(day.isoformat(),),
    )


QKVO_4 = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
LORA: dict[str, dict[str, object]] = {
    "English": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "Spanish": QKVO_4,
    "Italian": {**QKVO_4, "use_rslora": True},
}

TASKS = [
    Task(f"date_{language.lower()}", "dates", partial(generate, language=language), LORA[language])
    for language in MONTHS
]
