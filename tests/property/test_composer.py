"""Shares of retrieved adapters, whatever the scores."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from langchain_lora_retriever.retrieval.composer import compose
from langchain_lora_retriever.types import RetrievedAdapter

SCORES = st.lists(st.floats(-1, 1) | st.sampled_from([0.5, 0.50001, -1.0, 1.0]), min_size=1, max_size=70)
TEMPERATURES = st.floats(1e-9, 1e9) | st.sampled_from([5e-324, 1e-300, 0.05, 0.1, 1e308])


def shares(scores, temperature):
    """Similarity shares by name."""
    found = [RetrievedAdapter(f"a{i:02}", score) for i, score in enumerate(scores)]
    members = compose(found, mode="mixture", weights="similarity", temperature=temperature).adapters
    return {member.name: member.weight for member in members}


@given(SCORES, TEMPERATURES)
def test_shares_sum_to_one_and_keep_the_order(scores, temperature):
    """They sum to exactly 1, are above 0, and nobody has more than one who scored better."""
    by_name = shares(scores, temperature)
    assert sum(by_name.values()) == 1
    assert all(0 < share <= 1 for share in by_name.values())
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    ordered = [by_name.get(f"a{i:02}", 0) for i in ranked]
    assert ordered == sorted(ordered, reverse=True)


@given(SCORES, TEMPERATURES)
def test_shares_are_the_nearest_steps_to_the_softmax(scores, temperature):
    """None is a whole step away from softmax(score / temperature)."""
    by_name = shares(scores, temperature)
    powers = [math.exp((score - max(scores)) / temperature) for score in scores]
    step = 1 / max(16, 1 << (4 * len(scores) - 1).bit_length())
    for i, power in enumerate(powers):
        assert abs(by_name.get(f"a{i:02}", 0) - power / sum(powers)) < step + 1e-9


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_what_was_retrieved_does_not_matter(scores, generator):
    """A permutation of the adapters gives the same composition, member by member."""
    found = [RetrievedAdapter(f"a{i:02}", score) for i, score in enumerate(scores)]
    mixed = generator.sample(found, len(found))
    assert compose(mixed, mode="fusion", weights="similarity") == compose(found, mode="fusion", weights="similarity")
