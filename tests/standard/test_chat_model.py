"""LangChain's standard tests, on the demo model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_lora_retriever import ChatLoraRetriever
from langchain_lora_retriever.demo import demo_arguments

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage

pytestmark = pytest.mark.demo


class DemoModel:
    """What both suites are told of the model."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        """The class under test."""
        return ChatLoraRetriever

    @property
    def chat_model_params(self) -> dict[str, Any]:
        """The demo's base model, encoder and pool."""
        return demo_arguments()

    @property
    def supports_json_mode(self) -> bool:
        """JSON mode is constrained decoding here."""
        return True

    @property
    def model_override_value(self) -> str:
        """The `model` argument names an adapter, as on OpenAI-style servers."""
        return "function_calling"


class TestUnit(DemoModel, ChatModelUnitTests):
    """Construction, binding and tracing."""

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """The standard parameters, less the two of a remote service: a key, and retries over the network."""
        parameters = super().standard_chat_model_params
        return {name: value for name, value in parameters.items() if name not in {"api_key", "max_retries"}}


class TestIntegration(DemoModel, ChatModelIntegrationTests):
    """Answers, streams, tools and structured output."""

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        """Tokens found in the prefix cache are counted."""
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """Ask the same twice; the second time the prompt is in the cache."""
        model = ChatLoraRetriever(**self.chat_model_params, max_tokens=4)
        prompt = "Repeat the word river. " * 8
        model.invoke(prompt)
        if not stream:
            return model.invoke(prompt)
        first, *rest = model.stream(prompt)
        for chunk in rest:
            first += chunk
        return first
