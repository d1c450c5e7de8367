"""One scan from top to bottom, the series that reports form, and what a scan does not cover."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from operator import sub
from typing import TYPE_CHECKING

from closewait_guard import _descriptors
from closewait_guard._capture import SERIAL, ForkedSocket, Registry, patch
from closewait_guard._clock import Allowance, now, thread_time, wall
from closewait_guard._delivery import print_text
from closewait_guard._enums import LEAKS, NOT_INSTALLED
from closewait_guard._format import pluralize, unique
from closewait_guard._holders import Explainer, Pools, RunningCalls
from closewait_guard._inspect import (
    CheckoutScanner,
    DescriptorCounter,
    OwnerScanner,
    Probe,
    ScanResult,
    SocketScanner,
    add_open_at_end,
    record_of,
    retry_sources,
)
from closewait_guard._interruptions import refusals
from closewait_guard._judge import judge, leave_to_calls, leave_to_pools, threshold_alerts
from closewait_guard._libraries import SOCKET_CLASSES
from closewait_guard._live import hidden_by_interpreter
from closewait_guard._redact import Redaction
from closewait_guard._render import native_note
from closewait_guard._series import ReportSeries
from closewait_guard.model import SCHEMA, Coverage, Finding, Observation, Report, Verdict
from closewait_guard.settings import Settings

if TYPE_CHECKING:
    from closewait_guard._processes import ChildrensCopies

__all__ = ["Pipeline", "Totals"]


# The share of the time for searching that goes to running calls, and of all time to children.
_SHARE_OF_CALLS, _SHARE_OF_CHILDREN = 0.3, 0.002
_OPEN_LEAKS = LEAKS - {Verdict.DROPPED, Verdict.UNCLOSED, Verdict.SURPLUS}

# How many were dropped, could not be recorded, and how many copies and owners are forgotten.
Totals = tuple[int, int, int, int]


class Pipeline:
    """Turns what a registry has recorded into reports.

    Args:
        registry: Where the opening of sockets is recorded.
        probe: How to ask the kernel.
        settings: How to scan and judge.
        clock: Dates the reports of a series.
        is_installed: Whether sockets are being recorded.

    Attributes:
        scanner: The stage that asks the kernel.
        series: The reports so far.
        print_on_signal: What prints the report that a signal asks for.
        holders_seconds: The processor time that pools and the search for holders have taken.
    """

    def __init__(
        self,
        registry: Registry,
        probe: Probe,
        settings: Settings,
        clock: Callable[[], float],
        is_installed: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._is_installed = is_installed
        self.scanner = SocketScanner(registry, probe, settings)
        self._owners = OwnerScanner(registry)
        self._checkouts = CheckoutScanner(registry, probe, settings)
        self._pools = Pools()
        self._calls = RunningCalls(registry)
        self._allowance = Allowance(now())
        self._explainer = Explainer(registry, self._allowance)
        self.holders_seconds, self._undescribed = 0.0, 0
        self.print_on_signal: Callable[[Report], None] = print_text
        self.series = ReportSeries(registry, settings, clock)
        self._redaction = Redaction(settings.redact)
        self._descriptors = DescriptorCounter(self._registry)
        self.children = _Children(registry, settings)

    def scan(self, *, full: bool = False, is_last: bool = False) -> Report:
        """One report by itself.

        Args:
            full: Describe the healthy sockets too.
            is_last: The process ends now, so that nothing is left to a later report.
        """
        return self._finish(self._scan(full=full, is_last=is_last))

    def next_in_series(
        self, times_exhausted: int, notes: Iterable[str] = (), *, is_last: bool = False
    ) -> Report:
        """The next report of the series, whose alerts say what begins, gets worse and ends.

        Args:
            times_exhausted: How often there was no descriptor left, so far.
            notes: What else this report does not cover.
            is_last: The process ends now, so that nothing is left to a later report.
        """
        began, before = now(), thread_time()
        seen = self._scan(is_paced=not is_last, is_last=is_last)
        report = self.series.advance(seen, began, times_exhausted)
        coverage = replace(report.coverage, notes=(*report.coverage.notes, *notes))
        report = self._descriptors.name_if_exhausted(replace(report, coverage=coverage))
        # Last, because the series adds alerts and notes of its own.
        return self.series.keep(self._redaction.report(report), began, thread_time() - before)

    def reported_leaks(self) -> frozenset[int]:
        """The serials of the leaks that the latest report of the series has."""
        return self.series.reported_leaks()

    def check(self, since: int, *, is_last: bool = False) -> Report:
        """The sockets opened after a mark, healthy or not, without a grace time.

        The last check of a process has what child processes keep open, too.
        """
        seen = self._inspect(opened_after=since, is_last=is_last)
        settings = self._settings.with_overrides(grace=0)
        fd_limit = _descriptors.fd_limit()
        observations = seen.opened_after(since)
        findings = self._find(observations, settings, fd_limit, everything=True)
        findings += self.children.leaks(is_last=True) if is_last else self._copies_after(since)
        return self._finish(self._report(seen, findings, (), fd_limit))

    def with_open_at_end(self, report: Report) -> Report:
        """The last report of a process, with the owners that only its end closes."""
        return self._redaction.open_at_end(add_open_at_end(self._registry, report))

    def _finish(self, report: Report) -> Report:
        report = replace(report, alerts=threshold_alerts(report, self._settings))
        return self._redaction.report(self._descriptors.name_if_exhausted(report))

    def totals(self) -> Totals:
        """What was recorded so far: the beginning of a block or test, for `take_unseen`."""
        _, dropped, failures = self._registry.totals()
        owners, forgotten = self._registry.owners, self._registry.at_fork.forgotten
        return dropped, failures, forgotten, owners.forgotten if owners else 0

    def take_unseen(self, start: Totals) -> list[str]:
        """Why what a block or test has left open may be missing from the latest check, once."""
        dropped, failures, copies, owners = map(sub, self.totals(), start)
        lost = dropped - len(self._registry.dropped())
        counts = {
            f"recording sockets has failed ({pluralize(failures, 'time')})": failures,
            f"no record is left of {pluralize(lost, 'dropped socket')}": lost,
            f"no record is left of {pluralize(owners, 'unclosed object')}": owners,
            f"what child processes keep open of {pluralize(copies, 'socket')} is forgotten": copies,
        }
        unseen = (*self._owners.unasked, *self.children.unseen)
        self._owners.unasked = self.children.unseen = ()
        return [why for why, count in counts.items() if count > 0] + list(unseen)

    @property
    def has_unseen(self) -> bool:
        """Whether the latest look for what is open could not see all: the next may."""
        return bool(self._owners.unasked or self.children.unseen)

    def unseen(self) -> Iterator[str]:
        """Why leaks may be missing from the latest report: no gate must pass then."""
        if self._undescribed:
            yield f"looking at {pluralize(self._undescribed, 'socket')} has failed"
        if failures := self._registry.totals()[2]:
            yield f"recording sockets has failed ({pluralize(failures, 'time')})"
        if self.scanner.natives.count is None:
            yield "the open descriptors could not be listed"
        yield from self.scanner.forked_copies.unseen
        if self._owners.lost:
            yield self._owners.lost
        yield from self._pools.failures
        if self.children.failure:
            yield self.children.failure

    def open_since(self, mark: int) -> tuple[Finding, ...]:
        """The sockets opened after a mark that are open or were dropped; no holders, no hints."""
        observations = self._inspect(opened_after=mark).opened_after(mark)
        findings = judge(observations, self._settings.with_overrides(grace=0), fd_limit=None)
        return findings + self._copies_after(mark)

    def has_unrecorded(self, mark: int) -> bool:
        """Whether an open owner that was made after a mark has what is no socket object."""
        return bool(self._registry.owners and self._registry.owners.unrecorded(mark))

    def _copies_after(self, mark: int) -> tuple[Finding, ...]:
        dropped = {each.creation[SERIAL] for each in self._registry.dropped()}
        copies = self.children.copies_after(mark)
        return tuple(each for each in copies if each.observation.record.serial not in dropped)

    def print_report(self, report: Report, record: Callable[[Report], None]) -> None:
        """Print a report, to stderr by default, after another function has got it."""
        record(report)
        self.print_on_signal(report)

    def charge(self, seconds: float) -> None:
        """Leave less processor time for the search for holders, because scanning has taken some."""
        self._allowance.charge(seconds, now())

    def after_fork(self) -> None:
        """In the child: what was known is the parent's."""
        self.scanner.after_fork()
        self.series.after_fork()
        self.children = _Children(self._registry, self._settings)
        self._descriptors = DescriptorCounter(self._registry)

    def _scan(self, *, full: bool = False, is_paced: bool = False, is_last: bool = False) -> Report:
        """The report before alerts and redaction.

        Args:
            full: Describe the healthy sockets too.
            is_paced: Whether it is one of a series, which may take only a share of the time.
            is_last: Whether what is not known of pools cannot be left to the next.
        """
        seen = self._inspect(full=full, is_last=is_last)
        fd_limit = _descriptors.fd_limit()
        suspects = (*seen.suspects, *seen.dropped)
        all_findings = self._find(
            suspects, self._settings, fd_limit, is_paced=is_paced, is_last=is_last
        )
        findings = tuple([each for each in all_findings if each.verdict is not Verdict.OPEN])
        findings += self.children.leaks(is_last=is_last)
        spared = (each.observation for each in all_findings if each.verdict is Verdict.OPEN)
        healthy = (*seen.healthy, *spared) if full else ()
        return self._report(seen, findings, healthy, fd_limit, named=full)

    def _inspect(
        self, *, full: bool = False, opened_after: int | None = None, is_last: bool = False
    ) -> ScanResult:
        if not self._is_installed():
            self._registry.adopt()
        retry_sources()
        self.scanner.forked_copies.is_last = is_last
        seen = self.scanner.scan(full=full, opened_after=opened_after)
        seen = self._checkouts.scan(seen, opened_after)
        return self._owners.scan(seen, opened_after, may_stay_open=opened_after is None or is_last)

    def _find(
        self,
        observations: tuple[Observation, ...],
        settings: Settings,
        fd_limit: int | None,
        *,
        everything: bool = False,
        is_paced: bool = False,
        is_last: bool = False,
    ) -> tuple[Finding, ...]:
        """Verdicts, holders and hints.

        Args:
            observations: All that was seen in one scan.
            settings: The thresholds.
            fd_limit: How many descriptors the process may have.
            everything: Say who holds what is not a leak too.
            is_paced: Take no more than the share of the time that a series may take.
            is_last: Ask now what uses each pool; what is not known excuses nothing.
        """
        findings = judge(observations, settings, fd_limit, self._explainer.texts)
        with self._holders_measured():
            limit = self._explainer.time_to_search(paced=is_paced)
            asked = _OPEN_LEAKS | ({Verdict.OPEN} if everything else set())
            seen = [each.observation for each in findings if each.verdict in asked]
            pools = self._pools.uses(seen, limit, afresh=everything or is_last)
            idle = {serial for serial, use in pools.items() if use.is_excuse}
            findings = leave_to_pools(findings, idle, settings, fd_limit)
            # A test or a block is not to wait for the end of a call.
            part = limit.part(_SHARE_OF_CALLS)
            calls = {} if everything else self._calls.uses(findings, settings, fd_limit, part)
            findings = leave_to_calls(findings, calls.keys())
            return self._explainer.explain(findings, pools, calls, limit, everything=everything)

    @contextmanager
    def _holders_measured(self) -> Iterator[None]:
        began = thread_time()
        yield
        took = thread_time() - began
        self.holders_seconds += took
        self.charge(took)

    def _report(
        self,
        seen: ScanResult,
        findings: tuple[Finding, ...],
        observations: tuple[Observation, ...],
        fd_limit: int | None,
        *,
        named: bool = False,
    ) -> Report:
        self._undescribed = seen.undescribed
        report = Report(
            schema=SCHEMA,
            taken_at=wall(),
            host=_host(),
            pid=os.getpid(),
            command=sys.argv[0] if sys.argv else "",
            python=sys.version.split()[0],
            open_sockets=seen.open_sockets,
            fd_used=None,
            fd_limit=fd_limit,
            coverage=self._coverage(seen.undescribed),
            findings=findings,
            observations=observations,
            full_pools=self._checkouts.full_pools,
        )
        report = self._descriptors.add_to(report, named=named, afresh=named)
        # Last, because the descriptors are questions too.
        return _with_refusals(report)

    def _coverage(self, undescribed: int) -> Coverage:
        opened, dropped, failures = self._registry.totals()
        coverage = Coverage(
            opened=opened,
            adopted=self._registry.count_adopted(),
            dropped=dropped,
            forgotten=dropped - len(self._registry.dropped()),
            failures=failures,
            notes=(),
            native=self.scanner.natives.count,
            attributed=self.scanner.natives.attributed,
            earlier=self.scanner.natives.earlier,
            leaks_unknown=tuple(unique((*self.unseen(), *self.children.notes))),
        )
        notes = *self._not_covered(coverage, undescribed), *self._settings.notes
        return replace(coverage, notes=notes)

    def _not_covered(self, coverage: Coverage, undescribed: int) -> Iterator[str]:
        yield from _not_covered_of_creation(coverage, self._is_installed())
        context = self._registry.context
        if context is not None and context.failure is not None:
            yield context.failure
        yield from hidden_by_interpreter()
        if not self._explainer.has_seen_all_calls:
            yield "what some of the running calls have in their variables: there are too many"
        counts = {
            "what holds {} (the search failed)": self._explainer.failed,
            "what holds {} (searching may take 1 % of the time)": self._explainer.unsearched,
            "the state of {} (inspecting it failed)": undescribed,
        }
        yield from (why.format(pluralize(n, "socket")) for why, n in counts.items() if n)
        yield from self.scanner.notes
        yield from self.children.notes
        if forgotten := self._registry.at_fork.forgotten:
            yield (
                f"what child processes keep open of {pluralize(forgotten, 'socket')} that were "
                "closed long ago"
            )
        yield from (*self._owners.notes, *self._pools.notes)
        yield from (*self._calls.notes, *self.scanner.natives.notes)


class _Children:
    """What child processes keep open of the connections that this process has closed."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry, self._settings = registry, settings
        self._found: dict[int, Finding] = {}
        self._paused_until, self.failure = 0.0, ""
        # What the latest scan could not see, and of which processes.
        self.notes: tuple[str, ...] = ()
        self.unread: tuple[int, ...] = ()
        # What the latest check of a block or test could not see.
        self.unseen: tuple[str, ...] = ()

    def leaks(self, *, is_last: bool) -> tuple[Finding, ...]:
        """Those that a child has open unused, with the record that they had at the fork."""
        closed, started, self.failure = self._registry.at_fork.closed(), now(), ""
        if not closed:
            self.notes = self.unread = ()
        elif is_last or started >= self._paused_until:
            found = self._search(closed, of_block=False)
            seen = found and (found.leaks, found.notes, found.unread)
            self._found, self.notes, self.unread = seen or ({}, (self.failure,), ())
            self._paused_until = now() + (now() - started) / _SHARE_OF_CHILDREN
        return tuple(
            leak
            for inode, leak in self._found.items()
            if _descriptors.is_socket_of(leak.observation.record.pid, leak.observation.fd, inode)
        )

    def copies_after(self, mark: int) -> tuple[Finding, ...]:
        """Of the sockets opened after a mark, what a child has open; not what it serves."""
        self.unseen, closed = (), self._registry.at_fork.copied_after(mark)
        if not closed:
            return ()
        found = self._search(closed, of_block=True)
        self.unseen = (self.failure,) if found is None else found.notes
        return () if found is None else tuple({**found.undecided, **found.leaks}.values())

    def _search(
        self, closed: Mapping[int, ForkedSocket], *, of_block: bool
    ) -> ChildrensCopies | None:
        """The search in all children; None where it has failed, as without a descriptor."""
        settings = self._settings.with_overrides(grace=0) if of_block else self._settings
        try:
            # A process without children, and one that keeps its connections, loads nothing of it.
            from closewait_guard._processes import find_copies_in_children

            pid = self._registry.pid
            found = find_copies_in_children(
                closed, lambda each: record_of(each.creation, pid), settings, of_block=of_block
            )
        except Exception as error:
            self.failure = f"what child processes keep open: the search failed ({error})"
            return None
        self._registry.at_fork.forget(found.gone)
        return found


def _host() -> str:
    """The name of this machine, or an empty string where it cannot be had."""
    try:
        return socket.gethostname()
    except Exception as error:
        refusals.note(error)
        return ""


def _with_refusals(report: Report) -> Report:
    """Say what an audit hook has kept from being asked, if it has."""
    if not refusals.total:
        return report
    questions = pluralize(refusals.total, "question")
    notes = *report.coverage.notes, f"what an audit hook has kept from being asked: {questions}"
    return replace(report, coverage=replace(report.coverage, notes=notes))


def _not_covered_of_creation(coverage: Coverage, is_installed: bool) -> Iterator[str]:
    if note := native_note(coverage):
        yield note
    if not is_installed:
        yield NOT_INSTALLED
    elif (module := patch.overriding_module()) is not None:
        yield f"what {module} hides, which has wrapped the socket class after us"
    replacement = patch.replacement_class(() if is_installed else SOCKET_CLASSES)
    if replacement is not None:
        yield f"sockets of {replacement}, which has taken the place of socket.socket"
