"""Answers other processes of this user, and root, while the program runs: the control socket.

A thread of its own answers one request at a time, also while the main thread is stuck: with a
report, with the numbers of the latest, or by beginning or ending reports at intervals. Nothing else
can be asked for. The thread takes the socket up again where the program has closed it, or has
become another user.
"""

from __future__ import annotations

import atexit
import errno
import os
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from closewait_guard._descriptors import SpareDescriptors
from closewait_guard._guard import Guard
from closewait_guard._numbers import with_fewer_sites
from closewait_guard._remote.place import folder_of_this_user, name_of, remove_stale
from closewait_guard._remote.thread import IS_GREEN, RepeatingThread
from closewait_guard._remote.wire import Listener, MessageSocket, RemoteError, TooLargeError
from closewait_guard._render import to_dict, with_fewer_examples
from closewait_guard._threads import allows_daemons, in_child
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
# For an answer that is being made.
_MAX_JOIN_SECONDS = 2.0
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
        self._thread: RepeatingThread | None = None
        self._seconds_until_attempt = _CHECK_SECONDS
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
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop(_MAX_JOIN_SECONDS)
        self._forget_listener()
        self._stop_monitor()

    def _start_thread(self, delay: float = 0.0) -> None:
        """If none can be started, no one is answered."""
        with suppress(RuntimeError):
            self._thread = RepeatingThread(self._serve, delay)

    def after_fork(self) -> None:
        """In the child: a socket of its own, as soon as it is worth one."""
        if self._listener is not None:
            self._listener.close_copy()
        self._spare.release()
        self._listener = self._monitor = self._thread = None
        self._start_thread(_SECONDS_BEFORE_CHILD_LISTENS)

    # In the thread.

    def _serve(self) -> float:
        """Answer who asks, and return for how many seconds none can be answered, or need be."""
        listener = self._listener
        if listener is not None and listener.is_reachable and self._user == os.geteuid():
            self._seconds_until_attempt = _CHECK_SECONDS
            # An accept() that waits has the number for its result all the time, and a poll()
            # that waits may be using any descriptor, for those who look from outside.
            return self._serve_next(listener) if listener.wait(0.0) else _POLL_SECONDS
        if listener is not None:
            # A program that closes all of them expects the first numbers for what it opens.
            self._forget_listener()
            return _CHECK_SECONDS
        try:
            self._listen()
        except RemoteError:
            seconds = self._seconds_until_attempt
            self._seconds_until_attempt = min(2 * seconds, _MAX_SECONDS_BETWEEN_ATTEMPTS)
            return seconds
        return 0.0

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
        self._listener = Listener(path, lets_green_run=IS_GREEN)
        self._spare.acquire()

    def _serve_next(self, listener: Listener) -> float:
        """Answer the next who connects, if that is possible; the rest as for `_serve`."""
        try:
            caller = listener.accept(0.0)
        except RemoteError as error:
            if getattr(error.__cause__, "errno", None) not in _EXHAUSTED:
                return 0.0
            try:
                with self._spare.lend():
                    caller = listener.accept(0.0)
            except RemoteError:
                # Not at once again: the program may have taken the spare ones too.
                return _POLL_SECONDS
        with caller:
            self._answer(caller)
        return 0.0

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


_controls: weakref.WeakSet[Control] = weakref.WeakSet()


@in_child
def _in_child() -> None:
    for control in list(_controls):
        control.after_fork()
