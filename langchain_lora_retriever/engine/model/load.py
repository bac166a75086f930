"""Load a base model: all of it is transformers and accelerate."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from langchain_lora_retriever.engine.model.probe import num_embeddings
from langchain_lora_retriever.engine.model.quantisation import bits_per_weight, quantisation_of, require_packages
from langchain_lora_retriever.errors import EngineError
from langchain_lora_retriever.support.model_names import is_missing_folder
from langchain_lora_retriever.support.quiet_loading import quiet_loading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BaseModel",
    "ModelSource",
    "auto_class_of",
    "default_dtype",
    "load_base_model",
    "load_tokenizer",
    "make_empty",
    "read_config",
    "tell_if_too_small",
    "weight_bytes",
]

_logger = logging.getLogger(__name__)

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
    given = {"trust_remote_code": False, **_of_files(model_kwargs)}
    with _loading(str(source)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(source), **given)
    return tokenizer


def load_base_model(source: ModelSource, **model_kwargs: Any) -> BaseModel:
    """Load a model and its tokenizer with `from_pretrained`, or take them as they are.

    A model of text and images is loaded whole, and its text decoder is what serves.

    Args:
        source: A hub name, a folder, or `(model, tokenizer)` already loaded.
        **model_kwargs: For `from_pretrained`: `device_map`, `dtype`, `quantization_config`, `max_memory`,
            `offload_folder`, `gguf_file`, `trust_remote_code`, ... Without `device_map`, accelerate places the model on
            the GPUs there are, or the CPU. Without `dtype`, a GPU gets the checkpoint's own and a CPU float32. Without
            `quantization_config`, a GGUF file's weights are unpacked: transformers would keep them packed where it
            finds kernels for that, and attend by a kernel of its own choice.

    Raises:
        EngineError: If it cannot be loaded, is no model that generates text from text alone, or asks to run code of its
            own and `trust_remote_code` was not passed.
        MissingDependencyError: If its weights are quantised and the packages that read them are not installed.
    """
    if isinstance(source, tuple):
        model, tokenizer = source
        name = model.config.name_or_path or type(model).__name__
    else:
        name = str(source)
        has_gpu = torch.cuda.is_available()
        model_kwargs.setdefault("dtype", default_dtype())
        if has_gpu:
            model_kwargs.setdefault("device_map", "auto")
        if "gguf_file" in model_kwargs and hasattr(transformers, "GgufConfig"):  # earlier versions always unpack
            unpacked = transformers.GgufConfig(gguf_file=model_kwargs["gguf_file"], dequantize=True)
            model_kwargs.setdefault("quantization_config", unpacked)
        config = read_config(name, **model_kwargs)
        auto_class = auto_class_of(config, name)
        require_packages(name, quantisation_of(config, model_kwargs))
        if has_gpu and model_kwargs["device_map"] == "auto":
            tell_if_too_small(config, name, **model_kwargs)
        model_kwargs.setdefault("trust_remote_code", False)
        tokenizer = load_tokenizer(source, **model_kwargs)
        with _loading(name):
            model = auto_class.from_pretrained(name, **model_kwargs)
    num_known, num_tokens = max(tokenizer.get_vocab().values(), default=-1) + 1, num_embeddings(model)
    if num_known > num_tokens:
        _logger.warning(
            "The tokenizer of %s knows %d tokens and the model %d: prompts with the others are refused. It may be "
            "another model's.", name, num_known, num_tokens,
        )  # fmt: skip
    return BaseModel(model, tokenizer, name)


def default_dtype() -> str | torch.dtype:
    """What a model's weights are loaded in: the checkpoint's own on a GPU, float32 on a CPU."""
    return "auto" if torch.cuda.is_available() else torch.float32


def read_config(name: str, **model_kwargs: Any) -> PreTrainedConfig:
    """A model's configuration; nothing else is read.

    Args:
        name: A hub name or a folder.
        **model_kwargs: As for `load_base_model`.

    Raises:
        EngineError: If there is no such model, or it asks to run code of its own without `trust_remote_code`.
    """
    kwargs = {"trust_remote_code": False, **_of_files(model_kwargs)}
    try:
        with _loading(name):
            config: PreTrainedConfig = AutoConfig.from_pretrained(name, **kwargs)
    except EngineError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise EngineError(
            f"{name} comes with Python code of its own, which loading it would run on this machine with all your "
            "rights, and transformers has no such architecture itself. Read that code, and pass "
            'model_kwargs={"trust_remote_code": True} if you trust it, or take a model that needs none.'
        ) from error
    return config


def auto_class_of(config: PreTrainedConfig, name: str) -> Any:
    """Which of transformers' classes loads a model of text: of those with a vision tower the one that answers in text.

    Raises:
        EngineError: If none does.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise EngineError(
            f"{name} is an encoder-decoder model ({config.model_type}): an answer would be a decoder's that attends to "
            "an encoder's states, which are not kept here. Take a decoder-only model (Llama, Qwen, Gemma, ...)."
        )
    remote = getattr(config, "auto_map", None) or {}
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto_class._model_mapping or auto_class.__name__ in remote:  # noqa: SLF001 - the only way to ask
            return auto_class
    raise EngineError(
        f"{name} ({config.model_type}) is no model that generates text: transformers {transformers.__version__} has "
        "neither a causal language model of that architecture nor one that answers images with text."
    )


def make_empty(config: PreTrainedConfig, name: str, **model_kwargs: Any) -> PreTrainedModel:
    """A model without weights, on the meta device.

    Raises:
        EngineError: As `auto_class_of`.
    """
    dtype = model_kwargs.get("dtype", "auto")
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or config.get_text_config().dtype or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    remote = {"trust_remote_code": True} if model_kwargs.get("trust_remote_code") else {}
    with torch.device("meta"):
        model: PreTrainedModel = auto_class_of(config, name).from_config(config, dtype=dtype, **remote)
    model.eval()
    return model


def weight_bytes(model: PreTrainedModel, quantisation: str | None = None) -> int:
    """What a model's weights take: as they are, or with the matrices of its layers quantised."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    bits = bits_per_weight(model.config, quantisation)
    if bits is None:
        return total
    layers = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    return total - sum(int(w.numel() * (w.element_size() - bits / 8)) for w in layers)


def tell_if_too_small(config: PreTrainedConfig, name: str, **model_kwargs: Any) -> None:
    """Warn of weights that the GPUs have no room for, and say what would fit; nothing is read but the configuration."""
    free = sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    try:
        model = make_empty(config, name, **model_kwargs)
    except Exception as error:  # noqa: BLE001 - of other people's code; if the model cannot be made, loading it says why
        _logger.warning("Whether %s fits cannot be told before it is loaded: %r", name, error)
        return
    needed = weight_bytes(model, quantisation_of(config, model_kwargs))
    if needed > free:
        as_8_bits, as_4_bits = (weight_bytes(model, method) / 2**30 for method in ("fp8", "bitsandbytes"))
        _logger.warning(
            "%s takes %.1f GiB and the GPUs have %.1f GiB free: it does not fit, and what is beyond stays on the CPU, "
            "which is slow. Its layers take %.1f GiB with weights of 8 bits and %.1f GiB with 4 bits "
            "(model_kwargs={'quantization_config': ...}).", name, needed / 2**30, free / 2**30, as_8_bits, as_4_bits,
        )  # fmt: skip


def _of_files(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What says where files are and whether their code may run."""
    return {key: model_kwargs[key] for key in _OF_TOKENIZERS if key in model_kwargs}


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Show nothing of what the libraries tell meanwhile, and say in words what they raise."""
    if is_missing_folder(name):
        raise EngineError(
            f"The base model {name!r} cannot be loaded: there is no such folder. Pass one that save_pretrained() "
            "wrote, a hub name such as 'HuggingFaceTB/SmolLM2-135M-Instruct', or (model, tokenizer)."
        )
    try:
        with quiet_loading:
            yield
    except Exception as error:  # the hub's, the files', a quantiser's, torch's
        raise EngineError(
            f"The base model {name!r} cannot be loaded: {type(error).__name__}: {error}\n"
            "Pass a hub name that can be reached, a folder that save_pretrained() wrote, or (model, tokenizer)."
        ) from error
