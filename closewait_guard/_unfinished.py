"""The births whose sockets have not been closed: cheap, because nothing asks the kernel."""

from __future__ import annotations

from closewait_guard._birth import Birth
from closewait_guard._registry import Registry
from closewait_guard._story import SERIAL

__all__ = ["unfinished"]


def unfinished(registry: Registry, since: int) -> list[Birth]:
    """Births after a mark whose sockets are open at this moment, or were dropped while open."""
    living = registry.living(thorough=True).stories.values()
    dropped = (drop.story for drop in registry.dropped())
    return [Birth._make(story) for story in (*living, *dropped) if story[SERIAL] > since]
