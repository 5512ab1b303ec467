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

    __slots__ = ("_ducks", "_fragments", "_left", "_one")

    def __init__(self, ducks: int, fragments: int) -> None:
        self._ducks, self._fragments = ducks, fragments
        # What has not come, as bits: all fragments of duck 0, from the first on, then of duck 1 ...
        self._left = (1 << ducks * fragments) - 1
        self._one = (1 << fragments) - 1  # the bits of duck 0's answer

    def note(self, duck: int, fragment: int, fragments: int) -> bool:
        """Note a verified fragment. False for a duplicate, which must change nothing.

        Raises:
            WireError: no such duck, or another fragmentation than this ask's.
        """
        if not 0 <= duck < self._ducks:
            raise WireError(f"answer from duck {duck} of {self._ducks}")
        if fragments != self._fragments or not 0 <= fragment < fragments:
            raise WireError(f"fragment {fragment} of {fragments}, want {self._fragments} fragments")
        if self.seen(duck, fragment):
            return False
        self._left ^= 1 << duck * fragments + fragment
        return True

    def note_whole(self, duck: int) -> None:
        """Note all of a duck's answer at once, whatever was noted of it before."""
        self._left &= ~(self._one << duck * self._fragments)

    def note_all(self) -> None:
        """Note all of all answers at once, whatever was noted before."""
        self._left = 0

    @property
    def complete(self) -> bool:
        """Every duck's answer is whole."""
        return not self._left

    def seen(self, duck: int, fragment: int) -> bool:
        """This fragment of this duck's answer has been noted."""
        return not self._left >> duck * self._fragments + fragment & 1

    def has(self, duck: int) -> bool:
        """This duck's answer is whole."""
        return not self._left >> duck * self._fragments & self._one

    @property
    def missing(self) -> tuple[int, ...]:
        """The ducks whose answers are not whole yet, in order."""
        return tuple(duck for duck in range(self._ducks) if not self.has(duck))
