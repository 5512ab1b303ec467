"""The thread of a duck that computes asks, one after another."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Worker:
    """Runs jobs in the order they came; one that is dropped before its turn leaves nothing behind.

    Jobs belong to an owner (a host's session) and have a ticket. They must not raise.
    """

    def __init__(self) -> None:
        self._jobs: dict[tuple[int, int], tuple[Callable[[], None], int]] = {}
        self._changed = threading.Condition()
        self._ended = False
        # A daemon: a process that was told to end does not finish its sums first.
        threading.Thread(target=self._run, name="experts", daemon=True).start()

    def put(self, owner: int, ticket: int, job: Callable[[], None], size: int) -> None:
        """Add a job that holds `size` bytes until it has run."""
        with self._changed:
            self._jobs[owner, ticket] = (job, size)
            self._changed.notify()

    def drop(self, owner: int, ticket: int) -> None:
        """Forget a job unless it has begun."""
        with self._changed:
            self._jobs.pop((owner, ticket), None)

    def drop_all(self, owner: int) -> None:
        """Forget an owner's jobs."""
        with self._changed:
            self._jobs = {key: job for key, job in self._jobs.items() if key[0] != owner}

    def waiting(self, owner: int) -> tuple[int, int]:
        """How many jobs of an owner have not begun, and their bytes."""
        with self._changed:
            sizes = [size for key, (_, size) in self._jobs.items() if key[0] == owner]
        return len(sizes), sum(sizes)

    def end(self) -> None:
        """Forget all jobs; the thread ends after the one it runs."""
        with self._changed:
            self._jobs.clear()
            self._ended = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                job, _ = self._jobs.pop(next(iter(self._jobs)))
            job()
            del job  # and with it the ask's bytes, however long the next one takes to come
