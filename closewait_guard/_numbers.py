"""The numbers of a report, for metrics: what each of them means, and how it is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from closewait_guard._enums import GONE, Origin
from closewait_guard._format import truncate
from closewait_guard._stream import layout_of
from closewait_guard.model import Finding, Report, SiteGroup, State, Verdict

if TYPE_CHECKING:
    from closewait_guard._holders import PoolCount

__all__ = [
    "MEASURES",
    "Measure",
    "Numbers",
    "Sample",
    "SeriesFacts",
    "numbers_from",
    "numbers_of",
    "with_fewer_sites",
]


class Measure(NamedTuple):
    """One of the numbers.

    Attributes:
        name: Its name, which ends in its unit.
        description: What it is.
        labels: What the number is split by.
        is_total: It counts since the start of the process, and only grows.
    """

    name: str
    description: str
    labels: tuple[str, ...] = ()
    is_total: bool = False


class Sample(NamedTuple):
    """A number, and the values of the labels of its measure."""

    labels: tuple[str, ...]
    value: float


# By the name of the measure. One that is not known is left out.
Numbers = Mapping[str, Sequence[Sample]]


class SeriesFacts(NamedTuple):
    """What one report does not have.

    Attributes:
        closed: How many of the sockets opened so far have been closed.
        growth_per_minute: How many more leaked sockets there are each minute.
        time_left: Seconds until the descriptor limit is reached; infinite without growth.
        scan_seconds: The processor time of the scan.
        pools: How many connections are in use and idle, and what waits for one, by pool.
    """

    closed: int
    growth_per_minute: float
    time_left: float
    scan_seconds: float
    pools: tuple[PoolCount, ...]


MEASURES = (
    Measure(
        "sockets",
        "Open sockets by state. State healthy: neither closed by the peer nor suspect otherwise.",
        ("state",),
    ),
    Measure("findings", "Sockets of the last report by verdict.", ("verdict", "severity")),
    Measure(
        "leaked_sockets",
        "Leaked sockets by the line that opened them; the rest under other.",
        ("fingerprint", "site", "code"),
    ),
    Measure("sockets_opened", "Sockets opened since the guard was installed.", is_total=True),
    Measure("sockets_closed", "Those of the opened sockets that are closed.", is_total=True),
    Measure("sockets_dropped", "Sockets garbage-collected while they were open.", is_total=True),
    Measure(
        "close_wait_oldest_seconds",
        "How long ago the peer of the oldest leaked socket in CLOSE_WAIT closed; 0 without one.",
    ),
    Measure("descriptors", "Open file descriptors by what they are open on.", ("kind",)),
    Measure("descriptors_open", "Open file descriptors."),
    Measure("descriptors_limit", "The soft limit on file descriptors."),
    Measure("leaked_sockets_growth_per_minute", "How fast leaks grow; 0 unless they keep growing."),
    Measure(
        "descriptors_time_left_seconds",
        "Time until the descriptor limit is reached; infinite unless something keeps growing.",
    ),
    Measure(
        "pool_connections", "Connections of a pool, used or idle.", ("library", "pool", "state")
    ),
    Measure("pool_connections_limit", "How many connections a pool may have.", ("library", "pool")),
    Measure("pool_waiting", "How many wait for a connection of a pool.", ("library", "pool")),
    Measure("pools_full", "Pools that have no connection left, by name and peer.", ("pool",)),
    Measure("scan_cpu_seconds", "Processor time of the last scan."),
    Measure("last_report_timestamp_seconds", "When the last report was made."),
    Measure("not_covered", "How many things the last report says it does not cover."),
)
_MAX_NAME = 120
_OTHER = "other"
_HEALTHY = "healthy"


def numbers_of(
    report: Report,
    facts: SeriesFacts | None = None,
    *,
    states: Mapping[str, int] | None = None,
) -> Numbers:
    """All numbers of a report, the leaking lines in the order worst first.

    Args:
        report: The report, redacted.
        facts: What else is known, if it is of a series.
        states: The sockets by state, where all are known.
    """
    found = dict(_numbers_of_report(report, states))
    found |= {} if facts is None else dict(_numbers_of_series(report, facts))
    return found


def _numbers_of_report(
    report: Report, states: Mapping[str, int] | None
) -> Iterator[tuple[str, list[Sample]]]:
    still_open = [each for each in report.findings if _is_open(each, report.pid)]
    by_state = _by_state(report, still_open) if states is None else states
    yield "sockets", [Sample((state,), count) for state, count in by_state.items()]
    findings = Counter[tuple[str, str]]()
    for each in report.findings:
        findings[each.verdict.value, each.severity.value] += each.count
    yield "findings", [Sample(key, count) for key, count in findings.items()]
    yield "leaked_sockets", list(_leaks(report.by_site()))
    yield "close_wait_oldest_seconds", [Sample((), _oldest(still_open))]
    if report.descriptors is not None:
        kinds = report.descriptors.by_kind.items()
        yield "descriptors", [Sample((str(kind),), count) for kind, count in kinds]
    full = Counter(truncate(pool.name, _MAX_NAME) for pool in report.full_pools)
    yield "pools_full", [Sample((name,), count) for name, count in full.items()]
    if report.fd_used is not None:
        yield "descriptors_open", [Sample((), report.fd_used)]
    if report.fd_limit is not None:
        yield "descriptors_limit", [Sample((), report.fd_limit)]
    yield "last_report_timestamp_seconds", [Sample((), report.taken_at)]
    yield "not_covered", [Sample((), len(report.coverage.notes))]


def _numbers_of_series(report: Report, facts: SeriesFacts) -> Iterator[tuple[str, list[Sample]]]:
    yield "sockets_opened", [Sample((), report.coverage.opened)]
    yield "sockets_closed", [Sample((), facts.closed)]
    yield "sockets_dropped", [Sample((), report.coverage.dropped)]
    yield "leaked_sockets_growth_per_minute", [Sample((), facts.growth_per_minute)]
    yield "descriptors_time_left_seconds", [Sample((), facts.time_left)]
    yield "scan_cpu_seconds", [Sample((), facts.scan_seconds)]
    connections, limits = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    waiting = Counter[tuple[str, ...]]()
    unbounded = {_pool_labels(pool) for pool in facts.pools if pool.max_size is None}
    for pool in facts.pools:
        labels = _pool_labels(pool)
        connections[*labels, "used"] += pool.used
        connections[*labels, "idle"] += pool.idle
        waiting[labels] += pool.waiting
        if labels not in unbounded:
            limits[labels] += pool.max_size or 0
    yield "pool_connections", [Sample(key, count) for key, count in connections.items()]
    yield "pool_connections_limit", [Sample(key, count) for key, count in limits.items()]
    yield "pool_waiting", [Sample(key, count) for key, count in waiting.items()]


def _pool_labels(pool: PoolCount) -> tuple[str, str]:
    return pool.library, truncate(pool.name, _MAX_NAME)


def _is_open(finding: Finding, pid: int) -> bool:
    """Whether it stands for a descriptor of this process."""
    seen = finding.observation
    is_here = seen.fd >= 0 and seen.owner is None and seen.record.pid in (pid, 0)
    return is_here and seen.evidence not in GONE and finding.verdict is not Verdict.CLOSED_ELSEWHERE


def _by_state(report: Report, still_open: Iterable[Finding]) -> dict[str, int]:
    # Always there, so that a graph begins before anything is wrong.
    states = {_HEALTHY: report.open_sockets, State.CLOSE_WAIT.value: 0}
    for each in still_open:
        state = each.observation.state.value
        states[state] = states.get(state, 0) + each.count
        # Those without a socket object are not among the tracked.
        if each.observation.record.opener.origin is not Origin.NATIVE:
            states[_HEALTHY] -= each.count
    return {**states, _HEALTHY: max(0, states[_HEALTHY])}


def _oldest(still_open: Iterable[Finding]) -> float:
    return max(
        (
            each.observation.peer_closed_for or 0.0
            for each in still_open
            if each.observation.state is State.CLOSE_WAIT
            and (each.is_leak or each.verdict is Verdict.IDLE_OR_LEAKED)
        ),
        default=0.0,
    )


def _leaks(groups: Iterable[SiteGroup]) -> Iterator[Sample]:
    counts = Counter[tuple[str, str, str]]()
    for group in groups:
        if group.verdict.is_leak:
            counts[group.fingerprint, _place_of(group), group.code] += group.count
    for labels, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        yield Sample(labels, count)


def _place_of(group: SiteGroup) -> str:
    """The line that opened them: relative to this directory, or with the last folders only."""
    if group.site is None:
        return "unknown"
    place = layout_of().relative(group.site.place).replace("\\", "/")
    if place.startswith("/") or place[1:2] == ":":
        inside = place.partition("/site-packages/")[2]
        place = inside or "/".join(place.split("/")[-3:])
    return truncate(place, _MAX_NAME)


def with_fewer_sites(numbers: Numbers, most: int) -> Numbers:
    """The same with the worst leaking lines only, and the rest of them added up."""
    leaks = numbers.get("leaked_sockets", ())
    rest = sum(each.value for each in leaks[most:])
    shown = [*leaks[:most], *([Sample((_OTHER,) * 3, rest)] if rest else [])]
    return {**numbers, "leaked_sockets": shown}


def numbers_from(data: object) -> Numbers:
    """The numbers that another process has sent as JSON; what does not fit is left out."""
    found = {}
    for measure in MEASURES:
        samples = data.get(measure.name) if isinstance(data, dict) else None
        if isinstance(samples, list):
            read = [_sample_from(each, len(measure.labels)) for each in samples]
            found[measure.name] = [each for each in read if each is not None]
    return found


def _sample_from(data: object, labels: int) -> Sample | None:
    match data:
        case [list(values), int() | float() as value] if len(values) == labels:
            return Sample(tuple(truncate(str(each), _MAX_NAME) for each in values), float(value))
    return None
