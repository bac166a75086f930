"""What a chat model claims of itself: LangChain's model profile, by which agents and middleware choose what to do."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import ModelProfile
from transformers import AutoConfig

from langchain_lora_retriever.output.reasoning import THINK_CLOSE
from langchain_lora_retriever.output.response_template import REASONING, response_template

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_lora_retriever.engine import EngineClient, EngineConfig, ModelSource

__all__ = ["loaded_profile", "profile_before_loading"]


def profile_before_loading(
    name: str, source: ModelSource | None, model_kwargs: Mapping[str, Any], config: EngineConfig
) -> ModelProfile:
    """Describe a base model without loading it or asking the network."""
    profile = ModelProfile(
        name=name,
        open_weights=True,
        text_inputs=True,
        image_inputs=False,
        image_url_inputs=False,
        audio_inputs=False,
        video_inputs=False,
        pdf_inputs=False,
        image_tool_message=False,
        pdf_tool_message=False,
        attachment=False,
        text_outputs=True,
        image_outputs=False,
        audio_outputs=False,
        video_outputs=False,
        tool_calling=True,
        tool_choice=True,
        tool_call_streaming=True,
        mid_conversation_tools=False,
        structured_output=True,
        temperature=True,
    )
    window = _window(source, model_kwargs)
    if window is not None:
        profile["max_input_tokens"] = min(config.max_model_len or window, window)
    return profile


def loaded_profile(profile: ModelProfile, engine: EngineClient) -> ModelProfile:
    """Say also what is known once the base model is loaded: the engine's limits, and whether the model reasons."""
    tokenizer = engine.tokenizer
    fields = (response_template(tokenizer) or {}).get("fields", {})
    reasons = not REASONING.isdisjoint(fields) or THINK_CLOSE in repr(getattr(tokenizer, "chat_template", None))
    return {
        **profile,
        "max_input_tokens": engine.info.max_model_len,
        "max_output_tokens": engine.info.max_model_len - 1,
        "reasoning_output": reasons,
    }


def _window(source: ModelSource | None, model_kwargs: Mapping[str, Any]) -> int | None:
    if source is None:
        return None
    if isinstance(source, tuple):
        return _window_of(source[0].config)
    if "gguf_file" in model_kwargs:
        return None  # to look into the file takes as long as half of loading it
    return _window_on_disk(str(source) if isinstance(source, Path) else source, model_kwargs.get("revision"))


@lru_cache(maxsize=32)
def _window_on_disk(source: str, revision: str | None) -> int | None:
    try:
        config = AutoConfig.from_pretrained(source, revision=revision or "main", local_files_only=True)
    except (OSError, ValueError):  # not downloaded yet, or it needs code of its own
        return None
    return _window_of(config)


def _window_of(config: Any) -> int | None:
    window: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return window
