"""What the guard cannot see, in plain sentences: pure.

From what was seen to what is told: verdicts, once the pools were asked, and who holds what.

The series of a guard's reports: what there is to tell of each beside what a scan shows.

What a guard finds out from what was recorded: looks, verdicts, and the series of reports.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from closewait_guard import _descriptors
from closewait_guard._capture import Registry, patch
from closewait_guard._clock import Allowance, TimeLimit, now, wall
from closewait_guard._format import pluralize
from closewait_guard._holders import Explainer, Pools
from closewait_guard._inspect import (
    Lookout,
    Probe,
    ScanResult,
    SiteCount,
    count_by_site,
    read_again,
)
from closewait_guard._interruptions import refusals
from closewait_guard._judge import AlertState, SeriesPoint, judge, threshold_alerts, update_alerts
from closewait_guard._libraries import PoolUse
from closewait_guard._live import sees_all_threads, shows_other_threads
from closewait_guard._redact import Redaction
from closewait_guard._render import render_with_header
from closewait_guard._stream import write_text
from closewait_guard.model import SCHEMA, Coverage, Finding, Observation, Report, Verdict
from closewait_guard.settings import Settings

__all__ = [
    "Examiner",
    "History",
    "Jury",
    "notes",
]


_NO_TIME = "not searched for yet, or not found in the 1 % of the time that searching may take"
_NATIVE = "native code (libuv, libpq, libcurl, grpc) or _socket"
_OTHER_VARIABLES = (
    "what other threads have in their variables, which Python 3.13 shows safely from 3.13.5 on"
)
_OTHER_THREADS = (
    "what other threads do, have in their variables or read of closed sockets, because this "
    "process has several interpreters"
)


def notes(
    *,
    installed: bool,
    natives: int | None,
    replaced_by: str | None,
    stand_in: str | None,
    context_failure: str | None,
    sees_all_threads: bool,
    shows_variables: bool = True,
    failed_searches: int = 0,
    unsearched: int = 0,
    asked_pools: bool = True,
    undescribed: int = 0,
) -> tuple[str, ...]:
    """One phrase for each blind spot of this moment.

    Args:
        installed: Whether births are recorded.
        natives: How many sockets no object is known for; None where nobody says.
        replaced_by: The module that has wrapped the socket class after us.
        stand_in: What the name of the socket class stands for.
        context_failure: Why the context of births is unknown.
        sees_all_threads: Whether the calls of other threads are known.
        shows_variables: Whether the variables of other threads' calls can be read.
        failed_searches: For how many sockets finding out who holds them went wrong.
        unsearched: For how many sockets there was no time to find that out.
        asked_pools: Whether the pools could be asked what waits in them.
        undescribed: How many sockets nothing but the birth could be told of.
    """
    if natives is None:
        found = [f"sockets that {_NATIVE} opens"]
    else:
        found = [f"where {_NATIVE} opens sockets: {natives:,} such are open"]
    if not installed:
        found.append("where sockets were opened, because the guard is not installed")
    if replaced_by is not None:
        found.append(f"what {replaced_by} hides, which has wrapped the socket class after us")
    if stand_in is not None:
        found.append(f"sockets of {stand_in}, which has taken the place of socket.socket")
    if context_failure is not None:
        found.append(context_failure)
    found += _of_threads(sees_all=sees_all_threads, shows_variables=shows_variables)
    found += _of_sockets(failed_searches, unsearched, undescribed)
    if not asked_pools:
        found.append("what waits in pools: asking them has failed")
    return tuple(found)


def _of_threads(*, sees_all: bool, shows_variables: bool) -> list[str]:
    if not sees_all:
        return [_OTHER_THREADS]
    return [] if shows_variables else [_OTHER_VARIABLES]


def _of_sockets(failed_searches: int, unsearched: int, undescribed: int) -> list[str]:
    said = (
        (failed_searches, "who holds {}: the search has failed"),
        (unsearched, f"who holds {{}}: {_NO_TIME}"),
        (undescribed, "the state of {}: looking at it has failed"),
    )
    return [text.format(pluralize(count, "socket")) for count, text in said if count]


# The share of the time for searching that goes to pools.
_OF_POOLS = 0.3


class Jury:
    """Judges, and remembers what it has found out about the accused."""

    def __init__(self, registry: Registry) -> None:
        self._pools = Pools()
        self._allowance = Allowance(now())
        self._explainer = Explainer(registry, self._allowance)
        # Processor time of asking pools and going through the heap, which is limited by itself.
        self.spent = 0.0
        self.has_asked_pools = True

    def charge(self, seconds: float) -> None:
        """What looking has taken is no longer there for searching."""
        self._allowance.charge(seconds, now())

    @property
    def unsearched(self) -> int:
        """For how many of the accused there was no time to find out who holds them."""
        return self._explainer.unsearched

    @property
    def failed_searches(self) -> int:
        """For how many of the accused nobody could find out who holds them."""
        return self._explainer.failed

    def findings(
        self,
        seen: Iterable[Observation],
        settings: Settings,
        fd_limit: int | None,
        *,
        everything: bool = False,
        explain: bool = True,
        paced: bool = False,
    ) -> tuple[Finding, ...]:
        """The verdicts with their holders.

        Args:
            seen: All that was seen in one look.
            settings: The thresholds.
            fd_limit: How many descriptors the process may have.
            everything: Say who holds the innocent too.
            explain: Find out who holds them, and ask the pools, at all.
            paced: Take no more than the share of the time that a series may take.
        """
        seen = tuple(seen)
        leaks = judge(seen, settings, fd_limit)
        if not explain:
            return leaks
        begun = time.thread_time()
        accused = (leak for leak in leaks if leak.is_leak and leak.verdict is not Verdict.DROPPED)
        limit = self._explainer.time_to_search(paced=paced)
        pools = self._ask_pools((leak.observation for leak in accused), limit.part(_OF_POOLS))
        idle = {serial for serial, use in pools.items() if use.is_idle and not use.is_surplus}
        if idle:
            leaks = judge(seen, settings, fd_limit, idle)
        leaks = self._explainer.explain(leaks, pools, limit, everything=everything)
        took = time.thread_time() - begun
        self.spent += took
        self.charge(took)
        return leaks

    def _ask_pools(self, seen: Iterable[Observation], limit: TimeLimit) -> dict[int, PoolUse]:
        try:
            uses = self._pools.uses(seen, limit)
        except Exception:
            self.has_asked_pools = False
            return {}
        self.has_asked_pools = True
        return uses


class History:
    """Remembers the trend, and adds to each report its alerts and what was closed late."""

    def __init__(self, registry: Registry, settings: Settings, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._trend = AlertState()
        self._size = (0, 0)
        self._open_by_site: dict[str, SiteCount] = {}
        # One for each of the last reports: the oldest lies half a window back.
        self._marks: deque[int] = deque(maxlen=max(1, settings.growth_window // 2))
        # When the scan of the latest report began.
        self._latest = -math.inf
        self._one_at_a_time = threading.RLock()

    def continued(self, report: Report, began: float, times_exhausted: int) -> Report:
        """The report as the next of the series.

        One whose scan began before that of the latest tells no news: all is in that one.
        """
        with self._one_at_a_time:
            if began < self._latest:
                return replace(report, alerts=())
            self._latest = began
            still_open = frozenset(
                serial
                for serial, (leak, _) in self._trend.leaks.items()
                if self._registry.is_open(leak.observation.fd, serial)
            )
            moment = SeriesPoint(
                self._clock(), report, self._populations(report), times_exhausted, still_open
            )
            self._trend, alerts, closed = update_alerts(self._trend, moment, self._settings)
            return replace(report, alerts=alerts, closed_late=closed)

    def after_fork(self) -> None:
        """In the child: what was accused is the parent's, and its lock may never be released."""
        self._trend = AlertState()
        self._marks.clear()
        self._one_at_a_time = threading.RLock()

    def _populations(self, report: Report) -> dict[str, SiteCount]:
        if not self._settings.growth_window:
            return {}
        self._marks.append(self._registry.mark())
        # Counting touches every socket; where none was opened or closed there is nothing new.
        size = report.coverage.opened, report.open_sockets
        if size != self._size:
            self._size = size
            registry = self._registry
            self._open_by_site = count_by_site(registry.lately_open(), self._marks[0], registry.pid)
        return self._open_by_site


class Examiner:
    """Looks at what a registry knows, and judges.

    Args:
        registry: Where births are recorded.
        probe: How to ask the kernel.
        settings: How to look and judge.
        clock: Dates the reports of a series.
        installed: Whether births are being recorded.
    """

    def __init__(
        self,
        registry: Registry,
        probe: Probe,
        settings: Settings,
        clock: Callable[[], float],
        installed: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._redaction = Redaction(settings.redact)
        self._installed = installed
        self._jury = Jury(registry)
        self._history = History(registry, settings, clock)
        self.lookout = Lookout(registry, probe, settings.stack_depth, settings.grace)

    @property
    def spent_on_holders(self) -> float:
        """Seconds of processor time for finding out who holds the accused, so far."""
        return self._jury.spent

    def charge(self, seconds: float) -> None:
        """Leave the less time for finding out who holds the accused."""
        self._jury.charge(seconds)

    def scan(self, *, full: bool = False) -> Report:
        """Look at all sockets.

        Args:
            full: Tell of the healthy ones too.
        """
        return self._redaction.report(self._scan(full=full))

    def _scan(self, *, full: bool = False, paced: bool = False) -> Report:
        """The report as it is; `paced` in a series, which has only a share of the time."""
        sight = self._look(full=full)
        limit = _descriptors.fd_limit()
        seen = (*sight.suspects, *sight.dropped)
        judged = self._jury.findings(seen, self._settings, limit, paced=paced)
        leaks = tuple(leak for leak in judged if leak.verdict is not Verdict.OPEN)
        spared = (leak.observation for leak in judged if leak.verdict is Verdict.OPEN)
        healthy = (*sight.healthy, *spared) if full else ()
        return self._report(sight, leaks, healthy, limit)

    def next_report(self, times_exhausted: int, further_notes: Iterable[str]) -> Report:
        """Look, as the next of a series.

        Args:
            times_exhausted: How often there was no descriptor left, so far.
            further_notes: What else this report cannot see.
        """
        began = now()
        report = self._history.continued(self._scan(paced=True), began, times_exhausted)
        coverage = replace(report.coverage, notes=(*report.coverage.notes, *further_notes))
        # Last, for the series has alerts and notes of its own.
        return self._redaction.report(replace(report, coverage=coverage))

    def check(self, since: int, *, explain: bool) -> Report:
        """Look only at the sockets opened after a mark, without any grace."""
        sight = self._look(opened_after=since)
        limit = _descriptors.fd_limit()
        everything = (*sight.suspects, *sight.dropped, *sight.healthy)
        young = [seen for seen in everything if seen.record.serial > since]
        settings = self._settings.replaced(grace=0)
        leaks = self._jury.findings(young, settings, limit, everything=True, explain=explain)
        return self._redaction.report(self._report(sight, leaks, (), limit))

    def print(self) -> None:
        """Look, and print the report."""
        write_text(None, render_with_header(self.scan()))

    def after_fork(self) -> None:
        """In the child."""
        self.lookout.after_fork()
        self._history.after_fork()

    def _look(self, *, full: bool = False, opened_after: int | None = None) -> ScanResult:
        if not self._installed():
            self._registry.adopt()
        read_again()
        return self.lookout.look(full=full, opened_after=opened_after)

    def _report(
        self,
        sight: ScanResult,
        leaks: tuple[Finding, ...],
        observations: tuple[Observation, ...],
        limit: int | None,
    ) -> Report:
        report = Report(
            schema=SCHEMA,
            taken_at=wall(),
            host=_host(),
            pid=os.getpid(),
            command=sys.argv[0] if sys.argv else "",
            python=sys.version.split()[0],
            open_sockets=sight.open_sockets,
            fd_used=_descriptors.fd_used(),
            fd_limit=limit,
            coverage=self._coverage(sight.undescribed),
            findings=leaks,
            observations=observations,
        )
        return replace(report, alerts=threshold_alerts(report, self._settings))

    def _coverage(self, undescribed: int) -> Coverage:
        context = self._registry.context
        blind_spots = notes(
            installed=self._installed(),
            natives=self.lookout.natives,
            replaced_by=patch.overriding_module() if self._installed() else None,
            stand_in=patch.replacement_class(),
            context_failure=context.failure if context is not None else None,
            sees_all_threads=sees_all_threads(),
            shows_variables=shows_other_threads(),
            failed_searches=self._jury.failed_searches,
            unsearched=self._jury.unsearched,
            asked_pools=self._jury.has_asked_pools,
            undescribed=undescribed,
        )
        return self.lookout.coverage((*blind_spots, *_refused(), *self._settings.notes))


def _host() -> str:
    """The name of this machine; none where nobody says."""
    try:
        return socket.gethostname()
    except Exception as error:
        refusals.note(error)
        return ""


def _refused() -> tuple[str, ...]:
    if not refusals.total:
        return ()
    return (
        f"what an audit hook has kept from being asked: {pluralize(refusals.total, 'question')}",
    )
