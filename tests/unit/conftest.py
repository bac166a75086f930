"""A chat model without a model: a real pool, retriever and LangChain around an engine that answers from a function."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from langchain_lora_retriever.engine import Delta, Generation, TokenLogprob, Usage
from langchain_lora_retriever.engine.adapter_fit import AdapterFit
from langchain_lora_retriever.errors import EngineDeadError, PromptTooLongError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from langchain_lora_retriever import AdapterPool, ChatLoraRetriever

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLES = {
    "sql": ["How many users signed up in May?", "Select the names of all users from the table."],
    "dates": ["Write the date 3 March 2021 in ISO format.", "Convert the date 7/8/19 to ISO."],
    "french": ["Translate the sentence into French.", "How do you say good morning in French?"],
}


class WordEncoder:
    """Embeds a text by the words in it."""

    name = "words"
    dimension = 512

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return hashed word counts `[n, 512]`, L2-normalised."""
        rows = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word, count in Counter(re.findall(r"\w+", text.lower())).items():
                row[int.from_bytes(word.encode()[-6:], "big") % self.dimension] += count
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


class FakeEngine:
    """Stands in for `EngineWorker`: `answer(prompt, adapters)` says what a request gets, three characters a delta."""

    name = "fake"
    max_model_len = 2048
    max_num_seqs = 8

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.answer: Callable[[str, list[str]], str] = lambda prompt, adapters: "The answer."
        shapes = {"q_proj": (8, 8)}
        fit = AdapterFit("fake/base", shapes, max_rank=256, num_rows=1024, max_loras=64)
        self.check_adapter, self.missing_modules = fit.check, fit.missing
        self.base_names = frozenset({"fake/base"})
        self.delay = 0.0
        self.is_dead = False
        self.requests: list[dict[str, Any]] = []
        self.num_running = self.most_running = self.num_aborted = 0
        self._lock = threading.Lock()

    def submit(self, prompt_token_ids: Any, sampling: Any, adapters: Any = (), *, constraint: Any = None) -> Generation:
        """Answer in a thread."""
        if self.is_dead:
            raise EngineDeadError("The engine has stopped.")
        if len(prompt_token_ids) >= self.max_model_len:
            raise PromptTooLongError(f"The prompt has {len(prompt_token_ids)} tokens.")
        prompt = self.tokenizer.decode(prompt_token_ids)
        names = [adapter.name for adapter, _ in adapters]
        self.requests.append(
            {"prompt": prompt, "ids": list(prompt_token_ids), "sampling": sampling, "adapters": adapters,
             "names": names, "constraint": constraint}
        )  # fmt: skip
        generation = Generation(on_abort=self._on_abort)
        with self._lock:
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
        usage = Usage(len(prompt_token_ids), 2, 5)
        threading.Thread(target=self._run, args=(generation, prompt, names, sampling, usage), daemon=True).start()
        return generation

    def _run(self, generation: Generation, prompt: str, names: list[str], sampling: Any, usage: Usage) -> None:
        try:
            text = self.answer(prompt, names)
        except Exception as error:  # noqa: BLE001 - a scripted failure reaches the caller, as a step's would
            generation.fail(error)
            text = ""
        pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        logprobs = (TokenLogprob(5, -0.5, ((5, -0.5), (6, -1.5))),) if sampling.logprobs is not None else None
        for piece in pieces:
            time.sleep(self.delay)
            if generation.is_done:
                break
            generation.put(Delta(piece, (5,), logprobs, None, None))
        with self._lock:
            self.num_running -= 1
        generation.put(Delta("", (), None, "stop", usage))

    def _on_abort(self) -> None:
        self.num_aborted += 1


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with control tokens and a ChatML template."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The fake engine, in place of every chat model's."""
    from langchain_lora_retriever import ChatLoraRetriever

    fake = FakeEngine(tokenizer)
    monkeypatch.setattr(ChatLoraRetriever, "_engine", lambda self: fake)
    return fake


@pytest.fixture
def write_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Write a PEFT checkpoint of one module."""

    def write(name: str, *, size: int = 8, seed: int = 0) -> Path:
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        torch.manual_seed(seed + sum(map(ord, name)))
        prefix = "base_model.model.q_proj"
        tensors = {f"{prefix}.lora_A.weight": torch.randn(2, size), f"{prefix}.lora_B.weight": torch.randn(size, 2)}
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return write


@pytest.fixture
def pool(write_adapter: Callable[..., Path]) -> AdapterPool:
    """A pool in memory of three adapters."""
    from langchain_lora_retriever import AdapterPool

    pool = AdapterPool()
    for name, samples in SAMPLES.items():
        pool.add(name, write_adapter(name), samples=samples)
    return pool


@pytest.fixture
def llm(engine: FakeEngine, pool: AdapterPool) -> ChatLoraRetriever:
    """A chat model on the fake engine."""
    from langchain_lora_retriever import ChatLoraRetriever, LoraRetriever

    return ChatLoraRetriever(base_model="fake/base", retriever=LoraRetriever(pool, WordEncoder()))
