"""Looks from outside, one after the other, and what is remembered from one to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import NamedTuple

from closewait_guard._observed import observed
from closewait_guard._outside._choose import choose
from closewait_guard._outside._judged import Known, judged, record_of
from closewait_guard._outside._sight import Refusal
from closewait_guard._redact import Mask, Redaction
from closewait_guard.model import Observation, Origin, Report, State
from closewait_guard.settings import Settings

__all__ = ["Found", "Glance", "Onlooker"]


class Glance(NamedTuple):
    """One process: its report, and what a report has no room for.

    Attributes:
        states: How many sockets are in each TCP state; other sockets by their protocol.
        backlog: Connections that the peer has closed before anybody accepted them, by address.
        uncertain_backlog: The same, where another process listens at that address, too.
        narrowed: The report has been cut down to some states.
    """

    report: Report
    states: Mapping[str, int]
    backlog: Mapping[str, int]
    uncertain_backlog: Mapping[str, int]
    narrowed: bool = False

    def only(self, states: Set[str]) -> Glance:
        """The same, of the sockets in some states."""
        leaks = tuple(leak for leak in self.report.leaks if leak.observation.state in states)
        others = tuple(seen for seen in self.report.observations if seen.state in states)
        report = replace(self.report, leaks=leaks, observations=others)
        return self._replace(report=report, narrowed=True)


class Found(NamedTuple):
    """What one look found.

    Attributes:
        refused: Processes that are none, or may not be looked into.
        strays: By user, sockets in CLOSE_WAIT whose process may not be seen.
        undated: There are connections whose end nobody has dated: a second look can tell whether
            the grace time has passed.
        hides: There may be processes of other users, which the platform does not even list.
    """

    glances: tuple[Glance, ...]
    refused: Sequence[Refusal]
    strays: Mapping[int, Sequence[Observation]]
    undated: bool
    hides: bool = False


class Onlooker:
    """Looks at processes from outside, and remembers since when the undated have been as they are.

    Args:
        settings: The thresholds, and the probe: `portable` asks psutil on Linux, too.
        in_series: Each look is to be followed by another, so that all is remembered.
    """

    def __init__(self, settings: Settings, *, in_series: bool = False) -> None:
        self._settings = settings
        self._redaction = Redaction(settings.redact)
        self._in_series = in_series
        self._looker = choose(settings.probe)
        self._known: Known = {}

    def with_descendants(self, pids: Sequence[int]) -> list[int]:
        """The processes, with all those that they have started, and so on."""
        return self._looker.descendants(pids)

    def look(self, pids: Sequence[int] | None = None, *, everything: bool = False) -> Found:
        """Look once.

        Args:
            pids: The processes to look at; None for all.
            everything: Describe the healthy sockets too.
        """
        seen = self._looker.look(pids, everything=everything)
        now, known = seen.at, self._known
        self._known = {}
        glances = []
        for sight in seen.sights:
            # What the kernel dates needs no memory, but for progress in reading.
            after = self._known if self._in_series or not sight.dated else None
            report = judged(sight, self._settings, known, after, now, everything=everything)
            glances.append(Glance(report, sight.states, sight.backlog, sight.uncertain_backlog))
        strays: dict[int, list[Observation]] = {}
        for stray in seen.strays:
            found = stray.descriptor
            record = record_of(0, Origin.ACCEPTED if found.accepted else Origin.NATIVE)
            view = found.view
            observation = observed(record, found.fd, found.endpoint, view, view.fin_for)
            strays.setdefault(stray.uid, []).append(observation)
        undated = any(not each.dated and State.CLOSE_WAIT in each.states for each in seen.sights)
        found_now = Found(tuple(glances), seen.refused, strays, undated, seen.hides)
        return self._redaction.apply(lambda mask: _masked(found_now, mask), found_now)


def _masked(found: Found, mask: Mask) -> Found:
    """What may be told of other processes."""
    return found._replace(
        glances=tuple(_masked_glance(glance, mask) for glance in found.glances),
        refused=[each._replace(program=mask.text(each.program)) for each in found.refused],
        strays={
            uid: [mask.observation(seen) for seen in those] for uid, those in found.strays.items()
        },
    )


def _masked_glance(glance: Glance, mask: Mask) -> Glance:
    return glance._replace(
        report=mask.report(glance.report),
        backlog=mask.counts(glance.backlog),
        uncertain_backlog=mask.counts(glance.uncertain_backlog),
    )
