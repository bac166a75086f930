"""What a server's settings say of an engine that runs in another process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_lora_retriever.chat.model import ChatLoraRetriever
from langchain_lora_retriever.demo import demo_chat_model
from langchain_lora_retriever.demo.model import base_model_arguments
from langchain_lora_retriever.engine.config import config_of
from langchain_lora_retriever.remote import EngineRecipe, ProcessEngine
from langchain_lora_retriever.serving.config import MAX_WAITING

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_lora_retriever.serving.config import ServeConfig

__all__ = ["EngineElsewhere"]

_USUAL_NUM_SEQS = 128


class EngineElsewhere(NamedTuple):
    """An engine, and a chat model over whoever speaks to it.

    Attributes:
        recipe: Makes the engine.
        num_seqs: Requests that one runs at once.
        max_waiting: Requests that may wait beside them; None sets no limit.
        make_chat_model: Takes the `engine`.
    """

    recipe: EngineRecipe
    num_seqs: int
    max_waiting: int | None
    make_chat_model: Callable[..., ChatLoraRetriever]

    @classmethod
    def of(cls, config: ServeConfig) -> EngineElsewhere:
        """Read the settings.

        Raises:
            InvalidRequestError: If one of the engine's is unknown or not allowed.
        """
        settings = dict(config.chat)
        limits = settings.pop("engine_config", {})
        engine_config = config_of({"max_waiting": MAX_WAITING, **limits} if isinstance(limits, dict) else limits)
        model: dict[str, Any] = (
            base_model_arguments() if config.base_model is None else {"base_model": config.base_model}
        )
        recipe = EngineRecipe(
            base_model=str(model["base_model"]),
            model_kwargs={**model.get("model_kwargs", {}), **settings.pop("model_kwargs", {})},
            config=replace(engine_config, max_waiting=None),  # who asks it has the limit
            pool=None if config.pool is None else str(config.pool),
        )
        settings.setdefault("model_name", model.get("model_name", config.base_model))
        settings |= {"pool": config.pool, "encoder": config.encoder}
        settings = {name: value for name, value in settings.items() if value is not None}
        make = demo_chat_model if config.base_model is None else ChatLoraRetriever
        num_seqs = engine_config.max_num_seqs or _USUAL_NUM_SEQS
        return cls(recipe, num_seqs, engine_config.max_waiting, partial(make, **settings))

    def max_in_flight(self, num_engines: int = 1) -> int | None:
        """Requests that run or wait at once; None sets no limit."""
        return None if self.max_waiting is None else self.max_waiting + self.num_seqs * num_engines

    def start_process(self) -> ProcessEngine:
        """Run the engine in a process of its own on this machine, until it is closed.

        Raises:
            EngineError: If it cannot be made.
        """
        return ProcessEngine(self.recipe, max_in_flight=self.max_in_flight())
