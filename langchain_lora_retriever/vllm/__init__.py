"""Our kernels and compositions inside vLLM, and vLLM as an `EngineClient`. Experimental; vLLM 0.26 and 0.32.

vLLM loads `plugin.register` in each of its processes by the entry point `vllm.general_plugins`. What has an official
hook uses it; the rest is replaced in one place (`patches.py`), which looks at what it replaces first. A composition
crosses vLLM as one `LoRARequest` whose path names its members (`compositions.py`): the scheduler counts these
(`scheduler.py`), the prefix cache is keyed by them, and the worker runs them on `lora_retriever_kernels` (`manager.py`,
`layers.py`). `serving.py` is what vLLM's own server asks; `engine.py` is `VllmEngine`. vllm is imported here alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_lora_retriever.support.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_lora_retriever.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]

__getattr__ = lazy_names(__name__, {"VllmEngine": "engine"})
