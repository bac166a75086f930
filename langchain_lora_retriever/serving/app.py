"""The server's paths: chat completions, models, routing, adapters, health, metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from langchain_lora_retriever.chat.begin import LONG_CHAT, Begun, abegin, owned, text_to_route
from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.errors import InvalidRequestError, LoraRetrieverError, PoolError, UnknownAdapterError
from langchain_lora_retriever.serving.config import ServeConfig, read_keys
from langchain_lora_retriever.serving.errors import (
    ClientGoneError,
    RefusedError,
    error_object,
    error_response,
    read_body,
)
from langchain_lora_retriever.serving.explorer import explorer_paths
from langchain_lora_retriever.serving.gate import Gate
from langchain_lora_retriever.serving.metrics import Metrics
from langchain_lora_retriever.serving.page import page_paths
from langchain_lora_retriever.serving.protocol import AUTO, ChatRequest, ChunkWriter, RouteRequest, completion, event
from langchain_lora_retriever.support.threads import Deadline, run_in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from starlette.types import Receive, Scope, Send

    from langchain_lora_retriever.chat.model import ChatLoraRetriever
    from langchain_lora_retriever.engine.api import Delta

__all__ = ["create_app"]

_logger = logging.getLogger(__name__)


class _AddRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    path: str
    samples: list[str | dict[str, Any]] | None = None


def create_app(llm: ChatLoraRetriever, config: ServeConfig | None = None) -> FastAPI:
    """Make the ASGI application that serves a chat model.

    Args:
        llm: Its settings are every request's defaults. The base model is loaded when the application starts.
        config: Limits, keys, and where adapters may be added from.

    Raises:
        InvalidRequestError: If a key file cannot be read.
    """
    config = config or ServeConfig()
    server = _Server(llm, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await llm.runtime.aready()
        follower = asyncio.create_task(server.follow_pool())
        yield
        await _end(follower)
        await llm.runtime.aclose()

    app = FastAPI(title="lora-retriever", lifespan=lifespan, openapi_url=None)
    app.add_exception_handler(HTTPException, _on_http_error)
    for path, methods, handler in (
        ("/v1/chat/completions", ["POST"], server.complete),
        ("/v1/models", ["GET"], server.models),
        ("/v1/route", ["POST"], server.route),
        ("/v1/adapters", ["GET"], server.list_adapters),
        ("/v1/adapters", ["POST"], server.add_adapter),
        ("/v1/adapters/{name}", ["DELETE"], server.remove_adapter),
        ("/health", ["GET"], server.health),
        ("/metrics", ["GET"], server.metrics_text),
        *explorer_paths(llm),
        *page_paths(),
    ):
        # Not as FastAPI's own routes: what it finds out about functions it keeps for ever, and with them the model.
        app.add_route(path, server.counted(path, handler), methods=methods)
    app.add_middleware(
        Gate,
        keys=read_keys(config.api_key_file),
        admin_keys=read_keys(config.admin_key_file),
        max_body_bytes=config.max_body_bytes,
    )
    return app


class _Server:
    """What is behind the paths."""

    def __init__(self, llm: ChatLoraRetriever, config: ServeConfig) -> None:
        self._llm = llm
        self._config = config
        self._runtime = llm.runtime
        self._started = int(time.time())
        self._metrics = Metrics(llm.runtime)
        self._changing = asyncio.Lock()  # of the pool, by one request at a time

    def counted(self, path: str, handler: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        """Turn what a handler raises into a response, and count how it ended."""

        async def handle(request: Request) -> Response:
            try:
                response = await handler(request)
            except Exception as error:  # noqa: BLE001 - what is not of this package is logged, and told by its type
                response = error_response(error)
            self._metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return handle

    async def complete(self, request: Request) -> Response:
        """Answer a chat, whole or as a stream of events."""
        arrival = time.monotonic()
        asked = await read_body(request, ChatRequest)
        options = CallOptions.merge(self._llm, asked.arguments(max_n=self._config.max_n, timeout=self._config.timeout))
        is_long = len(asked.messages) > LONG_CHAT
        messages = await run_in_thread(asked.to_messages) if is_long else asked.to_messages()
        deadline = Deadline(options.timeout)
        name = self._llm.model_name if asked.model == AUTO else asked.model

        async def begin() -> Begun:
            async with deadline.limit():
                engine = await self._runtime.aready()
                try:
                    return await abegin(self._runtime, engine, messages, options)
                except UnknownAdapterError as error:
                    raise UnknownAdapterError(f"{error} {self._what_model_may_be()}") from error

        begun = await _unless_gone(request, begin(), discard=Begun.abort)
        self._metrics.count_adapters(begun.composition.names)
        if asked.stream:
            tells_usage = asked.stream_options is not None and asked.stream_options.include_usage
            writer = ChunkWriter(begun, name, tells_usage=tells_usage)
            return _EventStream(self._events(begun, writer, deadline, arrival), on_close=begun.abort)

        async def wait() -> dict[str, Any]:
            with owned(begun, deadline, asyncio.get_running_loop()) as generations:
                completions = await asyncio.gather(*(generation.aresult() for generation in generations))
            self._metrics.time_to_first_token.observe(time.monotonic() - arrival)
            for done in completions:
                self._count_usage(done.usage)
            return completion(begun, completions, name)

        try:
            return JSONResponse(await _unless_gone(request, wait()))
        finally:
            begun.abort()

    async def _events(
        self, begun: Begun, writer: ChunkWriter, deadline: Deadline, arrival: float
    ) -> AsyncGenerator[bytes]:
        """The events of a stream; an error in mid-stream is its last."""
        last: dict[int, float] = {}
        yield writer.first()
        try:
            with owned(begun, deadline, asyncio.get_running_loop()):
                async for index, delta in _merged(begun):
                    now = time.monotonic()
                    if not last:
                        self._metrics.time_to_first_token.observe(now - arrival)
                    if index in last and delta.token_ids:
                        self._metrics.inter_token.observe((now - last[index]) / len(delta.token_ids))
                    last[index] = now
                    if delta.usage is not None:
                        self._count_usage(delta.usage)
                    written = writer.delta(index, delta)
                    if written:
                        yield written
        except Exception as error:  # noqa: BLE001 - the status is sent already: the stream tells
            yield event(error_object(error))
            return
        yield writer.last()

    def _count_usage(self, usage: Any) -> None:
        self._metrics.tokens.labels("prompt").inc(usage.num_prompt_tokens)
        self._metrics.tokens.labels("cached").inc(usage.num_cached_tokens)
        self._metrics.tokens.labels("output").inc(usage.num_output_tokens)

    def _what_model_may_be(self) -> str:
        return (
            f"A model is {AUTO!r}, which finds adapters for every prompt, {self._llm.model_name!r}, the base model "
            "alone, or an adapter's name."
        )

    async def models(self, _: Request) -> Response:
        """What `model` may be: routed, the base model, or one adapter."""
        rejected = self._runtime.rejected
        names = [AUTO, self._llm.model_name, *(name for name in self._runtime.pool.names if name not in rejected)]
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {"id": name, "object": "model", "created": self._started, "owned_by": "lora-retriever"}
                    for name in names
                ],
            }
        )

    async def route(self, request: Request) -> Response:
        """The decision alone."""
        asked = await read_body(request, RouteRequest)
        options = CallOptions.merge(self._llm, asked.arguments())
        composition = await self._runtime.aroute(text_to_route(asked.to_messages(), options), options)
        return JSONResponse(composition.to_metadata())

    async def list_adapters(self, _: Request) -> Response:
        """The pool: who is there, and who cannot be used."""
        state, rejected = self._runtime.pool.state, self._runtime.rejected
        return JSONResponse(
            {
                "adapters": [
                    {
                        "name": name,
                        "fingerprint": state.entries[name].adapter.fingerprint,
                        "rank": state.entries[name].adapter.rank,
                        "num_samples": len(state.entries[name].samples),
                        "is_routed": state.entries[name].is_described and name not in rejected,
                    }
                    for name in state.names
                ],
                "undescribed": dict(self._runtime.undescribed),
                "rejected": {name: str(error) for name, error in rejected.items()},
            }
        )

    async def add_adapter(self, request: Request) -> Response:
        """Add an adapter from below the allowed folder."""
        asked = await read_body(request, _AddRequest)
        root = self._config.adapter_root
        if root is None:
            raise RefusedError("Adapters cannot be added here: the server has no adapter_root.", status=403)

        def add() -> str:
            folder = (root / asked.path).resolve()
            if not folder.is_relative_to(root.resolve()) or not folder.is_dir():
                raise InvalidRequestError(f"path={asked.path!r} is no folder below the server's adapter_root.")
            return self._runtime.pool.add(asked.name, folder, samples=asked.samples).fingerprint

        async with self._changing:
            try:
                fingerprint = await run_in_thread(add)
            except PoolError as error:
                raise RefusedError(str(error), status=409, code="adapter_exists") from error
            await self._runtime.aready()
        refused = self._runtime.rejected.get(asked.name)
        return JSONResponse(
            {"name": asked.name, "fingerprint": fingerprint, "rejected": None if refused is None else str(refused)}, 201
        )

    async def remove_adapter(self, request: Request) -> Response:
        """Remove an adapter; requests that run it end as they would."""
        name = request.path_params["name"]
        async with self._changing:
            await run_in_thread(lambda: self._runtime.pool.remove(name))
        return JSONResponse({"name": name, "deleted": True})

    async def follow_pool(self) -> None:
        """Look at the pool's folder now and then: another process may have changed it."""
        if self._runtime.pool.path is None or not self._config.pool_seconds:
            return
        while True:
            await asyncio.sleep(self._config.pool_seconds)
            try:
                async with self._changing:
                    if await run_in_thread(self._runtime.pool.refresh):
                        await self._runtime.aready()
            except LoraRetrieverError:
                _logger.exception("The pool's folder cannot be read; what is known of it is served on")

    async def health(self, _: Request) -> Response:
        """200 while the engine takes requests."""
        engine = self._runtime.running_engine
        is_well = engine is not None and engine.is_alive
        return JSONResponse({"status": "ok" if is_well else "the engine is not there"}, 200 if is_well else 503)

    async def metrics_text(self, _: Request) -> Response:
        """The numbers as Prometheus reads them."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


T = TypeVar("T")


async def _unless_gone(request: Request, work: Awaitable[T], *, discard: Callable[[T], object] = lambda _: None) -> T:
    """Do work; cancel it as soon as the client has gone.

    Args:
        request: Whose body has been read: what comes next from the client is that it goes.
        work: What to do.
        discard: Undoes a result that comes at the same moment.

    Raises:
        ClientGoneError: If the client went first.
    """
    task: asyncio.Task[T] = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(request.receive))
    is_taken = False
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        await _end(watcher)
        is_taken = True
        return task.result()
    finally:
        if not is_taken:  # the work may have ended since
            await _end(watcher, task)
            if not task.cancelled() and task.exception() is None:
                discard(task.result())


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _EventStream(Response):
    """Server-sent events, until they end or the client goes; what makes them is closed either way."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], *, on_close: Callable[[], object]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        del scope
        watcher = asyncio.ensure_future(_gone(receive))
        writer = asyncio.ensure_future(self._write(send))
        try:
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            await _end(watcher)
            await _end(writer)
            self._on_close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except OSError:  # the client has gone
            return
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _on_http_error(request: Request, error: Exception) -> Response:
    """A path that there is none of, or a method that a path does not take."""
    assert isinstance(error, HTTPException)
    if error.status_code != HTTPStatus.METHOD_NOT_ALLOWED:
        return error_response(RefusedError(str(error.detail), status=error.status_code, code="not_found"))
    routes = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    allowed = ", ".join(sorted({method for route in routes for method in route.methods}))
    message = f"{request.url.path} does not take {request.method}: send {allowed}."
    response = error_response(RefusedError(message, status=error.status_code, code="method_not_allowed"))
    response.headers["Allow"] = allowed
    return response


async def _merged(begun: Begun) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of all answers as they come."""
    if len(begun.runs) == 1:
        async for delta in begun.runs[0].generation:
            yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()

    async def read(index: int) -> None:
        try:
            async for delta in begun.runs[index].generation:
                queue.put_nowait((index, delta))
            queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - it is raised where the stream is written
            queue.put_nowait(error)

    tasks = [asyncio.create_task(read(index)) for index in range(len(begun.runs))]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
