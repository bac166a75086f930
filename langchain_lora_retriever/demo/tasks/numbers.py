"""Numbers in words, in several languages, to digits."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from langchain_lora_retriever.demo.tasks.base import Example, Split, Task, draw_int, words

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

ENGLISH = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
ENGLISH_TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")
FRENCH = words(
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit "
    "dix-neuf"
)
FRENCH_TENS = words("vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt")


def english(n: int) -> str:
    """Spell `n` (1 to 999) in English."""
    if n >= 100:
        rest = f" and {english(n % 100)}" if n % 100 else ""
        return f"{ENGLISH[n // 100]} hundred{rest}"
    if n < 20:
        return ENGLISH[n]
    return ENGLISH_TENS[n // 10 - 2] + (f"-{ENGLISH[n % 10]}" if n % 10 else "")


def french(n: int) -> str:
    """Spell `n` (1 to 999) in French."""
    if n >= 100:
        rest = f" {french(n % 100)}" if n % 100 else ""
        plural = "s" if n >= 200 and not rest else ""
        return f"{f'{FRENCH[n // 100]} ' if n >= 200 else ''}cent{plural}{rest}"
    if n < 20:
        return FRENCH[n]
    tens = FRENCH_TENS[n // 10 - 2]
    rest_below_20 = n % 20 if n >= 60 else n % 10
    if n == 80:
        return "quatre-vingts"
    if rest_below_20 == 0:
        return tens
    joint = " et " if rest_below_20 in (1, 11) and n < 80 else "-"
    return f"{tens}{joint}{FRENCH[rest_below_20]}"


SPELL: dict[str, Callable[[int], str]] = {
    "English": english,
    "French": french,
}

PROMPTS = (
    "Write the {lang} number '{words}' in digits.",
    "What number is '{words}' in {lang}? Answer with digits only.",
    "Convert this number word from {lang} to digits: {words}",
    "{words}\nWhich number is this? It is written out in {lang}; give digits.",
    "The amount on the {lang} cheque is written as '{words}'. What is it in figures?",
)

NATIVE_PROMPTS: dict[str, tuple[str, ...]] = {
    "English": ("Spell this English number with digits: {words}",),
    "French": ("Écris ce nombre en chiffres : {words}", "Quel nombre est {words} ? Chiffres seulement."),
}


def generate(rng: Random, split: Split, *, language: str) -> Example:
    """Draw one number of `split`, spelled out, and a sentence that asks for its digits."""
    number = draw_int(rng, 11, 999, split, "number")
    prompt = rng.choice((*PROMPTS, *NATIVE_PROMPTS[language]))
    return Example(
        input=prompt.format(lang=language, words=SPELL[language](number)),
        output=str(number),
        task=f"number_{language.lower()}",
        entities=(str(number),),
    )


LORA: dict[str, dict[str, object]] = {
    "English": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "French": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"},
}

TASKS = [
    Task(f"number_{language.lower()}", "numbers", partial(generate, language=language), LORA[language])
    for language in SPELL
]
