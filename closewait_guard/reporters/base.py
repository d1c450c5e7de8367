"""What can be asked of any reporter: its name, and to give back what it holds.

What reporters have in common that wrap another.
"""

from __future__ import annotations

from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Leak, Reporter

__all__ = [
    "Wrapping",
    "closed",
    "described",
    "serial_of",
]


def described(reporter: object) -> str:
    """What to call a reporter in a sentence."""
    name = getattr(reporter, "__qualname__", None)
    if isinstance(name, str):
        return name
    has_own_text = type(reporter).__repr__ is not object.__repr__
    return repr(reporter) if has_own_text else type(reporter).__qualname__


def closed(reporter: object) -> None:
    """Let a reporter give back what it holds, if it holds anything."""
    close = getattr(reporter, "close", None)
    if callable(close):
        close()


class Wrapping:
    """A reporter that hands on to another; closing it closes the other."""

    def __init__(self, name: str, reporter: Reporter) -> None:
        if not callable(reporter):
            raise ConfigurationError(
                f"{name}: reporter must be callable with a report, not {reporter!r}"
            )
        self._name = name
        self._reporter = reporter

    def close(self) -> None:
        closed(self._reporter)

    def __repr__(self) -> str:
        return f"{self._name}({described(self._reporter)})"


def serial_of(leak: Leak) -> int:
    """What tells the socket of a leak from all others."""
    return leak.observation.record.serial
