"""Layers as vLLM has them, on our kernels: true ranks, slots, tensor-parallel parts, the compiled operator."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from langchain_lora_retriever.vllm.layers import LoraLayer, LoraStep, StepAdapters

MAX_RANK = 8
WIDTHS = (6, 4)
IN = 10


def make_module(widths: tuple[int, ...] = WIDTHS, in_features: int = IN, tp_size: int = 1, **more: Any) -> Any:
    """What is used of a vLLM layer whose padded tensors were made."""
    return SimpleNamespace(
        lora_a_stacked=tuple(torch.zeros(3, 1, MAX_RANK, in_features) for _ in widths),
        lora_b_stacked=tuple(torch.zeros(3, 1, width, MAX_RANK) for width in widths),
        tp_size=tp_size,
        **more,
    )


def make_step(max_k: int = 2) -> LoraStep:
    """Three slots."""
    device = torch.device("cpu")
    return LoraStep(max_loras=3, max_rank=MAX_RANK, max_num_tokens=16, max_k=max_k, device=device)


def load(step: LoraStep, layer: LoraLayer, slot: int, rank: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Put a random adapter into a slot, as the manager does; its A and B."""
    generator = torch.Generator().manual_seed(seed)
    a = [torch.randn(rank, IN, generator=generator) for _ in WIDTHS]
    b = [torch.randn(width, rank, generator=generator) for width in WIDTHS]
    layer.set_lora(slot, a, b)
    step.assign(slot, layer.rank(slot))
    return a, b


def delta(x: torch.Tensor, weights: tuple[list[Any], list[Any]]) -> torch.Tensor:
    """What an adapter adds."""
    return torch.cat([x @ a.T @ b.T for a, b in zip(*weights, strict=True)], dim=-1)


def run(adapters: StepAdapters, module: Any, x: torch.Tensor) -> torch.Tensor:
    """What vLLM's layer calls, over a base product of zeros."""
    y = torch.zeros(x.shape[0], sum(WIDTHS))
    return adapters.add_lora_linear(y, x, module.lora_a_stacked, module.lora_b_stacked, 1.0, WIDTHS)


def mapping(*ids: int) -> Any:
    """VLLM's `LoRAMapping`, as far as it is read."""
    return SimpleNamespace(index_mapping=ids)


def test_tokens_run_their_own_adapters_and_compositions() -> None:
    """The base model, one adapter, and a composition by its number; ranks differ; what pads the batch runs nothing."""
    step, module, compositions = make_step(), make_module(), {}
    layer, adapters = LoraLayer(module, step), StepAdapters(step, compositions)
    first, second = load(step, layer, 0, 3, seed=1), load(step, layer, 2, 8, seed=2)
    compositions[900] = [(7, 0.25), (5, -2.0)]
    adapters.update_metadata(mapping(0, 5, 900, 7, 900), [5, None, 7], 4, 100)
    x = torch.randn(7, IN)
    expected = torch.zeros(7, sum(WIDTHS))
    expected[1], expected[3] = delta(x[1], first), delta(x[3], second)
    for row in (2, 4):
        expected[row] = 0.25 * delta(x[row], second) - 2 * delta(x[row], first)
    torch.testing.assert_close(run(adapters, module, x), expected, atol=1e-4, rtol=1e-4)
    adapters.update_metadata(mapping(0, 0), [5, None, 7], 4, 100)
    assert not run(adapters, module, x[:2]).any()


def test_a_slot_is_used_again() -> None:
    """By an adapter of another rank that lacks a slice, and by one that lacks the layer."""
    step, module = make_step(), make_module()
    layer, adapters = LoraLayer(module, step), StepAdapters(step, {})
    load(step, layer, 1, 8, seed=1)
    a, b = torch.randn(2, IN), torch.randn(WIDTHS[1], 2)
    layer.set_lora(1, [None, a], [None, b])
    step.assign(1, layer.rank(1))
    assert layer.rank(1) == 2
    adapters.update_metadata(mapping(4), [None, 4, None], 4, 100)
    x = torch.randn(1, IN)
    expected = torch.cat([torch.zeros(1, WIDTHS[0]), x @ a.T @ b.T], dim=1)
    torch.testing.assert_close(run(adapters, module, x), expected)
    layer.reset_lora(1)
    step.assign(1, layer.rank(1))
    adapters.update_metadata(mapping(4), [None, 4, None], 4, 100)
    assert not run(adapters, module, x).any()


def test_vllm_reads_shapes_and_refusals_name_them() -> None:
    """Its warm-up makes adapters by them; one of another width is refused, as are weights that are not finite."""
    module = make_module()
    layer = LoraLayer(module, make_step())
    assert [a.shape[-1] for a in module.lora_a_stacked] == [IN, IN]
    assert [b.shape[-2] for b in module.lora_b_stacked] == list(WIDTHS)
    assert module.lora_a_stacked[0].dtype == torch.float32
    with pytest.raises(ValueError, match=r"slice 0: expected lora_A \[r, 10\]"):
        layer.set_lora(0, [torch.ones(2, IN + 1)] * 2, [torch.ones(width, 2) for width in WIDTHS])
    with pytest.raises(ValueError, match="slice 1"):
        layer.set_lora(0, [torch.ones(2, IN)] * 2, [torch.ones(6, 2), torch.full((4, 2), torch.inf)])


def test_a_rank_takes_its_part_of_a_row_parallel_layer() -> None:
    """The sum over the ranks, which vLLM's all-reduce makes, is the whole, of a mixture too."""
    x, a, b = torch.randn(3, IN), torch.randn(4, IN), torch.randn(6, 4)
    total = torch.zeros(3, 6)
    for rank in range(2):
        step = make_step()
        half = slice(rank * IN // 2, (rank + 1) * IN // 2)
        module = make_module((6,), IN // 2, 2, slice_lora_a=lambda t, half=half: t[:, half], slice_lora_b=lambda t: t)
        layer, adapters = LoraLayer(module, step), StepAdapters(step, {8: [(1, 0.5), (2, 1.5)]})
        for slot, scale in enumerate((1.0, -1.0)):
            layer.set_lora(slot, a, scale * b)
            step.assign(slot, layer.rank(slot))
        adapters.update_metadata(mapping(1, 2, 8), [1, 2, None], 4, 100)
        part = torch.zeros(3, 6)
        adapters.add_lora_linear(part, x[:, half], module.lora_a_stacked, module.lora_b_stacked, 1.0, (6,))
        total += part
    whole = x @ a.T @ b.T * torch.tensor([1.0, -1.0, 0.5 - 1.5])[:, None]
    torch.testing.assert_close(total, whole, atol=1e-4, rtol=1e-4)


def test_what_warms_up_runs_on_every_rank() -> None:
    """It is as wide as the first rank's part, so nothing is left of it on others, whose captured steps need it too."""
    for cut_a, cut_b in ((lambda t: t, lambda t: t[6:]), (lambda t: t[:, IN:], lambda t: t)):
        step = make_step()
        module = make_module((6,), IN, 2, slice_lora_a=cut_a, slice_lora_b=cut_b)
        layer, adapters = LoraLayer(module, step), StepAdapters(step, {})
        layer.set_lora(0, torch.randn(4, IN), torch.randn(6, 4))
        assert layer.rank(0) == 4
        step.assign(0, layer.rank(0))
        adapters.update_metadata(mapping(1, 1), [1, None, None], 4, 100)
        assert step.begin(layer, 2)
        y = torch.zeros(2, 6)
        adapters.add_lora_linear(y, torch.randn(2, IN), module.lora_a_stacked, module.lora_b_stacked, 1.0, (6,))
        assert not y.any()


def test_a_compiled_graph_knows_neither_step_nor_adapters() -> None:
    """One graph, compiled once, serves whatever a step's tokens run: vLLM drops the guards of its graphs."""
    step, module = make_step(), make_module()
    layer, adapters = LoraLayer(module, step), StepAdapters(step, {})
    weights = load(step, layer, 0, 3, seed=1), load(step, layer, 1, 8, seed=2)
    num_graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x @ torch.ones(IN, sum(WIDTHS))
        return adapters.add_lora_linear(y, x, module.lora_a_stacked, module.lora_b_stacked, 1.0, WIDTHS)

    x = torch.randn(4, IN)
    base = x @ torch.ones(IN, sum(WIDTHS))
    for slot in (0, 1):
        adapters.update_metadata(mapping(*[slot + 1] * 4), [1, 2, None], 4, 100)
        torch.testing.assert_close(forward(x), base + delta(x, weights[slot]), atol=1e-4, rtol=1e-4)
    assert num_graphs == 1


@pytest.mark.parametrize("num_tokens", [5, 300])
def test_a_layer_makes_its_base_product_and_the_adapters_outputs(monkeypatch: Any, num_tokens: int) -> None:
    """In `apply`, which vLLM's `forward` calls: at once, compiled, and on a second stream as on a GPU."""
    weight, bias = torch.randn(sum(WIDTHS), IN), torch.randn(sum(WIDTHS))
    method = SimpleNamespace(apply=lambda base, x, bias: torch.nn.functional.linear(x, base.weight, bias))
    module = make_module(base_layer=SimpleNamespace(weight=weight), _get_quant_method=lambda: method)
    device = torch.device("cpu")
    step = LoraStep(max_loras=3, max_rank=MAX_RANK, max_num_tokens=512, max_k=2, device=device, max_captured_tokens=512)
    layer, adapters = LoraLayer(module, step), StepAdapters(step, {9: [(1, 0.5), (2, 2.0)]})
    first, second = load(step, layer, 0, 3, seed=1), load(step, layer, 1, 8, seed=2)
    x = torch.randn(num_tokens, IN)
    base = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(module.apply(x, bias), base)  # nothing runs yet
    adapters.update_metadata(mapping(*[0, 1, 9, 2, 0][:5]), [1, 2, None], 4, 100)
    expected = base.clone()
    expected[1] += delta(x[1], first)
    expected[2] += 0.5 * delta(x[2], first) + 2 * delta(x[2], second)
    expected[3] += delta(x[3], second)
    compiled = torch.compile(lambda x: module.apply(x, bias), backend="eager", fullgraph=True)
    streams: list[str] = []
    main, side = (SimpleNamespace(wait_stream=lambda _, name=name: streams.append(name)) for name in ("main", "side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    for run in (module.apply, lambda x, bias: compiled(x)):
        for step._side in (None, side):
            for entry, want in ((x, expected), (x[None], expected[None])):
                torch.testing.assert_close(run(entry, bias), want, atol=1e-4, rtol=1e-4)
    assert streams == ["side", "main"] * 4
