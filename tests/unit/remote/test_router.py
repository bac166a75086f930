"""Ray Serve's request router, asked as Serve asks it, without a cluster."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.request_router import PendingRequest

from langchain_lora_retriever.remote.router import AdapterRouter

DEPLOYMENT = DeploymentID(name="engine", app_name="app")


class Replica:
    """One that says how many requests it has, and counts how often it is asked."""

    def __init__(self, name: str, num_ongoing: int) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
        self.max_ongoing_requests = 4
        self.routing_stats: dict[str, Any] = {}
        self.num_ongoing, self.num_asked = num_ongoing, 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        """What Serve asks for."""
        assert deadline_s > 0
        self.num_asked += 1
        return self.num_ongoing


def make_router(*replicas: Replica) -> AdapterRouter:
    """A router that knows some replicas."""
    router = AdapterRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    router.initialize_state()
    router._replicas = {replica.replica_id: replica for replica in replicas}
    router._replicas_list = list(replicas)
    return router


def make_request() -> PendingRequest:
    """A request that waits for its place."""
    metadata = SimpleNamespace(internal_request_id="1", request_id="1", multiplexed_model_id="")
    return PendingRequest(args=[], kwargs={}, metadata=metadata)


def test_full_replicas_are_left_in_peace() -> None:
    """A request that waits asks each of them some times a second, and is sent where a place becomes free."""

    async def wait() -> list[int]:
        replicas = [Replica("r0", 4), Replica("r1", 4)]
        router = make_router(*replicas)
        waiting = asyncio.create_task(router._choose_replica_for_request(make_request()))
        await asyncio.sleep(1.0)
        num_asked = [replica.num_asked for replica in replicas]
        assert not waiting.done()
        replicas[1].num_ongoing = 3
        assert await asyncio.wait_for(waiting, 2.0) is replicas[1]
        return num_asked

    assert all(1 <= num <= 15 for num in asyncio.run(wait()))
