"""Which modules compute a product with a matrix of weights, and which share an input: noted while a model runs."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

__all__ = [
    "LinearCall",
    "LinearGroup",
    "OwnProduct",
    "Vocabulary",
    "find_vocabulary",
    "group_calls",
    "is_inner",
    "recorded_products",
]


class LinearGroup(NamedTuple):
    """Linear modules that were called in a row with the very same input tensor (q, k, v; gate, up)."""

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Vocabulary(NamedTuple):
    """The layers that know the vocabulary; None where the model has none, or calls it in a way that is not known.

    Attributes:
        embedding: Its input is the token, one-hot: its `in_features` are the vocabulary.
        output: Sees the tokens alone after which one is chosen. One that sees all is a linear group, and None here.
    """

    embedding: LinearGroup | None
    output: LinearGroup | None

    @property
    def groups(self) -> list[LinearGroup]:
        """Those of the two that there are."""
        return [group for group in self if group is not None]

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """`(in_features, out_features)` by module path."""
        return {group.names[0]: (group.in_features, group.out_features[0]) for group in self.groups}

    @property
    def sides(self) -> dict[str, int]:
        """Which of the two is the vocabulary, by module path."""
        return {group.names[0]: side for side, group in enumerate(self) if group is not None}


class LinearCall(NamedTuple):
    """A call of one module."""

    name: str
    input: torch.Tensor  # kept alive, so that its identity cannot be taken by a later tensor
    output: torch.Tensor


class OwnProduct(TorchFunctionMode):
    """While it is entered, tells of the product that a module computes by a function, with a matrix of its own.

    Args:
        weight: The matrix; a cast of it, or another of its shape, is taken for it.
        then: Gets the product's input and output.
    """

    def __init__(self, weight: torch.Tensor, then: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self._shape = weight.shape
        self._then = then

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; tell if it is that product."""
        output = func(*args, **(kwargs or {}))
        if func is linear and len(args) > 1 and args[1].shape == self._shape:
            self._then(args[0], output)
        return output


def _may_be_router(module: torch.nn.Module) -> bool:
    """Whether a module has a matrix of its own, and is neither a linear module nor a table."""
    weight = module._parameters.get("weight")  # noqa: SLF001 - quantised modules make theirs when they are asked
    is_other = hasattr(module, "in_features") or isinstance(module, torch.nn.Embedding)
    return weight is not None and weight.dim() == 2 and not is_other


@contextmanager
def recorded_products(model: PreTrainedModel, calls: list[LinearCall]) -> Iterator[None]:
    """Append to `calls` each product of a module, the embedding's among them."""

    def record(name: str) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                calls.append(LinearCall(name, args[0], output))

        return hook

    embedding = model.get_input_embeddings()
    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if module is embedding or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    ]
    for name, module in model.named_modules():
        if _may_be_router(module):
            within = OwnProduct(module.weight, partial(_note, calls, name))
            handles += [
                module.register_forward_pre_hook(lambda *_, mode=within: mode.__enter__() and None),
                module.register_forward_hook(lambda *_, mode=within: mode.__exit__(None, None, None), always_call=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(calls: list[LinearCall], name: str, x: torch.Tensor, y: torch.Tensor) -> None:
    calls.append(LinearCall(name, x, y))


def is_inner(call: LinearCall, num_tokens: int) -> bool:
    """Whether a module is linear and saw every token."""
    return call.input.is_floating_point() and call.output.shape[:-1].numel() == num_tokens


def find_vocabulary(
    model: PreTrainedModel, passes: Sequence[Sequence[LinearCall]], num_tokens: int, vocab_size: int
) -> Vocabulary:
    """The embedding and the output layer, if they are called once: with all tokens, and with the chosen ones."""
    names = {id(module): name for name, module in model.named_modules()}

    def find(module: torch.nn.Module | None, num: int) -> LinearGroup | None:
        name = names.get(id(module))
        found = [[call for call in calls if call.name == name] for calls in passes]
        call = found[0][0] if found[0] else None
        if name is None or call is None or any(len(calls) != 1 for calls in found):
            return None
        if any(calls[0].output.shape[:-1].numel() != num for calls in found):
            return None
        in_features = vocab_size if num == num_tokens else call.input.shape[-1]
        output = call.output
        return LinearGroup((name,), in_features, (output.shape[-1],), output.dtype, output.device)

    return Vocabulary(find(model.get_input_embeddings(), num_tokens), find(model.get_output_embeddings(), 1))


def group_calls(calls: list[LinearCall]) -> Iterator[LinearGroup]:
    """Groups by input; a module that is called more than once in a pass is a group by itself."""
    counts = Counter(call.name for call in calls)
    calls = list({call.name: call for call in reversed(calls)}.values())[::-1]  # each module's first
    start = 0
    for end in range(1, len(calls) + 1):
        is_repeated = end == len(calls) or max(counts[calls[start].name], counts[calls[end].name]) > 1
        if is_repeated or calls[end].input is not calls[start].input:
            members = calls[start:end]
            output = members[0].output  # under offloading, the input may still be elsewhere
            yield LinearGroup(
                tuple(call.name for call in members),
                members[0].input.shape[-1],
                tuple(call.output.shape[-1] for call in members),
                output.dtype,
                output.device,
            )
            start = end
