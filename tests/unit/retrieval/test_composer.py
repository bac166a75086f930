"""Retrieved adapters to weights, and fusion's arithmetic."""

from __future__ import annotations

import dataclasses
import gc
import math
import pickle
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from langchain_lora_retriever.errors import InvalidAdapterError, InvalidRequestError, UnknownAdapterError
from langchain_lora_retriever.retrieval.composer import compose, materialize, pin
from langchain_lora_retriever.retrieval.fusion import FusionCache, fuse
from langchain_lora_retriever.types import Adapter, ComposedAdapter, Composition, LoraWeights, RetrievedAdapter

FOUND = [RetrievedAdapter("a", 0.9), RetrievedAdapter("b", 0.8), RetrievedAdapter("c", 0.5)]
MODES = ["selection", "fusion", "mixture"]


def adapter(name, ranks, *, seed=0, scaling=2.0, dtype=torch.float32, out_features=5):
    """An adapter with the given rank per module."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weights = {m: LoraWeights(random(r, 6), random(out_features, r), scaling) for m, r in ranks.items()}
    return Adapter(name=name, fingerprint=f"{name}{seed}", weights=weights)


def test_selection_takes_the_best():
    """The highest score runs alone with weight 1, wherever it stands in the list."""
    composition = compose(FOUND[::-1], mode="selection")
    assert [(m.name, m.weight, m.score) for m in composition.adapters] == [("a", 1.0, 0.9)]


@pytest.mark.parametrize("mode", ["fusion", "mixture"])
def test_uniform_weights(mode):
    """Each of k adapters has weight 1 / k, best first."""
    composition = compose(FOUND, mode=mode)
    assert composition.names == ("a", "b", "c")
    assert [member.weight for member in composition.adapters] == [1 / 3] * 3


def test_similarity_weights():
    """Weights are the softmax of score / temperature, to the nearest of steps of 1/16, and sum to exactly 1."""
    weights = [m.weight for m in compose(FOUND, mode="mixture", weights="similarity", temperature=0.2).adapters]
    powers = [math.exp(score / 0.2) for score in (0.9, 0.8, 0.5)]
    assert weights == pytest.approx([power / sum(powers) for power in powers], abs=1 / 16)
    assert all(weight * 16 == round(weight * 16) for weight in weights)
    assert sum(weights) == 1


TASKS = {"b": (("x", 0.75), ("a", 0.25)), "c": (("y", 0.5), ("z", 0.5))}


def test_a_task_gives_its_share_to_its_members():
    """An adapter in a task and found by itself has both shares; as many run as were found; their shares sum to 1."""
    assert compose(FOUND[:2], mode="mixture", tasks=TASKS).adapters == (
        ComposedAdapter("a", 0.625, 0.9),
        ComposedAdapter("x", 0.375, 0.8),
    )
    composition = compose(FOUND, mode="mixture", weights="similarity", temperature=1.0, tasks=TASKS)
    assert composition.names == ("a", "x", "y")
    assert sum(member.weight for member in composition.adapters) == 1
    assert compose(FOUND, mode="mixture") == compose(FOUND, mode="mixture", tasks={"d": (("x", 1.0),)})


def test_a_task_that_is_nearest_runs_all_it_stands_for():
    """However few are wanted; a selection runs its first alone."""
    found = [RetrievedAdapter("b", 0.9)]
    assert compose(found, mode="fusion", tasks=TASKS).names == ("x", "a")
    assert compose([*found, RetrievedAdapter("c", 0.2)], mode="selection", tasks=TASKS).adapters == (
        ComposedAdapter("x", 1.0, 0.9),
    )


def test_who_has_no_share_does_not_run():
    """An adapter whose similarity is worth less than a step is left out."""
    assert compose(FOUND, mode="mixture", weights="similarity", temperature=0.05).names == ("a", "b")


def test_prompts_of_one_task_share_compositions():
    """Prompts whose scores differ by a hundredth mostly get the very same weights; so prefixes and fusions repeat."""
    generator = random.Random(0)
    compositions = set()
    for _ in range(40):
        found = [
            RetrievedAdapter(name, round(score + generator.uniform(-0.01, 0.01), 6))
            for name, score in (("a", 0.8), ("b", 0.62), ("c", 0.6))
        ]
        members = compose(found, mode="mixture", weights="similarity").adapters
        compositions.add(tuple((member.name, member.weight) for member in members))
    assert len(compositions) <= 8


def test_many_equal_adapters_all_run():
    """With more adapters the steps are finer, so that none of many that fit alike is left out."""
    found = [RetrievedAdapter(f"a{i:02}", 0.5) for i in range(40)]
    weights = [m.weight for m in compose(found, mode="mixture", weights="similarity").adapters]
    assert len(weights) == 40
    assert max(weights) - min(weights) <= 1 / 256


def test_similarity_weights_do_not_overflow():
    """A tiny temperature gives the best adapter everything, a huge one the same to all."""
    cold = compose(FOUND, mode="mixture", weights="similarity", temperature=1e-300)
    hot = compose(FOUND, mode="mixture", weights="similarity", temperature=1e300)
    assert [m.weight for m in cold.adapters] == [1.0]
    assert [m.weight for m in hot.adapters] == pytest.approx([1 / 3] * 3, abs=1 / 16)


@pytest.mark.parametrize("score", [math.nan, math.inf, "0.5", None, True])
def test_scores_that_are_none_are_refused(score):
    """A retriever of the caller's own that returns no number gets an error, not a composition of NaN."""
    with pytest.raises(InvalidRequestError, match="score"):
        compose([RetrievedAdapter("a", score)], mode="mixture", weights="similarity")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", ["uniform", "similarity"])
def test_nothing_retrieved_is_the_base_model(mode, weights):
    """Without adapters the base model answers alone."""
    assert compose([], mode=mode, weights=weights) == Composition(mode)
    assert pin([], mode=mode) == Composition(mode)
    assert materialize(Composition(mode), {}) == ()


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "average"},
        {"mode": "mixture", "weights": "equal"},
        {"mode": "mixture", "temperature": 0},
        {"mode": "mixture", "temperature": -1},
        {"mode": "mixture", "temperature": math.nan},
        {"mode": "mixture", "temperature": math.inf},
        {"mode": "mixture", "temperature": 10**400},
        {"mode": "mixture", "temperature": "0.1"},
    ],
)
def test_bad_arguments(arguments):
    """Unknown modes and weightings, and temperatures out of range, are refused."""
    with pytest.raises(InvalidRequestError, match="is not allowed"):
        compose(FOUND, **arguments)


def test_repeated_names_are_refused():
    """An adapter is named once."""
    with pytest.raises(InvalidRequestError, match="once"):
        compose([FOUND[0], FOUND[0]], mode="mixture")
    with pytest.raises(InvalidRequestError, match="once"):
        pin(["a", "a"], mode="mixture")


def test_pin():
    """Pinned adapters have no score; weights are equal, or the given ones scaled to 1."""
    assert [(m.name, m.weight, m.score) for m in pin(["b", "a"], mode="mixture").adapters] == [
        ("b", 0.5, None),
        ("a", 0.5, None),
    ]
    assert [m.weight for m in pin(["b", "a"], mode="fusion", weights=[3, 1]).adapters] == [0.75, 0.25]
    assert pin(["a"], mode="selection").adapters[0].weight == 1
    assert [m.weight for m in pin(["b", "a"], mode="fusion", weights=[1e308, 1e308]).adapters] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        (["a", "b"], {"mode": "selection"}),
        ("ab", {"mode": "mixture"}),
        (["a", "b"], {"mode": "mixture", "weights": [1]}),
        (["a", "b"], {"mode": "mixture", "weights": [1, 0]}),
        (["a", "b"], {"mode": "mixture", "weights": [1, math.nan]}),
        (["a", "b"], {"mode": "mixture", "weights": [1, 10**400]}),
        (["a", "b"], {"mode": "mixture", "weights": [1, "2"]}),
    ],
)
def test_bad_pins(names, arguments):
    """Two adapters in selection, a bare string, and weights that are none are refused."""
    with pytest.raises(InvalidRequestError):
        pin(names, **arguments)


def test_fusion_averages_parameters():
    """lora_A and lora_B are weighted sums, the scaling folded into B, over modules and ranks that differ."""
    one, two = adapter("one", {"m": 3, "n": 2}, seed=1), adapter("two", {"m": 1}, seed=2, scaling=0.5)
    fused = fuse([(one, 0.25), (two, 0.75)])
    A, B = torch.zeros(3, 6), torch.zeros(5, 3)
    A[:3] += 0.25 * one.weights["m"].lora_A
    A[:1] += 0.75 * two.weights["m"].lora_A
    B[:, :3] += 0.25 * 2.0 * one.weights["m"].lora_B
    B[:, :1] += 0.75 * 0.5 * two.weights["m"].lora_B
    assert torch.allclose(fused.weights["m"].lora_A, A)
    assert torch.allclose(fused.weights["m"].lora_B, B)
    assert torch.allclose(fused.weights["n"].lora_A, 0.25 * one.weights["n"].lora_A)
    assert fused.weights["m"].scaling == fused.weights["n"].scaling == 1.0
    assert fused.path is None


def test_fusion_of_one_is_that_adapter():
    """One adapter of weight 1 fused alone changes nothing."""
    one = adapter("one", {"m": 3})
    w, f = one.weights["m"], fuse([(one, 1.0)]).weights["m"]
    assert torch.allclose(f.scaling * f.lora_B @ f.lora_A, w.scaling * w.lora_B @ w.lora_A)


def test_fusion_does_not_depend_on_order():
    """The same members in any order give the same bits and fingerprint; other weights another fingerprint."""
    one, two = adapter("one", {"m": 3}, seed=1, dtype=torch.bfloat16), adapter("two", {"m": 2}, seed=2)
    ab, ba = fuse([(one, 0.3), (two, 0.7)]), fuse([(two, 0.7), (one, 0.3)])
    assert ab.fingerprint == ba.fingerprint != fuse([(one, 0.7), (two, 0.3)]).fingerprint
    assert torch.equal(ab.weights["m"].lora_A, ba.weights["m"].lora_A)
    assert ab.weights["m"].lora_A.dtype == torch.float32


def test_fusion_of_what_does_not_fit():
    """No adapters, or adapters of other shapes, cannot be fused."""
    with pytest.raises(InvalidRequestError, match="at least one"):
        fuse([])
    with pytest.raises(InvalidRequestError, match=r"'m'.*\(6, 5\).*\(6, 7\)"):
        dict(fuse([(adapter("one", {"m": 3}), 0.5), (adapter("two", {"m": 3}, out_features=7), 0.5)]).weights)


def test_materialize():
    """Selection and mixture give their members with weights; fusion one synthetic adapter of weight 1."""
    pool = {"a": adapter("a", {"m": 2}), "b": adapter("b", {"m": 3})}
    members = compose(FOUND[:2], mode="mixture")
    assert materialize(members, pool) == ((pool["a"], 0.5), (pool["b"], 0.5))
    ((fused, weight),) = materialize(compose(FOUND[:2], mode="fusion"), pool)
    assert (fused.name, fused.rank, weight) == ("a+b", 3, 1.0)


def test_materialize_unknown(tmp_path):
    """A name that has left the pool is an UnknownAdapterError."""
    from langchain_lora_retriever.pool.pool import AdapterPool

    with pytest.raises(UnknownAdapterError, match="'a'"):
        materialize(pin(["a"], mode="mixture"), AdapterPool(tmp_path, create=True))


def test_fusions_are_kept_by_content():
    """The same members are fused once; an adapter replaced under its name is fused anew."""
    cache, one, two = FusionCache(), adapter("one", {"m": 3}), adapter("two", {"m": 3})
    first = cache.fuse([(one, 0.5), (two, 0.5)])
    assert cache.fuse([(two, 0.5), (one, 0.5)]).weights is first.weights
    replaced = adapter("two", {"m": 3}, seed=9)
    assert cache.fuse([(one, 0.5), (replaced, 0.5)]).weights is not first.weights


def test_fusions_do_not_hold_their_members_for_ever():
    """Of many that nobody runs any more the last few are kept, and those that somebody still has."""
    cache = FusionCache()
    adapters = [adapter(f"a{i}", {"m": 3}, seed=i) for i in range(50)]
    held = [weakref.ref(one.weights["m"].lora_A) for one in adapters]
    kept = cache.fuse([(adapters[0], 1.0)])
    for one in adapters:
        cache.fuse([(one, 1.0)])
    del one, adapters
    gc.collect()
    alive = [ref() is not None for ref in held]
    assert alive == [True, *[False] * 17, *[True] * 32]
    assert cache.fuse(kept.members).weights is kept.weights


def test_fusions_are_bounded():
    """The cache stays within its bytes, dropping what was used longest ago."""
    adapters = [adapter(f"a{i}", {"m": 3}, seed=i) for i in range(4)]
    one_takes = fuse([(adapters[0], 1.0)]).num_parameters * 4
    cache = FusionCache(max_bytes=2 * one_takes)
    kept = cache.fuse([(adapters[0], 1.0)]).weights["m"].lora_A
    for other in adapters[1:]:
        dict(cache.fuse([(other, 1.0)]).weights)
        assert cache.fuse([(adapters[0], 1.0)]).weights["m"].lora_A is kept
    assert len(cache) == 2


def test_a_fusion_is_a_recipe_until_its_weights_are_asked_for():
    """Its rank, shapes and fingerprint are known before; equal ones are averaged once, whoever asks meanwhile."""
    cache = FusionCache()
    members = [(adapter("one", {"m": 3, "n": 2}, seed=1), 0.5), (adapter("two", {"m": 1}, seed=2), 0.5)]
    fused = cache.fuse(members)
    assert (fused.rank, sorted(fused.weights), len(fused.weights), len(cache)) == (3, ["m", "n"], 2, 0)
    shapes = {name: (w.lora_A.shape, w.lora_B.shape, w.scaling) for name, w in fused.shapes.items()}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: fused.weights["m"].lora_A, range(32)))
    assert all(tensor is found[0] for tensor in found)
    assert shapes == {name: (w.lora_A.shape, w.lora_B.shape, w.scaling) for name, w in fused.weights.items()}
    assert pickle.loads(pickle.dumps(fused)).weights["m"].lora_A.equal(found[0])


def test_a_fusion_that_fails_is_tried_again():
    """What is wrong with a member is told to everybody who asks, and is not kept."""

    class Gone(dict):
        def __iter__(self):
            raise InvalidAdapterError("its file is gone")

    cache, one = FusionCache(), adapter("one", {"m": 3})
    bad = dataclasses.replace(one, weights=Gone(one.weights))
    for _ in range(2):
        with pytest.raises(InvalidAdapterError, match="gone"):
            dict(cache.fuse([(bad, 1.0)]).weights)
    assert len(cache) == 0
    assert cache.fuse([(one, 1.0)]).weights["m"].r == 3
