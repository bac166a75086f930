"""LangChain's standard tests, on the demo model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_lora_retriever import ChatLoraRetriever
from langchain_lora_retriever.demo import demo_arguments
from standard_suite import DemoAbilities

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

pytestmark = pytest.mark.demo


class DemoModel(DemoAbilities):
    """What both suites are told of the model."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        """The class under test."""
        return ChatLoraRetriever

    @property
    def chat_model_params(self) -> dict[str, Any]:
        """The demo's base model, encoder and pool."""
        return demo_arguments()


class TestUnit(DemoModel, ChatModelUnitTests):
    """Construction, binding and tracing."""

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """The standard parameters, less the two of a remote service: a key, and retries over the network."""
        parameters = super().standard_chat_model_params
        return {name: value for name, value in parameters.items() if name not in {"api_key", "max_retries"}}


class TestIntegration(DemoModel, ChatModelIntegrationTests):
    """Answers, streams, tools and structured output."""
