"""Bookkeeping of the paged KV cache: which block holds which tokens, and for whom.

No tensors live here; `attention.py` holds them. A full block is known by a hash chain over its tokens that starts
from the salt of the adapters that run for the first token, and takes in another where other adapters begin to run. So a
prefix is shared only between requests that run the same adapters for each of its tokens, and what comes before the
invocation of an activated LoRA is the base model's.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from langchain_lora_retriever.engine.request import Request

__all__ = ["KVCacheManager"]


class KVCacheManager:
    """Hands out cache blocks, shares full ones between equal prefixes, reuses the least recently freed.

    Args:
        num_blocks: Blocks in the cache.
        block_size: Tokens per block.
        enable_prefix_caching: Whether freed blocks stay findable by their content until they are reused.
        num_warm_blocks: Once so many have been used, those that were freed are reused before any that never were, whose
            memory is still the system's. None uses all of them before any is reused.

    Attributes:
        has_lent: Whether a request of this step has found blocks that another request of it is to compute.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        num_warm_blocks: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._num_warm_blocks = num_blocks if num_warm_blocks is None else num_warm_blocks
        self._unused = deque(range(num_blocks))
        self._free: OrderedDict[int, None] = OrderedDict()  # those that were used, the least recently freed first
        self._block_by_hash: dict[bytes, int] = {}
        self._hash_by_block: dict[int, bytes] = {}
        self._fresh: set[bytes] = set()  # committed in this step, and to be computed by it
        self.has_lent = False

    @property
    def num_free_blocks(self) -> int:
        """Blocks no running request holds; some of them still cache a prefix."""
        return len(self._free) + len(self._unused)

    def match_prefix(self, request: Request) -> None:
        """Give a request without blocks the cached blocks of its longest known prefix.

        At least one token is left to compute, since its logits are needed, and all after which others' are wanted.
        Mutates `block_ids`, `block_hashes` and `num_computed_tokens`.
        """
        assert not request.block_ids
        num_matchable = self._num_matchable(request)
        for _ in range(num_matchable):
            if not self._take_next(request):
                break
        request.num_computed_tokens = len(request.block_ids) * self.block_size

    def extend_prefix(self, request: Request) -> None:
        """Give a running request the blocks behind what it has computed that others have computed meanwhile.

        At least one token is left to compute. Mutates what `match_prefix` does, and `num_cached_tokens`.
        """
        num_matchable = self._num_matchable(request)
        begin = request.num_computed_tokens
        num_full = begin // self.block_size
        if begin % self.block_size or not num_full == len(request.block_ids) == len(request.block_hashes):
            return
        while len(request.block_ids) < num_matchable and self._take_next(request):
            request.num_computed_tokens += self.block_size
        request.num_cached_tokens = (request.num_cached_tokens or 0) + request.num_computed_tokens - begin

    def _num_matchable(self, request: Request) -> int:
        """Full blocks that a request may have of others: before its last token, and before the places it scores."""
        num_tokens = min(request.num_tokens - 1, request.num_known_tokens, request.first_scored_place)
        return num_tokens // self.block_size if self._enable_prefix_caching else 0

    def _take_next(self, request: Request) -> bool:
        """Append the next full block of a request's tokens to its blocks, if anybody knows it."""
        block_hash = self._next_hash(request)
        block = self._block_by_hash.get(block_hash)
        if block is None:
            return False
        self.has_lent |= block_hash in self._fresh
        self._free.pop(block, None)
        self._ref_counts[block] += 1
        request.block_ids.append(block)
        request.block_hashes.append(block_hash)
        return True

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Make room for the request's first `num_tokens` tokens; False, and nothing changed, if there is none."""
        num_missing = -(-num_tokens // self.block_size) - len(request.block_ids)
        if num_missing <= 0:
            return True
        if num_missing > self.num_free_blocks:
            return False
        for _ in range(num_missing):
            block = self._take()
            stale = self._hash_by_block.pop(block, None)
            if stale is not None:
                del self._block_by_hash[stale]
            self._ref_counts[block] = 1
            request.block_ids.append(block)
        return True

    def _take(self) -> int:
        is_cold = self.num_blocks - len(self._unused) < self._num_warm_blocks
        if self._unused and (is_cold or not self._free):
            return self._unused.popleft()
        block, _ = self._free.popitem(last=False)
        return block

    def begin_step(self) -> None:
        """Forget which blocks the last step was to compute: it has been launched."""
        self._fresh.clear()
        self.has_lent = False

    def commit(self, request: Request, num_tokens: int) -> None:
        """Make the full blocks of a request's first `num_tokens` tokens findable, which the step is to compute.

        Others may have them at once: in every layer of a step all keys and values are written before any are read.
        """
        if not self._enable_prefix_caching:
            return
        num_known = min(num_tokens, request.num_known_tokens)
        for index in range(len(request.block_hashes), num_known // self.block_size):
            block_hash = self._next_hash(request)
            request.block_hashes.append(block_hash)
            block = request.block_ids[index]
            if block_hash not in self._block_by_hash:  # the first of two equal blocks is the one that is shared
                self._block_by_hash[block_hash] = block
                self._hash_by_block[block] = block_hash
                self._fresh.add(block_hash)

    def retract(self, request: Request, num_tokens: int) -> None:
        """Take back what `commit` made findable beyond the first `num_tokens` tokens; nobody may have found it."""
        num_full = num_tokens // self.block_size
        for block, block_hash in list(zip(request.block_ids, request.block_hashes, strict=False))[num_full:]:
            if self._hash_by_block.get(block) == block_hash:  # and not of another request, which was first
                del self._hash_by_block[block], self._block_by_hash[block_hash]
        del request.block_hashes[num_full:]

    def free(self, request: Request) -> None:
        """Take all blocks back. Tail blocks are reused first: a prefix outlives what followed it."""
        for block in reversed(request.block_ids):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
        request.block_ids = []  # a new list: whoever mirrors the old one sees that it is over
        request.block_hashes = []
        request.num_computed_tokens = 0

    def forget(self, request: Request) -> None:
        """Let nobody find the request's blocks any more; those who share them already keep them."""
        for block in request.block_ids:
            block_hash = self._hash_by_block.pop(block, None)
            if block_hash is not None:
                del self._block_by_hash[block_hash]

    def check_integrity(self, holders: list[Request]) -> None:
        """Assert that free + held == total and every reference is accounted for by `holders`."""
        counts = [0] * self.num_blocks
        for request in holders:
            for block in request.block_ids:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts disagree with the running requests"
        held = sum(count > 0 for count in counts)
        num_free = self.num_free_blocks
        assert held + num_free == self.num_blocks, f"{held} held + {num_free} free != {self.num_blocks}"
        free = [*self._free, *self._unused]
        assert len(set(free)) == num_free, "a block is free twice"
        assert all(self._ref_counts[block] == 0 for block in free), "a free block is still referenced"
        assert {b: h for h, b in self._block_by_hash.items()} == self._hash_by_block, "hash tables disagree"

    def _next_hash(self, request: Request) -> bytes:
        """The hash of the block behind those of a request that have one."""
        parent = request.block_hashes[-1] if request.block_hashes else request.salts[0]
        begin = len(request.block_hashes) * self.block_size
        end = begin + self.block_size
        digest = hashlib.blake2b(parent + array("q", request.tokens_between(begin, end)).tobytes(), digest_size=16)
        if len(request.salts) > 1:
            for first, salt in request.salts.items():
                if first and begin <= first < end:
                    digest.update((first - begin).to_bytes(4, "little") + salt)
        return digest.digest()
