"""Two things at once on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run_beside"]

One = TypeVar("One")
Other = TypeVar("Other")


def run_beside(side: torch.cuda.Stream | None, aside: Callable[[], Other], run: Callable[[], One]) -> tuple[One, Other]:
    """Launch `aside` on a second stream and `run` on the current one; what follows waits for both.

    Args:
        side: The second stream, of the current stream's device; None launches one after the other.
        aside: May read what was launched before.
        run: Likewise; nothing of what `aside` makes.

    Returns:
        What `run` and what `aside` return.
    """
    if side is None:
        other = aside()
        return run(), other
    main = torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        other = aside()
    one = run()
    main.wait_stream(side)
    return one, other
