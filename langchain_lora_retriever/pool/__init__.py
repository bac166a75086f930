"""What adapters there are: data, in snapshots that never change.

`AdapterPool` holds them; the rest reads strangers' files and refuses, by name, what cannot be used. Nothing here knows
an engine, an encoder or LangChain: what of a pool suits these is derived by those who read it, and changes no pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_lora_retriever.support.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_lora_retriever.pool.pool import AdapterPool

__all__ = ["AdapterPool"]


__getattr__ = lazy_names(__name__, {"AdapterPool": "pool"})
