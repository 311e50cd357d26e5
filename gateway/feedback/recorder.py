"""The recorder: notes answered calls in the feedback store, in the background and a few times a second."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING, Any

from gateway.feedback.store import KEPT_HEADERS, Feedback, LoggedCall, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.feedback.store import FeedbackStore

logger = logging.getLogger(__name__)
FLUSH_S = 0.25
PRUNE_S = 30.0
# A disk that stands still must not fill the memory: what is noted beyond this is dropped, and logged.
MOST_PENDING_BYTES = 64 * 1024 * 1024
_ROW_BYTES = 500


class Recorder:
    """Notes the calls of one gateway process. `share` of them (0 to 1) with their image.

    `chance` returns random numbers in [0, 1); tests pass it in.
    """

    def __init__(self, store: FeedbackStore, share: float, chance: Callable[[], float] = random.random) -> None:
        self._store = store
        self._share = share
        self._chance = chance
        self._pending: list[LoggedCall] = []
        self._pending_bytes = 0
        self._dropped = 0
        self._pruned_at = 0.0
        self._writing = asyncio.Lock()

    def note(
        self,
        request_id: str,
        image: bytes,
        entry: Mapping[str, Any],
        model: tuple[str, str],
        headers: Mapping[str, str],
    ) -> None:
        """Note one answered image, to be written soon.

        Args:
            request_id: the call's.
            image: the image's bytes.
            entry: the answer, with `class`, `confidence` and perhaps `familiar`.
            model: the name and version that answered.
            headers: the call's; only `KEPT_HEADERS` are kept.
        """
        kept = image if self._chance() < self._share else None
        size = _ROW_BYTES + len(kept or b"")
        if self._pending_bytes + size > MOST_PENDING_BYTES:
            self._dropped += 1
            return
        familiar = entry.get("familiar")
        call = LoggedCall(
            request_id,
            time.time(),
            *model,
            str(entry["class"]),
            float(entry["confidence"]),
            familiar if isinstance(familiar, bool) else None,
            {name: headers[name][:200] for name in KEPT_HEADERS if name in headers},
            kept,
        )
        self._pending.append(call)
        self._pending_bytes += size

    async def flush(self) -> None:
        """Write what was noted. A store that cannot be written to costs the calls that were to be written, not more."""
        async with self._writing:
            calls, self._pending, self._pending_bytes = self._pending, [], 0
            dropped, self._dropped = self._dropped, 0
            try:
                if calls:
                    await asyncio.to_thread(self._store.add, calls)
                if time.monotonic() - self._pruned_at > PRUNE_S:
                    self._pruned_at = time.monotonic()
                    await asyncio.to_thread(self._store.prune)
            except StoreError as error:
                dropped += len(calls)
                logger.warning("feedback store not written: %s", error)
            if dropped:
                logger.warning("calls not noted for feedback", extra={"dropped": dropped})

    async def find(self, request_id: str) -> LoggedCall | None:
        """Return the call with this id; None if there is none. It waits for the other processes' notes.

        Raises:
            StoreError: the store cannot be read.
        """
        await self.flush()
        found = await asyncio.to_thread(self._store.find, request_id)
        if found is None:  # perhaps another process answered it a moment ago
            await asyncio.sleep(2 * FLUSH_S)
            found = await asyncio.to_thread(self._store.find, request_id)
        return found

    async def put(self, request_id: str, class_name: str, note: str, caller: str) -> None:
        """Keep the feedback on a call.

        Raises:
            StoreError: the store cannot be written to.
        """
        await asyncio.to_thread(self._store.put, Feedback(request_id, time.time(), class_name, note, caller))

    async def run(self) -> None:
        """Write what was noted every `FLUSH_S` seconds, until it is cancelled; then once more."""
        try:
            while True:
                await self.flush()
                await asyncio.sleep(FLUSH_S)
        finally:
            await self.flush()
