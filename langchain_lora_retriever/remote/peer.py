"""One end of a connection between two processes: messages out, gathered into frames, and frames in."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

__all__ = ["Peer"]


class Peer:
    """Sends and receives messages, in order. Any thread may send; none waits for the other side.

    Both sides have proved that they know the door's key, or are parent and child, before a frame is read: frames are
    pickles.

    Args:
        connection: Open; it belongs to the peer.
        on_messages: Takes what came in a frame, on a thread of the peer's own. What it raises ends the connection.
        on_close: Called once, with the reason, when the connection has ended, whoever ended it.
        linger: Seconds to wait for further messages before a frame is sent. A step of an engine gives a delta for each
            of its requests, one after the other.
    """

    def __init__(
        self,
        connection: Connection,
        on_messages: Callable[[Peer, list[Any]], object],
        on_close: Callable[[Peer, BaseException | None], object],
        *,
        linger: float = 0.0,
    ) -> None:
        self._connection = connection
        self._on_messages = on_messages
        self._on_close = on_close
        self._linger = linger
        self._outbox: list[Any] = []
        self._news = threading.Condition()
        self._is_closing = False
        self._has_ended = False
        _send_at_once(connection)

    def start(self) -> None:
        """Begin to send and to receive."""
        for work, name in ((self._read, "lora-peer-reader"), (self._write, "lora-peer-writer")):
            threading.Thread(target=work, name=name, daemon=True).start()

    def send(self, message: Any) -> None:
        """Send a message soon; nothing happens if the connection has ended."""
        with self._news:
            if self._is_closing:
                return
            self._outbox.append(message)
            self._news.notify()

    def close(self, reason: BaseException | None = None) -> None:
        """End the connection; what was not sent is not. Idempotent."""
        with self._news:
            self._is_closing = True
            self._news.notify()
            has_ended, self._has_ended = self._has_ended, True
        if has_ended:
            return
        with self._news, suppress(OSError), socket.socket(fileno=self._connection.fileno()) as end:
            try:
                end.shutdown(socket.SHUT_RDWR)  # wakes the reader
            finally:
                end.detach()
        self._on_close(self, reason)

    def _read(self) -> None:
        try:
            while True:
                self._on_messages(self, pickle.loads(self._connection.recv_bytes()))  # noqa: S301 - see the class
        except (EOFError, OSError):
            self.close()
        except BaseException as error:
            self.close(error)
            raise
        finally:
            with self._news:
                self._connection.close()

    def _write(self) -> None:
        try:
            while True:
                with self._news:
                    while not (self._outbox or self._is_closing):
                        self._news.wait()
                    if self._is_closing:
                        return
                if self._linger:
                    time.sleep(self._linger)
                with self._news:
                    messages, self._outbox = self._outbox, []
                self._connection.send_bytes(pickle.dumps(messages, pickle.HIGHEST_PROTOCOL))
        except OSError:
            self.close()
        except BaseException as error:
            self.close(error)
            raise


def _send_at_once(connection: Connection) -> None:
    """Let no frame wait for the other side's acknowledgement of the last one (Nagle's algorithm)."""
    with socket.socket(fileno=connection.fileno()) as end:
        try:
            if end.family in (socket.AF_INET, socket.AF_INET6):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        finally:
            end.detach()
