"""Engines in other processes: one on this machine, or many behind Ray Serve. Each is an `EngineClient` to its callers.

Routing, composition and tokenising stay with the caller. A request crosses as a value, its adapters by content hash; a
replica that lacks one reads it from the folder it lies in, or has it sent, once. Deltas come back over one connection
for each caller and replica, all of a step in one frame. Ray, where there is any, chooses the replica, watches over it,
and is asked once per request; `ray` is imported by `replica`, `router` and `engine` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_lora_retriever.support.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_lora_retriever.remote.engine import RemoteEngine
    from langchain_lora_retriever.remote.process import ProcessEngine
    from langchain_lora_retriever.remote.recipe import EngineRecipe
    from langchain_lora_retriever.remote.replica import EngineReplica, engine_app
    from langchain_lora_retriever.remote.router import AdapterRouter

__all__ = ["AdapterRouter", "EngineRecipe", "EngineReplica", "ProcessEngine", "RemoteEngine", "engine_app"]

_HOMES = {
    "AdapterRouter": "router",
    "EngineRecipe": "recipe",
    "EngineReplica": "replica",
    "ProcessEngine": "process",
    "RemoteEngine": "engine",
    "engine_app": "replica",
}

__getattr__ = lazy_names(__name__, _HOMES)
