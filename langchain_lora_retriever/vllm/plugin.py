"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`."""

from __future__ import annotations

import logging

from langchain_lora_retriever.errors import EngineError
from langchain_lora_retriever.vllm.limits import check_version
from langchain_lora_retriever.vllm.patches import apply_patches

__all__ = ["register"]

_logger = logging.getLogger("vllm.lora_retriever")  # vLLM's handlers show its own loggers alone


def register() -> None:
    """Put our kernels and compositions into this process's vLLM.

    One that this was not tested with is left as it is, in a warning's words: whoever has both packages installed did
    not ask for the plug-in by that. `VllmEngine` refuses it.
    """
    try:
        check_version()
        apply_patches()
    except EngineError as error:
        _logger.warning("The plug-in langchain-lora-retriever is off: %s", error)
