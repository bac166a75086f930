"""Products of few tokens against the same in float64, and the rule that says how they are launched."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn.functional import gelu, silu

pytest.importorskip("triton")
from lora_retriever_kernels import few_tokens
from lora_retriever_kernels.decoder import gated_activation
from lora_retriever_kernels.few_tokens import (
    ProductShape,
    choose_gated_product,
    choose_product,
    launch_product,
    multiply_few,
    multiply_gated,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs it so",
)
DTYPES = (torch.float16, torch.bfloat16 if DEVICE == "cuda" else torch.float32)  # the interpreter knows no bfloat16
PLAIN, IN_PARTS = ProductShape(64, 128, 1, 4, 4), ProductShape(64, 128, 2, 4, 4)
GATED = ProductShape(64, 64, 1, 3, 4)
WIDE, WIDE_FEW = ProductShape(128, 64, 1, 4, 8), ProductShape(128, 128, 1, 3, 8)


def random(*sizes: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    """The same on every device."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [PLAIN, IN_PARTS, WIDE, WIDE_FEW], ids=["plain", "parts", "wide", "wide few"])
@pytest.mark.parametrize(("num_tokens", "has_bias"), [(1, True), (5, False), (17, True), (64, False)])
def test_against_float64(num_tokens: int, has_bias: bool, shape: ProductShape, dtype: torch.dtype) -> None:
    """Rows that lie apart, and a bias that is added once."""
    whole = random(num_tokens, 512, dtype=dtype)
    x, weight = whole[:, :256], random(128, 256, dtype=dtype, seed=1)
    bias = random(128, dtype=dtype, seed=2) if has_bias else None
    y = launch_product(x, weight, bias, shape)
    assert y.shape == ((num_tokens, 128) if shape.num_parts == 1 else (2, num_tokens, 128))
    assert y.dtype == (dtype if shape.num_parts == 1 else torch.float32)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    total = y.double() if y.dim() == 2 else y.double().sum(0)
    torch.testing.assert_close(total, expected, rtol=1e-2, atol=1e-5 if y.dim() == 3 else 0.1)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "has_bias", "name"), [(1, True, "gelu"), (17, False, "silu"), (64, True, "silu")]
)
def test_gate_and_up_with_their_activation(num_tokens: int, has_bias: bool, name: str, dtype: torch.dtype) -> None:
    """Against float64, over rows that lie apart; a token does not depend on the others."""
    whole = random(num_tokens, 512, dtype=dtype)
    x, weight = whole[:, :256], random(256, 256, dtype=dtype, seed=1) * 0.1
    bias = random(256, dtype=dtype, seed=2) if has_bias else None
    y = launch_product(x, weight, bias, GATED, name)
    gate, up = (x.double() @ weight.double().T + (0 if bias is None else bias.double())).chunk(2, 1)
    expected = (silu(gate) if name == "silu" else gelu(gate)) * up
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=0.02)
    if dtype != torch.float32:  # the interpreter's products in float32 are BLAS's
        assert torch.equal(launch_product(x[:1], weight, bias, GATED, name), y[:1])


@needs_triton
@pytest.mark.parametrize("shape", [PLAIN, IN_PARTS, WIDE, WIDE_FEW], ids=["plain", "parts", "wide", "wide few"])
def test_a_token_does_not_depend_on_the_others(shape: ProductShape) -> None:
    """In one launch shape: bit for bit, whatever their number, and from call to call."""
    x, weight = random(64, 256), random(128, 256, seed=1)
    y = launch_product(x, weight, None, shape)
    assert torch.equal(y, launch_product(x, weight, None, shape))
    for num_tokens in (1, 16, 30):
        assert torch.equal(launch_product(x[:num_tokens], weight, None, shape), y[..., :num_tokens, :])


@pytest.mark.parametrize(
    ("width", "features", "takes_parts", "few", "many"),
    [
        (6144, 4096, False, (64, 128, 1), (64, 128, 1)),  # q, k and v of Llama-3-8B; its others
        (4096, 4096, True, (64, 128, 2), (64, 128, 2)),
        (28672, 4096, False, (128, 128, 1), (128, 64, 1)),
        (4096, 14336, True, (64, 128, 4), (64, 128, 2)),
        (10240, 8192, False, (64, 128, 1), None),  # a second round of programs, some of them idle
        (16384, 2048, False, (64, 128, 1), None),
        (5120, 17408, True, (64, 128, 2), None),
        (2048, 2048, True, (64, 128, 4), (64, 128, 4)),
        (1024, 2048, True, (64, 128, 4), None),
        (2048, 2048, False, None, None),  # too few programs
        (64, 512, True, None, None),
        (0, 512, True, None, None),
        (6144, 4000, False, None, None),  # sizes that blocks do not divide
        (6100, 4096, False, None, None),
        (28700, 4096, False, None, None),
    ],
)
def test_the_rule(
    width: int, features: int, takes_parts: bool, few: tuple[int, int, int] | None, many: tuple[int, int, int] | None
) -> None:
    """Of 132 SMs as many as possible are busy, with up to 16 tokens and with more; else it is the library's product."""
    for is_small, expected in ((True, few), (False, many)):
        shape = few_tokens._choose((width, features), 132, is_small=is_small, takes_parts=takes_parts)
        assert (None if shape is None else shape[:3]) == expected
        if shape is not None:
            assert width % shape.block_n == 0
            assert features % (shape.block_k * shape.num_parts) == 0
        assert few_tokens._choose((width, features), 0, is_small=is_small, takes_parts=takes_parts) is None


@pytest.mark.parametrize(
    ("width", "features", "is_chosen"),
    [
        (14336, 4096, True),  # Llama-3-8B
        (17408, 5120, False),  # a second round
        (8192, 2048, False),  # one program on each SM
        (14336, 4000, False),
        (14300, 4096, False),
    ],
)
def test_the_rule_of_gate_and_up_at_once(width: int, features: int, is_chosen: bool) -> None:
    """One round of programs, two on nearly every SM."""
    assert (few_tokens._choose_gated(width, features, 132) is not None) == is_chosen
    assert few_tokens._choose_gated(width, features, 0) is None


def test_what_is_left_to_the_library() -> None:
    """Many tokens, other dtypes, weights on a CPU."""
    weight = torch.empty(6144, 4096, dtype=torch.bfloat16, device="meta")
    assert choose_product(8, weight, takes_parts=False) is None
    assert multiply_few(random(8, 256), random(128, 256).cpu(), None, takes_parts=True) is None
    assert choose_gated_product(32, weight) is None
    assert multiply_gated(random(32, 256), random(128, 256).cpu(), None, "silu") is None
    if DEVICE == "cuda":
        weight = torch.zeros(6144, 4096, dtype=torch.bfloat16, device="cuda")
        for num_tokens in (0, 16, few_tokens.MAX_TOKENS + 1):
            assert choose_gated_product(num_tokens, weight.new_zeros(28672, 4096)) is None
        for num_tokens in (0, few_tokens.MAX_TOKENS + 1):
            assert choose_product(num_tokens, weight, takes_parts=False) is None
        assert choose_product(8, weight.float(), takes_parts=False) is None
        assert choose_product(8, weight.T, takes_parts=False) is None
        x = torch.zeros(8, 4096, dtype=torch.bfloat16, device="cuda")
        assert multiply_few(x, weight, None, takes_parts=False) is not None
        assert multiply_few(x.half(), weight, None, takes_parts=False) is None
        odd = torch.zeros(8, 4100, dtype=torch.bfloat16, device="cuda")
        for apart in (odd[:, :4096], odd.view(-1)[4:].as_strided((8, 4096), (4096, 1))):  # rows begin anywhere
            assert multiply_few(apart, weight, None, takes_parts=False) is None
        assert multiply_few(odd[:1, :4096], weight, None, takes_parts=False) is not None
        assert multiply_few(x.new_zeros(4096, 8).T, weight, None, takes_parts=False) is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(("width", "features"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
@pytest.mark.parametrize("num_tokens", [1, 8, 33, 64])
def test_the_sizes_of_a_model(num_tokens: int, width: int, features: int) -> None:
    """As near to float64 as the library's product, in a graph behind another launch of the same kind."""
    x = random(num_tokens, features, dtype=torch.bfloat16)
    weight = random(width, features, dtype=torch.bfloat16, seed=1) * features**-0.5
    expected = x.double() @ weight.double().T

    def run() -> torch.Tensor:
        y = multiply_few(x * 2, weight, None, takes_parts=True)
        assert y is not None
        again = multiply_few(x, weight, None, takes_parts=True)
        assert again is not None
        return again if again.dim() == 2 else again.sum(0)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    graph.replay()
    theirs = torch.nn.functional.linear(x, weight).double()
    assert (y.double() - expected).norm() <= 1.05 * (theirs - expected).norm()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("num_tokens", [17, 64])
def test_the_gated_product_of_a_model(num_tokens: int) -> None:
    """As near to float64 as product and activation one after the other, in a graph."""
    x = random(num_tokens, 4096, dtype=torch.bfloat16)
    weight = random(28672, 4096, dtype=torch.bfloat16, seed=1) / 64
    gate, up = (x.double() @ weight.double().T).chunk(2, 1)
    expected = silu(gate) * up
    assert multiply_gated(x, weight, None, "silu") is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply_gated(x * 1, weight, None, "silu")
    graph.replay()
    assert y is not None
    theirs = gated_activation(torch.nn.functional.linear(x, weight), "silu").double()
    assert (y.double() - expected).norm() <= 1.05 * (theirs - expected).norm()
