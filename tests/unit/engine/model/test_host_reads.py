"""What a CUDA graph cannot hold is noticed on any device, and passed over on one without numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from langchain_lora_retriever.engine.model.host_reads import HostReads

if TYPE_CHECKING:
    from collections.abc import Callable

READS: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "branch": (lambda x: 1 if x.sum() > 3 else 2, "is_nonzero"),
    "nonzero": (torch.nonzero, "nonzero"),
    "index by a mask": (lambda x: x[x > 0], "index"),
}


@pytest.mark.parametrize("name", READS)
def test_what_waits_for_the_host_is_named(name: str) -> None:
    """On a CPU, where nobody waits."""
    read, operation = READS[name]
    with HostReads() as reads:
        read(torch.ones(4))
    assert reads.names & {operation, "_local_scalar_dense"}


def test_what_only_launches_is_not() -> None:
    """Gathers, products and selections by condition."""
    x = torch.ones(4, 4)
    with HostReads() as reads:
        torch.where(x > 0, x @ x, 0.0)[torch.tensor([1, 2])].softmax(-1).topk(2)
    assert reads.names == set()


def test_a_model_without_numbers_can_be_followed() -> None:
    """Numbers are zero, truths are False, and nothing is found."""
    x = torch.ones(4, 3, device="meta")
    with HostReads() as reads:
        assert x.sum().item() == 0.0
        assert (x.long().max() > 5).item() is False
        assert torch.nonzero(x).shape == (0, 2)
        offsets = torch.ones(2, dtype=torch.int32, device="meta")
        weights = torch.ones(2, 3, 8, device="meta")
        assert torch.nn.functional.grouped_mm(x, weights, offs=offsets).shape == (4, 8)
    assert "nonzero" in reads.names


@pytest.mark.parametrize(
    "upload",
    [
        lambda x, table: x + table.to(x.device),
        lambda x, table: x + table.to(device=x.device, dtype=torch.float64),
        lambda x, table: x.copy_(table),
    ],
)
def test_a_table_that_the_host_makes_anew_is_noticed(upload: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
    """A rotation worked out on the CPU in every step is copied in every step; one that lies on the device is not."""
    x = torch.ones(4, device="meta")
    with HostReads() as reads:
        upload(x, torch.arange(4.0))
    assert len(reads.names) == 1
    with HostReads() as reads:
        upload(x, torch.ones(4, device="meta"))
        x + 3.0
        x * torch.tensor(2.0)
    assert reads.names == set()
