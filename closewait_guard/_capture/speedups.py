"""The extension in C, where the package has one that this interpreter can use.

What it does is also there in Python, and does the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from closewait_guard._cpython import has_gil

if TYPE_CHECKING:
    from closewait_guard._capture._speedups import Finalizer, Recorder

__all__ = [
    "Speedups",
    "find_speedups",
    "why_no_speedups",
]


class Speedups(NamedTuple):
    """What the extension has: what records creations, and what notifies of dropped sockets."""

    recorder: type[Recorder]
    finalizer: type[Finalizer]


def find_speedups() -> Speedups | None:
    """What the extension has; None where it cannot be used."""
    found = _load()
    return None if isinstance(found, str) else found


def why_no_speedups() -> str | None:
    """Why the extension cannot be used; None where it can."""
    found = _load()
    return found if isinstance(found, str) else None


def _load() -> Speedups | str:
    if not has_gil():
        return "it is not proven safe without the GIL"
    try:
        from closewait_guard._capture import _speedups
    except ImportError as error:
        # There was no compiler, or it is another interpreter, or a file that is not its own.
        return str(error)
    return Speedups(_speedups.Recorder, _speedups.Finalizer)
