"""Numbers that the gateway processes share: one for each process, in shared memory."""

from __future__ import annotations

import mmap


class SharedCounters:
    """A number for each process; made before the processes are forked. A process has a slot, its worker's age."""

    SLOTS = 64
    """More than the processes that live at a time. Slots repeat; two processes in one would overwrite each other."""

    def __init__(self) -> None:
        self._values = memoryview(mmap.mmap(-1, 4 * self.SLOTS)).cast("I")  # the number plus 1; 0: no process

    def set(self, slot: int, number: int) -> None:
        """Set the number of the process with this slot."""
        self._values[slot % self.SLOTS] = number + 1

    def clear(self, slot: int) -> None:
        """Remove the number of the process with this slot."""
        self._values[slot % self.SLOTS] = 0

    def is_least(self, slot: int) -> bool:
        """Return True if no other process has a lower number."""
        own = self._values[slot % self.SLOTS]
        return all(own <= value for value in self._values if value)

    def largest(self) -> int:
        """Return the highest number of all processes, or 0."""
        return max(0, *self._values) - 1 if any(self._values) else 0

    def sum_of_others(self, slot: int) -> int:
        """Return the sum of the numbers of all other processes."""
        return sum(value - 1 for other, value in enumerate(self._values) if value and other != slot % self.SLOTS)
