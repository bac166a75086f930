"""How an engine is made in another process."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from langchain_lora_retriever.engine.config import EngineConfig
from langchain_lora_retriever.errors import PoolError

if TYPE_CHECKING:
    from langchain_lora_retriever.engine.admission import Admission
    from langchain_lora_retriever.engine.api import EngineClient
    from langchain_lora_retriever.engine.worker import EngineWorker
    from langchain_lora_retriever.types import Adapter

    class HostedEngine(EngineClient, Protocol):
        """An engine that says what it asks of requests, so that callers elsewhere can ask it themselves."""

        @property
        def admission(self) -> Admission:
            """What can ever be served."""


__all__ = ["EngineRecipe"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineRecipe:
    """Loads a base model and makes an engine over it, where it is called.

    Attributes:
        base_model: A hub name or a folder that the other process sees.
        model_kwargs: For `from_pretrained`.
        config: The engine's limits.
        pool: A pool's folder that the other process sees: for the kinds of its adapters the engine takes memory and
            captures graphs, where `config.adapter_kinds` does not say for which.
    """

    base_model: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    config: EngineConfig = field(default_factory=EngineConfig)
    pool: str | None = None

    def __call__(self) -> EngineWorker:
        """Make it.

        Raises:
            EngineError: If the architecture or the memory does not allow serving.
        """
        from langchain_lora_retriever.engine.start import start_engine  # noqa: PLC0415 - torch

        return start_engine(self.base_model, self.model_kwargs, self.config, self._adapters())

    def _adapters(self) -> list[Adapter]:
        """The pool's, if they are asked for and can be had."""
        from langchain_lora_retriever.pool.pool import AdapterPool  # noqa: PLC0415 - torch

        if self.pool is None or self.config.adapter_kinds is not None:
            return []
        try:
            pool = AdapterPool(self.pool)
        except PoolError as error:
            _logger.warning("The engine is made for plain adapters, as the pool cannot be read here: %s", error)
            return []
        return [pool[name] for name in pool.names]
