"""Linear modules joined into one product, and given back as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from langchain_lora_retriever.engine.model import joint_linears
from langchain_lora_retriever.engine.model.base_module import BaseModule
from langchain_lora_retriever.engine.model.joint_linears import count_uses, join_linears, speed_up_output_layer
from langchain_lora_retriever.engine.model.packed_weight import PackedWeight
from lora_retriever_kernels.packed_matrix import can_pack
from makers import make_tiny_model

CPU = torch.device("cpu")
packs = pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="this build of torch has no oneDNN")


def make_modules(*, bias: bool) -> list[nn.Linear]:
    """Three modules of 24 inputs."""
    torch.manual_seed(0)
    return [nn.Linear(24, width, bias=bias).requires_grad_(requires_grad=False) for width in (40, 8, 17)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_packed", [pytest.param(True, marks=packs), False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (7, 24), (2, 3, 24), (300, 24)])
def test_joined_modules_give_their_outputs_side_by_side(
    shape: tuple[int, ...], *, is_packed: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of rows; and the modules have their own numbers back afterwards, in parameters of their own."""
    monkeypatch.setattr(joint_linears, "can_pack", lambda _: is_packed)
    modules = make_modules(bias=bias)
    before, parameters = copy.deepcopy(modules), [module.weight for module in modules]
    x = torch.randn(shape)
    joint = join_linears(modules, count_uses(nn.ModuleList(modules)))
    expected = torch.cat([module(x) for module in before], -1)
    torch.testing.assert_close(joint(x), expected)
    joint.release()
    for module, other, parameter in zip(modules, before, parameters, strict=True):
        assert module.weight is parameter
        assert torch.equal(module.weight, other.weight)
        assert module.weight.is_contiguous()
        assert module.weight.untyped_storage().nbytes() == module.weight.nbytes


@packs
def test_while_packed_a_weight_has_its_shape_and_no_numbers() -> None:
    """Its memory is given up; who asks for the numbers gets them, and who computes with what stands there is told."""
    module = make_modules(bias=True)[0]
    expected, parameter = module.weight.clone(), module.weight
    joint = join_linears([module], count_uses(module))
    assert isinstance(module.weight, PackedWeight)
    assert (module.weight.shape, module.weight.dtype) == (expected.shape, expected.dtype)
    assert parameter.untyped_storage().nbytes() == 0
    assert module.weight.numel() * module.weight.element_size() == module.weight.nbytes == expected.nbytes
    for compute in (lambda: module(torch.randn(2, 24)), module.weight.sum, module.weight.tolist, module.weight.clone):
        with pytest.raises(RuntimeError, match="Close the engine first"):
            compute()
    with pytest.raises(RuntimeError, match="Close the engine first"):
        copy.deepcopy(module)
    found = BaseModule(module, torch.float32, CPU).tensor("weight")
    assert found is not None
    assert torch.equal(found, expected)
    joint.release()


@packs
def test_rows_that_overflow_stay_by_themselves() -> None:
    """NaN and infinite inputs of one row reach no other."""
    modules = make_modules(bias=True)
    joint = join_linears(modules, count_uses(nn.ModuleList(modules)))
    x = torch.randn(8, 24)
    expected = joint(x)
    x[3], x[5] = float("nan"), float("inf")
    rest = [0, 1, 2, 4, 6, 7]
    assert torch.equal(joint(x)[rest], expected[rest])


def test_other_dtypes_are_not_packed() -> None:
    """A weight in bfloat16 lies as it did."""
    module = make_modules(bias=False)[0].to(torch.bfloat16)
    joint = join_linears([module], count_uses(module))
    assert type(module.weight) is nn.Parameter
    joint.release()


@packs
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_output_layer_is_packed_and_the_embedding_keeps_its_weight(*, is_tied: bool) -> None:
    """Logits are those from before, up to rounding; afterwards weight and tie are as they were."""
    model: Any = make_tiny_model("llama", tie_word_embeddings=is_tied)
    ids = torch.tensor([[5, 9, 11]])
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        before, numbers = model.lm_head.weight, model.lm_head.weight.clone()
        undo = speed_up_output_layer(model)
        assert isinstance(model.lm_head.weight, PackedWeight)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        undo()
        assert model.lm_head.weight is before
        assert torch.equal(before, numbers)
        assert (model.get_input_embeddings().weight is before) == is_tied
        assert torch.equal(model(input_ids=ids).logits, expected)
