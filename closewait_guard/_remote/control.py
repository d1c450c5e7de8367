"""Answers other processes of this user, and root, while the program runs: the control socket.

A thread of its own answers one request at a time, also while the main thread is stuck: with a
report, with the numbers of the latest, or by beginning or ending reports at intervals. Nothing else
can be asked for. The thread makes way for each fork, of which Python would otherwise warn, and
takes the socket up again where the program has closed it, or has become another user.
"""

from __future__ import annotations

import _thread
import atexit
import errno
import os
import signal
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any

from closewait_guard._clock import nap, now, pause
from closewait_guard._descriptors import SpareDescriptors
from closewait_guard._guard import Guard
from closewait_guard._numbers import with_fewer_sites
from closewait_guard._remote.place import folder_of_this_user, name_of, remove_stale
from closewait_guard._remote.wire import Listener, MessageSocket, RemoteError, TooLargeError
from closewait_guard._render import to_dict, with_fewer_examples
from closewait_guard._threads import allows_daemons, before_fork, in_child, in_parent
from closewait_guard.exceptions import CloseWaitGuardError

if TYPE_CHECKING:
    from closewait_guard._monitor import Monitor

__all__ = [
    "Control",
]


_POLL_SECONDS = 0.1
# After the program has closed the socket.
_CHECK_SECONDS = 1.0
# A child that ends at once, or runs another program, leaves no file behind.
_SECONDS_BEFORE_CHILD_LISTENS = 0.2
_MAX_SECONDS_BETWEEN_ATTEMPTS = 60.0
_MAX_REQUEST, _MAX_REPLY = 4096, 2_000_000
# In an answer with numbers.
_MAX_SITES = 100
# A caller sends at once, and then waits.
_REQUEST_SECONDS, _REPLY_SECONDS = 1.0, 5.0
# For an answer that is being made: a fork is not kept waiting for it.
_MAX_JOIN_SECONDS, _MAX_SECONDS_BEFORE_FORK = 2.0, 0.2
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)


class Control:
    """The control socket of this process, and of those that it forks, each with its own.

    Args:
        guard: Whose reports are asked for. It ends with the guard.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._listener: Listener | None = None
        self._user = -1
        self._thread: _Thread | None = None
        self._is_paused = False
        self._spare = SpareDescriptors()
        self._monitor: Monitor | None = None

    def start(self, *, in_children_only: bool = False) -> None:
        """Listen, and answer, unless another of this process does: it has the same records.

        Args:
            in_children_only: Begin with the processes that this one forks.

        Raises:
            RemoteError: It cannot listen here.
        """
        if not allows_daemons():
            raise RemoteError("only the main interpreter can have a control socket")
        if _controls:
            return
        if not in_children_only:
            self._listen()
            self._start_thread()
        # Later there may be no descriptor to load it with.
        self._guard._load()
        _controls.add(self)
        atexit.register(self.stop)
        self._guard._on_uninstall(self.stop)

    def stop(self) -> None:
        """End, and leave nothing behind. Idempotent."""
        _controls.discard(self)
        atexit.unregister(self.stop)
        self._end_thread(_MAX_JOIN_SECONDS)
        self._forget_listener()
        self._stop_monitor()

    def _start_thread(self, delay: float = 0.0) -> None:
        """If none can be started, no one is answered."""
        with suppress(RuntimeError):
            self._thread = _Thread(self._serve, delay)

    def _end_thread(self, timeout: float) -> None:
        """End the thread, if there is one; who asks meanwhile waits."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.is_ending = True
        thread.join(timeout)

    def pause(self) -> None:
        """Before a fork. Green threads are none to the system, and need not make way."""
        if self._thread is not None and not _IS_GREEN:
            # Also if a signal handler raises in the middle of it.
            self._is_paused = True
            self._end_thread(_MAX_SECONDS_BEFORE_FORK)

    def resume(self) -> None:
        """After it, in the process that has forked."""
        was_paused, self._is_paused = self._is_paused, False
        if was_paused:
            self._start_thread()

    def after_fork(self) -> None:
        """In the child: a socket of its own, as soon as it is worth one."""
        if self._thread is not None:
            self._thread.is_ending = True
        if self._listener is not None:
            self._listener.close_copy()
        self._spare.release()
        self._listener = self._monitor = None
        self._is_paused = False
        self._start_thread(_SECONDS_BEFORE_CHILD_LISTENS)

    # In the thread.

    def _serve(self, thread: _Thread) -> None:
        """Answer until the thread is to end."""
        delay = _CHECK_SECONDS
        while not thread.is_ending:
            listener = self._listener
            if listener is not None and listener.is_reachable and self._user == os.geteuid():
                delay = _CHECK_SECONDS
                # An accept() that waits has the number for its result all the time, and a poll()
                # that waits may be using any descriptor, for those who look from outside.
                if listener.wait(0.0):
                    self._serve_next(listener, thread)
                else:
                    thread.wait(_POLL_SECONDS)
                continue
            if listener is not None:
                # A program that closes all of them expects the first numbers for what it opens.
                self._forget_listener()
                thread.wait(_CHECK_SECONDS)
                continue
            try:
                self._listen()
            except RemoteError:
                thread.wait(delay)
                delay = min(2 * delay, _MAX_SECONDS_BETWEEN_ATTEMPTS)

    def _forget_listener(self) -> None:
        self._spare.release()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def _listen(self) -> None:
        """Listen as the user that this process has become."""
        self._user = os.geteuid()
        folder = folder_of_this_user()
        remove_stale(folder)
        try:
            path = f"{folder}/{name_of('self')}"
        except OSError as error:
            raise RemoteError(f"cannot read /proc: {error.strerror}") from error
        # That of a program that this process has run before.
        with suppress(OSError):
            os.unlink(path)  # noqa: PTH108 - pathlib is slow to load
        self._listener = Listener(path, lets_green_run=_IS_GREEN)
        self._spare.acquire()

    def _serve_next(self, listener: Listener, thread: _Thread) -> None:
        """Answer the next who connects, if one does within the time."""
        try:
            caller = listener.accept(0.0)
        except RemoteError as error:
            if getattr(error.__cause__, "errno", None) not in _EXHAUSTED:
                return
            # Not at once again: the program may have taken the spare ones too.
            thread.wait(0.1)
            try:
                with self._spare.lend():
                    caller = listener.accept(0.0)
            except RemoteError:
                return
        with caller:
            self._answer(caller)

    # Requests.

    def _answer(self, caller: MessageSocket) -> None:
        """What goes wrong is said to the caller, if it may be answered at all."""
        try:
            caller.require_peer()
        except RemoteError:
            return
        try:
            request = caller.receive(_REQUEST_SECONDS, _MAX_REQUEST)
            self._reply(caller, request)
        except Exception as error:
            is_sentence = isinstance(error, CloseWaitGuardError)
            text = str(error) if is_sentence else f"{type(error).__name__}: {error}"
            with suppress(RemoteError):
                caller.send({"error": text}, _REPLY_SECONDS)

    def _reply(self, caller: MessageSocket, request: dict[str, Any]) -> None:
        what = request.get("request")
        if what == "report":
            self._send_report(caller)
            return
        if what == "numbers":
            numbers = self._guard._pipeline.series.numbers() or {}
            caller.send({"numbers": with_fewer_sites(numbers, _MAX_SITES)}, _REPLY_SECONDS)
            return
        if what == "start":
            self._start_monitor(request.get("interval"))
        elif what == "stop":
            self._require_monitor()
            self._stop_monitor()
        else:
            raise RemoteError("it answers report, numbers, start and stop, and nothing else")
        caller.send({"done": what}, _REPLY_SECONDS)

    def _send_report(self, caller: MessageSocket) -> None:
        for report in with_fewer_examples(self._guard.scan()):
            try:
                caller.send({"report": to_dict(report)}, _REPLY_SECONDS, _MAX_REPLY)
            except TooLargeError:
                continue
            return
        raise RemoteError(f"the report is larger than {_MAX_REPLY:,} bytes")

    def _start_monitor(self, interval: Any) -> None:
        """Print reports at intervals, by a guard of their own: the program's are its own series."""
        if self._monitor is not None and self._monitor.running:
            raise RemoteError("it prints reports at intervals already")
        from closewait_guard._monitor import Monitor

        settings = self._guard.settings.with_overrides(signal=None)
        guard = Guard._recording(settings, ("text",), self._guard)
        monitor = Monitor(guard, interval, at_exit=False)
        guard.install()
        self._monitor = monitor.start()

    def _require_monitor(self) -> None:
        if self._monitor is None or not self._monitor.running:
            raise RemoteError("it prints no reports at intervals that were asked for this way")

    def _stop_monitor(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.guard.uninstall()


# As this is loaded, before or after gevent: what a thread is made with, and made of, fits together.
_start_new_thread, _allocate_lock = _thread.start_new_thread, _thread.allocate_lock
_IS_GREEN = not isinstance(_start_new_thread, BuiltinFunctionType)


class _Thread:
    """A thread that the program does not see among its own, and that does not keep it from ending.

    Args:
        function: What it runs, with itself as argument.
        delay: Seconds until then.

    Attributes:
        is_ending: Whether it is to return.
    """

    def __init__(self, function: Callable[[_Thread], None], delay: float) -> None:
        self.is_ending = False
        self._function, self._delay = function, delay
        self._number = 0
        self._runs, self._waits = _allocate_lock(), _allocate_lock()
        self._runs.acquire()
        self._waits.acquire()
        _start_new_thread(self._run, ())

    def _run(self) -> None:
        try:
            self._number = _thread.get_native_id()
            if not _IS_GREEN:
                # They are the program's, and would interrupt what waits here. A green thread has
                # none of its own to block them in: the main thread would get none any more.
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            self.wait(self._delay)
            if not self.is_ending:
                self._function(self)
        finally:
            self._runs.release()

    def wait(self, seconds: float) -> None:
        """In it: wait, unless it is to return."""
        if _IS_GREEN:
            pause(seconds)
        else:
            self._waits.acquire(timeout=seconds)

    def join(self, timeout: float) -> None:
        """Wait until it is gone, also for the system, which is a moment later."""
        end = now() + timeout
        with suppress(RuntimeError):
            self._waits.release()
        if self._number == _thread.get_native_id() or not self._runs.acquire(timeout=timeout):
            return
        task = f"/proc/self/task/{self._number}"
        while not _IS_GREEN and os.path.exists(task) and now() < end:  # noqa: PTH110
            nap(0.0001)


_controls: weakref.WeakSet[Control] = weakref.WeakSet()


@before_fork
def _before_fork() -> None:
    for control in list(_controls):
        control.pause()


@in_parent
def _in_parent() -> None:
    for control in list(_controls):
        control.resume()


@in_child
def _in_child() -> None:
    for control in list(_controls):
        control.after_fork()
