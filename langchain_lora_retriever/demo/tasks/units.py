"""Metric conversions by a factor of a thousand, each for one quantity."""

from __future__ import annotations

from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING

from langchain_lora_retriever.demo.tasks.base import Example, Split, Task, is_test

if TYPE_CHECKING:
    from random import Random

UNITS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "length": (("km", "kilometres", "m", "metres"), ("m", "metres", "mm", "millimetres")),
    "mass": (("kg", "kilograms", "g", "grams"), ("t", "tonnes", "kg", "kilograms")),
    "volume": (("l", "litres", "ml", "millilitres"), ("m3", "cubic metres", "l", "litres")),
}

STORIES: dict[str, tuple[str, ...]] = {
    "length": (
        "The hiking trail is {x} {a} long. Give the distance in {b}.",
        "A cable measures {x} {a}. How long is it in {b}?",
        "The bridge has a length of {x} {a}; state the length in {b}.",
        "We walked {x} {A}. How far is that in {b}?",
    ),
    "mass": (
        "The parcel weighs {x} {a}. Give the weight in {b}.",
        "A sack of grain has a mass of {x} {a}. How heavy is it in {b}?",
        "The load on the scale is {x} {A}; state the weight in {b}.",
        "How heavy in {b} is a crate of {x} {a}?",
    ),
    "volume": (
        "The bottle holds {x} {a}. Give the volume in {b}.",
        "A tank contains {x} {a} of water. How much liquid is that in {b}?",
        "We poured {x} {A} of juice; state the volume in {b}.",
        "The aquarium has a capacity of {x} {a}. Capacity in {b}?",
    ),
}

PROMPTS = ("Convert {x} {a} to {b}.", "How many {B} ({b}) are {x} {A}?", "{x} {a} = ? {b}")


def generate(rng: Random, split: Split, *, quantity: str) -> Example:
    """Draw an amount of `split` and a sentence that asks for it in the thousandfold smaller unit."""
    while True:
        number = rng.randint(11, 9999)
        value = Decimal(number).scaleb(-rng.choice((1, 2, 3)))
        if number % 10 and is_test(f"amount/{value}") == (split == "test"):
            break
    a, long_a, b, long_b = rng.choice(UNITS[quantity])
    prompt = rng.choice((*PROMPTS, *STORIES[quantity], *STORIES[quantity]))
    return Example(
        input=prompt.format(x=value, a=a, A=long_a, b=b, B=long_b),
        output=f"{int(value * 1000)} {b}",
        task=f"unit_{quantity}",
        entities=(str(value),),
    )


LORA: dict[str, dict[str, object]] = {
    "length": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "mass": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "volume": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "rank_pattern": {"v_proj": 8, "k_proj": 2},
        "alpha_pattern": {"v_proj": 16, "k_proj": 4},
    },
}

TASKS = [Task(f"unit_{q}", "units", partial(generate, quantity=q), LORA[q]) for q in UNITS]
