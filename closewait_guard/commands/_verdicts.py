"""What the program's processes say of their ends, and which of them say nothing."""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from closewait_guard._cpython import compare_digest
from closewait_guard._descriptors import identity_of
from closewait_guard._format import escape_control
from closewait_guard._preload import Channel, SentReports, move_up
from closewait_guard._render import LastReport, from_dict, render_family
from closewait_guard._stream import layout_of
from closewait_guard.commands._pythons import PythonProcesses, shares_stderr
from closewait_guard.exceptions import ConfigurationError

__all__ = [
    "Verdicts",
]


# Time for children of the program to end after it.
_MAX_SECONDS = 10.0
_MAX_SILENT_LINES = 256
_LONGEST_MESSAGE = 65_536
# Where the program waits for us, not we for it: longer only while there is something to hear.
_MAX_SECONDS_BESIDE = 2.0
_MAX_SILENT_SECONDS = 0.5


@dataclass(eq=False)
class _Line:
    """A connection, and the processes that have not said by it how they end."""

    sock: socket.socket
    processes: dict[int, str] = field(default_factory=dict)
    rest: bytes = b""
    is_programs: bool = False


class Verdicts:
    """Listens to the program's processes from their start to their end.

    Args:
        command: What will be run.
        is_beside: The program is no child of this process: it takes its place.

    Attributes:
        leaked: Whether a process has leaked.
        members: All last reports that `report()` has been called for.
    """

    def __init__(self, command: Sequence[str], *, is_beside: bool = False) -> None:
        if not hasattr(socket, "AF_UNIX"):
            raise ConfigurationError(
                "run --fail-on-leak needs UNIX sockets, which this platform does not have"
            )
        self._is_beside = is_beside
        self.leaked = self._has_printed = False
        self.members: list[LastReport] = []
        self._opened: set[int] = set()
        self._leaked: set[int] = set()
        self._ended: set[int] = set()
        self._reports = _Reports()
        self._heard: set[int] = set()
        self._failed: dict[int, str] = {}
        self._unguarded: dict[int, str] = {}
        self._lost: set[int] = set()
        self._replaced: set[int] = set()
        self._helpers: set[int] = set()
        self._unread: set[int] = set()
        self._running: set[int] = set()
        self._heard_at = 0.0
        self._token = os.urandom(16).hex()
        self._program = 0
        self._pythons = PythonProcesses(command, self._token)
        self._folders = ExitStack()
        self._selector = selectors.DefaultSelector()
        self._listener = self._start_listening()
        self._main, theirs = socket.socketpair()
        self._theirs = move_up(theirs.detach())
        os.set_inheritable(self._theirs, True)  # noqa: FBT003
        self._stop, self._stopped = socket.socketpair()
        self._is_stopping = False
        self._program_end = -1
        self._thread = threading.Thread(target=self._serve_until_stopped, daemon=True)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._stopped, selectors.EVENT_READ)
        if self._pythons.fileno() >= 0:
            self._selector.register(self._pythons, selectors.EVENT_READ)
        self._add(self._main)

    def _start_listening(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"closewait-guard-{os.urandom(8).hex()}"
        if os.uname().sysname == "Linux":
            # No file: it is reached from any root directory, by any user.
            self._address = f"\0{name}"
        else:
            from tempfile import TemporaryDirectory

            folder = TemporaryDirectory(prefix="closewait-guard-")
            self._address = str(Path(self._folders.enter_context(folder), name))
        listener.bind(self._address)
        listener.listen(4096)
        listener.settimeout(0)
        return listener

    @property
    def channel(self) -> Channel:
        """How the processes reach this."""
        identity = identity_of(self._theirs)
        assert identity is not None  # noqa: S101 - it is open
        return Channel(self._address, self._token, self._theirs, identity, self._is_beside)

    @property
    def has_messages(self) -> bool:
        """Whether any process has said anything."""
        return bool(self._heard)

    def listen(self, program: int) -> None:
        """In the launcher, once the program has been started, as the process of this number."""
        self._program = program
        os.close(self._theirs)
        _raise_limit()
        self._thread.start()

    def stop_listening(self, is_interrupted: Callable[[], bool]) -> None:
        """In the launcher, once the program has ended: wait for the other processes."""
        self._stop.close()
        self._thread.join()
        self._selector.unregister(self._stopped)
        self._settle(_MAX_SECONDS, lambda: self._is_waiting() and not is_interrupted())

    def serve_beside(self, program: int, end: int) -> None:
        """Serve until the program has said how it ends, or has ended.

        Args:
            program: Its process.
            end: A descriptor that is readable when it has ended.
        """
        self._program = program
        _raise_limit()
        self._program_end = end
        self._selector.register(end, selectors.EVENT_READ)
        while program not in self._ended and not self._is_stopping:
            self._serve(None)
        self._selector.unregister(end)
        self._heard_at = time.monotonic()
        self._settle(_MAX_SECONDS_BESIDE, self._is_telling)

    def serve_children(self) -> None:
        """Let the program end, and wait for the children that only its end has end."""
        for line in self._lines():
            if line.is_programs:
                self._end(line)
        self._settle(_MAX_SECONDS, self._may_print_more)

    def _settle(self, seconds: float, should_wait: Callable[[], bool]) -> None:
        """Wait for the processes that are still about to end."""
        deadline = time.monotonic() + seconds
        while self._serve(0.0) or should_wait():
            if time.monotonic() > deadline:
                break
            self._serve(0.02)
        speaking = self._speaking()
        alive = set(filter(_is_alive, speaking))
        self._running = alive | self._silent()
        self._lost.update(pid for pid in speaking.keys() - alive if speaking[pid] != "here")

    def report(self, *, is_complete: bool) -> str:
        """The last reports since the last call as one; empty if there is nothing to print.

        Args:
            is_complete: Whether it is known of each process whether it has leaked.
        """
        # That of the program itself comes first.
        members = sorted(
            self._reports.take(self._ended),
            key=lambda each: (each.report.pid != self._program, each.report.pid),
        )
        self.members += members
        note = self._reports.take_note()
        has_leaked = any(each.report.leaks for each in members)
        self.leaked = self.leaked or has_leaked or bool(self._leaked)
        has_main = bool(members) and members[0].report.pid == self._program
        self._has_printed = self._has_printed or has_main or has_leaked
        if not members or not self._has_printed:
            return note
        return render_family(members, layout_of(), is_complete=is_complete) + note

    def unknown(self) -> list[str]:
        """A sentence for each way in which it is not known whether a process has leaked."""
        unguarded = self._pythons.unguarded() | self._unguarded
        by_reason: dict[str, set[int]] = defaultdict(set)
        for pid, why in unguarded.items():
            by_reason[why].add(pid)
        found = [f"{_named(pids)} was not guarded: {why}" for why, pids in by_reason.items()]
        if lost := (self._lost | self._replaced) - self._running - unguarded.keys():
            found += [
                f"{_named(lost)} ended without a last report (by a signal, or in native code)"
            ]
        running = self._running - unguarded.keys()
        if self._is_beside:
            # It may well be a service, which goes on.
            running &= self._opened - self._helpers
        if running:
            found.append(f"{_named(running)} still running")
        # One with a guard has looked itself.
        if unread := self._unread - self._ended - self._lost - self._running - unguarded.keys():
            found.append(f"what {_named(unread)} kept open could not be read")
        found += [f"process {pid} could not report: {why}" for pid, why in self._failed.items()]
        if not found and not self.has_messages and not self._is_beside:
            found.append("no process has reported: TARGET is not Python")
        return found

    def close(self) -> None:
        """Let go of everything."""
        for key in list(self._selector.get_map().values()):
            # Not unregistered: a process beside this one may share the selector.
            key.fileobj.close()  # type: ignore[union-attr]
        for sock in (self._stop, self._stopped):
            sock.close()
        self._selector.close()
        self._folders.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    # What the processes do.

    def _serve_until_stopped(self) -> None:
        while not self._is_stopping:
            self._serve(None)

    def _serve(self, timeout: float | None) -> bool:
        """Hear what there is to hear; whether there was anything."""
        ready = [key for key, _ in self._selector.select(self._pythons.limit(timeout))]
        if self._program:
            self._pythons.look_if_due(self._program)
        for key in ready:
            if key.fileobj is self._stopped or key.fileobj == self._program_end:
                self._is_stopping = True
            elif key.fileobj is self._pythons:
                self._pythons.take_events()
            elif key.fileobj is self._listener:
                self._accept()
            else:
                self._receive(key.data)
        return bool(ready)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            # No descriptor is left: others are about to end.
            time.sleep(0.01)
            return
        self._add(sock)
        silent = [
            line for line in self._lines() if not line.processes and line.sock is not self._main
        ]
        # What belongs to the program speaks at once.
        for line in silent[:-_MAX_SILENT_LINES]:
            self._end(line)

    def _add(self, sock: socket.socket) -> None:
        sock.settimeout(0)
        self._selector.register(sock, selectors.EVENT_READ, _Line(sock))

    def _lines(self) -> Iterable[_Line]:
        return [key.data for key in self._selector.get_map().values() if key.data is not None]

    def _speaking(self) -> dict[int, str]:
        """The processes that have not said how they end, with what they have said last."""
        return {pid: verb for line in self._lines() for pid, verb in line.processes.items()}

    def _is_waiting(self) -> bool:
        return bool(self._speaking() or self._silent())

    def _is_telling(self) -> bool:
        """Whether children may end with the program, which waits; helpers end after it."""
        is_recent = time.monotonic() - self._heard_at < _MAX_SILENT_SECONDS
        return is_recent and bool(self._speaking().keys() - self._helpers or self._silent())

    def _may_print_more(self) -> bool:
        """Whether a child with sockets is there that has not gone its own way, as a service."""
        speaking = self._speaking()
        return any(verb != "here" and shares_stderr(pid) for pid, verb in speaking.items())

    def _silent(self) -> set[int]:
        """Processes of the program that have not said anything yet: they are just starting."""
        return self._pythons.find_running() - self._heard

    def _receive(self, line: _Line) -> None:
        try:
            data = line.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *messages, line.rest = (line.rest + data).split(b"\n")
        is_ours = all(self._understand(line, message) for message in messages)
        if not data or not is_ours or len(line.rest) > _LONGEST_MESSAGE:
            self._end(line)

    def _understand(self, line: _Line, message: bytes) -> bool:
        """Take in one message, if it comes from the program."""
        token, _, rest = message.decode(errors="replace").partition(" ")
        if not compare_digest(token.encode(), self._token.encode()):
            return False
        number, _, what = rest.partition(" ")
        if not number.isdecimal():
            return False
        verb, _, why = what.partition(" ")
        pid = int(number)
        self._heard.add(pid)
        self._heard_at = time.monotonic()
        if verb == "report":
            self._reports.sent.add_piece(pid, why)
        elif verb == "unread":
            self._unread.update(int(word) for word in why.split() if word.isdecimal())
        else:
            line.is_programs = line.is_programs or pid == self._program
            self._note(line, pid, verb, why)
        return True

    def _note(self, line: _Line, pid: int, verb: str, why: str) -> None:
        if verb in ("here", "helper", "main"):
            self._begin(pid)
        if verb == "helper":
            self._helpers.add(pid)
            verb = "here"
        if verb == "resumed":
            self._leaked.discard(pid)
            self._failed.pop(pid, None)
        # It may have closed the line that it had before.
        self._lost.discard(pid)
        if verb == "opened":
            self._opened.add(pid)
        if verb in ("here", "main", "opened", "resumed"):
            self._ended.discard(pid)
            line.processes[pid] = verb
            return
        line.processes.pop(pid, None)
        if verb == "replaced":
            verb, _, why = why.partition(" ")
            self._reports.sent.note_exec(pid)
        else:
            self._ended.add(pid)
        if verb == "leaked":
            self._leaked.add(pid)
        if verb == "failed":
            self._failed[pid] = why
        if verb == "unguarded":
            self._unguarded[pid] = why

    def _begin(self, pid: int) -> None:
        """Said at the start only: of a known process by its next program, after exec."""
        if pid in self._lost:
            self._replaced.add(pid)
        self.leaked = self.leaked or pid in self._leaked
        self._leaked.discard(pid)
        self._reports.sent.keep(pid, is_last=pid in self._ended)

    def _end(self, line: _Line) -> None:
        """No more is to come. A child that has never opened a socket has nothing to say."""
        self._lost.update(pid for pid, verb in line.processes.items() if verb != "here")
        self._selector.unregister(line.sock)
        line.sock.close()


class _Reports:
    """Last reports that are yet to be printed, and which of them cannot be."""

    def __init__(self) -> None:
        self.sent = SentReports()
        self._unreadable: dict[int, str] = {}

    def take(self, ended: Container[int]) -> list[LastReport]:
        """Those since the last call, each the last one of its program if that has ended."""
        found = []
        for each in self.sent.take(ended):
            try:
                report = from_dict(json.loads(each.text))
            except (ValueError, RecursionError) as error:
                self._unreadable[each.pid] = escape_control(str(error))
            else:
                found.append(LastReport(report, each.is_last, each.is_before_exec))
        return found

    def take_note(self) -> str:
        """Lines on the reports that are too large, and on those that cannot be read."""
        lines = [
            f"The report of process {pid} is left out, because it cannot be read: {why}\n"
            for pid, why in self._unreadable.items()
        ]
        if too_large := self.sent.take_too_large():
            lines.append(f"The reports of {_named(too_large)} are left out: they are too large.\n")
        self._unreadable.clear()
        return "".join(lines)


def _raise_limit() -> None:
    """For as many processes as there may be. The program has begun with the limit as it was."""
    import resource

    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It is there, and may not be sent a signal: it has become another user's.
        return True
    return True


def _named(pids: set[int]) -> str:
    """The processes, the first few by number."""
    if len(pids) == 1:
        return f"process {min(pids)}"
    some = ", ".join(map(str, sorted(pids)[:5]))
    return f"{len(pids):,} processes ({some}{', ...' if len(pids) > 5 else ''})"
