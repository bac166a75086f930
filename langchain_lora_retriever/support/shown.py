"""How an error shows the value it was met with."""

from __future__ import annotations

import reprlib

__all__ = ["shown"]


class _ShortRepr(reprlib.Repr):
    """A `repr` of bounded length and cost, whatever it is given: huge, nested, or in a circle."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        """Name the size of an integer that Python refuses to print."""
        return super().repr_int(x, level) if x.bit_length() <= 512 else f"<an integer of {x.bit_length()} bits>"

    def repr_bytes(self, x: bytes, level: int) -> str:
        """Show the beginning."""
        return self.repr_instance(x[: self.maxother], level)


_repr = _ShortRepr()


def shown(value: object) -> str:
    """Return a short `repr` for an error's text, at most some hundred characters."""
    return _repr.repr(value)
