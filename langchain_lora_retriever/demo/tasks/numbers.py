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
SPANISH = words(
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete "
    "dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete "
    "veintiocho veintinueve"
)
SPANISH_TENS = words("treinta cuarenta cincuenta sesenta setenta ochenta noventa")
SPANISH_HUNDREDS = words(
    "ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos novecientos"
)
ITALIAN = words(
    "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici sedici "
    "diciassette diciotto diciannove"
)
ITALIAN_TENS = words("venti trenta quaranta cinquanta sessanta settanta ottanta novanta")


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


def spanish(n: int) -> str:
    """Spell `n` (1 to 999) in Spanish."""
    if n == 100:
        return "cien"
    if n > 100:
        return SPANISH_HUNDREDS[n // 100 - 1] + (f" {spanish(n % 100)}" if n % 100 else "")
    if n < 30:
        return SPANISH[n]
    return SPANISH_TENS[n // 10 - 3] + (f" y {SPANISH[n % 10]}" if n % 10 else "")


def italian(n: int) -> str:
    """Spell `n` (1 to 999) in Italian."""
    if n >= 100:
        return f"{'' if n < 200 else ITALIAN[n // 100]}cento{italian(n % 100) if n % 100 else ''}"
    if n < 20:
        return ITALIAN[n]
    tens = ITALIAN_TENS[n // 10 - 2]
    if n % 10 in (1, 8):
        tens = tens[:-1]
    unit = "tré" if n % 10 == 3 else ITALIAN[n % 10]
    return tens + (unit if n % 10 else "")


SPELL: dict[str, Callable[[int], str]] = {
    "English": english,
    "French": french,
    "Spanish": spanish,
    "Italian": italian,
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
    "Spanish": ("Escribe este número en cifras: {words}", "¿Qué número es {words}? Solo cifras."),
    "Italian": ("Scrivi questo numero in cifre: {words}", "Che numero è {words}? Solo cifre."),
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


QKVO_4 = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
LORA: dict[str, dict[str, object]] = {
    "English": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "French": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"},
    "Spanish": QKVO_4,
    "Italian": QKVO_4,
}

TASKS = [
    Task(f"number_{language.lower()}", "numbers", partial(generate, language=language), LORA[language])
    for language in SPELL
]
