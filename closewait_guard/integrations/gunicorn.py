"""gunicorn: hooks for its configuration. Each worker is watched; the end has one report of all.

    from closewait_guard.integrations.gunicorn import *

or `gunicorn --config python:closewait_guard.integrations.gunicorn`. The settings are read from the
environment and from `pyproject.toml`. A file with a hook of the same name defines it after the
import, and calls this one in it. No signal is touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
from functools import cache
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from closewait_guard import _api
from closewait_guard._delivery import Delivery
from closewait_guard._format import pluralize
from closewait_guard._preload import move_up, prints_json
from closewait_guard._render import (
    LastReport,
    from_dict,
    render_family,
    to_dict,
    with_fewer_examples,
)
from closewait_guard._stream import layout_of, print_error, write_text
from closewait_guard.integrations._app import AppMonitor
from closewait_guard.integrations._page import StatusPage
from closewait_guard.integrations.asgi import asgi
from closewait_guard.integrations.wsgi import wsgi
from closewait_guard.settings import Settings

if TYPE_CHECKING:
    from closewait_guard.model import Report, Reporter

# Among the names of this module gunicorn takes those of its settings for settings: these alone.
__all__ = ["child_exit", "on_exit", "post_fork", "post_worker_init"]


_MAX_REPORT, _MAX_FILE = 1_000_000, 64_000_000


class _LastReports:
    """The last reports of all workers, in a file without a name that they have from the master.

    A worker may be another user than the master by the time that it ends.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            self._fd = move_up(os.dup(file.fileno()))
        # Each is written by one call, at the end of the file: those of others stay whole.
        fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_APPEND)

    def add(self, report: Report) -> None:
        """In a worker."""
        for shorter in with_fewer_examples(report):
            line = f"{json.dumps(to_dict(shorter), separators=(',', ':'))}\n".encode()
            if len(line) <= _MAX_REPORT:
                break
        if os.fstat(self._fd).st_size + len(line) <= _MAX_FILE:
            os.write(self._fd, line)

    def all(self) -> dict[int, Report]:
        """In the master: by process, the last one of each."""
        data = os.pread(self._fd, _MAX_FILE, 0).decode(errors="replace")
        reports = [from_dict(json.loads(line)) for line in data.splitlines()]
        return {report.pid: report for report in reports}


class _ToMaster:
    """Shows what is new in a worker, and keeps its last report for the one of all workers."""

    def __init__(self, last: _LastReports, news: Reporter | None) -> None:
        self._last, self._news = last, news

    def __call__(self, report: Report) -> None:
        self._last.add(report)

    def periodic(self, report: Report, heartbeat: float) -> None:
        """One of the reports at intervals."""
        if (periodic := getattr(self._news, "periodic", None)) is not None:
            periodic(report, heartbeat)


class _Workers:
    """What the master and its workers have in common, made before the first of them is forked."""

    def __init__(self) -> None:
        self._last, self._ended = _LastReports(), set[int]()
        settings = Settings.load()
        has_control = settings.control or not settings.is_given("control")
        guard = _api.install(settings.with_overrides(control=has_control))
        named = guard.settings.reporters
        # Without any, text goes to stderr, and the last of it comes from the master.
        news = None if named else Delivery(["text"]).reporters[0]
        self._monitor = AppMonitor(reporters=[_ToMaster(self._last, news)])
        # A token that cannot be used is refused here, and not by each worker.
        StatusPage()
        is_printed_by_run = guard._is_beside_last_report
        self._prints = settings.at_exit and not (is_printed_by_run or prints_json(named))

    def begin(self) -> None:
        """In a worker."""
        self._monitor.start()

    def note_end(self, pid: int) -> None:
        """In the master: a worker has ended."""
        self._ended.add(pid)

    def print_all(self) -> None:
        """In the master, at the end."""
        if not self._prints:
            return
        reports = self._last.all()
        members = [LastReport(_api.scan()), *map(LastReport, reports.values())]
        unknown = self._ended.difference(reports)
        write_text(None, render_family(members, layout_of(), is_complete=not unknown))
        if unknown:
            some = ", ".join(map(str, sorted(unknown)[:5]))
            workers = pluralize(len(unknown), "worker")
            print_error(f"leaks unknown: {workers} ended without a report ({some})")


@cache
def _workers() -> _Workers:
    return _Workers()


if "gunicorn.app.base" in sys.modules:
    # It reads its configuration: from here on what a preloaded application opens has its line.
    _workers()


def post_fork(server: Any, worker: Any) -> None:  # noqa: ARG001
    """A worker begins: it is watched from before its application is loaded."""
    _workers().begin()


def post_worker_init(worker: Any) -> None:
    """Its application is loaded: each request gets its label."""
    # The worker of gunicorn that serves ASGI has it under a name of its own.
    name = "asgi" if getattr(worker, "asgi", None) is not None else "wsgi"
    app = getattr(worker, name)
    is_asynchronous = any(map(iscoroutinefunction, (app, type(app).__call__)))
    setattr(worker, name, asgi(app) if is_asynchronous else wsgi(app))


def child_exit(server: Any, worker: Any) -> None:  # noqa: ARG001
    """A worker has ended."""
    _workers().note_end(worker.pid)


def on_exit(server: Any) -> None:  # noqa: ARG001
    """All workers have ended: print one report of what they have leaked."""
    try:
        _workers().print_all()
    except Exception as error:
        print_error(f"the reports of the workers cannot be printed: {error}")
