"""The defaults of what recording has to know: a run of tests records without loading `Settings`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from closewait_guard._parse import ContextProvider

__all__ = ["context", "dropped_kept", "stack_depth"]

# By the names of the settings, so that this module can stand for them.
context: ContextProvider | str | None = None
dropped_kept: int = 1000
stack_depth: int = 32
