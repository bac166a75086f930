"""Who may ask, and how much at once: keys and the size of a request, before anything is read of it."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from langchain_lora_retriever.serving.errors import RefusedError, error_response
from langchain_lora_retriever.serving.page import PAGE_PATHS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Gate"]

_OPEN = frozenset({"/health"}) | PAGE_PATHS
_ADMIN = "/v1/adapters"


class Gate:
    """ASGI middleware: refuses who has no key, and what is too large.

    Args:
        app: What is behind it.
        keys: Keys that may ask; none lets everybody.
        admin_keys: Keys that may change the pool; none lets nobody.
        max_body_bytes: Largest request.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[bytes], admin_keys: Sequence[bytes], max_body_bytes: int
    ) -> None:
        self._app = app
        self._keys = tuple(keys)
        self._admin_keys = tuple(admin_keys)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            length = headers.get(b"content-length")
            if length is not None and (not length.isdigit() or int(length) > self._max_body_bytes):
                raise self._too_large()
        except RefusedError as error:
            await error_response(error)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large()  # to the handler that reads it, which tells
            return message

        await self._app(scope, counted, send)

    def _check_key(self, path: str, given: bytes) -> None:
        if path in _OPEN:
            return
        scheme, _, key = given.partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else b""
        if path == _ADMIN or path.startswith(f"{_ADMIN}/"):
            if not self._admin_keys:
                raise RefusedError("Adapters cannot be changed here: the server has no admin key.", status=403)
            if not _is_among(key, self._admin_keys):
                raise RefusedError("The admin key is missing or wrong.", status=401, code="invalid_api_key")
        elif self._keys and not _is_among(key, (*self._keys, *self._admin_keys)):
            raise RefusedError(
                "The API key is missing or wrong: pass it as `Authorization: Bearer KEY`.",
                status=401,
                code="invalid_api_key",
            )

    def _too_large(self) -> RefusedError:
        return RefusedError(
            f"The request has more than {self._max_body_bytes:,} bytes, which is the most that is taken.",
            status=413,
            code="request_too_large",
        )


def _is_among(key: bytes, keys: Sequence[bytes]) -> bool:
    """Compare with all of them, in a time that tells nothing of which or how much was right."""
    found = False
    for other in keys:
        found |= hmac.compare_digest(key, other)
    return found
