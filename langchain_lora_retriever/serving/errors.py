"""Errors as the protocol has them: a status, and an object that says what was wrong; of a body too."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from langchain_lora_retriever.errors import (
    AdapterError,
    EncoderError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    InvalidRequestError,
    LoraRetrieverError,
    PoolError,
    PromptTooLongError,
    RequestAbortedError,
    UnknownAdapterError,
)

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["ClientGoneError", "RefusedError", "error_object", "error_response", "read_body", "told"]

Body = TypeVar("Body", bound=BaseModel)

_logger = logging.getLogger(__name__)
_CLIENT_CLOSED = 499
_RETRY_SECONDS = 1
_ENGINE_ENDED = (
    "The engine of this server has ended. Ask again; if it has not come back, the server's operator must restart the "
    "server, whose log says more."
)
_MAX_COUNTED = 1000  # faults of a body, beyond which telling them apart takes seconds
_MAX_TOLD = 3
"""Faults of a request that are told at once."""

# The first that fits counts.
_STATUS: tuple[tuple[type[BaseException], int, str, str | None], ...] = (
    (PromptTooLongError, 400, "invalid_request_error", "context_length_exceeded"),
    (UnknownAdapterError, 404, "invalid_request_error", "model_not_found"),
    (InvalidRequestError, 400, "invalid_request_error", None),
    (AdapterError, 400, "invalid_request_error", "adapter_refused"),
    (PoolError, 400, "invalid_request_error", None),
    (EngineOverloadedError, 429, "rate_limit_error", "overloaded"),
    (EngineDeadError, 503, "server_error", "engine_dead"),
    (RequestAbortedError, 503, "server_error", "aborted"),
    (EncoderError, 500, "server_error", "encoder"),
    (EngineError, 500, "server_error", "engine"),
    (TimeoutError, 504, "server_error", "timeout"),
    (LoraRetrieverError, 500, "server_error", None),
)


class RefusedError(Exception):
    """A request that is refused before a call is made of it.

    Attributes:
        status: HTTP status.
        kind: The protocol's `type`.
        code: Its `code`.
    """

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "invalid_request_error", code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code


class ClientGoneError(RefusedError):
    """A client that has gone before its answer; the status is for the count alone."""

    def __init__(self) -> None:
        super().__init__("The client has gone.", status=_CLIENT_CLOSED, kind="client_error")


def error_object(error: BaseException) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`. What is not of this package is told by its type alone.

    An engine's end is told to clients in their words: the error's own advice is for whoever holds the engine in Python.
    """
    _, kind, code = _describe(error)
    is_ours = isinstance(error, LoraRetrieverError | RefusedError | TimeoutError)
    message = str(error) if is_ours else f"The server failed ({type(error).__name__}); its log says more."
    if not is_ours:
        _logger.error("A request failed", exc_info=error)
    elif isinstance(error, EngineDeadError):
        _logger.error("A request met an engine that has ended: %s", error)
        message = _ENGINE_ENDED
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_response(error: BaseException) -> JSONResponse:
    """The response that tells of an error."""
    status, _, _ = _describe(error)
    headers = {"Retry-After": str(_RETRY_SECONDS)} if status == 429 else None
    return JSONResponse(error_object(error), status, headers)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """Read a request's body.

    Raises:
        RefusedError: If it is not what the path takes, or the client goes while it sends it.
    """
    try:
        return kind.model_validate_json(await request.body())
    except ClientDisconnect as error:
        raise ClientGoneError from error
    except ValidationError as error:
        raise RefusedError(f"The request cannot be understood: {told(error, whole='the body')}.") from error


def told(error: ValidationError, *, whole: str) -> str:
    """What pydantic found, in a line; the first few of it.

    Args:
        error: What it raised.
        whole: What its place is called if it is the value as a whole.
    """
    if error.error_count() > _MAX_COUNTED:
        return f"{whole} has {error.error_count():,} faults"
    faults = error.errors(include_url=False, include_input=False)[:_MAX_TOLD]
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or whole}: {fault['msg']}" for fault in faults)


def _describe(error: BaseException) -> tuple[int, str, str | None]:
    if isinstance(error, RefusedError):
        return error.status, error.kind, error.code
    for kind, status, name, code in _STATUS:
        if isinstance(error, kind):
            return status, name, code
    return 500, "server_error", None
