"""What the registry answers a scan with: those that are open at one moment."""

from __future__ import annotations

from closewait_guard._story import SERIAL, Story

__all__ = ["Living"]


class Living:
    """One moment's open sockets, by descriptor."""

    __slots__ = ("close_called", "detached", "stories")

    def __init__(
        self, stories: dict[int, Story], close_called: set[int], detached: set[int]
    ) -> None:
        self.stories = stories
        self.close_called = close_called
        self.detached = detached

    def born_after(self, mark: int) -> set[int]:
        """Those that are younger than a mark."""
        return {fd for fd, story in self.stories.items() if story[SERIAL] > mark}
