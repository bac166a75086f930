"""The same server as a Ray Serve application: ingress replicas speak HTTP and route, engine replicas run."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from langchain_lora_retriever.errors import EngineError
from langchain_lora_retriever.remote import RemoteEngine, engine_app
from langchain_lora_retriever.serving.app import create_app
from langchain_lora_retriever.serving.config import ServeConfig, address_of, read_config
from langchain_lora_retriever.serving.engines import EngineElsewhere

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI
    from ray.serve import Application

__all__ = ["app", "cluster_app", "serve_cluster"]

_NAME = "lora-retriever"
_ENGINE = "engine"
_MAX_HTTP_REQUESTS = 4096  # of an ingress replica; what may wait is `max_waiting`


def app(args: dict[str, Any]) -> Application:
    """Build the application from the `args` of a `serve deploy` file: the settings of `ServeConfig`.

    Raises:
        InvalidRequestError: If a setting is unknown or not allowed.
    """
    # Whoever the cluster lets in can ask: a key is required, unless the settings say that it is this machine alone.
    return cluster_app(read_config(None, **{"host": "0.0.0.0", "replicas": 1, **args}))  # noqa: S104 - see above


def cluster_app(config: ServeConfig) -> Application:
    """Make the Serve application of a server: its ingress, and the engines that it asks.

    Args:
        config: The server's settings. Files and folders are looked for on the nodes that the replicas run on.
    """
    elsewhere = EngineElsewhere.of(config)
    num_seqs, num_replicas = elsewhere.num_seqs, config.replicas or 1

    def build() -> FastAPI:
        handle = serve.get_deployment_handle(_ENGINE, app_name=serve.get_replica_context().app_name)
        engine = RemoteEngine(handle, max_in_flight=elsewhere.max_in_flight(config.max_replicas or num_replicas))
        return create_app(elsewhere.make_chat_model(engine=engine), config)

    engines = engine_app(
        elsewhere.recipe,
        num_replicas=num_replicas,
        max_replicas=config.max_replicas,
        target_ongoing_requests=num_seqs,
        max_ongoing_requests=2 * num_seqs,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        graceful_shutdown_timeout_s=float(config.drain_seconds),
    )
    ingress: Any = serve.deployment(
        serve.ingress(build)(),
        name="ingress",
        num_replicas=config.ingress_replicas,
        max_ongoing_requests=_MAX_HTTP_REQUESTS,
        ray_actor_options={"num_cpus": 1},
        graceful_shutdown_timeout_s=float(config.drain_seconds),
        graceful_shutdown_wait_loop_s=0.5,
    )
    made: Application = ingress.bind(engines)
    return made


def serve_cluster(config: ServeConfig, *, on_ready: Callable[[str], object]) -> None:
    """Serve until the process is interrupted or terminated.

    In the cluster that `RAY_ADDRESS` names; where there is none, in one of this machine that begins and ends with this
    process.

    Args:
        config: The server's settings, `replicas` among them.
        on_ready: Called with the server's address once everything has started.

    Raises:
        EngineError: If a replica does not start.
    """
    application = cluster_app(config)
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**_cluster(config), log_to_driver=False, configure_logging=False)
        port = config.port or _free_port(config.host)
        serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": port})
        try:
            serve.run(application, name=_NAME, route_prefix="/")
        except RuntimeError as error:
            raise EngineError(f"The replicas did not start: {error}") from error
        on_ready(address_of(config.host, port))
        stop.wait()
    finally:
        if ray.is_initialized():
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


def _cluster(config: ServeConfig) -> dict[str, Any]:
    """Which cluster: the one that the environment names, or one of this machine, with room for what is to run."""
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return {}
    engines = (config.max_replicas or config.replicas or 1) * config.cpus_per_replica
    num_cpus = max(os.cpu_count() or 1, math.ceil(engines + config.ingress_replicas))
    return {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as found:
        port: int = found.getsockname()[1]
        return port
