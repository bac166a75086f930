"""Bookkeeping of the paged KV cache: which block holds which tokens, and for whom.

No tensors live here; `attention.py` holds them. A full block is known by a hash chain over its tokens that starts
from the salt of the adapters that run for the first token, and takes in another where other adapters begin to run. So a
prefix is shared only between requests that run the same adapters for each of its tokens, and what comes before the
invocation of an activated LoRA is the base model's.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
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
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        self._block_by_hash: dict[bytes, int] = {}
        self._hash_by_block: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks no running request holds; some of them still cache a prefix."""
        return len(self._free)

    def match_prefix(self, request: Request) -> None:
        """Give a request without blocks the cached blocks of its longest known prefix.

        At least one token is left to compute, since its logits are needed, and all after which others' are wanted.
        Mutates `block_ids`, `block_hashes` and `num_computed_tokens`.
        """
        assert not request.block_ids
        num_reusable = min(request.num_tokens - 1, request.first_scored_place)
        num_matchable = num_reusable // self.block_size if self._enable_prefix_caching else 0
        parent = request.salts[0]
        for index in range(num_matchable):
            parent = self._hash(parent, request, index)
            block = self._block_by_hash.get(parent)
            if block is None:
                break
            self._free.pop(block, None)
            self._ref_counts[block] += 1
            request.block_ids.append(block)
            request.block_hashes.append(parent)
        request.num_computed_tokens = len(request.block_ids) * self.block_size

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Make room for the request's first `num_tokens` tokens; False, and nothing changed, if there is none."""
        num_missing = -(-num_tokens // self.block_size) - len(request.block_ids)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            block, _ = self._free.popitem(last=False)
            stale = self._hash_by_block.pop(block, None)
            if stale is not None:
                del self._block_by_hash[stale]
            self._ref_counts[block] = 1
            request.block_ids.append(block)
        return True

    def commit(self, request: Request) -> None:
        """Make the request's newly filled blocks findable. Call after `num_computed_tokens` grew."""
        if not self._enable_prefix_caching:
            return
        num_known = min(request.num_computed_tokens, request.num_known_tokens)
        for index in range(len(request.block_hashes), num_known // self.block_size):
            parent = request.block_hashes[-1] if request.block_hashes else request.salts[0]
            block_hash = self._hash(parent, request, index)
            request.block_hashes.append(block_hash)
            block = request.block_ids[index]
            if block_hash not in self._block_by_hash:  # the first of two equal blocks is the one that is shared
                self._block_by_hash[block_hash] = block
                self._hash_by_block[block] = block_hash

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
        assert held + len(self._free) == self.num_blocks, f"{held} held + {len(self._free)} free != {self.num_blocks}"
        assert all(self._ref_counts[block] == 0 for block in self._free), "a free block is still referenced"
        assert {b: h for h, b in self._block_by_hash.items()} == self._hash_by_block, "hash tables disagree"

    def _hash(self, parent: bytes, request: Request, index: int) -> bytes:
        begin, end = index * self.block_size, (index + 1) * self.block_size
        digest = hashlib.blake2b(parent + array("q", request.tokens_between(begin, end)).tobytes(), digest_size=16)
        if len(request.salts) > 1:
            for first, salt in request.salts.items():
                if first and begin <= first < end:
                    digest.update((first - begin).to_bytes(4, "little") + salt)
        return digest.digest()
