"""Takes new connections in turns, so that the gateway's processes share them.

All processes listen on one socket. Whichever wakes first would take all that wait: 32 clients that connect together
mostly end up in one process, whose places are then full while the other's are empty. So each takes one and leaves the
socket alone for a moment. When that goes on, so many come that they are shared anyway: it takes more at a time.
A process that holds as many connections as it may takes none until some have ended.
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
PAUSE_S = 0.001  # time for another process to wake up and take the next connection
MOST_AT_ONCE = 16
FLOOD_TURNS = 50  # one after the other in which somebody waited, until one more is taken at a time
# Files or memory have run out: connections must end before there can be new ones.
EXHAUSTED_PAUSE_S = 1.0
# A TLS handshake may take longer than the process has to end.
CLOSING_S = 1.0


class Acceptor:
    """Accepts from a listening, non-blocking socket; to uvicorn it is one of its servers."""

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        has_room: Callable[[], bool],
        *,
        ssl: SSLContext | None = None,
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._has_room = has_room
        self._ssl = ssl
        self._loop = asyncio.get_running_loop()
        self._accepting: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._busy_turns = 0
        self._listen()

    def close(self) -> None:
        """Accepts no more; the socket stays open."""
        self._loop.remove_reader(self._listener)
        if self._timer is not None:
            self._timer.cancel()

    async def wait_closed(self) -> None:
        """Waits for the connections that are just being accepted."""
        if self._accepting:
            _, late = await asyncio.wait(self._accepting, timeout=CLOSING_S)
            for task in late:
                task.cancel()

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        pause_s = PAUSE_S
        try:
            for _ in range(min(1 + self._busy_turns // FLOOD_TURNS, MOST_AT_ONCE)):
                if not self._has_room():
                    break  # who comes now waits in the listener's queue, or for another process
                connection, _address = self._listener.accept()
                task = self._loop.create_task(self._connect(connection))
                self._accepting.add(task)
                task.add_done_callback(self._accepting.discard)
            self._busy_turns += 1
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            self._busy_turns = 0  # no more are waiting: the others were quicker, or the caller has gone
        except OSError as error:
            logger.error("no connection accepted: %s", error.strerror)  # noqa: TRY400 — the sentence says it all
            pause_s = EXHAUSTED_PAUSE_S
        self._loop.remove_reader(self._listener)
        self._timer = self._loop.call_later(pause_s, self._listen)

    async def _connect(self, connection: socket.socket) -> None:
        connection.settimeout(0)
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection, ssl=self._ssl)
        except OSError:
            connection.close()  # the caller has gone
