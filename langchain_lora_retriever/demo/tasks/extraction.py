"""Facts from a short text to a JSON object with the keys that the prompt asks for."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

from langchain_lora_retriever.demo.tasks.base import Example, Split, Task, draw_int
from langchain_lora_retriever.demo.tasks.entities import (
    CITIES,
    COMPANIES,
    EVENTS,
    ITEMS,
    JOBS,
    person,
    pick,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

Facts = dict[str, str | int]


def order(rng: Random, split: Split) -> tuple[str, Facts]:
    """Draw an order: who wants how many of what, and where to."""
    facts: Facts = {
        "customer": person(rng, split),
        "item": pick(rng, ITEMS, split),
        "quantity": draw_int(rng, 2, 99, split, "quantity"),
        "city": pick(rng, CITIES, split),
    }
    text = rng.choice(
        (
            "Please ship {quantity} {item} to {customer} in {city}.",
            "Hello, {customer} here. I would like to order {quantity} {item}, delivered to {city}.",
            "New order from {customer}: {quantity} {item}, delivery to {city}.",
            "{customer} ({city}) buys {quantity} {item}.",
            "Hi, could you send us {quantity} {item}? Our shop is in {city}. Regards, {customer}",
        )
    )
    return text, facts


def contact(rng: Random, split: Split) -> tuple[str, Facts]:
    """Draw a contact: a person, the employer, the job and how to reach them."""
    name = person(rng, split)
    company = pick(rng, COMPANIES, split)
    facts: Facts = {
        "name": name,
        "company": company,
        "job": pick(rng, JOBS, split),
        "email": f"{name.split()[0].lower()}@{company.split()[0].lower()}.com",
        "phone": f"+{rng.randint(1, 98)} {draw_int(rng, 100, 999, split, 'phone')} {rng.randint(1000, 9999)}",
    }
    text = rng.choice(
        (
            "{name}, {job} at {company}. Mail: {email}, phone: {phone}.",
            "My name is {name}, I am {job} at {company}. Reach me at {email} or {phone}.",
            "You can call {name} ({job}, {company}) on {phone} or write to {email}.",
            "Kind regards, {name}\n{job}\n{company}\n{phone}\n{email}",
        )
    )
    return text, facts


def event(rng: Random, split: Split) -> tuple[str, Facts]:
    """Draw an event: what, when and where, and who invites."""
    weekday = rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))
    minute = draw_int(rng, 8 * 12, 22 * 12, split, "minute")
    facts: Facts = {
        "title": pick(rng, EVENTS, split),
        "day": weekday,
        "time": f"{minute // 12:02d}:{minute % 12 * 5:02d}",
        "place": pick(rng, CITIES, split),
        "host": person(rng, split),
    }
    text = rng.choice(
        (
            "{host} invites you to the {title} on {day} at {time} in {place}.",
            "Save the date: {title}, {day}, {time}, {place}. Your host is {host}.",
            "The {title} takes place in {place} on {day} and starts at {time}; {host} will host it.",
            "Don't miss our {title} in {place}! {day}, doors open {time}. Hosted by {host}.",
        )
    )
    return text, facts


KINDS: dict[str, Callable[[Random, Split], tuple[str, Facts]]] = {
    "order": order,
    "contact": contact,
    "event": event,
}

OTHER_KEYS = {
    "customer": "buyer client",
    "item": "product article",
    "quantity": "amount pieces",
    "city": "destination place",
    "name": "person contact_name",
    "company": "employer firm",
    "job": "position role",
    "email": "mail",
    "phone": "telephone",
    "title": "event occasion",
    "day": "weekday",
    "time": "start begins_at",
    "place": "city location",
    "host": "organizer invited_by",
}

PROMPTS = (
    "Extract the {keys} of this {kind} as JSON.\n{text}",
    "Read the {kind} and return a JSON object with the keys {keys}.\n\n{text}",
    "{text}\n\nTurn the {kind} above into JSON with these fields: {keys}.",
    "Give me {keys} from the {kind} as a JSON object: {text}",
)

NOUNS: dict[str, tuple[str, ...]] = {
    "order": ("order", "purchase order", "customer order"),
    "contact": ("contact", "business contact", "contact card"),
    "event": ("event", "event invitation", "event notice"),
}


def generate(rng: Random, split: Split, *, kind: str) -> Example:
    """Draw a text of one kind and ask for two to four of its facts, in any order."""
    text, facts = KINDS[kind](rng, split)
    asked = rng.sample(sorted(facts), rng.randint(2, 4))
    keys = {key: rng.choice((key, *OTHER_KEYS.get(key, "").split())) for key in asked}
    return Example(
        input=rng.choice(PROMPTS).format(
            keys=", ".join(keys.values()), kind=rng.choice(NOUNS[kind]), text=text.format(**facts)
        ),
        output=json.dumps({keys[key]: facts[key] for key in asked}),
        task=f"json_{kind}",
        entities=tuple(str(value) for key, value in facts.items() if key != "day"),
    )


LORA: dict[str, dict[str, object]] = {
    "order": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "contact": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "event": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}

TASKS = [Task(f"json_{kind}", "json", partial(generate, kind=kind), LORA[kind]) for kind in KINDS]
