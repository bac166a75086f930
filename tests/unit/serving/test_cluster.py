"""The server as a Ray Serve application, as far as it goes without a cluster: settings, and the files for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")

from ray.serve.schema import ServeDeploySchema

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.serving import cluster

EXAMPLES = Path(__file__).parents[3] / "examples" / "cluster"


def read(name: str) -> tuple[dict[str, Any], ServeDeploySchema]:
    """A file's whole, and what of it is Serve's."""
    loaded = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    config = loaded if "applications" in loaded else yaml.safe_load(loaded["spec"]["serveConfigV2"])
    return loaded, ServeDeploySchema.model_validate(config)


@pytest.mark.parametrize("name", ["serve.yaml", "kuberay.yaml"])
def test_the_examples_can_be_deployed(name: str) -> None:
    """By Serve's schema, and by ours: what they name is there, and takes what they pass."""
    _, config = read(name)
    (application,) = config.applications
    module, _, builder = application.import_path.partition(":")
    assert (module, getattr(cluster, builder)) == (cluster.__name__, cluster.app)
    built = cluster.app(application.args)
    engine = next(node for node in _deployments(built) if node.name == "engine")
    assert engine.ray_actor_options["num_gpus"] == 1
    assert engine._deployment_config.autoscaling_config.max_replicas == application.args["max_replicas"]
    assert engine._deployment_config.request_router_config.request_router_class.endswith("AdapterRouter")


def test_the_kuberay_example_is_a_ray_service() -> None:
    """Its pods see the folders that its settings name, and outlive their requests."""
    loaded, config = read("kuberay.yaml")
    assert (loaded["apiVersion"], loaded["kind"]) == ("ray.io/v1", "RayService")
    args = config.applications[0].args
    spec = loaded["spec"]["rayClusterConfig"]
    (workers,) = spec["workerGroupSpecs"]
    assert workers["maxReplicas"] == args["max_replicas"]
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > args.get("drain_seconds", 30)
    for group in (spec["headGroupSpec"], workers):
        (container,) = group["template"]["spec"]["containers"]
        mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert args["pool"] in mounted
        assert str(Path(args["api_key_file"]).parent) in mounted
        named = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == named


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    """A cluster that anybody reaches needs a key, and the engine's settings are looked at before anything starts."""
    with pytest.raises(InvalidRequestError, match="api-key-file"):
        cluster.app({"base_model": "org/model"})
    with pytest.raises(InvalidRequestError, match="replicas"):
        cluster.app({"base_model": "org/model", "host": "127.0.0.1", "replicas": 0})
    with pytest.raises(InvalidRequestError, match="max_num_seq"):
        cluster.app({"base_model": "org/model", "host": "127.0.0.1", "chat": {"engine_config": {"max_num_seq": 3}}})
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        cluster.app({"base_model": "org/model", "host": "127.0.0.1", "engine_process": True})
    with pytest.raises(InvalidRequestError, match="max_replicas"):
        cluster.app({"base_model": "org/model", "host": "127.0.0.1", "replicas": 3, "max_replicas": 2})


def _deployments(application: Any) -> list[Any]:
    """The deployments of an application that is bound, not deployed."""
    found = [application._bound_deployment]
    for argument in found[0].init_args:
        if hasattr(argument, "_bound_deployment"):
            found += _deployments(argument)
    return found
