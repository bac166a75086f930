"""Tools that tests give to models and agents, and the schema of an answer."""

from __future__ import annotations

from langchain_core.tools import tool
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city."""
    return f"sunny and 21 degrees in {city}"


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two integers."""
    return a * b
