"""An engine as a Ray Serve deployment: one replica for each GPU."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from langchain_lora_retriever.errors import EngineDeadError, EngineError
from langchain_lora_retriever.remote.host import MAX_ADAPTER_BYTES, EngineHost
from langchain_lora_retriever.remote.wire import Door, short

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ray.serve import Application

    from langchain_lora_retriever.remote.recipe import HostedEngine
    from langchain_lora_retriever.remote.wire import EngineDescription, Job

__all__ = ["EngineReplica", "engine_app"]

_SECONDS_TO_COME = 30.0


class EngineReplica:
    """One engine in a process that Serve keeps. Its public methods are Serve's and `RemoteEngine`'s to call.

    Args:
        make_engine: Makes the engine, in the replica: an `EngineRecipe`, mostly.
        max_adapter_bytes: Maximum number of bytes of adapters that callers have sent, kept for further requests.
    """

    def __init__(self, make_engine: Callable[[], HostedEngine], max_adapter_bytes: int = MAX_ADAPTER_BYTES) -> None:
        self._host = EngineHost(make_engine(), max_adapter_bytes=max_adapter_bytes)
        address, key = self._host.listen(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._door = Door(serve.get_replica_context().replica_id.unique_id, address, key, os.getpid())

    def describe(self) -> EngineDescription:
        """What callers must know of the engine."""
        return self._host.description

    async def generate(self, job: Job) -> AsyncIterator[Door]:
        """Run a request: say where its caller is let in, and end when it ends. Its deltas go through the door.

        Serve counts the request for as long as this runs, and ends it here when its caller cancels it.
        """
        yield self._door
        loop = asyncio.get_running_loop()
        has_come, has_ended = asyncio.Event(), asyncio.Event()
        self._host.when_there(job.caller, lambda: loop.call_soon_threadsafe(has_come.set))
        try:
            async with asyncio.timeout(_SECONDS_TO_COME):
                await has_come.wait()
        except TimeoutError:
            raise EngineError(
                f"The caller did not come within {_SECONDS_TO_COME:.0f} s to {self._door.address}: it must reach the "
                "replicas' nodes on the ports that Ray's workers use too."
            ) from None

        try:
            self._host.start(job, lambda: loop.call_soon_threadsafe(has_ended.set))
            await has_ended.wait()
        finally:
            self._host.abort(job.caller, job.key)

    def record_routing_stats(self) -> dict[str, Any]:
        """What `AdapterRouter` goes by."""
        return {
            "adapters": [short(fingerprint) for fingerprint in self._host.resident_fingerprints],
            "max_num_seqs": self._host.engine.info.max_num_seqs,
            "num_unfinished": self._host.num_unfinished,
        }

    def check_health(self) -> None:
        """Let Serve start another replica once the engine takes no more requests.

        Raises:
            EngineDeadError: If so.
        """
        if not self._host.engine.is_alive:
            raise EngineDeadError("The engine has stopped.")

    def __del__(self) -> None:
        """Close the engine when Serve ends the replica, its requests being done."""
        host: EngineHost | None = getattr(self, "_host", None)
        if host is not None:
            host.close()
            host.engine.close()


def engine_app(
    make_engine: Callable[[], HostedEngine],
    *,
    num_replicas: int = 1,
    max_replicas: int | None = None,
    target_ongoing_requests: float = 64,
    max_ongoing_requests: int = 256,
    max_adapter_bytes: int = MAX_ADAPTER_BYTES,
    ray_actor_options: dict[str, Any] | None = None,
    **options: Any,
) -> Application:
    """Make the Serve application of engine replicas.

    Args:
        make_engine: Makes an engine in each replica.
        num_replicas: Replicas; with `max_replicas` the fewest.
        max_replicas: Most replicas: Serve adds some while requests queue, and takes them away again.
        target_ongoing_requests: Requests of a replica, waiting ones included, that Serve then aims at.
        max_ongoing_requests: Maximum number of requests that a replica is given; others wait with their callers.
        max_adapter_bytes: See `EngineReplica`.
        ray_actor_options: What a replica takes: `{"num_gpus": 1}`. One CPU by default.
        **options: Further ones of `serve.deployment`.
    """
    scaling: dict[str, Any] = {"num_replicas": num_replicas}
    if max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=num_replicas, max_replicas=max_replicas, target_ongoing_requests=target_ongoing_requests
            )
        }
    routing: dict[str, Any] = {
        "request_router_class": "langchain_lora_retriever.remote.router.AdapterRouter",
        "request_routing_stats_period_s": 1.0,
    }
    deployment: Any = serve.deployment(  # of a class: not the decorator
        EngineReplica,
        name="engine",
        max_ongoing_requests=max_ongoing_requests,
        ray_actor_options=ray_actor_options or {"num_cpus": 1},
        request_router_config=RequestRouterConfig(**routing),
        **{
            "health_check_period_s": 2.0,
            "health_check_timeout_s": 10.0,
            "graceful_shutdown_timeout_s": 30.0,
            "graceful_shutdown_wait_loop_s": 0.5,
            **scaling,
            **options,
        },
    )
    made: Application = deployment.bind(make_engine, max_adapter_bytes)
    return made
