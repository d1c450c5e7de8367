"""The process-wide guard behind the functions of the package."""

from __future__ import annotations

from collections.abc import Iterable

from closewait_guard import _patch
from closewait_guard._guard import Guard
from closewait_guard._no_leaks import NoLeaks
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Report, Reporter
from closewait_guard.settings import Settings

__all__ = ["install", "no_leaks", "report", "scan", "uninstall"]

_guard: Guard | None = None


def install(
    settings: Settings | None = None,
    *,
    reporters: Iterable[Reporter | str] = (),
    **overrides: object,
) -> Guard:
    """Begin to record where sockets are born. Idempotent; returns the process-wide guard.

    Call it early: sockets that are open already are adopted, with their birth unknown.

    Args:
        settings: How to look and judge. Left out, the settings are read from the environment
            (`CLOSEWAIT_GUARD_*`) and from `[tool.closewait_guard]` in the nearest `pyproject.toml`.
        reporters: Who is told by `report()`: anything that can be called with a `Report`, or the
            name of a reporter, such as "structlog" or "json_lines:/var/log/leaks.jsonl".
        **overrides: Single settings that win over all other sources.

    Raises:
        ConfigurationError: A setting cannot be used, or the guard is installed with others.

    Example:
        >>> guard = install(grace=2.0)
        >>> guard is install()
        True
        >>> uninstall()
    """
    global _guard
    with _patch.changing():
        if _guard is None:
            _guard = Guard(Settings.given(settings, overrides), reporters).install()
        else:
            _refuse_change(_guard, settings, overrides, reporters)
        return _guard


def _refuse_change(
    guard: Guard, settings: Settings | None, overrides: dict[str, object], reporters: object
) -> None:
    wanted = guard.settings if settings is None else settings
    if reporters or Settings.given(wanted, overrides) != guard.settings:
        raise ConfigurationError(
            "install(): the guard is installed already, with other settings or reporters; "
            "call uninstall() first, or make a Guard of your own"
        )


def uninstall() -> None:
    """Stop recording, and leave the socket class as it was found."""
    global _guard
    with _patch.changing():
        if _guard is not None:
            _guard.uninstall()
            _guard = None


def scan(*, full: bool = False) -> Report:
    """Look, and tell nobody. Cheap with many sockets: only suspects are described.

    Without `install()` it looks too, at every socket object in the process, but cannot tell where
    one was born.

    Args:
        full: Describe the healthy open sockets too, in `Report.observations`.
    """
    return _current().scan(full=full)


def report() -> Report:
    """Look, and tell the reporters that `install()` was given."""
    return _current().report()


def no_leaks(grace: float = 1.0, *, allow_open: bool = False) -> NoLeaks:
    """Prove that a block leaves no socket behind: `with`, `async with`, or a decorator.

    Sockets that were open before are not its concern. Waits up to `grace` seconds for sockets
    that are about to close, and only then accuses.

    Args:
        grace: Seconds that sockets have to close after the block.
        allow_open: Accept sockets that are open and well, such as those of a pool that stays.

    Raises:
        SocketLeakError: Sockets were leaked; the text is the report.

    Example:
        >>> import socket
        >>> with no_leaks():
        ...     socket.socket().close()
    """
    return NoLeaks(_current, grace, allow_open=allow_open)


def _current() -> Guard:
    return _guard if _guard is not None else Guard()
