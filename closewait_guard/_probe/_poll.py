"""The poller that the probes have in common."""

from __future__ import annotations

from collections.abc import Collection

from closewait_guard._probe._select import select

__all__ = ["PollPoller"]


class PollPoller:
    """Asks for some events, and for hang-ups and errors, which come unasked."""

    def __init__(self, events: int) -> None:
        self._poll = select.poll()
        self._events = events
        self._given: object = None
        self._watched: set[int] = set()

    def suspects(self, fds: Collection[int]) -> dict[int, int]:
        if fds is not self._given:
            wanted = set(fds)
            for fd in self._watched - wanted:
                self._poll.unregister(fd)
            for fd in wanted - self._watched:
                self._poll.register(fd, self._events)
            self._given, self._watched = fds, wanted
        return dict(self._poll.poll(0))
