"""Scans before finalizers run at exit and before event loops close: both close sockets.

urllib3 closes its pools in a `weakref.finalize`, which runs before the last report; uvloop closes
its transports with the loop, and asyncio has them closed by the collector. What only that has
closed is a leak all the same, and so is what a report of a series has found. What an exit function
of the program is about to close is none, nor is what a thread closes at that moment.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial, wraps
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol

from closewait_guard._capture import SocketEvents, patch
from closewait_guard._clock import TimeLimit, nap, now
from closewait_guard._cpython import LOOP_TRANSPORTS, before_exit_functions, finalizers_at_exit
from closewait_guard._live import Walk, running_frames
from closewait_guard._threads import get_ident
from closewait_guard.model import Finding, Report, Verdict

__all__ = [
    "EarlyLooks",
    "check_at_end",
]


_MAX_FINDINGS = 1000
_MAX_SECONDS = 0.5
# From an exit function to the functions that it calls, and so on.
_MAX_CALLS = 3
_LOOPS = (("asyncio", "BaseEventLoop"), ("uvloop", "Loop"))
# How long looks at loops that close may take, at first and in the long run: a program may have a
# loop for each request, and each look takes longer the more leaks there are.
_SECONDS_AT_FIRST, _SHARE_OF_TIME = 2.0, 0.05
# For a thread that has yet to see that a peer has closed: less than what pools and servers wait
# for a worker to end by itself.
_SECONDS_TO_SEE = 0.5
_FIRST_WAIT, _LONGEST_WAIT = 0.002, 0.05
_PACKAGE = __file__.removesuffix("_signal/early_looks.py")


class _Guard(Protocol):
    """What is asked of the guard."""

    def scan(self) -> Report: ...
    def check(self, since: int) -> Report: ...
    def _reported_leaks(self) -> frozenset[int]: ...
    def _record_state(self, report: Report) -> None: ...


class EarlyLooks:
    """Remembers the leaks that only the end of the program closes, from now on.

    Args:
        guard: What scans.

    Attributes:
        failures: Why leaks that the end has closed may be missing.
    """

    def __init__(self, guard: _Guard) -> None:
        self._guard = guard
        self.failures: tuple[str, ...] = ()
        # By process, because a forked child has its own, and serial.
        self._leaks: dict[int, dict[int, Finding]] = {}
        self._left_out: dict[int, set[int]] = {}
        self._began, self._seconds = now(), 0.0
        _hooks.add(self)

    def add_closed_by_end(self, report: Report) -> Report:
        """The last report, with the leaks that are gone by now."""
        present = _serials(report.findings)
        gone = {
            serial: replace(leak, closed_at_exit=True)
            for serial, leak in self._leaks.get(os.getpid(), {}).copy().items()
            if serial not in present
        }
        closed_late = tuple(
            each
            for each in report.closed_late
            if each.finding.observation.record.serial not in gone
        )
        findings = (*report.findings, *gone.values())
        omitted = report.omitted + len(self._left_out.get(os.getpid(), set()) - present)
        return replace(report, findings=findings, closed_late=closed_late, omitted=omitted)

    def stop(self) -> None:
        """Look no more; the last to stop restores what was wrapped. Idempotent."""
        _hooks.discard(self)

    @contextmanager
    def noting_failures(self) -> Iterator[None]:
        """Let no failure reach the program, which does not know of the scan."""
        try:
            yield
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self.failures = (f"what the end of the program has closed: a scan failed ({why})",)

    def before_close(self, loop: Any) -> Callable[[], None] | None:
        """Look before a loop is closed; returns what is to be called when it is."""
        began = now()
        if not _may_close_sockets(loop):
            return None
        if self._seconds > _SECONDS_AT_FIRST + _SHARE_OF_TIME * (began - self._began):
            self.failures = (_NO_TIME,)
            return None
        leaks = _still_open(self._guard.scan())
        self._seconds += now() - began
        if not leaks:
            return None
        abandoned = set(_descriptors_of_transports(loop))

        def closed() -> None:
            began = now()
            report = self._guard.scan()
            self._seconds += now() - began
            present = _serials(report.findings)
            self._remember(
                leak
                for leak in leaks
                if leak.observation.fd in abandoned or leak.observation.record.serial not in present
            )
            self._record_state(report)

        return closed

    def before_exit_functions(self) -> None:
        """Remember what a report has found already, whatever closes it from here on."""
        reported = self._guard._reported_leaks()
        if reported:
            self._remember(
                leak
                for leak in _still_open(self._guard.scan())
                if leak.observation.record.serial in reported
            )

    def before_finalizers(self) -> None:
        """Look at what finalizers may close, and no function of the program after them."""
        report = check_at_end(lambda: self._guard.check(0))
        leaks = _still_open(report)
        if leaks:
            reached = _descriptors_reached_from(_hooks.functions_after_finalizers() or ())
            spared = _serials(leak for leak in leaks if leak.observation.fd in reached)
            self._remember(leak for leak in leaks if leak.observation.record.serial not in spared)
            self._record_state(report, spared)

    def _record_state(self, report: Report, spared: Container[int] = ()) -> None:
        """If the process is killed from here on, this is the last that is known of it."""
        findings = tuple(
            each for each in report.findings if each.observation.record.serial not in spared
        )
        self._guard._record_state(self.add_closed_by_end(replace(report, findings=findings)))

    def _remember(self, leaks: Iterable[Finding]) -> None:
        remembered = self._leaks.setdefault(os.getpid(), {})
        left_out = self._left_out.setdefault(os.getpid(), set())
        for leak in leaks:
            serial = leak.observation.record.serial
            if serial in remembered or len(remembered) < _MAX_FINDINGS:
                remembered[serial] = leak
            else:
                left_out.add(serial)


_NO_TIME = "what closing event loops has closed: looking would take more than 5 % of the time"


class _Hooks:
    """What is wrapped for all looks of the process, while there are any."""

    def __init__(self) -> None:
        self._looks: list[EarlyLooks] = []
        self._restore: dict[Any, Callable[[], None]] = {}
        self._exit_functions: _ExitFunctions | None = None
        self._first_socket = _FirstSocket(self.hook_loops)  # type: ignore[abstract]
        self._is_called_at_exit = False

    def add(self, looks: EarlyLooks) -> None:
        self._looks.append(looks)
        if self._exit_functions is None:
            self._exit_functions = _ExitFunctions()
            # A program may import what its loop runs on when we have begun already.
            patch.subscribe(self._first_socket)
            self.hook_loops()
        if not self._is_called_at_exit:
            # Only once: it cannot be undone.
            with suppress(RuntimeError):
                before_exit_functions(self._before_exit_functions)
                self._is_called_at_exit = True

    def discard(self, looks: EarlyLooks) -> None:
        if looks in self._looks:
            self._looks.remove(looks)
        if not self._looks and self._exit_functions is not None:
            patch.unsubscribe(self._first_socket)
            self._exit_functions.stop()
            self._exit_functions = None
            while self._restore:
                self._restore.popitem()[1]()

    def hook_loops(self) -> None:
        """Have the closing of event loops noticed, of those modules that are imported by now."""
        for module, name in _LOOPS:
            self._wrap_close(module, name, self._close_loop)
        # It is called before the loop's, when the program has imported what it runs on.
        self._wrap_close("asyncio", "Runner", self._close_runner)

    def functions_after_finalizers(self) -> list[object] | None:
        """See `_ExitFunctions.after_finalizers`."""
        return None if self._exit_functions is None else self._exit_functions.after_finalizers()

    def _wrap_close(self, module: str, name: str, around: Callable[..., None]) -> None:
        place: Any = getattr(sys.modules.get(module), name, None)
        if place is None or place in self._restore:
            return
        was_own, found = "close" in vars(place), place.close

        @wraps(found)
        def close(self: object) -> None:
            around(found, self)

        def restore() -> None:
            if vars(place).get("close") is close:
                if was_own:
                    place.close = found
                else:
                    del place.close

        place.close = close
        self._restore[place] = restore

    def _close_runner(self, close: Callable[[Any], None], runner: object) -> None:
        with suppress(Exception):
            if self._looks:
                self.hook_loops()
        close(runner)

    def _close_loop(self, close: Callable[[Any], None], loop: Any) -> None:
        looking: list[EarlyLooks] = []
        with suppress(Exception):
            if not loop.is_closed() and not loop.is_running():
                looking += self._looks
        closed: list[tuple[EarlyLooks, Callable[[], None]]] = []
        for looks in looking:
            with looks.noting_failures():
                if (call := looks.before_close(loop)) is not None:
                    closed.append((looks, call))
        close(loop)
        for looks, call in closed:
            with looks.noting_failures():
                call()

    def _before_exit_functions(self) -> None:
        for looks in self._looks.copy():
            with looks.noting_failures():
                looks.before_exit_functions()
        # The newest runs first. Without others, none closes anything.
        if self.functions_after_finalizers() is not None:
            weakref.finalize(self, self._before_finalizers)

    def _before_finalizers(self) -> None:
        for looks in self._looks.copy():
            with looks.noting_failures():
                looks.before_finalizers()


class _FirstSocket(SocketEvents):
    """Calls a function when the next socket is created, once."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback

    def on_create(self, sock: socket.socket, descriptor: object, /) -> None:  # noqa: ARG002
        patch.try_unsubscribe(self)
        with suppress(Exception):
            self._callback()


class _ExitFunctions:
    """What is registered with `atexit` from now on, which does not say that itself."""

    def __init__(self) -> None:
        self._registered: list[tuple[Any, ...]] = []
        self._found: tuple[Any, Any] = atexit.register, atexit.unregister
        self._ours = self._make_register(), self._make_unregister()
        atexit.register, atexit.unregister = self._ours

    def stop(self) -> None:
        """Restore the functions, unless others have replaced them, and forget the rest."""
        if atexit.register is self._ours[0]:
            atexit.register = self._found[0]
        if atexit.unregister is self._ours[1]:
            atexit.unregister = self._found[1]
        self._registered.clear()

    def after_finalizers(self) -> list[object] | None:
        """Those that run after finalizers, with arguments; None if no finalizer runs."""
        finalizers = finalizers_at_exit()
        # The last that is registered runs first. Not ours: they reach finalizers and reporters.
        for place, (function, *_) in enumerate(self._registered):
            if function == finalizers:
                return [
                    each
                    for entry in self._registered[:place]
                    if not _is_ours(entry[0])
                    for each in entry
                ]
        return None

    def _make_register(self) -> Callable[..., Any]:
        found = self._found[0]

        @wraps(found)
        def register(func: Any, /, *args: Any, **kwargs: Any) -> Any:
            result = found(func, *args, **kwargs)
            self._registered.append((func, args, kwargs))
            return result

        return register

    def _make_unregister(self) -> Callable[..., None]:
        found = self._found[1]

        @wraps(found)
        def unregister(func: Any, /) -> None:
            found(func)
            self._registered[:] = [entry for entry in self._registered if entry[0] != func]

        return unregister


def check_at_end(check: Callable[[], Report]) -> Report:
    """The report of a check as the program ends, while its other threads do not know of that.

    They get a moment to close what has only just ended; what they leave open has leaked.

    Args:
        check: Makes the report, without a grace time. Called again until nothing is waited for.
    """
    report = check()
    just_ended = _just_ended(report)
    if not just_ended or not _has_other_threads():
        return report
    end, wait, left = now() + _SECONDS_TO_SEE, _FIRST_WAIT, just_ended
    while left and now() < end:
        nap(wait)
        wait = min(2 * wait, _LONGEST_WAIT)
        left = just_ended & _serials(check().leaks)
    closed = just_ended - left
    findings = [each for each in report.findings if each.observation.record.serial not in closed]
    return replace(report, findings=tuple(findings))


def _just_ended(report: Report) -> set[int]:
    return _serials(
        leak
        for leak in report.leaks
        if leak.verdict in (Verdict.LEAKED, Verdict.DEAD)
        and leak.observation.ended_for < _SECONDS_TO_SEE
    )


def _has_other_threads() -> bool:
    """Whether a thread of the program runs besides the one that ends it, the main thread."""
    ending = get_ident(), threading.main_thread().ident
    frames = [frame for ident, frame in running_frames().items() if ident not in ending]
    return any(not _outermost_file(frame).startswith(_PACKAGE) for frame in frames)


def _outermost_file(frame: FrameType | None) -> str:
    """Where the code is that a thread has been started with."""
    found = ""
    while frame is not None:
        file = frame.f_code.co_filename
        found = found if file == threading.__file__ else file
        frame = frame.f_back
    return found


def _is_ours(function: object) -> bool:
    owner = function.__self__ if isinstance(function, MethodType) else function
    return type(owner).__module__.startswith("closewait_guard.")


def _still_open(report: Report) -> tuple[Finding, ...]:
    return tuple(leak for leak in report.leaks if not leak.is_gone)


def _serials(findings: Iterable[Finding]) -> set[int]:
    return {finding.observation.record.serial for finding in findings}


def _may_close_sockets(loop: object) -> bool:
    """Whether a loop has any besides its own, or may have: it does not say so."""
    transports = getattr(loop, LOOP_TRANSPORTS, None)
    return transports is None or bool(len(transports))


def _descriptors_of_transports(loop: object) -> Iterator[int]:
    """Those that nothing closes properly once the loop is closed: a transport needs it for that."""
    for fd, transport in dict(getattr(loop, LOOP_TRANSPORTS, ())).items():
        if not transport.is_closing():
            yield fd


def _descriptors_reached_from(functions: Iterable[object]) -> set[int]:
    """The descriptors of the sockets that functions can reach, to close them."""
    # From any socket through its class, which is patched, to all that we reach: not to close it.
    walk = Walk(lambda _: False, without=(socket.socket, weakref.finalize))
    limit = TimeLimit(_MAX_SECONDS)
    walk.begin_with([each for function in functions for each in _used_by(function, _MAX_CALLS)])
    found = (walk.things[place] for place in walk.run(limit.is_over))
    return {socket.socket.fileno(each) for each in found if issubclass(type(each), socket.socket)}  # type: ignore[arg-type]


def _used_by(thing: object, calls: int) -> Iterator[object]:
    """An object, and what a function reads by a global name."""
    yield thing
    function = thing.func if isinstance(thing, partial) else thing
    if isinstance(function, MethodType):
        function = function.__func__
    if not isinstance(function, FunctionType) or not calls:
        return
    names = set(_names_in(function.__code__))
    values = [function.__globals__[name] for name in names & function.__globals__.keys()]
    for module in [value for value in values if isinstance(value, ModuleType)]:
        values += [vars(module)[name] for name in names & vars(module).keys()]
    for value in values:
        yield from _used_by(value, calls - 1)


def _names_in(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            yield from _names_in(constant)


_hooks = _Hooks()
