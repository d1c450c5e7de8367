"""What the registry answers a scan with: those that are open, and those that were dropped."""

from __future__ import annotations

from typing import NamedTuple

from closewait_guard._birth import SERIAL, Story
from closewait_guard._probe import Endpoint, View

__all__ = ["Drop", "Living"]


class Drop(NamedTuple):
    """A socket that was finalized while it was open, and the kernel's last word on it."""

    story: Story
    fd: int
    collected: bool
    endpoint: Endpoint
    view: View | None


class Living(NamedTuple):
    """One moment's open sockets, by descriptor."""

    stories: dict[int, Story]
    close_called: set[int]
    detached: set[int]

    def born_after(self, mark: int) -> set[int]:
        """Those that are younger than a mark."""
        return {fd for fd, story in self.stories.items() if story[SERIAL] > mark}
