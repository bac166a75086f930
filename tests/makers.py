"""Shared makers of small models, adapters and prompts. Everything is seeded and made on the spot."""

from __future__ import annotations

import asyncio
import hashlib
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from langchain_lora_retriever.engine.api import Grammar
from langchain_lora_retriever.types import Adapter, LoraWeights

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB_SIZE = 320

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def make_tiny_model(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 causal LM of the given transformers `model_type`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    extras: dict[str, Any] = {}
    if architecture == "mistral":
        extras["sliding_window"] = 8
    if architecture in {"gemma2", "gemma3_text"}:
        extras |= {
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**_SMALL, **extras, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # the default initialisation is so small that all logits are alike
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False)


def make_tokenizer() -> Any:
    """A byte-level tokenizer: token id = byte + 3, so that every text has tokens and every token a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {symbol: i + 3 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


def make_adapter(
    model: Any,
    name: str,
    *,
    r: int = 4,
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    scaling: float = 2.0,
    seed: int | None = None,
) -> Adapter:
    """A random adapter strong enough to change greedy answers."""
    generator = torch.Generator().manual_seed(
        seed if seed is not None else int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    )
    weights = {}
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in targets and isinstance(module, torch.nn.Linear):
            weights[path] = LoraWeights(
                torch.randn(r, module.in_features, generator=generator) * module.in_features**-0.5,
                torch.randn(module.out_features, r, generator=generator) * 0.3,
                scaling,
            )
    digest = hashlib.sha256(f"{name}{r}{targets}{scaling}{seed}".encode()).hexdigest()
    return Adapter(name=name, fingerprint=digest, weights=weights)


def merge_adapters(model: Any, adapters: Any) -> None:
    """Add `sum_j w_j s_j B_j A_j` to the model's weights, in place: the reference for a mixture."""
    for adapter, weight in adapters:
        for path, w in adapter.weights.items():
            module = model.get_submodule(path)
            module.weight.data += weight * w.scaling * (w.lora_B.float() @ w.lora_A.float())


def make_checkpoint(folder: Any, *, seed: int = 0, model: Any = None, **lora: Any) -> Any:
    """Write a random PEFT checkpoint for the tiny model, or for `model`, into `folder`."""
    from peft import LoraConfig, get_peft_model

    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | lora
    wrapped = get_peft_model(make_tiny_model() if model is None else model, LoraConfig(**lora))
    wrapped.peft_config["default"].base_model_name_or_path = "org/tiny-llama"
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    if model is not None:
        wrapped.unload()
    return folder


def wait_until(is_so: Callable[[], object], seconds: float = 30.0) -> None:
    """Return as soon as something is so; fail if it is not within some time."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"it was not so within {seconds} s"
        time.sleep(0.001)


class ScriptedCompiler:
    """Stands in for a `GrammarCompiler`: `add(make)` gives a grammar whose constraints are what `make` makes."""

    def __init__(self) -> None:
        self._makes: list[Callable[[], Any]] = []

    def add(self, make: Callable[[], Any]) -> Grammar:
        """A grammar for `submit`."""
        self._makes.append(make)
        return Grammar(str(len(self._makes) - 1))

    def start(self, grammar: Grammar) -> Any:
        """What the engine waits for: done at once."""
        future: Future[Any] = Future()
        future.set_result(SimpleNamespace(constraint=lambda **_: self._makes[int(grammar.text)]()))
        return future


async def until(is_so: Callable[[], object], seconds: float = 30.0) -> None:
    """`wait_until` without blocking the event loop."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"it was not so within {seconds} s"
        await asyncio.sleep(0.001)
