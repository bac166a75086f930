"""Quantised modules are wrapped as they are: an adapter's output is added to whatever they compute."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AwqConfig, BitsAndBytesConfig, GPTQConfig, TorchAoConfig

from four_bits import AWQ_ORDER, MAKERS, save_four_bits
from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker, load_base_model
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.types import Adapter, SamplingParams
from makers import make_adapter, make_checkpoint, make_tiny_model, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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


class FourBitLinear(nn.Module):
    """A matrix in GPTQ's layout or AWQ's, read without a package: integers in eights, scales, zero points."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor

    def __init__(self, linear: nn.Linear, method: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.method = linear.in_features, linear.out_features, method
        for name, tensor in MAKERS[method](linear.weight, 32).items():
            self.register_buffer(name, tensor)

    def matrix(self) -> torch.Tensor:
        """What it multiplies by `[in_features, out_features]`, fp32."""
        places = torch.arange(0, 32, 4, device=self.qweight.device)
        zeros = ((self.qzeros[..., None] >> places) & 15).flatten(-2)
        if self.method == "gptq":
            numbers = ((self.qweight[:, None] >> places[:, None]) & 15).flatten(0, 1)
            zeros = zeros + 1
        else:
            order = torch.tensor(AWQ_ORDER).argsort()
            numbers = ((self.qweight[..., None] >> places) & 15)[..., order].flatten(-2)
            zeros = zeros.unflatten(-1, (-1, 8))[..., order].flatten(-2)
        scales = self.scales.float()
        return (numbers - zeros.repeat_interleave(32, 0)) * scales.repeat_interleave(32, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dequantise, then multiply."""
        return x @ self.matrix().to(x.dtype)


class Int8Weight(torch.Tensor):
    """A weight that is a tensor of its own kind, as torchao's are, within a plain `nn.Linear`: it has no numbers."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor) -> Self:
        """As wide as the weight, of which it keeps eight bits."""
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        made.scales = weight.abs().amax(1, keepdim=True) / 127
        made.numbers = (weight / made.scales).round().to(torch.int8)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Multiply, and nothing else with numbers."""
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.numbers.to(x.dtype) * weight.scales, *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Only what makes a parameter of it."""
        if func in {torch.ops.aten.detach.default, torch.ops.aten.alias.default}:
            return args[0]
        raise NotImplementedError(f"{func} of quantised weights")


def quantise(model: Any, make: Any) -> Any:
    """Replace the decoder's linear modules."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, make(module))
    return model.to(DEVICE)


@pytest.mark.parametrize("method", MAKERS)
def test_layers_whose_weights_are_buffers_may_be_fused(method: str) -> None:
    """Their modules have no parameters at all."""
    pytest.importorskip("triton")
    from langchain_lora_retriever.engine.model.fused_layers import num_fusable_layers

    model = quantise(make_tiny_model("llama"), lambda linear: FourBitLinear(linear, method))
    attention = dict.fromkeys(range(model.config.num_hidden_layers))
    assert num_fusable_layers(model, SimpleNamespace(attention=attention)) == len(attention)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_in_the_layouts_of_gptq_and_awq(method: str) -> None:
    """Packed integers are no dtype to compute in; rounded to nearest, weights are half a step away at most."""
    model = make_tiny_model("llama")
    adapters = [make_adapter(model, f"q{i}") for i in range(2)]
    before = model.model.layers[0].mlp.down_proj.weight
    check(quantise(model, partial(FourBitLinear, method=method)), adapters)
    got = model.model.layers[0].mlp.down_proj
    farthest = (got.matrix().T - before.to(DEVICE)).abs().amax()
    assert 0 < farthest <= 0.55 * got.scales.amax()


def test_dora_over_weights_that_are_no_linear_modules() -> None:
    """Its norms are those of the weights that the modules multiply by, which are read through their own forward."""
    model = make_tiny_model("llama")
    adapters = [make_adapter(model, "dora", is_dora=True), make_adapter(model, "plain")]
    check(quantise(model, Int8Linear), adapters)


def test_weights_of_their_own_kind_in_plain_linear_modules() -> None:
    """They must not be laid side by side, copied or moved as if they held numbers."""
    model = make_tiny_model("llama").to(DEVICE)
    adapters = [make_adapter(model, f"q{i}") for i in range(2)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            module.weight = nn.Parameter(Int8Weight(module.weight.data), requires_grad=False)
    check(model, adapters)
    assert type(model.model.layers[0].self_attn.q_proj.weight) is Int8Weight


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


def load_quantised(folder: Path, make_config: Callable[[], Any]) -> BaseModel:
    """A small model, saved and loaded as transformers quantises it."""
    make_tiny_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return load_base_model(folder, quantization_config=make_config())


def int8_weights() -> Any:
    """Torchao's int8, of weights alone: it runs anywhere."""
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def test_torchao_weights_that_are_tensors_of_their_own_kind(tmp_path: Path) -> None:
    """Within plain `nn.Linear` modules, which must not be laid side by side as if they held numbers."""
    base = load_quantised(tmp_path, int8_weights)
    projection = base.model.model.layers[0].self_attn.q_proj
    assert type(projection) is nn.Linear
    kind = type(projection.weight)
    assert kind is not nn.Parameter
    check(base.model, [make_adapter(base.model, f"q{i}") for i in range(2)])
    assert type(projection.weight) is kind


def test_torchao_weights_answer_as_peft_does(tmp_path: Path) -> None:
    """The adapter is PEFT's own, loaded by PEFT over the quantised model, and by the engine from its folder."""
    base = load_quantised(tmp_path / "model", int8_weights)
    folder = make_checkpoint(tmp_path / "adapter", model=make_tiny_model("llama"), target_modules="all-linear")
    adapted = PeftModel.from_pretrained(base.model, folder)
    expected = [generate(adapted, prompt, []) for prompt in PROMPTS]
    adapted.unload()
    adapter = read_adapter(folder)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    with EngineWorker(base, CONFIG) as worker:
        running = [worker.submit(prompt, sampling, [(adapter, 1.0)]) for prompt in PROMPTS]
        assert [list(g.result(120).token_ids) for g in running] == expected


def load_four_bits(folder: Path, method: str, dtype: torch.dtype) -> BaseModel:
    """A checkpoint of a small model, as transformers and gptqmodel load it, by kernels that take no compiler."""
    pytest.importorskip("gptqmodel")
    save_four_bits(make_tiny_model("llama"), folder, method)
    make_tokenizer().save_pretrained(folder)
    on_gpu = DEVICE == "cuda"
    config: Any = GPTQConfig(bits=4, backend="triton" if on_gpu else "gptq_torch_aten")
    if method == "awq":
        config = AwqConfig(backend="gemm_triton" if on_gpu else "torch_awq")
    return load_base_model(folder, quantization_config=config, dtype=dtype)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_checkpoints_of_gptq_and_awq_answer_as_peft_does(method: str, tmp_path: Path) -> None:
    """The adapter is PEFT's own, loaded by PEFT over the quantised model, and by the engine from its folder."""
    base = load_four_bits(tmp_path / "model", method, torch.float32)
    plain = make_tiny_model("llama")
    folder = make_checkpoint(tmp_path / "adapter", model=plain, target_modules="all-linear")
    without = [generate(base.model, prompt, []) for prompt in PROMPTS]
    adapted = PeftModel.from_pretrained(base.model, folder)
    expected = [generate(adapted, prompt, []) for prompt in PROMPTS]
    adapted.unload()
    adapter, dora = read_adapter(folder), make_adapter(plain, "dora", is_dora=True)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    with EngineWorker(base, CONFIG) as worker:
        running = [worker.submit(prompt, sampling, [(adapter, 1.0)]) for prompt in PROMPTS]
        running += [worker.submit(prompt, sampling) for prompt in PROMPTS]
        assert [list(g.result(120).token_ids) for g in running] == expected + without
        assert len(worker.submit(PROMPTS[0], sampling, [(dora, 1.0)]).result(120).token_ids) == 12


def fused_answers(base: BaseModel) -> list[list[int]]:
    """What the engine answers on a GPU, with all layers fused and steps captured."""
    config = EngineConfig(max_num_seqs=4, kv_cache_bytes=2 << 20, lora_cache_bytes=4 << 20, captured_ranks=(16,))
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    with EngineWorker(base, config) as worker:
        executor = worker.core.runner.executor
        assert (executor.name, executor.is_fused, bool(executor.graphs)) == ("triton", True, True)
        running = [worker.submit(prompt, sampling) for prompt in PROMPTS]
        return [list(g.result(120).token_ids) for g in running]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_layers_of_gptq_and_awq_run_fused_and_captured(method: str, tmp_path: Path) -> None:
    """In fp16, which is what AWQ's kernels compute in; random weights have near-ties, so first tokens are compared."""
    base = load_four_bits(tmp_path, method, torch.float16)
    expected = [generate(base.model, prompt, [])[0] for prompt in PROMPTS]
    assert [token_ids[0] for token_ids in fused_answers(base)] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", ["int8", "float8", "nf4"])
def test_quantised_layers_run_fused_and_captured(scheme: str, tmp_path: Path) -> None:
    """On the Triton backend, in bf16; tokens are those of the quantised model's own `generate`."""

    def make_config() -> Any:
        if scheme == "nf4":
            pytest.importorskip("bitsandbytes")
            return BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
        quantization = pytest.importorskip("torchao.quantization")
        kinds = {"int8": quantization.Int8WeightOnlyConfig, "float8": quantization.Float8WeightOnlyConfig}
        return TorchAoConfig(kinds[scheme]())

    make_tiny_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    base = load_base_model(tmp_path, quantization_config=make_config(), dtype=torch.float32)
    expected = [generate(base.model, prompt, []) for prompt in PROMPTS]
    assert fused_answers(base) == expected
