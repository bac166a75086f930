"""Products over packed matrices: any number of rows, and few kernels for them."""

from __future__ import annotations

import pytest
import torch

from lora_retriever_kernels.packed_matrix import _padded, _split_rows, can_pack, multiply, pack

packs = pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="nothing is packed here")


@packs
def test_a_product_is_that_of_the_plain_matrix_and_no_row_reaches_another() -> None:
    """For numbers of rows that are met as they are, padded, split, and split into many."""
    torch.manual_seed(0)
    matrix, bias = torch.randn(40, 24), torch.randn(40)
    packed = pack(matrix)
    assert torch.equal(packed.to_dense(), matrix)
    for num_rows in (0, 1, 7, 16, 17, 23, 25, 40, 100, 127, 129, 500, 700, 2048, 2049, 4500):
        x = torch.randn(num_rows, 24)
        torch.testing.assert_close(multiply(x, packed, bias), torch.nn.functional.linear(x, matrix, bias))
    x = torch.randn(3, 17, 24)
    torch.testing.assert_close(multiply(x, packed), x @ matrix.t())
    x[1, 3] = float("nan")
    assert multiply(x, packed).isnan().any(-1).nonzero().tolist() == [[1, 3]]


def test_there_are_few_numbers_of_rows() -> None:
    """Of each of which oneDNN keeps a kernel; and few rows of zeros are computed."""
    met = set()
    for num_rows in range(1, 5000):
        parts = _split_rows(num_rows)
        assert sum(parts) == num_rows
        assert len(parts) <= 2 + num_rows // 2048
        met |= {_padded(part) for part in parts}
        assert sum(map(_padded, parts)) <= 1.42 * num_rows
    assert len(met) <= 32
