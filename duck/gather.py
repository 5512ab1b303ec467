"""The answers of one ask: which ducks have answered, which are missing.

Pure: no socket, no clock.
"""

from __future__ import annotations

from duck.errors import WireError


class Gather:
    """Counts every fragment of every duck's answer once.

    Args:
        ducks: how many answers make the sum whole.
        fragments: in how many fragments each duck's answer comes.
    """

    def __init__(self, ducks: int, fragments: int) -> None:
        self._fragments = fragments
        self._left = [fragments] * ducks
        self._seen = [0] * ducks  # bitmaps of fragments
        self._missing = ducks

    def note(self, duck: int, fragment: int, fragments: int) -> bool:
        """Note a verified fragment. False for a duplicate, which must change nothing.

        Raises:
            WireError: no such duck, or another fragmentation than this ask's.
        """
        if not 0 <= duck < len(self._left):
            raise WireError(f"answer from duck {duck} of {len(self._left)}")
        if fragments != self._fragments or not 0 <= fragment < fragments:
            raise WireError(f"fragment {fragment} of {fragments}, want {self._fragments} fragments")
        bit = 1 << fragment
        if self._seen[duck] & bit:
            return False
        self._seen[duck] |= bit
        self._left[duck] -= 1
        if not self._left[duck]:
            self._missing -= 1
        return True

    def note_whole(self, duck: int) -> None:
        """Note all of a duck's answer at once, whatever was noted of it before."""
        if self._left[duck]:
            self._seen[duck] = (1 << self._fragments) - 1
            self._left[duck] = 0
            self._missing -= 1

    @property
    def complete(self) -> bool:
        """Every duck's answer is whole."""
        return not self._missing

    def seen(self, duck: int, fragment: int) -> bool:
        """This fragment of this duck's answer has been noted."""
        return bool(self._seen[duck] >> fragment & 1)

    def has(self, duck: int) -> bool:
        """This duck's answer is whole."""
        return not self._left[duck]

    @property
    def missing(self) -> tuple[int, ...]:
        """The ducks whose answers are not whole yet, in order."""
        return tuple(duck for duck, left in enumerate(self._left) if left)
