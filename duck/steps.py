"""Who steps together, and how many steps run at once: several sessions on one device and flock.

A session that wants its next token asks for a step and waits. Whenever the schedule allows one more
step, the sessions that wait longest are grouped into one; the first of them leads: it runs the
step in its own task. So a session that nobody reads from holds nobody up, sessions join and leave
between any two steps, and no task outlives the session that runs it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from duck.schedule import Chooser, Way


class Lent(Protocol):
    """What a step works on; its owner must not touch it before `lent` is done, if there is one."""

    lent: asyncio.Future[None] | None


class Wish(Protocol):
    """What a session asks of a step."""

    @property
    def session(self) -> Lent: ...


Asked = TypeVar("Asked", bound=Wish)
Given = TypeVar("Given")


class Steps(Generic[Asked, Given]):
    """Groups wishes for a step and has them run.

    Args:
        run: makes one step of several wishes, and gives each its outcome, in order. It changes
            nothing that counts before it returns, so it may be cancelled and run again.
        chooser: says how steps are run.
    """

    def __init__(
        self, run: Callable[[Sequence[Asked], Way], Awaitable[Sequence[Given]]], chooser: Chooser
    ) -> None:
        self._run, self._chooser = run, chooser
        self._waiting: list[_Place[Asked, Given]] = []
        self._running = 0  # steps
        self._stepping = 0  # sessions in them
        self._forming = False

    @property
    def sessions(self) -> int:
        """How many sessions are in a step or wait for one."""
        return len(self._waiting) + self._stepping

    async def step(self, wish: Asked) -> Given:
        """One step for this session, alone or with others.

        Raises:
            DuckError: it cannot be made. What is wrong with one session fails no other.
        """
        alone = False
        while True:
            place: _Place[Asked, Given] = _Place(wish, alone)
            self._waiting.append(place)
            self._form_soon()
            try:
                group = await place.turn
            except asyncio.CancelledError:
                self._leave(place)
                raise
            if group is None:  # whoever led has left or failed
                alone = place.alone
            elif group.places[0] is not place:
                return group.outcomes[place.number]
            else:
                try:
                    return await self._lead(group)
                except _TryAlone:
                    alone = True

    async def _lead(self, group: _Group[Asked, Given]) -> Given:
        others = group.places[1:]
        try:
            group.outcomes = await self._run([place.wish for place in group.places], group.way)
            for place in others:
                place.tell(group)
            return group.outcomes[0]
        except asyncio.CancelledError:
            self._disband(others, alone=False)
            raise
        except Exception:
            if not others:
                raise
            # Whose fault it is shows when each goes alone.
            self._disband(others, alone=True)
            raise _TryAlone from None
        finally:
            self._ended(group)

    def _leave(self, place: _Place[Asked, Given]) -> None:
        """The session of this place was cancelled while it waited."""
        if place in self._waiting:
            self._waiting.remove(place)
        elif place.leads is not None:  # it was told to lead in the same turn
            self._disband(place.leads.places[1:], alone=False)
            self._ended(place.leads)

    def _disband(self, places: Sequence[_Place[Asked, Given]], *, alone: bool) -> None:
        for place in places:
            place.alone = alone
            place.tell(None)

    def _ended(self, group: _Group[Asked, Given]) -> None:
        group.done.set_result(None)
        self._running -= 1
        self._stepping -= len(group.places)
        self._form_soon()

    def _form_soon(self) -> None:
        # Not at once: sessions whose step has just ended ask for the next one in this turn.
        if not self._forming:
            self._forming = True
            asyncio.get_running_loop().call_soon(self._form)

    def _form(self) -> None:
        self._forming = False
        if not self._waiting:
            return
        sessions = self.sessions
        way = self._chooser.way(sessions)
        at_once, each = way.policy.grouping(sessions, 2 if way.draft else 1)
        while self._waiting and self._running < at_once:
            first = self._waiting[0]
            places = [place for place in self._waiting if not place.alone][:each]
            places = [first] if first.alone else places
            self._waiting = [place for place in self._waiting if place not in places]
            for number, place in enumerate(places):
                place.number = number
            first.leads = group = _Group(way, places)
            # Now and not when the leader wakes: until then a session may leave and begin anew.
            for place in places[1:]:
                place.wish.session.lent = group.done
            first.tell(group)
            self._running += 1
            self._stepping += len(places)


class _TryAlone(Exception):
    """The step of a group failed; its leader goes on alone."""


@dataclass(eq=False)
class _Place(Generic[Asked, Given]):
    """A session in the queue, or in a group."""

    wish: Asked
    alone: bool
    # Its group when it leads, or when the outcomes are there; None to ask again.
    turn: asyncio.Future[_Group[Asked, Given] | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    number: int = 0
    leads: _Group[Asked, Given] | None = None

    def tell(self, group: _Group[Asked, Given] | None) -> None:
        if not self.turn.done():  # its session may have been cancelled
            self.turn.set_result(group)


@dataclass(eq=False)
class _Group(Generic[Asked, Given]):
    """Sessions that step together; the first one leads."""

    way: Way
    places: list[_Place[Asked, Given]]
    outcomes: Sequence[Given] = field(default_factory=list)
    # When nobody works on the sessions of those who do not lead any more.
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
