"""What can be asked of any reporter: its name, and to give back what it holds."""

from __future__ import annotations

__all__ = ["closed", "described"]


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
