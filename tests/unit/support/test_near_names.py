"""What a name that is not there was probably meant to be."""

from __future__ import annotations

import pytest

from langchain_lora_retriever.support.near_names import near_names

NAMES = ["sql_compare", "sql_equal", "unit_length", "Dates", "fr"]


@pytest.mark.parametrize(
    ("sought", "near"),
    [
        ("unit_lenght", ["unit_length"]),
        ("dates", ["Dates"]),
        ("LENGTH", ["unit_length"]),
        ("fr-FR", ["fr"]),
        ("sqlx", ["sql_compare", "sql_equal"]),
        ("un", ["unit_length"]),
        ("weather", []),
        ("", []),
        ("   ", []),
    ],
)
def test_near_names(sought: str, near: list[str]) -> None:
    """Spelled nearly so, or a part of it, or begun alike; whatever the case."""
    assert near_names(sought, NAMES) == near


def test_a_name_of_any_length_is_looked_for() -> None:
    """What somebody has pasted costs no more than a name."""
    assert near_names("sql" * 100_000, NAMES) == ["sql_compare", "sql_equal"]
