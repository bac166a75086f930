"""LangChain's standard tests through `ChatOpenAI` against the server, on the demo model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import httpx
import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from langchain_lora_retriever.demo import demo_chat_model
from servers import running
from standard_suite import DemoAbilities

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_core.language_models import BaseChatModel

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    """The server, in a thread of this process."""
    with running(demo_chat_model(), start_seconds=120, end_seconds=60) as address:
        TestServer.address = f"{address}/v1"
        yield


class TestServer(DemoAbilities, ChatModelIntegrationTests):
    """Answers, streams, tools and structured output."""

    address: ClassVar[str]

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        """OpenAI's client."""
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        """The server in OpenAI's place. Connections of its own: tests have event loops of their own."""
        return {
            "base_url": self.address,
            "api_key": "none",
            "model": "auto",
            "stream_usage": True,
            "max_retries": 0,
            "http_async_client": httpx.AsyncClient(timeout=120),
        }
