"""Which modules an adapter may target, as its checkpoint calls them: vLLM joins some of them and knows other names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["module_shapes"]


def module_shapes(config: Any) -> Mapping[str, tuple[int, int]]:
    """`(in_features, out_features)` of a model's linear modules but its output layer, by module path.

    Nothing is loaded: the model is made on the meta device.

    Args:
        config: transformers' configuration of the text model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
