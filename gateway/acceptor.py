"""Takes new connections one at a time, so that the gateway's processes share them.

All processes listen on one socket. Whichever wakes first would take all that wait: 32 clients that connect together
mostly end up in one process, whose places are then full while the other's are empty. So each takes one and leaves the
socket alone for a moment.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from ssl import SSLContext

logger = logging.getLogger(__name__)
# Time for another process to wake up and take the next connection; it bounds a process to 1000 new ones per second.
PAUSE_S = 0.001
# Files or memory have run out: connections must end before there can be new ones.
EXHAUSTED_PAUSE_S = 1.0


class Acceptor:
    """Accepts from a listening, non-blocking socket; to uvicorn it is one of its servers."""

    def __init__(
        self, listener: socket.socket, make_protocol: Callable[[], asyncio.Protocol], *, ssl: SSLContext | None = None
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._ssl = ssl
        self._loop = asyncio.get_running_loop()
        self._accepting: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """Accepts no more; the socket stays open."""
        self._loop.remove_reader(self._listener)
        if self._timer is not None:
            self._timer.cancel()

    async def wait_closed(self) -> None:
        """Waits for the connections that are just being accepted."""
        if self._accepting:
            await asyncio.wait(self._accepting)

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        pause_s = PAUSE_S
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another process was quicker, or the caller has gone
        except OSError as error:
            logger.error("no connection accepted: %s", error.strerror)  # noqa: TRY400 — the sentence says it all
            pause_s = EXHAUSTED_PAUSE_S
        else:
            task = self._loop.create_task(self._connect(connection))
            self._accepting.add(task)
            task.add_done_callback(self._accepting.discard)
        self._loop.remove_reader(self._listener)
        self._timer = self._loop.call_later(pause_s, self._listen)

    async def _connect(self, connection: socket.socket) -> None:
        connection.settimeout(0)
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection, ssl=self._ssl)
        except OSError:
            connection.close()  # the caller has gone
