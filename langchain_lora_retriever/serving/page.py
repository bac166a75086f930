"""The page at `/`: static files of this package, which ask the server's own paths and nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

__all__ = ["PAGE_PATHS", "page_paths"]

_FOLDER = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/ui/page.css": ("page.css", "text/css; charset=utf-8"),
    "/ui/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/ui/api.js": ("api.js", "text/javascript; charset=utf-8"),
    "/ui/map.js": ("map.js", "text/javascript; charset=utf-8"),
    "/ui/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

PAGE_PATHS = frozenset(_FILES)
"""Paths of the page. They need no key: what they hold is in every copy of this package."""


def page_paths() -> list[tuple[str, list[str], Callable[[Request], Awaitable[Response]]]]:
    """The paths, their methods, and what answers them."""
    return [(path, ["GET"], _giver(*_FILES[path])) for path in _FILES]


def _giver(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (_FOLDER / name).read_bytes()

    async def give(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return give
