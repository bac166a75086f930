"""What a server is told: by the command line, or by a YAML file."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.serving.errors import told
from langchain_lora_retriever.support.shown import shown

__all__ = ["MAX_WAITING", "ServeConfig", "address_of", "read_config", "read_keys"]

MAX_WAITING = 256
"""Requests that may wait beside those that run, where the configuration says nothing: a server has strangers."""
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class ServeConfig(BaseModel):
    """Settings of a server.

    Attributes:
        base_model: A hub name or a folder; None serves the demo's.
        pool: Folder of adapters; None serves the demo's, or with a base model of one's own none.
        encoder: A sentence-transformers name or folder.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        api_key_file: File with one key per line. Without it anybody may ask, which only a loopback address allows.
        admin_key_file: File with the keys that may change the pool; without it nobody may.
        adapter_root: Folder below which adapters may be added from.
        max_body_bytes: Largest request.
        max_n: Maximum number of answers of a request.
        timeout: Seconds a request may take.
        pool_seconds: Seconds after which the pool's folder is looked at again, for what others have changed; 0 never
            does.
        drain_seconds: Seconds that open requests have when the server is told to stop.
        engine_process: Whether the engine runs in a process of its own, where it shares no interpreter lock with HTTP:
            for a hundred streams and more on a GPU.
        replicas: Engine replicas of a Ray Serve application; None serves from this process alone.
        max_replicas: Most of them: Serve adds some while requests queue. None keeps `replicas`.
        ingress_replicas: Processes that speak HTTP, encode and route, before the engine replicas.
        gpus_per_replica: GPUs of an engine replica; 0 runs it on CPUs.
        cpus_per_replica: CPU cores of an engine replica, which computes in so many threads where it has no GPU.
        chat: More settings of `ChatLoraRetriever`, which are the defaults of every request.
    """

    model_config = ConfigDict(extra="forbid")

    base_model: str | None = None
    pool: Path | None = None
    encoder: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    adapter_root: Path | None = None
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    max_n: int = Field(default=8, ge=1, le=128)
    timeout: float = Field(default=600.0, gt=0)
    pool_seconds: float = Field(default=1.0, ge=0)
    drain_seconds: int = Field(default=30, ge=0)
    engine_process: bool = False
    replicas: int | None = Field(default=None, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    ingress_replicas: int = Field(default=1, ge=1)
    gpus_per_replica: float = Field(default=0.0, ge=0)
    cpus_per_replica: float = Field(default=1.0, gt=0)
    chat: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in _LOOPBACK


def address_of(host: str, port: int) -> str:
    """Where a server that listens there is found."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def read_config(path: Path | None, **given: Any) -> ServeConfig:
    """Read a YAML file, and lay what was given over it; None is not given.

    Raises:
        InvalidRequestError: If the file cannot be read, or a setting is unknown or out of range, or the server would
            be open to a network without a key.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InvalidRequestError(f"--config {path} cannot be read: {error}") from error
        if loaded is not None and not (isinstance(loaded, dict) and all(isinstance(name, str) for name in loaded)):
            raise InvalidRequestError(f"--config {path} holds {shown(loaded)}: write settings as `name: value`.")
        values = loaded or {}
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        config = ServeConfig(**values)
    except ValidationError as error:
        raise InvalidRequestError(f"The server cannot be set up so: {told(error, whole='it')}.") from error
    if not config.is_loopback and config.api_key_file is None:
        raise InvalidRequestError(
            f"host={config.host!r} lets others reach this server: pass --api-key-file with the keys that may ask, or "
            "listen on 127.0.0.1."
        )
    if config.engine_process and config.replicas is not None:
        raise InvalidRequestError(
            f"engine_process=True and replicas={config.replicas} exclude each other: replicas have processes of their "
            "own. Drop one of the two."
        )
    if config.max_replicas is not None and config.max_replicas < (config.replicas or 1):
        raise InvalidRequestError(
            f"max_replicas={config.max_replicas} is less than replicas={config.replicas or 1}: raise or drop it."
        )
    if config.admin_key_file is not None and config.adapter_root is None:
        raise InvalidRequestError("An admin key needs adapter_root: the folder below which adapters may be added from.")
    return config


def read_keys(path: Path | None) -> tuple[bytes, ...]:
    """Read one key per line; () without a file.

    Raises:
        InvalidRequestError: If the file cannot be read, or holds no key of 16 characters or more.
    """
    if path is None:
        return ()
    try:
        keys = tuple(line.strip().encode() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"The key file {path} cannot be read: {error}") from error
    if not keys or any(len(key) < 16 for key in keys):
        raise InvalidRequestError(f"The key file {path} must hold keys of 16 characters or more, one per line.")
    return keys
