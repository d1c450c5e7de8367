"""What a guard finds out from what was recorded: looks, verdicts, and the series of reports."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

from closewait_guard import _census, _patch
from closewait_guard._clock import now, wall
from closewait_guard._coverage import notes
from closewait_guard._frames import read_again
from closewait_guard._history import History
from closewait_guard._jury import Jury
from closewait_guard._lookout import Lookout
from closewait_guard._probe import Probe
from closewait_guard._redact import Redaction
from closewait_guard._refusals import refusals
from closewait_guard._registry import Registry
from closewait_guard._render import dated
from closewait_guard._running_frames import sees_all_threads
from closewait_guard._sight import Sight
from closewait_guard._stream import put
from closewait_guard._thresholds import crossed
from closewait_guard._variables import shows_other_threads
from closewait_guard._words import count_of
from closewait_guard.model import SCHEMA, Coverage, Leak, Observation, Report, Verdict
from closewait_guard.settings import Settings

__all__ = ["Examiner"]


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
        limit = _census.fd_limit()
        seen = (*sight.suspects, *sight.dropped)
        judged = self._jury.leaks(seen, self._settings, limit, paced=paced)
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
        """Look only at the sockets born after a mark, without any grace."""
        sight = self._look(born_after=since)
        limit = _census.fd_limit()
        everything = (*sight.suspects, *sight.dropped, *sight.healthy)
        young = [seen for seen in everything if seen.record.serial > since]
        settings = self._settings.replaced(grace=0)
        leaks = self._jury.leaks(young, settings, limit, everything=True, explain=explain)
        return self._redaction.report(self._report(sight, leaks, (), limit))

    def print(self) -> None:
        """Look, and print the report."""
        put(None, dated(self.scan()))

    def after_fork(self) -> None:
        """In the child."""
        self.lookout.after_fork()
        self._history.after_fork()

    def _look(self, *, full: bool = False, born_after: int | None = None) -> Sight:
        if not self._installed():
            self._registry.adopt()
        read_again()
        return self.lookout.look(full=full, born_after=born_after)

    def _report(
        self,
        sight: Sight,
        leaks: tuple[Leak, ...],
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
            fd_used=_census.fd_used(),
            fd_limit=limit,
            coverage=self._coverage(sight.undescribed),
            leaks=leaks,
            observations=observations,
        )
        return replace(report, alerts=crossed(report, self._settings))

    def _coverage(self, undescribed: int) -> Coverage:
        context = self._registry.context
        blind_spots = notes(
            installed=self._installed(),
            natives=self.lookout.natives,
            replaced_by=_patch.replaced_by() if self._installed() else None,
            stand_in=_patch.stand_in(),
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
        f"what an audit hook has kept from being asked: {count_of(refusals.total, 'question')}",
    )
