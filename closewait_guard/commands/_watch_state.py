"""What `watch` remembers of one look until the next: counts by state, offenders, changes. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from closewait_guard._processes import ProcessScan
from closewait_guard._render import group_by_peer
from closewait_guard.model import Finding, Severity, Verdict

__all__ = [
    "Offender",
    "ScanHistory",
    "sparkline",
]


_MAX_SCANS = 500
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"


class Offender(NamedTuple):
    """Leaks of one process, or what may be leaks, with one verdict and peer.

    Attributes:
        change: How many more than in the look before.
        oldest: Seconds since the first peer has closed; None where it is unknown.
        is_lower_bound: It may have closed earlier.
    """

    program: str
    pid: int
    verdict: Verdict
    severity: Severity
    peer: str
    many: int
    change: int
    oldest: float | None
    is_lower_bound: bool
    unread: int
    code: str


class ScanHistory:
    """The looks so far.

    Attributes:
        states: For each state, the counts of the looks, the latest last.
        offenders: Of the latest look, the worst first.
        sockets: How many are open.
        processes: How many have any.
    """

    def __init__(self) -> None:
        self.states: dict[str, deque[int]] = {}
        self.offenders: list[Offender] = []
        self.sockets = 0
        self.processes = 0
        self._looks = 0
        self._before: Mapping[tuple[int, Verdict, str], int] = {}

    def take(self, found: ProcessScan) -> None:
        """Take in one look."""
        total: Counter[str] = Counter()
        for process in found.processes:
            total.update(process.states)
        for state in total.keys() - self.states.keys():
            self.states[state] = deque([0] * min(self._looks, _MAX_SCANS), _MAX_SCANS)
        for state, counts in self.states.items():
            counts.append(total[state])
        self.sockets = total.total()
        self.processes = sum(bool(process.report.open_sockets) for process in found.processes)
        self._take_offenders(found)
        self._looks += 1

    def change(self, state: str) -> int:
        """How many more there are in a state than in the look before."""
        counts = self.states[state]
        return counts[-1] - counts[-2] if len(counts) > 1 else 0

    def _take_offenders(self, found: ProcessScan) -> None:
        groups: dict[tuple[int, Verdict, str], list[Finding]] = {}
        programs: dict[int, str] = {}
        for process in found.processes:
            programs[process.report.pid] = process.report.command
            suspects = (each for each in process.report.findings if _may_be_leak(each))
            for key, leaks in group_by_peer(suspects).items():
                groups[(process.report.pid, *key)] = leaks
        self.offenders = sorted(
            (self._offender(key, leaks, programs[key[0]]) for key, leaks in groups.items()),
            key=lambda each: (
                not each.verdict.is_leak,
                -each.severity.rank,
                -each.many,
                -(each.oldest or 0.0),
                each.pid,
            ),
        )
        self._before = {key: len(leaks) for key, leaks in groups.items()}

    def _offender(
        self, key: tuple[int, Verdict, str], leaks: list[Finding], program: str
    ) -> Offender:
        pid, verdict, peer = key
        ages = [leak.observation.peer_closed_for for leak in leaks]
        return Offender(
            program,
            pid,
            verdict,
            max((leak.severity for leak in leaks), key=lambda severity: severity.rank),
            peer,
            len(leaks),
            len(leaks) - self._before.get(key, 0) if self._looks else 0,
            max((age for age in ages if age is not None), default=None),
            any(leak.observation.is_lower_bound for leak in leaks),
            sum(leak.observation.unread or 0 for leak in leaks),
            leaks[0].code,
        )


def _may_be_leak(finding: Finding) -> bool:
    return finding.is_leak or finding.verdict is Verdict.IDLE_OR_LEAKED


def sparkline(counts: Iterable[int], width: int, *, plain: bool = False) -> str:
    """The latest counts as bars, the highest of them as the highest bar.

    Example:
        >>> sparkline([0, 1, 2, 4], 10)
        '▁▂▄█'
        >>> sparkline([1, 2, 3, 4], 2, plain=True)
        '+#'
    """
    shown = list(counts)[-width:] if width > 0 else []
    highest = max(shown, default=0) or 1
    bars = _PLAIN_BARS if plain else _BARS
    return "".join(bars[(len(bars) - 1) * count // highest] for count in shown)
