"""What LangChain's standard tests are told of the demo model, asked directly or through a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage


class DemoAbilities:
    """What it can do, for a suite that has a `chat_model_class` and `chat_model_params`."""

    chat_model_class: type[BaseChatModel]
    chat_model_params: dict[str, Any]

    @property
    def supports_json_mode(self) -> bool:
        """JSON mode is constrained decoding here."""
        return True

    @property
    def model_override_value(self) -> str:
        """The `model` argument names an adapter, as on OpenAI-style servers."""
        return "function_calling"

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        """Tokens found in the prefix cache are counted."""
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """Ask the same twice; the second time the prompt is in the cache."""
        model = self.chat_model_class(**self.chat_model_params, max_tokens=4)
        prompt = "Repeat the word river. " * 8
        model.invoke(prompt)
        if not stream:
            return model.invoke(prompt)
        first, *rest = model.stream(prompt)
        for chunk in rest:
            first += chunk
        return first
