"""Load a base model: all of it is transformers and accelerate."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_lora_retriever.errors import EngineError
from langchain_lora_retriever.support.quiet_loading import quiet_loading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BaseModel", "ModelSource", "load_base_model", "load_tokenizer"]

ModelSource: TypeAlias = "str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase]"


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A causal language model, its tokenizer, and the name answers are signed with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


_OF_TOKENIZERS = frozenset({"gguf_file", "revision", "token", "trust_remote_code", "cache_dir", "local_files_only"})
"""What `from_pretrained` of a tokenizer takes, of what is passed for the model."""


def load_tokenizer(source: ModelSource, **model_kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer alone; see `load_base_model` for the arguments.

    Raises:
        EngineError: If it cannot be loaded.
    """
    if isinstance(source, tuple):
        return source[1]
    given = {key: value for key, value in model_kwargs.items() if key in _OF_TOKENIZERS}
    with _loading(str(source)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(source), **given)
    return tokenizer


def load_base_model(source: ModelSource, **model_kwargs: Any) -> BaseModel:
    """Load a model and its tokenizer with `from_pretrained`, or take them as they are.

    Args:
        source: A hub name, a folder, or `(model, tokenizer)` already loaded.
        **model_kwargs: For `AutoModelForCausalLM.from_pretrained`: `device_map`, `dtype`, `quantization_config`,
            `max_memory`, `offload_folder`, `gguf_file`, ... Without `device_map`, accelerate places the model on the
            GPUs there are, or the CPU. Without `dtype`, a GPU gets the checkpoint's own and a CPU float32. Without
            `quantization_config`, a GGUF file's weights are unpacked: transformers would keep them packed where it
            finds kernels for that, and attend by a kernel of its own choice.

    Raises:
        EngineError: If it cannot be loaded, or cannot attend over a paged cache.
    """
    if isinstance(source, tuple):
        model, tokenizer = source
        name = model.config.name_or_path or type(model).__name__
    else:
        name = str(source)
        has_gpu = torch.cuda.is_available()
        model_kwargs.setdefault("dtype", "auto" if has_gpu else torch.float32)
        if has_gpu:
            model_kwargs.setdefault("device_map", "auto")
        if "gguf_file" in model_kwargs and hasattr(transformers, "GgufConfig"):  # earlier versions always unpack
            unpacked = transformers.GgufConfig(gguf_file=model_kwargs["gguf_file"], dequantize=True)
            model_kwargs.setdefault("quantization_config", unpacked)
        tokenizer = load_tokenizer(source, **model_kwargs)
        with _loading(name):
            model = AutoModelForCausalLM.from_pretrained(name, **model_kwargs)
    if not model._supports_attention_backend:  # noqa: SLF001 - transformers offers no public way to ask
        raise EngineError(
            f"{type(model).__name__} does not route its attention through transformers' AttentionInterface, so it "
            "cannot use the paged cache. Use an architecture that does (Llama, Qwen, Gemma, Mistral, Phi, ...)."
        )
    return BaseModel(model, tokenizer, name)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Show nothing of what the libraries tell meanwhile, and say in words what they raise."""
    try:
        with quiet_loading:
            yield
    except Exception as error:  # the hub's, the files', a quantiser's, torch's
        raise EngineError(
            f"The base model {name!r} cannot be loaded: {type(error).__name__}: {error}\n"
            "Pass a hub name that can be reached, a folder that save_pretrained() wrote, or (model, tokenizer)."
        ) from error
