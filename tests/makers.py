"""Shared makers of small models, adapters and prompts. Everything is seeded and made on the spot."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from langchain_lora_retriever.engine.api import Grammar
from langchain_lora_retriever.types import Adapter, LoraWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    """A random float32 causal LM of the given transformers `model_type`, of which `text_config` is a part or all."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from langchain_lora_retriever.engine.model.load import auto_class_of

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
    if "text_config" in overrides:
        overrides["text_config"] = {**_SMALL, **overrides["text_config"]}
        config = AutoConfig.for_model(architecture, **overrides)
    else:
        config = AutoConfig.for_model(architecture, **{**_SMALL, **extras, **overrides})
    auto_class = AutoModelForCausalLM if config.is_encoder_decoder else auto_class_of(config, architecture)
    model = auto_class.from_config(config, dtype=torch.float32).eval()
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
    is_dora: bool = False,
    invocation_tokens: tuple[int, ...] = (),
) -> Adapter:
    """A random adapter strong enough to change greedy answers; of the embedding too if `targets` names it."""
    generator = torch.Generator().manual_seed(
        seed if seed is not None else int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    )
    weights = {}
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] not in targets or not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        weight = module.weight.t() if isinstance(module, torch.nn.Embedding) else module.weight
        out_features, in_features = weight.shape
        is_embedding = isinstance(module, torch.nn.Embedding)
        weights[path] = LoraWeights(
            torch.randn(r, in_features, generator=generator) * (0.3 if is_embedding else in_features**-0.5),
            torch.randn(out_features, r, generator=generator) * 0.3,
            scaling,
            weight.norm(dim=1).cpu() * (1 + 0.3 * torch.randn(out_features, generator=generator)) if is_dora else None,
        )
    digest = hashlib.sha256(f"{name}{r}{targets}{scaling}{seed}{is_dora}{invocation_tokens}".encode()).hexdigest()
    return Adapter(name=name, fingerprint=digest, weights=weights, invocation_tokens=invocation_tokens)


def make_tiny_engine() -> Any:
    """The engine over a tiny Llama, as processes of their own make it too."""
    from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker

    config = EngineConfig(max_num_seqs=24, kv_cache_bytes=4 << 20, lora_cache_bytes=4 << 20, max_model_len=128)
    return EngineWorker(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), config)


def merge_adapters(model: Any, adapters: Any) -> None:
    """Add to the model's weights, in place, the weighted sum of what each adapter changes: the reference for a mixture.

    A weight that two layers share is parted first: an adapter of one does not change the other.
    """
    changes: dict[str, torch.Tensor] = {}
    for adapter, share in adapters:
        for path, w in adapter.weights.items():
            module = model.get_submodule(path)
            weight = module.weight.t() if isinstance(module, torch.nn.Embedding) else module.weight
            updated = weight + w.scaling * (w.lora_B.float() @ w.lora_A.float()).to(weight.device)
            if w.magnitude is not None:
                updated = updated * (w.magnitude.to(weight.device) / updated.norm(dim=1))[:, None]
            changes[path] = changes.get(path, 0) + share * (updated - weight)
    for path, change in changes.items():
        module = model.get_submodule(path)
        changed = module.weight.data + (change.t() if isinstance(module, torch.nn.Embedding) else change)
        module.weight = torch.nn.Parameter(changed, requires_grad=False)


def mixture_logits(model: Any, adapters: Any, prompt: list[int], answer: Sequence[int] = ()) -> torch.Tensor:
    """Transformers' logits `[num_tokens, vocab_size]` of a prompt and an answer, each adapter from its invocation on.

    Where another begins, the model with its weights merged goes on over the keys and values that are there.
    """
    tokens = [*prompt, *answer]
    firsts = [_last_place(adapter.invocation_tokens, prompt) for adapter, _ in adapters]
    begins = sorted({0, *(first for first in firsts if first is not None)})
    past, logits = None, []
    for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
        merged = copy.deepcopy(model)
        merge_adapters(merged, [pair for pair, f in zip(adapters, firsts, strict=True) if f is not None and f <= begin])
        with torch.no_grad():
            out = merged(input_ids=torch.tensor([tokens[begin:end]]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits[0])
    return torch.cat(logits)


def _last_place(wanted: Any, prompt: list[int]) -> int | None:
    """Where an invocation begins for the last time; 0 for none at all, None if it does not occur."""
    places = [i for i in range(len(prompt) - len(wanted) + 1) if prompt[i : i + len(wanted)] == list(wanted)]
    return (places[-1] if places else None) if wanted else 0


def make_checkpoint(
    folder: Any, *, seed: int = 0, model: Any = None, std: float = 0.1, saves_base: bool | str = False, **lora: Any
) -> Any:
    """Write a random PEFT checkpoint for the tiny model, or for `model`, into `folder`."""
    from peft import LoraConfig, get_peft_model

    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | lora
    wrapped = get_peft_model(make_tiny_model() if model is None else model, LoraConfig(**lora))
    wrapped.peft_config["default"].base_model_name_or_path = "org/tiny-llama"
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if ".lora_magnitude_vector" in name:
            parameter.data.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        elif ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)  # tied ones stay tied
    wrapped.save_pretrained(folder, save_embedding_layers=saves_base)
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
