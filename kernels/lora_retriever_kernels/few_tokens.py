# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202 - Triton types the kernels' arguments itself
"""Products of few tokens with a weight, which take the time that the weight's bytes do.

cuBLAS's for these sizes fill each SM that they run on: whatever runs beside them has to wait. These leave room for the
adapters' kernels, begin while the launch before them drains, and hand the sum over parts of the inner dimension
(split-K) to whoever reads the product next.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_retriever_kernels.decoder.activation import ACTIVATIONS, activate
from lora_retriever_kernels.launch import pdl_options, wait_for_earlier_launches

__all__ = [
    "MAX_TOKENS",
    "ProductShape",
    "choose_gated_product",
    "choose_product",
    "launch_product",
    "multiply_few",
    "multiply_gated",
]

MAX_TOKENS = 64
_SMALL = 16  # tokens, of which two programs with narrow blocks fit an SM's shared memory
_LEAST_BUSY, _LEAST_BUSY_SMALL = 0.72, 0.36  # below this share of SMs at work the library's product is as fast
_LEAST_BUSY_GATED = 0.8  # in one round, two on an SM; two rounds were slower than two launches
_LEAST_PART, _GOOD_PART = 512, 2048  # features of a part: at least, and from when on more parts do no harm


class ProductShape(NamedTuple):
    """Launch shape of a product.

    Attributes:
        block_n: Outputs of a program.
        block_k: Features of one of its steps.
        num_parts: Programs that share the features of an output.
        num_stages: Steps whose loads are under way at once.
        num_warps: Warps of a program.
    """

    block_n: int
    block_k: int
    num_parts: int
    num_stages: int
    num_warps: int


def choose_product(num_tokens: int, weight: torch.Tensor, *, takes_parts: bool) -> ProductShape | None:
    """Choose how a product of `num_tokens` tokens with `weight` `[out_features, in_features]` is launched.

    Args:
        num_tokens: Rows of the other factor.
        weight: In bfloat16 or float16, contiguous.
        takes_parts: Whether whoever reads the product can add up its parts.

    Returns:
        None where the library's product is as good or better, and on all GPUs but Hopper's.
    """
    if not 0 < num_tokens <= MAX_TOKENS or not _can_read(weight):
        return None
    num_sms = _num_sms(weight.device)
    return _choose(tuple(weight.shape), num_sms, is_small=num_tokens <= _SMALL, takes_parts=takes_parts)


def choose_gated_product(num_tokens: int, weight: torch.Tensor) -> ProductShape | None:
    """Choose how a product with gate and up, and its activation, are launched together.

    Args:
        num_tokens: Rows of the other factor.
        weight: `[2 * width, in_features]`, gate above up; as in `choose_product`.

    Returns:
        None where two launches are as fast or faster, and on all GPUs but Hopper's. The blocks are of gate and up each.
    """
    if not _SMALL < num_tokens <= MAX_TOKENS or not _can_read(weight):
        return None
    return _choose_gated(weight.shape[0] // 2, weight.shape[1], _num_sms(weight.device))


def _choose_gated(width: int, features: int, num_sms: int) -> ProductShape | None:
    """The one shape, where its programs fill the SMs in one round."""
    shape, places = ProductShape(64, 64, 1, 3, 4), 2 * num_sms
    if width % shape.block_n or features % shape.block_k:
        return None
    return shape if _LEAST_BUSY_GATED * places <= width // shape.block_n <= places else None


def _can_read(weight: torch.Tensor) -> bool:
    """Whether a launch can read a weight: in half precision on a GPU, contiguous from a multiple of 16 bytes on."""
    is_laid_out = weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and is_laid_out


def _reads(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a launch beside `weight` can read `x`: its rows begin at multiples of 16 bytes, on the current device."""
    is_aligned = x.data_ptr() % 16 == 0 and (x.shape[0] == 1 or x.stride(0) * x.element_size() % 16 == 0)
    is_here = x.device == weight.device and x.device.index == torch.cuda.current_device()
    return x.dtype == weight.dtype and x.stride(1) == 1 and is_aligned and is_here


@functools.cache
def _num_sms(device: torch.device) -> int:
    """SMs of a Hopper GPU, on which the rule was measured; 0 of another."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major == 9 else 0


@functools.cache
def _choose(weight: tuple[int, int], num_sms: int, *, is_small: bool, takes_parts: bool) -> ProductShape | None:
    """The shape that keeps the largest share of the SMs busy, over all rounds of programs, if that is enough.

    Args:
        weight: Its sizes.
        num_sms: The device's SMs; 0 where the kernel is not to be used.
        is_small: Whether there are at most `_SMALL` tokens: then an SM holds two programs of narrow blocks as well.
        takes_parts: As in `choose_product`.
    """
    if not num_sms:
        return None
    width, features = weight
    shares: dict[ProductShape, float] = {}
    wide = ProductShape(128, 128, 1, 3, 8) if is_small else ProductShape(128, 64, 1, 4, 8)
    narrow = (ProductShape(64, 128, num_parts, 4, 4) for num_parts in ((1, 2, 4, 8) if takes_parts else (1,)))
    for shape in (wide, *narrow):
        num_parts, num_programs = shape.num_parts, width // shape.block_n * shape.num_parts
        if not num_programs or width % shape.block_n or features % (shape.block_k * num_parts):
            continue
        if num_parts > 1 and features < _LEAST_PART * num_parts:
            continue
        # Two rounds of parts, or of narrow blocks that fill an SM by themselves, were never faster.
        is_one_round = num_programs <= (2 if is_small else 1) * num_sms
        if shape is not wide and not is_one_round and (num_parts > 1 or not is_small):
            continue
        places = num_sms if shape is not wide and num_programs <= num_sms else 2 * num_sms
        shares[shape] = num_programs / (-(-num_programs // places) * places)

    def rank(shape: ProductShape) -> tuple[float, int]:
        parts = shape.num_parts
        return shares[shape], parts if features >= _GOOD_PART * parts else -parts

    best = max(shares, key=rank, default=None)
    least = _LEAST_BUSY_SMALL if is_small else _LEAST_BUSY
    return best if best is not None and shares[best] >= least else None


@triton.jit(do_not_specialize=["num_tokens"])
def _few_kernel(
    y, x, weight, bias, num_tokens,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, HAS_BIAS: tl.constexpr, NUM_PARTS: tl.constexpr, KIND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per block of outputs and part of the features, for all tokens: the weight is read once.

    `x` and `weight` are tensor descriptors: the copy engine (TMA) brings their blocks. With a `KIND` of activation a
    program has its rows of gate and its rows of up, and `WIDTH` is that of each.
    """
    first = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    n = first + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    PART: tl.constexpr = FEATURES // NUM_PARTS
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    wait_for_earlier_launches(PDL)
    for k in tl.range(part * PART, (part + 1) * PART, BLOCK_K, num_stages=NUM_STAGES):
        rows = weight.load([first, k])
        columns = tl.trans(x.load([0, k]))
        total = tl.dot(rows, columns, total, input_precision="ieee")
        if KIND is not None:
            up = tl.dot(weight.load([WIDTH + first, k]), columns, up, input_precision="ieee")
    if HAS_BIAS:
        total += tl.where(part == 0, tl.load(bias + n).to(tl.float32), 0.0)[:, None]
    if KIND is not None:
        if HAS_BIAS:
            up += tl.load(bias + WIDTH + n).to(tl.float32)[:, None]
        total = activate(total, KIND) * up
    target = y + (part * num_tokens + t[:, None]) * WIDTH + n[None, :]
    tl.store(target, tl.trans(total).to(y.dtype.element_ty), mask=(t < num_tokens)[:, None])


def launch_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: ProductShape,
    activation: str | None = None,
) -> torch.Tensor:
    """Multiply few tokens with a weight; see `multiply_few` and `multiply_gated`.

    Args:
        x: `[num_tokens, in_features]`, unit stride in a row; the rows begin at multiples of 16 bytes.
        weight: `[out_features, in_features]`, contiguous, of its dtype; its rows begin there, too.
        bias: `[out_features]`, or None.
        shape: How; its blocks and parts divide the weight's sizes, or with an activation those of its halves, and then
            there is one part.
        activation: One of `ACTIVATIONS`: of the first half of the outputs, times the second. None leaves them.

    Returns:
        `[num_tokens, out_features]` of the inputs' dtype, or half as wide with an activation; with several parts
        `[num_parts, num_tokens, out_features]` float32.
    """
    num_tokens, (width, features) = x.shape[0], weight.shape
    if activation is not None:
        width //= 2
    y = torch.empty(num_tokens, width, dtype=x.dtype, device=x.device)
    if shape.num_parts > 1:
        y = torch.empty(shape.num_parts, num_tokens, width, dtype=torch.float32, device=x.device)
    block_t = max(16, triton.next_power_of_2(num_tokens))
    _few_kernel[(width // shape.block_n, shape.num_parts)](
        y,
        TensorDescriptor(x, x.shape, [x.stride(0) if num_tokens > 1 else features, 1], [block_t, shape.block_k]),
        TensorDescriptor(weight, weight.shape, weight.stride(), [shape.block_n, shape.block_k]),
        bias if bias is not None else weight,
        num_tokens,
        WIDTH=width,
        FEATURES=features,
        HAS_BIAS=bias is not None,
        NUM_PARTS=shape.num_parts,
        KIND=None if activation is None else ACTIVATIONS[activation],
        BLOCK_T=block_t,
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        NUM_STAGES=shape.num_stages,
        num_warps=shape.num_warps,
        **pdl_options(x.device),
    )
    return y


def multiply_few(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, takes_parts: bool
) -> torch.Tensor | None:
    """Multiply few tokens with a weight, where that is faster than the library's product.

    Semantics:
        y = x @ weight.T + bias, summed in float32, for one launch shape in one order.

    Args:
        x: `[num_tokens, in_features]`, unit stride in a row.
        weight: `[out_features, in_features]`.
        bias: `[out_features]`, or None.
        takes_parts: Whether the caller can add up parts.

    Returns:
        `[num_tokens, out_features]` of the inputs' dtype; or parts of it, `[num_parts, num_tokens, out_features]`
        float32, whose sum is the product; or None where another's is as fast or faster: of more tokens, in another
        dtype, on another GPU than Hopper's or one that is not the current device; and where rows of `x` do not begin at
        multiples of 16 bytes.
    """
    shape = choose_product(x.shape[0], weight, takes_parts=takes_parts)
    if shape is None or not _reads(x, weight):
        return None
    return launch_product(x, weight, bias, shape)


def multiply_gated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor | None:
    """Multiply few tokens with gate and up, and the activation of the one with the other, where that is faster at once.

    Semantics:
        gate, up = (x @ weight.T + bias).chunk(2, 1); y = activation(gate) * up, rounded once.

    Args:
        x: `[num_tokens, in_features]`, unit stride in a row.
        weight: `[2 * width, in_features]`.
        bias: `[2 * width]`, or None.
        activation: One of `ACTIVATIONS`.

    Returns:
        `[num_tokens, width]` of the inputs' dtype; None where two launches are as fast or faster, as in `multiply_few`.
    """
    shape = choose_gated_product(x.shape[0], weight)
    if shape is None or not _reads(x, weight):
        return None
    return launch_product(x, weight, bias, shape, activation)
