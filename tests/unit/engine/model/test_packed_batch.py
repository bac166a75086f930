"""What a step computes as flat arrays, and the pages its requests have on the device."""

from __future__ import annotations

from typing import Any

import torch

from langchain_lora_retriever.engine.model.block_tables import BlockTables
from langchain_lora_retriever.engine.model.packed_batch import PackedBatch
from langchain_lora_retriever.engine.request import Request
from langchain_lora_retriever.engine.scheduler import ScheduledRequest
from langchain_lora_retriever.types import SamplingParams

CPU = torch.device("cpu")


def make_request(num_prompt: int, row: int, **state: Any) -> Request:
    """A running request whose prompt counts up from 10 * row."""
    prompt = list(range(10 * row, 10 * row + num_prompt))
    request = Request(row, prompt, SamplingParams(), (), detokenizer=None, row=row)  # type: ignore[arg-type]
    for name, value in state.items():
        setattr(request, name, value)
    return request


def test_a_pending_token_is_named_by_its_place_in_the_last_choice() -> None:
    """A chunk of a prompt, a decode with its token known, and one whose token only the device knows."""
    chunk = make_request(6, 0, num_computed_tokens=2)
    known = make_request(3, 1, num_computed_tokens=3, output_token_ids=[7])
    pending = make_request(3, 2, num_computed_tokens=4, output_token_ids=[8], num_pending_tokens=1)
    batch = PackedBatch.pack(
        [ScheduledRequest(chunk, 3), ScheduledRequest(known, 1), ScheduledRequest(pending, 1)], {known: 0, pending: 5}
    )
    assert list(batch.token_ids) == [2, 3, 4, 7, 0]
    assert list(batch.positions) == [2, 3, 4, 3, 4]
    assert list(batch.rows) == [0, 0, 0, 1, 2]
    assert list(batch.sources) == [-1, -1, -1, -1, 5]
    assert batch.sampled_tokens == [3, 4]
    assert batch.sampled_requests == [known, pending]
    assert not batch.is_decode
    assert PackedBatch.pack([ScheduledRequest(known, 1)], {}).is_decode


def test_block_tables_follow_growth_and_replacement() -> None:
    """Pages are added as they come; a row's next request, or a preempted one's second life, starts over."""
    tables = BlockTables(2, 4, CPU)
    request = make_request(3, 1, block_ids=[5, 6])
    tables.sync([request])
    assert tables.tables[1, :2].tolist() == [5, 6]
    request.block_ids.append(9)
    tables.sync([request])
    assert tables.tables[1, :3].tolist() == [5, 6, 9]
    request.block_ids = [2]
    tables.sync([request])
    assert tables.tables[1, 0].item() == 2
    tables.sync([make_request(3, 1, block_ids=[7, 8, 1])])
    assert tables.tables.tolist() == [[0, 0, 0, 0], [7, 8, 1, 0]]
