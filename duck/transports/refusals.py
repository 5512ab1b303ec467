"""Peers that are turned away: all are counted, and the log hears of each while they are few.

Whoever can reach a port can be refused a thousand times a second, and must not fill a disk by it.
Pure: takes `now`.
"""

from __future__ import annotations


class Refusals:
    """A counter, and a bucket of log lines that fills again slowly."""

    LINES = 50  # at once
    EVERY_S = 1.0  # one more after so long

    def __init__(self) -> None:
        self.count = 0
        self._unlogged = 0  # since the last line
        self._lines = float(self.LINES)
        self._since = 0.0

    def note(self, now: float) -> int | None:
        """One more. None: the log should not hear of it.

        Else how many it did not hear of before. now: seconds on any clock that only goes forward.
        """
        self.count += 1
        self._lines = min(self.LINES, self._lines + (now - self._since) / self.EVERY_S)
        self._since = now
        if self._lines < 1:
            self._unlogged += 1
            return None
        self._lines -= 1
        unlogged, self._unlogged = self._unlogged, 0
        return unlogged
