"""How an engine is made in another process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from langchain_lora_retriever.engine.config import EngineConfig

if TYPE_CHECKING:
    from langchain_lora_retriever.engine.admission import Admission
    from langchain_lora_retriever.engine.api import EngineClient
    from langchain_lora_retriever.engine.worker import EngineWorker

    class HostedEngine(EngineClient, Protocol):
        """An engine that says what it asks of requests, so that callers elsewhere can ask it themselves."""

        @property
        def admission(self) -> Admission:
            """What can ever be served."""


__all__ = ["EngineRecipe"]


@dataclass(frozen=True, kw_only=True)
class EngineRecipe:
    """Loads a base model and makes an engine over it, where it is called.

    Attributes:
        base_model: A hub name or a folder that the other process sees.
        model_kwargs: For `from_pretrained`.
        config: The engine's limits.
    """

    base_model: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    config: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> EngineWorker:
        """Make it.

        Raises:
            EngineError: If the architecture or the memory does not allow serving.
        """
        from langchain_lora_retriever.engine import EngineWorker, load_base_model  # noqa: PLC0415 - torch
        from langchain_lora_retriever.engine.grammar import compiler_of  # noqa: PLC0415

        base = load_base_model(self.base_model, **self.model_kwargs)
        compiler_of(base.tokenizer).prepare()
        return EngineWorker(base, self.config)
