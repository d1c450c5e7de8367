"""Leaks and healthy sockets by peer, as lines of text: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

from closewait_guard._block import kind_of, name_of, story
from closewait_guard._lines import cut, folded
from closewait_guard._words import count_of, distinct
from closewait_guard.model import Leak, Observation, Origin, Report, Severity, State, Verdict

__all__ = ["group_lines", "groups_of", "healthy_lines", "peer_of"]

_MOST_NUMBERS = 10


def groups_of(reports: Iterable[Report]) -> list[list[Leak]]:
    """By verdict and peer, worst first."""
    groups: dict[tuple[Verdict, str], list[Leak]] = {}
    for report in reports:
        for leak in report.leaks:
            groups.setdefault((leak.verdict, peer_of(leak.observation)), []).append(leak)
    return sorted(groups.values(), key=_weight)


def _weight(group: Sequence[Leak]) -> tuple[int, int, int]:
    return (group[0].verdict.rank, -_severity(group).rank, -len(group))


def _severity(group: Sequence[Leak]) -> Severity:
    return max({leak.severity for leak in group}, key=attrgetter("rank"))


def peer_of(seen: Observation) -> str:
    """Whom the socket is connected to; of one who came to us, the port tells nothing."""
    if seen.peer is None:
        return f"at {seen.local}" if seen.local else ""
    return f"from {_host_of(seen.peer)}" if _came_to_us(seen) else f"to {seen.peer}"


def _came_to_us(seen: Observation) -> bool:
    """Whether the other end has made the connection."""
    record = seen.record
    return Origin.ACCEPTED in (record.origin, record.parent.origin if record.parent else None)


def _host_of(address: str) -> str:
    """An address without its port.

    Example:
        >>> _host_of("[::1]:80"), _host_of("10.0.0.1:80")
        ('[::1]', '10.0.0.1')
    """
    return address.rpartition(":")[0] or address


def group_lines(group: Sequence[Leak], *, several: bool) -> Iterator[str]:
    """The lines of one group.

    Args:
        group: Leaks with one verdict and peer.
        several: They may be of several processes.
    """
    seen = [leak.observation for leak in group]
    what = f"{name_of(group[0].verdict).upper()}  {kind_of(seen[0])} {peer_of(seen[0])}"
    yield from folded(f"  {_severity(group).upper()}  {len(group):,} x {what.rstrip()}", "    ")
    yield from folded(f"    {story(seen)}", "      ")
    if several:
        yield from _numbers("process", distinct(str(each.record.pid) for each in seen))
    else:
        yield from _numbers("descriptor", [each.fd for each in seen])
    parent = seen[0].record.parent
    if parent is not None:
        yield f"    inherited over fork() from process {parent.pid}"
    for holder in _some_of(distinct(holder for leak in group for holder in leak.holders)):
        yield from folded(f"    held by {holder}", "      ")


def _numbers(noun: str, numbers: Sequence[object]) -> list[str]:
    shown = ", ".join(map(str, numbers[:_MOST_NUMBERS]))
    more = len(numbers) - _MOST_NUMBERS
    word = count_of(len(numbers), noun).partition(" ")[2]
    return folded(f"    {word} {shown}" + (f" and {more:,} more" if more > 0 else ""), "      ")


def _some_of(holders: Sequence[str], most: int = 3) -> Iterator[str]:
    yield from holders[:most]
    if len(holders) > most:
        yield f"{len(holders) - most} more"


def healthy_lines(seen: Sequence[Observation]) -> Iterator[str]:
    """One line for each state and peer."""
    if not seen:
        return
    lines = Counter((each.state, kind_of(each), peer_of(each)) for each in seen)
    yield ""
    ordered = sorted(lines.items(), key=lambda item: (item[0][0], -item[1]))
    for (state, kind, peer), times in ordered:
        name = state if state in _TCP else "-"
        yield cut(f"  {name:<12}{times:>7,} x {kind} {peer}".rstrip())


_TCP = frozenset(State) - {State.UNIX, State.NONE}
