"""Every Triton kernel compiles for the GPUs it is meant for, on a machine that has none.

The interpreter runs kernels as Python: it does not see that two branches give a name two types, nor that an instruction
is missing on an older GPU. Here the launches are caught, and each is compiled down to machine code.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lora_retriever_kernels.lora import (
    LoraBatch,
    LoraPacking,
    LoraRows,
    LoraSlice,
    LoraStack,
    add_lora,
    lora_delta,
    lora_expand,
    lora_expand_gated,
    lora_mix,
    lora_shrink,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run where there is a GPU"),
]

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


class Compiler:
    """Stands in for launches: compiles each kernel once for each of its signatures."""

    def __init__(self, capability: int) -> None:
        self.target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        self.known: dict[str, int] = {}  # bytes of machine code by kernel and signature
        self.most_shared = 0  # bytes of shared memory of a program

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """Take what `JITFunction.run` takes."""
        given = dict(zip(kernel.arg_names, args, strict=False))
        given |= {name: kwargs.pop(name) for name in kernel.arg_names if name in kwargs}
        signature, constants = {}, {}
        for index, param in enumerate(kernel.params):
            value = given.get(param.name, param.default)
            kind = self._kind(param, value)
            signature[param.name] = kind
            if kind == "constexpr":
                constants[(index,)] = value
        key = f"{kernel.fn.__name__} {signature} {constants} {kwargs}"
        if key not in self.known:
            source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=self.target, options=kwargs)
            self.known[key] = len(compiled.asm["cubin"])
            self.most_shared = max(self.most_shared, compiled.metadata.shared)

    @staticmethod
    def _kind(param: Any, value: Any) -> str:
        if param.is_constexpr or value is None:
            return "constexpr"
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[value.dtype]}"
        if isinstance(value, triton.tools.tensor_descriptor.TensorDescriptor):
            return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
        if isinstance(value, float):
            return "fp32"
        return "constexpr" if value == 1 and not param.do_not_specialize else "i32"


@pytest.fixture
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """Catches launches; on Hopper with programmatic dependent launch, as on the device."""
    from lora_retriever_kernels import chosen_tokens, few_tokens
    from lora_retriever_kernels.attention import decode, prefill, write
    from lora_retriever_kernels.decoder import activation, norm
    from lora_retriever_kernels.lora import expand, shrink

    made = Compiler(request.param)
    options = {"PDL": True, "launch_pdl": True} if request.param >= 90 else {"PDL": False}
    for module in (expand, shrink, decode, prefill, write, activation, norm, few_tokens, chosen_tokens):
        monkeypatch.setattr(module, "pdl_options", lambda _: options)

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        made.launch(kernel, *args, **kwargs)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    yield made
    assert made.known
    assert all(size > 0 for size in made.known.values())


HOPPER, AMPERE = 90, 80


@pytest.mark.parametrize(
    ("compiler", "num_tokens", "k"), [(HOPPER, 1, 1), (AMPERE, 64, 3), (HOPPER, 512, 3)], indirect=["compiler"]
)
def test_adapters(compiler: Compiler, num_tokens: int, k: int) -> None:
    """Single tokens, tiles and prompts; with gains and one-hot inputs; from packing to the outputs."""
    dtype = torch.bfloat16
    rows = LoraRows(8, 32, "cpu")
    stack = LoraStack(rows, 72, 256, (256, 64, 64), dtype)
    slices = [LoraSlice(torch.randn(16, 256), torch.randn(n, 16), 0.5, torch.ones(n)) for n in (256, 64, 64)]
    for slot in range(4):
        rows.assign(slot, 18 * slot + 1, 16, 18 * slot)
    packing = LoraPacking([stack], "triton")
    flat = torch.empty(packing.size(17, slices), dtype=dtype)
    packing.pack(17, slices, flat)
    packing.load(0, 0, 17, slices, flat)
    batch = LoraBatch(rows, num_tokens, k, backend="triton")
    mapping, weights = torch.zeros(num_tokens, k, dtype=torch.int32), torch.ones(num_tokens, k)
    x, y = torch.randn(num_tokens, 256).to(dtype), torch.randn(num_tokens, 384).to(dtype)
    for has_gains in (False, True):
        batch.update(mapping, weights, 4, has_gains=has_gains)
        v = lora_shrink(x, stack, batch)
        lora_expand(y, v, stack, batch, lora_mix(v, stack, batch), torch.zeros(384, dtype=dtype))
    for batch.splits_rows in (False, True):
        lora_delta(v, stack, batch, lora_mix(v, stack, batch), takes_parts=True)
    add_lora(y, torch.zeros(num_tokens, dtype=torch.int64), stack, batch)
    names = {key.split()[0] for key in compiler.known}
    expand = {"_expand_token_kernel"} if batch.block_m == 1 else {"_mix_kernel", "_expand_tile_kernel"}
    loading = {"_unpack_kernel", "_unpack_gains_kernel"}
    assert names == {"_sort_kernel", "_tile_kernel", "_shrink_kernel", "_look_up_kernel", *loading, *expand}


@pytest.mark.parametrize("compiler", [HOPPER, AMPERE], indirect=True)
def test_adapters_of_an_activation(compiler: Compiler) -> None:
    """Of two modules and of one that is both, for adapters that share an input and for wide ones."""
    dtype = torch.bfloat16
    rows = LoraRows(8, 256, "cpu")
    batch = LoraBatch(rows, 2048, 3, backend="triton")
    mapping, weights = torch.zeros(2048, 3, dtype=torch.int32), torch.ones(2048, 3)
    x, y = torch.randn(2048, 256).to(dtype), torch.randn(2048, 256).to(dtype)
    for rank, out_features in ((4, (128, 128)), (256, (256,))):
        rows.assign(0, 0, rank)
        stack = LoraStack(rows, 256, 256, out_features, dtype)
        batch.update(mapping, weights)
        lora_expand_gated(y, stack, batch, lora_mix(lora_shrink(x, stack, batch), stack, batch), "silu")
    names = {key.split()[0] for key in compiler.known}
    assert names == {"_sort_kernel", "_tile_kernel", "_shrink_kernel", "_mix_kernel", "_expand_gated_kernel"}


@pytest.mark.parametrize("compiler", [HOPPER], indirect=True)
def test_attention_and_layers(compiler: Compiler) -> None:
    """Writing, decoding and prefill over pages; norms and activations; with what adapters add, and without."""
    from lora_retriever_kernels.attention import (
        Pages,
        Projected,
        QueryKeyNorm,
        Rotary,
        attend_decode,
        attend_prefill,
        write_kv,
    )
    from lora_retriever_kernels.decoder import RmsNorm, add_rms_norm, gated_activation, rms_norm

    dtype = torch.bfloat16
    num_tokens, heads, kv_heads, dim = 4, 8, 2, 64
    query, key, value = (torch.randn(num_tokens, n, dim).to(dtype) for n in (heads, kv_heads, kv_heads))
    keys, values = (torch.zeros(8, 16, kv_heads, dim, dtype=dtype) for _ in range(2))
    long = torch.arange(num_tokens)
    pages = Pages(torch.zeros(2, 4, dtype=torch.int32), torch.zeros_like(long), long)
    rotary = Rotary(*(torch.randn(num_tokens, dim).to(dtype) for _ in range(2)))
    weight = torch.ones(dim, dtype=dtype)
    norm = QueryKeyNorm(weight, weight, 1e-5, 0.0)
    out = torch.empty_like(query)
    width = (heads + 2 * kv_heads) * dim
    for delta in (None, torch.randn(num_tokens, width).to(dtype), torch.randn(4, num_tokens, width).to(dtype)):
        write_kv(query, key, value, keys, values, pages, rotary, norm, delta)
        write_kv(query, key, value, keys, values, pages, delta=delta)
        for num_splits in (1, 4):
            projected = Projected(key, value, rotary, norm, delta)
            options = {"scaling": 0.1, "num_splits": num_splits}
            attend_decode(out, query, keys, values, pages, long, projected, **options)
            attend_decode(out, query, keys, values, pages, long, projected._replace(norm=None), **options)
    sinks = torch.randn(heads).to(dtype)
    for window, chunk, softcap, sink in ((None, None, None, None), (8, None, None, sinks), (None, 8, 30.0, None)):
        options = {"sliding_window": window, "chunk_size": chunk, "softcap": softcap, "scaling": 0.1, "sinks": sink}
        attend_decode(out, query, keys, values, pages, long, num_splits=4, **options)
        attend_prefill(out, query, keys, values, pages, torch.tensor([[0, 4]]), **options)
    for many, num_splits in ((512, 1), (64, 4)):  # of which several are on every SM
        attend_decode(out, query, keys, values, pages, long.repeat(many // 4), scaling=0.1, num_splits=num_splits)
    x = torch.randn(num_tokens, 2 * dim).to(dtype)
    wide = RmsNorm(torch.ones(2 * dim, dtype=dtype), 1e-5, 0.0)
    for delta in (None, x.clone(), x.repeat(4, 1, 1)):
        rms_norm(x, wide, delta)
        add_rms_norm(x, x, wide, wide, delta)
        for name in ("silu", "gelu", "gelu_pytorch_tanh"):
            gated_activation(x, name, delta)
    assert {key.split()[0] for key in compiler.known} == {
        "_write_kernel", "_decode_kernel", "_combine_kernel", "_prefill_kernel", "_norm_kernel", "_activation_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("compiler", [HOPPER], indirect=True)
def test_products_of_few_tokens(compiler: Compiler) -> None:
    """One token and many, in parts and in wide blocks, with a bias and without; an SM keeps room for others."""
    from lora_retriever_kernels.few_tokens import ProductShape, launch_product

    weight = torch.zeros(256, 4096, dtype=torch.bfloat16)
    for num_tokens in (1, 64):
        x = torch.zeros(num_tokens, 4096, dtype=torch.bfloat16)
        launch_product(x, weight, None, ProductShape(64, 128, 2, 4, 4))
        wide = ProductShape(128, 128, 1, 3, 8) if num_tokens == 1 else ProductShape(128, 64, 1, 4, 8)
        launch_product(x, weight, weight[:, 0].contiguous(), wide)
    for num_tokens, block_k, num_warps in ((1, 128, 4), (64, 64, 4)):
        x = torch.zeros(num_tokens, 4096, dtype=torch.bfloat16)
        launch_product(x, weight, None, ProductShape(64, block_k, 1, 3, num_warps), "silu")
    assert len(compiler.known) == 6
    assert compiler.most_shared <= (128 << 10) + 64  # barriers of the copies


@pytest.mark.parametrize("compiler", [HOPPER, AMPERE], indirect=True)
def test_greedy_choices(compiler: Compiler) -> None:
    """Of few columns and of many, in every dtype that models compute in; and taken by the next step."""
    from lora_retriever_kernels.chosen_tokens import choose_greedily, fill_in_pending

    chosen = torch.zeros(4, 2, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (320, 128_256):
            choose_greedily(chosen, torch.zeros(4, width, dtype=dtype), width)
    for num_tokens in (1, 64):
        fill_in_pending(*torch.zeros(2, num_tokens, dtype=torch.int64), chosen)
    assert {key.split()[0] for key in compiler.known} == {"_part_kernel", "_choice_kernel", "_pending_kernel"}
