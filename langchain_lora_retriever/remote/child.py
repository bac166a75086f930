"""The process of a `ProcessEngine`: makes the engine, and serves its parent. Light, until it is told what to make."""

from __future__ import annotations

import os
import pickle
import sys
from concurrent.futures import Future
from multiprocessing.connection import Connection

from langchain_lora_retriever.remote.wire import portable
from langchain_lora_retriever.support.parents import end_with

__all__ = ["serve_parent"]


def serve_parent() -> None:
    """Be an engine's process: make it, serve the parent, and end with it."""
    connection: Connection = Connection(int(sys.argv[1]))
    try:
        end_with(connection.recv())
        recipe = connection.recv_bytes()
        try:
            engine = pickle.loads(recipe)()  # noqa: S301 - the parent's
        except Exception as error:  # noqa: BLE001 - the parent's to hear
            connection.send(portable(error))
            return
        from langchain_lora_retriever.remote.host import EngineHost  # noqa: PLC0415 - torch

        host = EngineHost(engine)
        connection.send(host.description)
    except (EOFError, OSError):
        return
    ended: Future[None] = Future()
    host.serve(connection, on_close=lambda: ended.set_result(None))
    ended.result()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nobody wants the model back, and a step that runs is not waited for
