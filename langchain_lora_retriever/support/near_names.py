"""Which of some names was probably meant."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["did_you_mean", "near_names"]

_MAX_LENGTH = 200
_PREFIX = 3


def near_names(name: str, names: Iterable[str], num: int = 3) -> list[str]:
    """The names that are most like one that there is not, whatever the case of their letters.

    Args:
        name: What was asked for.
        names: What there is.
        num: Maximum number of names.

    Returns:
        Those that are spelled nearly so, or else those that hold it or are held by it, or else those that begin with
        the same three characters; [] if nothing is near.
    """
    sought = name[:_MAX_LENGTH].casefold()
    by_key = {known.casefold(): known for known in names}
    found = difflib.get_close_matches(sought, by_key, n=num)
    if not found and sought.strip():
        found = sorted((key for key in by_key if key and (sought in key or key in sought)), key=len)[:num]
    if not found and len(sought) >= _PREFIX:
        found = sorted(key for key in by_key if key.startswith(sought[:_PREFIX]))[:num]
    return [by_key[key] for key in found]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that refuses a name: the one that is most like it, or nothing."""
    near = near_names(name, names, 1)
    return f" Did you mean {near[0]!r}?" if near else ""
