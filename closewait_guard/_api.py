"""The process-wide guard behind the functions of the package."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from closewait_guard._capture import patch
from closewait_guard._guard import Guard
from closewait_guard._interruptions import loading_late, restore_late
from closewait_guard.exceptions import ConfigurationError

if TYPE_CHECKING:
    from closewait_guard._monitor import Monitor
    from closewait_guard._no_leaks import NoLeaks
    from closewait_guard.model import Report, Reporter
    from closewait_guard.settings import Settings

__all__ = [
    "attribute",
    "current_guard",
    "install",
    "installed_guards",
    "is_watched",
    "no_leaks",
    "read_records_of",
    "report",
    "scan",
    "track",
    "uninstall",
    "watch",
    "watch_async",
]


_guard: Guard | None = None
# That of `run`, which the program did not ask for and cannot end.
_launched: Guard | None = None
_monitor: Monitor | None = None


def install(
    settings: Settings | None = None,
    *,
    reporters: Iterable[Reporter | str] = (),
    **overrides: object,
) -> Guard:
    """Begin to record where sockets are opened. Idempotent; returns the process-wide guard.

    Call it early: sockets that are already open have no stack. Under `run` they do: the guard
    then reads the records of the one that is there, and reports by its own settings.

    Args:
        settings: How to scan and judge. Left out, the settings are read from the environment
            (`CLOSEWAIT_GUARD_*`) and from `[tool.closewait_guard]` in the nearest `pyproject.toml`.
        reporters: What `report()` reports to: anything that can be called with a `Report`, or the
            name of a reporter, such as "structlog" or "json_lines:/var/log/leaks.jsonl".
        **overrides: Single settings that win over all other sources; `signal=SIGPROF`, for one,
            prints a report to stderr on that signal, before the handler that was there.

    Raises:
        ConfigurationError: A setting cannot be used, or the guard is installed with others.

    Example:
        >>> guard = install(grace=2.0)
        >>> guard is install()
        True
        >>> uninstall()
    """
    return _install(settings, reporters, overrides)


def _install(
    settings: Settings | None, reporters: Iterable[Reporter | str], overrides: dict[str, object]
) -> Guard:
    global _guard
    with patch.install_lock():
        if _guard is None:
            if overrides:
                settings = _with_overrides(settings, overrides)
            _guard = Guard._recording(settings, reporters, _launched).install()
            if _guard._settings is not None and _guard._settings.control:
                _listen(_guard)
        else:
            _refuse_change(_guard, settings, overrides, reporters)
        return _guard


def _listen(guard: Guard) -> None:
    """Have the process answer `closewait-guard report`."""
    with loading_late():
        from closewait_guard._remote import Control, RemoteError
    try:
        Control(guard).start()
    except RemoteError as error:
        # Where warnings are errors, the program continues all the same.
        with suppress(Exception):
            text = f"closewait_guard: the process has no control socket: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)


def _refuse_change(
    guard: Guard, settings: Settings | None, overrides: dict[str, object], reporters: object
) -> None:
    wanted = guard.settings if settings is None else settings
    changes = list(guard.settings.changes_to(_with_overrides(wanted, overrides)))
    if reporters:
        changes.append("reporters")
    if changes:
        raise ConfigurationError(
            f"already installed with different settings ({', '.join(changes)}). Pass them to the "
            "first install() or watch(), or call uninstall() first"
        )


def _with_overrides(settings: Settings | None, overrides: dict[str, object]) -> Settings:
    restore_late()
    # A program that gives none, and only records, does not load them.
    from closewait_guard.settings import Settings

    return Settings.resolve(settings, overrides)


def read_records_of(guard: Guard | None) -> None:
    """Have the program use what an installed guard records, as long as it makes none of its own."""
    global _launched
    _launched = guard


def current_guard() -> Guard | None:
    """The process-wide guard, or that which was put in from outside; None without any."""
    return _guard or _launched


def installed_guards() -> tuple[Guard, ...]:
    """The program's own, and that of `run`, as far as they are there."""
    return tuple(each for each in (_guard, _launched) if each is not None and each.installed)


def uninstall() -> None:
    """Stop recording, reporting and handling signals; leave everything as it was found."""
    global _guard
    with patch.install_lock():
        guard, _guard = _guard, None
    if guard is not None:
        guard.uninstall()


def attribute(*names: str) -> None:
    """Record where native code opens sockets: libpq, libcurl, libuv and the like.

    The callables that open them are wrapped until `uninstall()`. A socket that appears during the
    call, and has no socket object, counts as opened where the call was made.

    Args:
        *names: `"module:callable"`, or a library that is known: psycopg, psycopg2, pycurl, uvloop.

    Raises:
        ConfigurationError: There is no such callable, the guard is not installed, or what is
            named cannot be wrapped because it is written in C.

    Example:
        >>> guard = install()
        >>> attribute("http.client:HTTPConnection.connect")
        >>> uninstall()
    """
    guard = _guard or _launched
    if guard is None:
        raise ConfigurationError("attribute(): call install() first")
    guard.attribute(*names)


def track(cls: type, *, close: str | Iterable[str] = "close") -> None:
    """Report the objects of a class that are collected without their close, until `uninstall()`.

    For a session or client of your own, or of a library that is not known: what is reported is the
    line that made it. Sockets among its attributes are counted, and not reported beside it.

    Args:
        cls: The class. Objects of its subclasses are tracked too.
        close: The name of the method that closes one, or several names.

    Raises:
        ConfigurationError: The guard is not installed, the class has no such method, or its
            objects cannot be tracked.

    Example:
        >>> import http.client
        >>> guard = install()
        >>> track(http.client.HTTPConnection, close="close")
        >>> uninstall()
    """
    guard = _guard or _launched
    if guard is None:
        raise ConfigurationError("track(): call install() first")
    guard.track(cls, close=close)


def scan(*, full: bool = False) -> Report:
    """Scan, without reporting. Cheap with many sockets: only suspects are described.

    Without `install()` it scans every socket object in the process, but does not know where it was
    opened.

    Args:
        full: Describe the healthy open sockets too, in `Report.observations`.
    """
    return _current().scan(full=full)


def report() -> Report:
    """Scan, and deliver the report to the reporters that `install()` was given."""
    return _current().report()


def watch(
    interval: float | None = None,
    *,
    settings: Settings | None = None,
    reporters: Iterable[Reporter | str] = (),
    at_exit: bool | None = None,
    in_children: bool = False,
    **overrides: object,
) -> Monitor:
    """Report at every interval from a daemon thread, until `stop()` or `uninstall()`.

    Installs the guard if that has not been done.

    Args:
        interval: Seconds between two reports, 60 by default. Longer if a scan would take more
            than 0.6 % of it.
        settings: As for `install()`, like the overrides.
        reporters: Those to report to in addition to the ones that `install()` was given. Where
            there is none at all, reports are written to stderr as text.
        at_exit: Report once more when the program, or a `with` block, ends; so by default.
        in_children: Continue in forked children, each for itself.
        **overrides: Single settings that win over all other sources.

    Raises:
        ConfigurationError: A setting cannot be used, or a monitor is running already.

    Example:
        >>> with watch(interval=60, reporters=["structlog"]) as monitor:
        ...     monitor.running
        True
        >>> uninstall()
    """
    global _monitor
    with patch.install_lock():
        if _monitor is not None and _monitor.running:
            raise ConfigurationError("watch(): a monitor is running already; stop() it first")
        was_installed = _guard is not None
        guard = _install_and_add(settings, reporters, overrides)
        try:
            from closewait_guard._monitor import Monitor

            _monitor = Monitor(guard, interval, at_exit=at_exit, in_children=in_children)
            return _monitor.start()
        except BaseException:
            if not was_installed:
                uninstall()
            raise


def is_watched(*, by_program: bool) -> bool:
    """Whether a monitor reports on this process.

    Args:
        by_program: Only one that the program has started, not that of `run`.
    """
    if _monitor is not None and _monitor.running:
        return True
    if by_program or _launched is None:
        return False
    from closewait_guard._monitor import is_monitored

    return is_monitored(_launched)


async def watch_async(
    interval: float | None = None,
    *,
    settings: Settings | None = None,
    reporters: Iterable[Reporter | str] = (),
    at_exit: bool | None = None,
    **overrides: object,
) -> None:
    """Report at every interval until cancelled, without a thread of its own; see `watch`.

    Example:
        >>> import asyncio
        >>> async def main():
        ...     reports = asyncio.create_task(watch_async(interval=60, reporters=["structlog"]))
        ...     await asyncio.sleep(0)  # The program's own work.
        ...     reports.cancel()
        >>> asyncio.run(main())
        >>> uninstall()
    """
    # asyncio takes long to import, and a program without it must not pay.
    from closewait_guard._monitor import report_forever

    with patch.install_lock():
        guard = _install_and_add(settings, reporters, overrides)
    await report_forever(guard, interval, at_exit)


def _install_and_add(
    settings: Settings | None, reporters: Iterable[Reporter | str], overrides: dict[str, object]
) -> Guard:
    """The process-wide guard, installed, and reporting to these reporters too."""
    if _guard is None:
        guard = _install(settings, reporters, overrides)
    else:
        guard = _install(settings, (), overrides)
        guard._add_reporters(reporters)
    guard._require_reporter()
    return guard


def no_leaks(grace: float = 1.0, *, allow_open: bool = False, descriptors: bool = False) -> NoLeaks:
    """Check that a block leaves no socket behind: `with`, `async with`, or a decorator.

    Sockets that were open before do not count. Waits up to `grace` seconds for sockets that are
    about to close.

    Args:
        grace: Seconds that sockets have to close after the block.
        allow_open: Accept sockets that are open and healthy, such as those of a pool that stays.
        descriptors: Refuse everything else that is left open, too: files, pipes, epoll and so on.

    Raises:
        SocketLeakError: Sockets were leaked; the text is the report. Or something that may have
            been left open could not be looked at.

    Example:
        >>> import socket
        >>> with no_leaks():
        ...     socket.socket().close()
    """
    restore_late()
    if (guard := _guard or _launched) is not None:
        # With the descriptors that it keeps for that, if there are no others.
        guard._load()
    from closewait_guard._no_leaks import NoLeaks

    return NoLeaks(_current, grace, allow_open=allow_open, descriptors=descriptors)


def _current() -> Guard:
    return current_guard() or Guard()
