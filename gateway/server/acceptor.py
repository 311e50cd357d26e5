"""Accept new connections so that the gateway processes share them evenly.

All processes listen on one socket. Without this module the first process to wake up accepts every pending connection:
32 clients that connect together mostly end up in one process, whose places are then full while the other's are free. So
each process publishes the number of connections it holds, and one that holds more than another waits for a moment
before it accepts. If connections keep waiting, it accepts several at a time.
A process that holds as many connections as it may closes the one that has been idle longest for each new one, and
accepts none while all of them are in use.
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
# A process that holds more connections than another checks this number of times, with this pause, before it accepts:
# the other one may be in the middle of an iteration of its event loop.
CHECKS = 5
CHECK_EVERY_S = 0.001
MOST_AT_ONCE = 16
FLOOD_TURNS = 16  # after each 16 turns in a row with a waiting connection, one more is accepted at a time
FLOOD_ENDS_S = 0.1  # a pause of this length between two turns ends the row
FULL_PAUSE_S = 0.001
# Not shorter: a caller who opens a new connection for each that is closed would keep the process busy.
ROOM_PAUSE_S = 0.004
# After files or memory have run out: some connections must be closed first.
EXHAUSTED_PAUSE_S = 1.0
# The longest wait for connections that are being accepted, when the process stops: a TLS handshake may take longer.
CLOSING_S = 1.0


class Acceptor:
    """Accepts connections from a listening, non-blocking socket; uvicorn treats it as one of its servers."""

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        connections: Collection[asyncio.Protocol],
        *,
        most_connections: int,
        make_room: Callable[[], bool],
        counters: SharedCounters,
        slot: int,
        ssl: SSLContext | None = None,
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._connections = connections
        self._most_connections = most_connections
        self._make_room = make_room
        self._counters = counters
        self._slot = slot
        self._ssl = ssl
        self._loop = asyncio.get_running_loop()
        self._accepting: dict[asyncio.Task[None], asyncio.Protocol] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._busy_turns = 0
        self._last_turn = 0.0
        self._listen()

    def close(self) -> None:
        """Stop accepting; the socket stays open."""
        self._counters.clear(self._slot)
        self._loop.remove_reader(self._listener)
        if self._timer is not None:
            self._timer.cancel()

    async def wait_closed(self) -> None:
        """Wait for the connections that are being accepted, at most `CLOSING_S`."""
        if self._accepting:
            _, late = await asyncio.wait(self._accepting, timeout=CLOSING_S)
            for task in late:
                task.cancel()

    def publish_count(self) -> int:
        """Publish the number of connections that this process holds, and return it."""
        accepting = sum(protocol not in self._connections for protocol in self._accepting.values())
        held = len(self._connections) + accepting
        self._counters.set(self._slot, held)
        return held

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept_in_turn)

    def _accept_in_turn(self, checks: int = CHECKS) -> None:
        self.publish_count()
        if checks and not self._counters.is_least(self._slot):
            self._pause(CHECK_EVERY_S, self._accept_in_turn, checks - 1)
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
                if self.publish_count() >= self._most_connections:
                    # The new connection waits in the listener's queue, or another process accepts it. A closed
                    # connection stops counting only in the next iteration of the event loop.
                    pause_s = ROOM_PAUSE_S if self._make_room() else FULL_PAUSE_S
                    break
                connection, _address = self._listener.accept()
                protocol = self._make_protocol()
                task = self._loop.create_task(self._connect(connection, protocol))
                self._accepting[task] = protocol
                task.add_done_callback(self._accepting.pop)
            self._busy_turns += 1
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            self._busy_turns = 0  # none waits: another process was quicker, or the caller disconnected
        except OSError as error:
            logger.error("no connection accepted: %s", error.strerror)  # noqa: TRY400 — the traceback adds nothing
            pause_s = EXHAUSTED_PAUSE_S
        self.publish_count()
        self._pause(pause_s, self._listen)

    def _pause(self, seconds: float, then: Callable[..., None], *arguments: int) -> None:
        self._loop.remove_reader(self._listener)
        self._timer = self._loop.call_later(seconds, then, *arguments)

    async def _connect(self, connection: socket.socket, protocol: asyncio.Protocol) -> None:
        connection.settimeout(0)
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection, ssl=self._ssl)
        except OSError:
            connection.close()  # the caller disconnected
