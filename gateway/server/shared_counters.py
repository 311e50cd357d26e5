"""What the gateway's processes tell each other: a number for each, in memory that all share."""

from __future__ import annotations

import mmap


class SharedCounters:
    """A number of each process that was forked after this was made."""

    MOST = 64
    """More than processes live at a time; two on one seat would only know less of each other."""

    def __init__(self) -> None:
        self._told = memoryview(mmap.mmap(-1, 4 * self.MOST)).cast("I")  # one more than was told; 0: nobody sits there

    def tell(self, seat: int, number: int) -> None:
        """Tells the others the number of the process on `seat`."""
        self._told[seat % self.MOST] = number + 1

    def leave(self, seat: int) -> None:
        """Tells the others that the process on `seat` counts no more."""
        self._told[seat % self.MOST] = 0

    def has_least(self, seat: int) -> bool:
        """Whether no other process has a lower number."""
        own = self._told[seat % self.MOST]
        return all(own <= told for told in self._told if told)

    def largest(self) -> int:
        """Return the highest number of all processes, or 0."""
        return max(0, *self._told) - 1 if any(self._told) else 0

    def sum_of_others(self, seat: int) -> int:
        """The numbers of all other processes together."""
        return sum(told - 1 for other, told in enumerate(self._told) if told and other != seat % self.MOST)
