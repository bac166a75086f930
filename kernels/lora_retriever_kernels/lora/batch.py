"""One step's assignment of adapters to tokens, grouped on the device."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

import torch

from lora_retriever_kernels.lora import plan
from lora_retriever_kernels.lora.dense import DensePlan, plan_dense

if TYPE_CHECKING:
    from lora_retriever_kernels.lora.rows import LoraRows

Backend = Literal["torch", "triton"]


class LoraBatch:
    """Which adapters each token of a step uses; shared by all layers of the step.

    Allocated once. On a GPU `update` is two kernel launches into buffers that never move, without synchronisation,
    so it may stand inside or outside a captured graph. On a CPU it groups on the host.

    Args:
        rows: The row map that the model's stacks share.
        max_num_tokens: Most tokens in a step.
        max_k: Most adapters per token.
        backend: "triton" or "torch"; by default Triton on a GPU that has it, else PyTorch.

    Attributes:
        token_lora_mapping: `[max_num_tokens, max_k]`, int32, filled with -1: a place where a caller may write the
            slots of a captured step before replay, passing `token_lora_mapping[:num_tokens]` to `update`.
        token_lora_weights: `[max_num_tokens, max_k]`, fp32, likewise.
        num_tokens: Tokens of the last `update`.
        rank_bound: First part of the last `update`'s `launch_shape`.
        block_m: The second.
        splits_rows: The third.
        has_gains: Whether the last `update` may name adapters with gains.

    Raises:
        ValueError: If a size is out of range or the backend is unknown.
    """

    def __init__(self, rows: LoraRows, max_num_tokens: int, max_k: int = 1, backend: Backend | None = None) -> None:
        if max_num_tokens < 1 or not 1 <= max_k <= 8:
            raise ValueError(
                f"max_num_tokens must be at least 1 and max_k lie in 1..8, got {max_num_tokens} and {max_k}"
            )
        if backend is None:
            has_triton = importlib.util.find_spec("triton") is not None
            backend = "triton" if has_triton and rows.device.type == "cuda" else "torch"
        if backend not in {"torch", "triton"}:
            raise ValueError(f'backend must be "torch" or "triton", got {backend!r}')
        self.rows = rows
        self.max_num_tokens = max_num_tokens
        self.max_k = max_k
        self.backend = backend
        self.num_tokens = 0
        self.k = 1
        self.rank_bound = rows.rank_bound
        self.block_m = 1
        self.splits_rows = False
        self.has_gains = False
        self.token_lora_mapping = torch.full((max_num_tokens, max_k), -1, dtype=torch.int32, device=rows.device)
        self.token_lora_weights = torch.zeros(max_num_tokens, max_k, dtype=torch.float32, device=rows.device)
        self.dense = DensePlan((), None, ())
        self._step = (self.token_lora_mapping[:0], self.token_lora_weights[:0])
        if backend == "triton":
            self._allocate()

    def _allocate(self) -> None:
        """Allocate the buffers of the Triton path for the largest step."""
        n, max_loras, max_rank = self.max_num_tokens, self.rows.max_loras, self.rows.max_rank
        num_pairs = n * self.max_k
        num_tiles = plan.cdiv(num_pairs, 16) + max_loras
        num_token_tiles = plan.cdiv(n, 16)
        num_items = max(
            plan.cdiv(n, block_m) * plan.max_items(block_m, self.max_k, max_loras, max_rank) for block_m in (16, 32, 64)
        )
        device = self.rows.device
        self._segments = torch.zeros(2, max_loras, dtype=torch.int32, device=device)
        self._buffers = (
            torch.full((num_pairs,), -1, dtype=torch.int32, device=device),  # mapping
            torch.zeros(num_pairs, dtype=torch.float32, device=device),  # weights
            torch.zeros(num_pairs, dtype=torch.int32, device=device),  # pairs, sorted by slot
            torch.full((num_tiles, 3), -1, dtype=torch.int32, device=device),  # tiles of pairs: slot, begin, end
            torch.full((n,), -1, dtype=torch.int32, device=device),  # tokens, sorted by first slot
            torch.zeros(num_items, dtype=torch.int32, device=device),  # row blocks of each tile of tokens
            torch.zeros(num_token_tiles, dtype=torch.int32, device=device),  # how many
        )

    def update(
        self,
        token_lora_mapping: torch.Tensor,
        token_lora_weights: torch.Tensor,
        num_active: int | None = None,
        rank_bound: int | None = None,
        has_gains: bool | None = None,
    ) -> None:
        """Group the tokens of a step by adapter.

        Args:
            token_lora_mapping: Slot per token `[num_tokens, k]`, int32, contiguous; -1 contributes nothing. Slots below
                `max_loras` only (not checked on a GPU). A slot named twice counts with the sum of its weights.
            token_lora_weights: Weight per slot `[num_tokens, k]`, fp32, contiguous.
            num_active: How many different adapters the step names, if the host knows it: it decides between kernels and
                changes no result beyond rounding. By default all that are loaded.
            rank_bound: For which ranks launches are made, a result of `LoraRows.bound`; no adapter that the step names
                may have a higher one (not checked). By default `LoraRows.rank_bound`.
            has_gains: Whether the step may name adapters with gains, if the host knows it: without, none may be named
                (not checked). By default whether any that is loaded has some.

        Raises:
            ValueError: If shapes, dtypes or devices do not fit.
        """
        shape = tuple(token_lora_mapping.shape)
        if len(shape) != 2 or shape[0] > self.max_num_tokens or not 1 <= shape[1] <= self.max_k:
            raise ValueError(
                f"token_lora_mapping must be [num_tokens <= {self.max_num_tokens}, 1 <= k <= {self.max_k}], got "
                f"{list(shape)}"
            )
        if tuple(token_lora_weights.shape) != shape:
            raise ValueError(
                f"token_lora_weights must be {list(shape)} like token_lora_mapping, got "
                f"{list(token_lora_weights.shape)}"
            )
        if token_lora_mapping.dtype != torch.int32 or token_lora_weights.dtype != torch.float32:
            raise ValueError(
                "token_lora_mapping must be int32 and token_lora_weights float32, got "
                f"{token_lora_mapping.dtype} and {token_lora_weights.dtype}"
            )
        for name, tensor in (("token_lora_mapping", token_lora_mapping), ("token_lora_weights", token_lora_weights)):
            if tensor.device.type != self.rows.device.type:
                raise ValueError(f"{name} must be on {self.rows.device}, got {tensor.device}")
        if self.backend == "torch":
            highest = int(token_lora_mapping.max()) if token_lora_mapping.numel() else -1
            if highest >= self.rows.max_loras:
                raise ValueError(f"slots must be below max_loras {self.rows.max_loras}, got {highest}")
        self.num_tokens, self.k = shape
        self.has_gains = self.rows.have_gains() if has_gains is None else has_gains
        num_active = self.rows.num_used if num_active is None else num_active
        self.rank_bound, self.block_m, self.splits_rows = self.launch_shape(*shape, num_active, rank_bound)
        if self.backend == "torch":
            self.dense = plan_dense(
                token_lora_mapping,
                token_lora_weights,
                self.rows.counts,
                self.dense.slots,
                self.rows.gains if self.has_gains else None,
            )
            self._step = (token_lora_mapping, token_lora_weights)
            return
        from lora_retriever_kernels.lora.group import group_tokens  # noqa: PLC0415 - Triton is optional

        group_tokens(
            token_lora_mapping.contiguous(),
            token_lora_weights.contiguous(),
            self.rows.counts,
            self.rank_bound,
            self.block_m,
            (*self._buffers, self._segments),
        )

    def launch_shape(
        self, num_tokens: int, k: int, num_active: int, rank_bound: int | None = None
    ) -> tuple[int, int, bool]:
        """What a captured step is made for besides its number of tokens and `k`: capture again when this changes.

        Args:
            num_tokens: Tokens of the step.
            k: Adapters per token.
            num_active: As in `update`.
            rank_bound: As in `update`.

        Returns:
            The bound of the ranks, how many tokens one program of expand takes, and whether several programs share the
            rows of its adapters.
        """
        rank_bound = self.rows.rank_bound if rank_bound is None else rank_bound
        sizes = num_tokens, k, num_active
        return rank_bound, plan.token_block(*sizes), plan.splits_rows(*sizes, rank_bound)

    def tensors(self) -> list[torch.Tensor]:
        """Return what the operators read: the step's mapping and weights, and the Triton path's groups."""
        if self.backend == "torch":
            return list(self._step)
        n, k = self.num_tokens, self.k
        mapping, weights, *groups = self._buffers
        return [mapping[: n * k].view(n, k), weights[: n * k].view(n, k), *groups]
