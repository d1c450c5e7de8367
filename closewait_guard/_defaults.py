"""The defaults of what recording has to know: a run of tests records without loading `Settings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from closewait_guard._parse import ContextProvider

__all__ = ["RECORDING_DEFAULTS"]


class _RecordingSettings(NamedTuple):
    """What recording reads of `Settings`."""

    context: ContextProvider | str | None = None
    dropped_kept: int = 1000
    stack_depth: int = 32


RECORDING_DEFAULTS = _RecordingSettings()
