"""Which shapes steps are captured in, and how a step is laid out in one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from langchain_lora_retriever.engine.config import EngineConfig
from langchain_lora_retriever.engine.model import step_graph
from langchain_lora_retriever.engine.model.packed_batch import LoraSpans, PackedBatch
from langchain_lora_retriever.engine.model.step_graph import StaticInputs, StepGraph, StepShape, StepShapes
from langchain_lora_retriever.engine.request import Request
from langchain_lora_retriever.engine.scheduler import ScheduledRequest
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")


def make_request(row: int, num_computed: int) -> Request:
    """A running request with six prompt tokens that count up from 10 * row."""
    request = Request(row, [10 * row + i for i in range(6)], SamplingParams(), (), detokenizer=None, row=row)  # type: ignore[arg-type]
    request.num_computed_tokens = num_computed
    return request


def watched(seen: list[StaticInputs]) -> Callable[[StaticInputs], torch.Tensor]:
    """A forward that keeps what it is given, and whose logits are the sampled tokens' ids."""

    def forward(inputs: StaticInputs) -> torch.Tensor:
        seen.append(StaticInputs(*(None if part is None else part.clone() for part in inputs)))  # type: ignore[arg-type]
        return inputs.tokens[0, inputs.sampled, None].float()

    return forward


def with_adapters(batch: PackedBatch, *spans: tuple[int, tuple[int, ...], tuple[float, ...]]) -> PackedBatch:
    """A batch whose sequences have these numbers of tokens, slots and weights."""
    counts, slots, weights = zip(*spans, strict=True)
    active = frozenset(slot for row in slots for slot in row)
    return batch._replace(lora=LoraSpans(counts, slots, weights, max(map(len, slots)), active))


def test_a_decode_step_is_padded_and_adapters_that_stay_are_kept() -> None:
    """Padding has no row, no source and no adapter; adapters are copied when they change."""
    seen: list[StaticInputs] = []
    graph = StepGraph(watched(seen), StepShape(4, 4, 0, 3, 4, 2), CPU, None)
    batch = PackedBatch.pack([ScheduledRequest(make_request(row, 5), 1) for row in (2, 0)], {})
    logits = graph.replay(with_adapters(batch, (1, (4, 6), (0.5, 0.25)), (1, (), ())), [0, 1], [])
    assert logits[:, 0].tolist() == [25, 5]
    assert seen[0].tokens.tolist() == [[25, 5, 0, 0], [5, 5, 0, 0], [2, 0, -1, -1], [-1, -1, -1, -1]]
    assert seen[0].decode_tokens.tolist() == [0, 1, 2, 3]
    assert seen[0].lora_slots is not None
    assert seen[0].lora_slots.tolist() == [[4, 6], [-1, -1], [-1, -1], [-1, -1]]
    graph.replay(with_adapters(batch, (1, (1,), (1.0,)), (1, (), ())), [0, 1], [])
    assert seen[1].lora_slots is not None
    assert seen[1].lora_weights is not None
    assert seen[1].lora_slots[0].tolist() == [1, -1]
    assert seen[1].lora_weights.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_adapters_are_copied_again_after_a_copy_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step as the one before the failed one runs its own adapters, not those of which half had come."""
    seen: list[StaticInputs] = []
    graph = StepGraph(watched(seen), StepShape(2, 2, 0, 3, 2, 1), CPU, None)
    batch = PackedBatch.pack([ScheduledRequest(make_request(row, 5), 1) for row in (0, 1)], {})
    first = with_adapters(batch, (1, (0,), (1.0,)), (1, (1,), (1.0,)))
    graph.replay(first, [0, 1], [])
    copies: list[torch.Tensor] = []

    def fail_at_third(target: torch.Tensor, host: torch.Tensor) -> None:
        copies.append(target)
        if len(copies) == 3:
            raise RuntimeError("CUDA error: out of memory")
        target.copy_(host)

    with monkeypatch.context() as patched:
        patched.setattr(step_graph, "copy_into", fail_at_third)
        with pytest.raises(RuntimeError, match="out of memory"):
            graph.replay(with_adapters(batch, (1, (2,), (0.5,)), (1, (3,), (0.5,))), [0, 1], [])
    graph.replay(first, [0, 1], [])
    for before, after in zip(seen[0][4:], seen[1][4:], strict=True):
        assert before is not None
        assert after is not None
        assert torch.equal(before, after)


def test_a_step_with_a_prompt_lies_beside_its_streams() -> None:
    """A stream, four tokens of a prompt in two tiles: every token has its request's adapters, one is sampled."""
    seen: list[StaticInputs] = []
    graph = StepGraph(watched(seen), StepShape(8, 2, 5, 3, 2, 1), CPU, None)
    scheduled = [ScheduledRequest(make_request(1, 5), 1), ScheduledRequest(make_request(3, 0), 4)]
    batch = with_adapters(PackedBatch.pack(scheduled, {}), (1, (7,), (1.0,)), (4, (2,), (0.5,)))
    logits = graph.replay(batch, [0], [(1, 3), (4, 1)])
    assert logits[:, 0].tolist() == [15]
    (inputs,) = seen
    assert inputs.tokens[0].tolist() == [15, 30, 31, 32, 33, 0, 0, 0]
    assert inputs.tokens[2].tolist() == [1, 3, 3, 3, 3, -1, -1, -1]
    assert inputs.decode_tokens.tolist() == [0, -1]
    assert inputs.prefill_tiles.tolist() == [[1, 3], [4, 1], [5, 3], [0, 0], [0, 0]]
    assert inputs.sampled.tolist() == [0, 0]
    assert inputs.lora_slots is not None
    assert inputs.lora_slots[:, 0].tolist() == [7, 2, 2, 2, 2, -1, -1, -1]


def test_decode_shapes_reach_from_one_to_the_most_there_may_be() -> None:
    """Small steps are padded little, the largest not at all."""
    sizes = {num: StepShapes(num, 4096, 32, (0,)) for num in (1, 20, 128)}
    found = {
        num: [shape.num_tokens for shape in reversed(shapes.all()) if shape.is_decode] for num, shapes in sizes.items()
    }
    assert found[1] == [1]
    assert found[20] == [1, 2, 4, 8, 16, 20]
    assert found[128][-6:] == [56, 64, 80, 96, 112, 128]


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 100, 544, 700, 1025, 2048])
@pytest.mark.parametrize("num_adapters", [0, 1, 2, 3])
def test_a_captured_shape_has_room_for_every_step_up_to_2048_tokens(num_tokens: int, num_adapters: int) -> None:
    """For the tokens, for as many streams or prompts as may run, and for the adapters; a third is wasted at most."""
    shapes = StepShapes(64, 4096, 32, (0, 1, 3))
    shape = shapes.find(num_tokens, num_adapters, is_decode=False)
    assert shape is not None
    assert shape in shapes.all()
    assert num_tokens <= shape.num_tokens <= max(16, 1.5 * num_tokens, num_tokens + 63)
    assert shape.num_decodes == shape.num_sampled == min(shape.num_tokens, 64)
    assert shape.num_adapters == {2: 3}.get(num_adapters, num_adapters)
    most_tiles = max(
        sum(-(-length // 32) for length in [num_tokens - 2 * (num - 1), *[2] * (num - 1)])
        for num in range(1, min(64, -(-num_tokens // 2)) + 1)
    )
    assert shape.num_tiles >= most_tiles + -(-(shape.num_tokens - num_tokens) // 32)


def test_a_step_that_nothing_was_foreseen_for() -> None:
    """More adapters than graphs are captured for get none, and neither do more tokens."""
    shapes = StepShapes(8, 4096, 32, (0, 1))
    assert shapes.find(5, 4, is_decode=True) is None
    assert shapes.find(2049, 0, is_decode=False) is None


def test_numbers_of_adapters_that_no_request_can_have_are_refused() -> None:
    """Kernels take up to eight."""
    with pytest.raises(InvalidRequestError, match="captured_num_adapters"):
        EngineConfig(captured_num_adapters=(0, 9))
