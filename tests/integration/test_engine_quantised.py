"""Quantised modules are wrapped as they are: an adapter's output is added to whatever they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.types import Adapter, SamplingParams
from makers import make_adapter, make_tiny_model, make_tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = EngineConfig(max_num_seqs=4, kv_cache_bytes=2 << 20, lora_cache_bytes=4 << 20)
PROMPTS = [[5, 17, 99, 4, 250, 31, 8, 77], [9, 200, 13, 42], list(range(10, 50))]


class Int8Linear(nn.Module):
    """Weights as int8 with a scale for each output, as GPTQ, AWQ and HQQ keep theirs: no `weight`, no `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dequantise, then multiply."""
        assert isinstance(self.qweight, torch.Tensor)
        assert isinstance(self.scales, torch.Tensor)
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales)


def quantise(model: Any, make: Any) -> Any:
    """Replace the decoder's linear modules."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, make(module))
    return model.to(DEVICE)


def generate(model: Any, prompt: list[int], adapters: list[tuple[Adapter, float]]) -> list[int]:
    """What the model answers with the adapters' outputs added by hooks."""

    def hook_for(path: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            base, total = output, output
            for adapter, share in adapters:
                w = adapter.weights[path]
                added = w.scaling * (inputs[0] @ w.lora_A.to(DEVICE).T) @ w.lora_B.to(DEVICE).T
                if w.magnitude is not None:
                    module = model.get_submodule(path)
                    updated = module.qweight * module.scales + w.scaling * (w.lora_B @ w.lora_A).to(DEVICE)
                    gain = w.magnitude.to(DEVICE) / updated.norm(dim=1)
                    added = (gain - 1) * base + gain * added
                total = total + share * added
            return total

        return hook

    paths = adapters[0][0].weights if adapters else {}
    handles = [model.get_submodule(path).register_forward_hook(hook_for(path)) for path in paths]
    ids = torch.tensor([prompt], device=DEVICE)
    out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    for handle in handles:
        handle.remove()
    return list(out[0, len(prompt) :].tolist())


def check(model: Any, adapters: list[Adapter]) -> None:
    """Base, selection and mixture in one batch give the model's own answers, and nobody else's."""
    kinds = [[], [(adapters[0], 1.0)], [(adapters[0], 0.6), (adapters[1], 0.4)]]
    expected = [generate(model, prompt, kind) for prompt, kind in zip(PROMPTS, kinds, strict=True)]
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    with EngineWorker(BaseModel(model, make_tokenizer(), "tiny"), CONFIG) as worker:
        running = [worker.submit(prompt, sampling, kind) for prompt, kind in zip(PROMPTS, kinds, strict=True)]
        assert [list(g.result(120).token_ids) for g in running] == expected
        worker.check_integrity()
    assert generate(model, PROMPTS[0], []) == expected[0], "the model was given back as it was"


def test_weights_that_are_no_linear_modules() -> None:
    """Modules with `in_features`, `out_features` and a forward of their own, on whichever device there is."""
    model = make_tiny_model("llama")
    adapters = [make_adapter(model, f"q{i}") for i in range(2)]
    check(quantise(model, Int8Linear), adapters)


def test_dora_over_weights_that_are_no_linear_modules() -> None:
    """Its norms are those of the weights that the modules multiply by, which are read through their own forward."""
    model = make_tiny_model("llama")
    adapters = [make_adapter(model, "dora", is_dora=True), make_adapter(model, "plain")]
    check(quantise(model, Int8Linear), adapters)


def test_bitsandbytes_four_bit_layers() -> None:
    """`Linear4bit` is a subclass of `nn.Linear` whose weight is packed: it must not be taken for a plain one."""
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> Any:
        quantised = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        quantised.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return quantised

    model = make_tiny_model("llama")
    adapters = [make_adapter(model, f"q{i}") for i in range(2)]
    check(quantise(model, make), adapters)
