"""What adapters there are: data, in snapshots that never change.

`AdapterPool` holds them; the rest reads strangers' files and refuses, by name, what cannot be used. Nothing here knows
an engine, an encoder or LangChain: what of a pool suits these is derived by those who read it, and changes no pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_lora_retriever.pool.pool import AdapterPool

__all__ = ["AdapterPool"]


def __getattr__(name: str) -> Any:
    """Import the pool, and torch with it, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from langchain_lora_retriever.pool.pool import AdapterPool  # noqa: PLC0415

    return AdapterPool
