"""transformers' `generate()` and PEFT's mixed batch: the same model, the same prompts, the same run of the script."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from engine_gpu.bench import DEVICE, RANK, TARGETS, Bench, synchronize
from engine_gpu.correctness import load_into_peft

if TYPE_CHECKING:
    from typing import Any


def peers(bench: Bench) -> None:
    """One run each after a short one; PEFT's is shortened, since every adapter of its batch runs by itself."""
    num_short = 2 if bench.is_tiny else 8
    model = bench.plain
    ids = torch.tensor([bench.prompt(i) for i in range(bench.batch)], device=DEVICE)
    _generate(model, ids, 2)
    bench.put("tok/s generate(), base", _rate(model, ids, bench.num_out))

    from peft import LoraConfig, get_peft_model

    few = bench.adapters[:8]
    peft_model: Any = None
    for adapter in few:
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS))
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=adapter.name, autocast_adapter_dtype=False)
        else:
            peft_model.add_adapter(adapter.name, config)
        load_into_peft(peft_model, adapter.name, adapter)
    peft_model.eval()
    for num in (1, len(few)):
        names = [few[i % num].name for i in range(bench.batch)]
        _generate(peft_model, ids, 2, adapter_names=names)
        bench.put(
            f"tok/s PEFT mixed batch, {num} adapters, one per request, {num_short} tokens out",
            _rate(peft_model, ids, num_short, adapter_names=names),
        )
    peft_model.unload()


def _rate(model: Any, ids: torch.Tensor, num_tokens: int, **options: Any) -> int:
    start = time.perf_counter()
    _generate(model, ids, num_tokens, **options)
    return round(ids.shape[0] * num_tokens / (time.perf_counter() - start))


def _generate(model: Any, ids: torch.Tensor, num_tokens: int, **options: Any) -> None:
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip
    synchronize()
