"""Takes new connections in turns, so that the gateway's processes share them.

All processes listen on one socket. Whichever wakes first would take all that wait: 32 clients that connect together
mostly end up in one process, whose places are then full while the other's are empty. So each notes where all can see it
how many it holds, and who holds more than another leaves what comes to the others for a moment. When connections wait
nevertheless, turn after turn, it takes more at a time.
A process that holds as many connections as it may ends the one that has been idle longest for each that comes, and
takes none while all of them are in use.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection
    from ssl import SSLContext

    from gateway.server.shared_counters import SharedCounters

logger = logging.getLogger(__name__)
# For another process, which may be in the middle of a turn of its loop: looks at whether it still holds fewer.
LOOKS = 5
LOOK_EVERY_S = 0.001
MOST_AT_ONCE = 16
FLOOD_TURNS = 16  # one after the other in which somebody waited, until one more is taken at a time
FLOOD_ENDS_S = 0.1  # after the last turn: who comes later is no part of it
FULL_PAUSE_S = 0.001
# Not quicker: callers who hold connections and open a new one for each that is ended would keep the process busy.
ROOM_PAUSE_S = 0.004
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
        connections: Collection[asyncio.Protocol],
        *,
        most_connections: int,
        make_room: Callable[[], bool],
        counters: SharedCounters,
        seat: int,
        ssl: SSLContext | None = None,
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._connections = connections
        self._most_connections = most_connections
        self._make_room = make_room
        self._seats = counters
        self._seat = seat
        self._ssl = ssl
        self._loop = asyncio.get_running_loop()
        self._accepting: dict[asyncio.Task[None], asyncio.Protocol] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._busy_turns = 0
        self._last_turn = 0.0
        self._listen()

    def close(self) -> None:
        """Accepts no more; the socket stays open."""
        self._seats.leave(self._seat)
        self._loop.remove_reader(self._listener)
        if self._timer is not None:
            self._timer.cancel()

    async def wait_closed(self) -> None:
        """Waits for the connections that are just being accepted."""
        if self._accepting:
            _, late = await asyncio.wait(self._accepting, timeout=CLOSING_S)
            for task in late:
                task.cancel()

    def note(self) -> int:
        """Tells the other processes how many connections this one holds, and says so."""
        coming = sum(protocol not in self._connections for protocol in self._accepting.values())
        held = len(self._connections) + coming
        self._seats.tell(self._seat, held)
        return held

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._find_waiting)

    def _find_waiting(self, looks: int = LOOKS) -> None:
        self.note()
        if looks and not self._seats.has_least(self._seat):
            self._pause(LOOK_EVERY_S, self._find_waiting, looks - 1)
        else:
            self._accept()

    def _accept(self) -> None:
        pause_s = 0.0
        now = self._loop.time()
        if now > self._last_turn + FLOOD_ENDS_S:
            self._busy_turns = 0
        self._last_turn = now
        try:
            for _ in range(min(1 + self._busy_turns // FLOOD_TURNS, MOST_AT_ONCE)):
                if self.note() >= self._most_connections:
                    # Who comes now waits in the listener's queue, or for another process. The loop has to turn before
                    # a connection that was ended counts no more.
                    pause_s = ROOM_PAUSE_S if self._make_room() else FULL_PAUSE_S
                    break
                connection, _address = self._listener.accept()
                protocol = self._make_protocol()
                task = self._loop.create_task(self._connect(connection, protocol))
                self._accepting[task] = protocol
                task.add_done_callback(self._accepting.pop)
            self._busy_turns += 1
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            self._busy_turns = 0  # no more are waiting: the others were quicker, or the caller has gone
        except OSError as error:
            logger.error("no connection accepted: %s", error.strerror)  # noqa: TRY400 — the sentence says it all
            pause_s = EXHAUSTED_PAUSE_S
        self.note()
        self._pause(pause_s, self._listen)

    def _pause(self, seconds: float, then: Callable[..., None], *arguments: int) -> None:
        self._loop.remove_reader(self._listener)
        self._timer = self._loop.call_later(seconds, then, *arguments)

    async def _connect(self, connection: socket.socket, protocol: asyncio.Protocol) -> None:
        connection.settimeout(0)
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection, ssl=self._ssl)
        except OSError:
            connection.close()  # the caller has gone
