"""Fixtures that any test may use; what they are made of is in `makers.py`."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

import makers

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ["LORA_RETRIEVER_CACHE"] = ""  # what one test has embedded is no other's
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # a test's own processes see what it sees
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """The byte-level tokenizer."""
    return makers.make_tokenizer()


@pytest.fixture(scope="session")
def make_checkpoint() -> Any:
    """Write a random PEFT checkpoint for the tiny model: `make_checkpoint(folder, seed=0, r=4, ...)`."""
    return makers.make_checkpoint


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster of this machine with Serve, started once; a handle of two replicas of `makers.make_tiny_engine`."""
    ray = pytest.importorskip("ray")
    from ray import serve

    from langchain_lora_retriever.remote import engine_app

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # or a key is written into the home folder
    folder = tempfile.mkdtemp(prefix="lora-ray-")  # short: sockets lie in it
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, _temp_dir=folder,
        namespace="lora-tests", log_to_driver=False, configure_logging=False,
    )  # fmt: skip
    try:
        serve.start(proxy_location="Disabled")
        app = engine_app(makers.make_tiny_engine, num_replicas=2, graceful_shutdown_timeout_s=2.0)
        yield serve.run(app, name="tiny", route_prefix=None)
        serve.shutdown()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
