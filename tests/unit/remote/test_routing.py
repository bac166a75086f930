"""Which replica a request goes to: the decision alone, and over a stream of requests."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque

import pytest

from langchain_lora_retriever.remote.routing import ReplicaView, rank_replicas

NAMES = ("r0", "r1", "r2", "r3")


def view(name: str, num_ongoing: int = 0, *resident: str, capacity: int = 64) -> ReplicaView:
    """A replica."""
    return ReplicaView(name, num_ongoing, capacity, frozenset(resident))


def test_a_request_goes_where_its_adapters_lie() -> None:
    """Where most of them do, if nobody has them all; the other replicas follow."""
    replicas = [view("r0", 3), view("r1", 3, "a"), view("r2", 3, "a", "b"), view("r3", 3, "d")]
    assert rank_replicas(["a", "b", "c"], replicas)[:2] == ["r2", "r1"]
    assert sorted(rank_replicas(["a", "b", "c"], replicas)) == list(NAMES)


def test_where_several_have_all_the_least_busy_is_taken() -> None:
    """The base model's requests have all they need everywhere."""
    replicas = [view("r0", 4, "a"), view("r1", 2, "a"), view("r2", 1), view("r3", 3, "a")]
    assert rank_replicas(["a"], replicas)[0] == "r1"
    assert rank_replicas([], replicas)[0] == "r2"


def test_a_cold_adapter_has_one_home() -> None:
    """The same for everybody, and the same when another replica comes or goes; homes are spread."""
    homes = {f"a{i}": rank_replicas([f"a{i}"], [view(name) for name in NAMES])[0] for i in range(400)}
    assert all(count > 70 for count in Counter(homes.values()).values())
    for adapter, home in homes.items():
        fewer = [view(name) for name in NAMES if name != "r3"]
        assert home == "r3" or rank_replicas([adapter], fewer)[0] == home


def test_no_replica_is_left_idle_beside_a_full_one() -> None:
    """Whatever lies where: one that has no room for another request in its batch comes after those that have."""
    full, idle = view("r0", 8, "a", capacity=8), view("r1", 0, capacity=8)
    assert rank_replicas(["a"], [full, idle]) == ["r1", "r0"]
    busy = view("r0", 5, "a", capacity=64)
    assert rank_replicas(["a"], [busy, idle]) == ["r1", "r0"]
    assert rank_replicas(["a"], [view("r0", 5, "a"), view("r1", 4)]) == ["r0", "r1"]


def test_all_full() -> None:
    """The least busy first."""
    replicas = [view("r0", 9, "a", capacity=8), view("r1", 8, capacity=8)]
    assert rank_replicas(["a"], replicas) == ["r1", "r0"]
    assert rank_replicas(["a"], []) == []


def test_replicas_that_lost_a_request_come_last() -> None:
    """Even if they are all there is."""
    replicas = [view("r0", 0, "a"), view("r1", 3)]
    assert rank_replicas(["a"], replicas, avoid={"r0"}) == ["r1", "r0"]
    assert rank_replicas(["a"], replicas, avoid={"r0", "r1"}) == ["r0", "r1"]


def simulate(exponent: float, num_adapters_each: int, *, num_requests: int = 20_000) -> tuple[float, float, float]:
    """Requests that found all their adapters, adapters that were found, and how far the loads are from even.

    Four replicas that keep 160 adapters each, of 500; 128 requests at a time, each of which takes its turn to end.
    """
    rng = random.Random(0)
    weights = [1 / rank**exponent for rank in range(1, 501)]
    resident: dict[str, OrderedDict[str, None]] = {name: OrderedDict() for name in NAMES}
    ongoing, served = Counter(dict.fromkeys(NAMES, 0)), Counter[str]()
    running: deque[str] = deque()
    num_hits = num_found = 0
    for _ in range(num_requests):
        wanted: list[str] = []
        while len(wanted) < num_adapters_each:
            (adapter,) = rng.choices(range(500), weights)
            wanted += [f"a{adapter}"] * (f"a{adapter}" not in wanted)
        views = [ReplicaView(name, ongoing[name], 64, resident[name].keys()) for name in NAMES]
        chosen = rank_replicas(wanted, views)[0]
        found = sum(adapter in resident[chosen] for adapter in wanted)
        num_found += found
        num_hits += found == len(wanted)
        for adapter in wanted:
            resident[chosen][adapter] = None
            resident[chosen].move_to_end(adapter)
        while len(resident[chosen]) > 160:
            resident[chosen].popitem(last=False)
        ongoing[chosen] += 1
        served[chosen] += 1
        running.append(chosen)
        if len(running) > 128:
            place = rng.randrange(len(running))
            running.rotate(-place)
            ongoing[running.popleft()] -= 1
    even = num_requests / len(NAMES)
    furthest = max(abs(served[name] - even) for name in NAMES) / even
    return num_hits / num_requests, num_found / num_requests / num_adapters_each, furthest


@pytest.mark.parametrize("exponent", [1.0, 1.2])
def test_most_requests_land_where_their_adapters_lie(exponent: float) -> None:
    """Nine of ten, with 500 adapters asked for zipf-wise and room for 160 at each of four replicas; loads are even."""
    hits, _, furthest = simulate(exponent, 1)
    assert hits >= 0.9
    assert furthest <= 0.2


def test_most_adapters_of_mixtures_lie_where_they_are_asked_for() -> None:
    """Three of 500 that have nothing to do with each other cannot all lie together; most of them do."""
    hits, found, furthest = simulate(1.0, 3)
    assert found >= 0.85
    assert hits >= 0.65
    assert furthest <= 0.2
