"""The process of a `ProcessEngine`: makes the engine, and serves its parent. Light, until it is told what to make."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import Future
from multiprocessing.connection import Connection

from langchain_lora_retriever.remote.wire import portable

__all__ = ["serve_parent"]

_WATCH_SECONDS = 1.0


def serve_parent() -> None:
    """Be an engine's process: make it, serve the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; it is the parent that ends us
    connection: Connection = Connection(int(sys.argv[1]))
    try:
        threading.Thread(target=_end_with, args=(connection.recv(),), daemon=True).start()
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


def _end_with(parent: int) -> None:
    """End when the parent has ended, also while the model is loaded."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
