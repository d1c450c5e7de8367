"""What was seen from outside as text, 80 columns wide, by program and peer: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from closewait_guard._block import name_of
from closewait_guard._lines import folded
from closewait_guard._outside._missing import apart, told_missing
from closewait_guard._outside._onlooker import Found, Glance
from closewait_guard._outside._peers import group_lines, groups_of, healthy_lines
from closewait_guard._words import count_of, distinct
from closewait_guard.model import State, Verdict

__all__ = ["told"]

_MOST_PEERS = 12
_MOST_PROCESSES = 8


def told(found: Found, *, only: Sequence[Glance]) -> str:
    """Everything that is to be told, of some of the processes that were found."""
    by_name = sorted(only, key=lambda glance: glance.report.command)
    programs = [
        list(group) for _, group in groupby(by_name, key=lambda glance: glance.report.command)
    ]
    programs.sort(key=_badness, reverse=True)
    blocks = ["\n".join(_program(glances)) for glances in programs]
    blocks += ["\n".join(lines) for lines in (_unseen(only), _rest(found, only))]
    blocks.append(told_missing(found))
    return "".join(f"{block}\n" for block in apart(blocks))


def _badness(glances: Sequence[Glance]) -> tuple[int, int]:
    leaks = [leak for glance in glances for leak in glance.report.accused]
    severities = {leak.severity for leak in leaks}
    return max((severity.rank for severity in severities), default=-1), len(leaks)


def _program(glances: Sequence[Glance]) -> Iterator[str]:
    reports = [glance.report for glance in glances]
    name = reports[0].command or "a process without a name"
    pids = ", ".join(str(report.pid) for report in reports[:_MOST_PROCESSES])
    more = len(reports) - _MOST_PROCESSES
    many = "process" if len(reports) == 1 else f"{len(reports)} processes:"
    yield from folded(f"{name}, {many} {pids}" + (f" and {more} more" if more > 0 else ""), "  ")
    yield from _numbers(glances)
    for alert in (alert for report in reports for alert in report.alerts):
        yield from folded(
            f"  {alert.severity.upper()}  {alert.kind.upper()}: {alert.message}", "    "
        )
    groups = groups_of(reports)
    for group in groups[:_MOST_PEERS]:
        yield ""
        yield from group_lines(group, several=len(reports) > 1)
    if len(groups) > _MOST_PEERS:
        rest = [leak for group in groups[_MOST_PEERS:] for leak in group]
        yield ""
        yield f"  and {len(rest):,} more with {len(groups) - _MOST_PEERS:,} other peers"
    for fix in distinct(leak.hint for report in reports for leak in report.leaks if leak.hint):
        yield ""
        yield from folded(f"  fix: {fix}", "    ")
    yield from healthy_lines([seen for report in reports for seen in report.observations])
    for address, times in _united(glance.backlog for glance in glances).items():
        yield from folded(f"  {_waiting(address, times)}", "    ")
    for address, times in _united(glance.uncertain_backlog for glance in glances).items():
        yield from folded(
            f"  {_waiting(address, times)}; at this address listens another process, too, and "
            "which of them has them the kernel does not tell",
            "    ",
        )


def _waiting(address: str, times: int) -> str:
    return (
        f"{count_of(times, 'connection')} in CLOSE_WAIT in the backlog of {address}: the peer has "
        "gone before anybody called accept()"
    )


def _united(backlogs: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Of a listener that several processes share, once."""
    found: dict[str, int] = {}
    for backlog in backlogs:
        found |= backlog
    return found


def _numbers(glances: Sequence[Glance]) -> Iterator[str]:
    """Sockets by state for all of them, descriptors for each of those that have most."""
    states = _summed(glance.states for glance in glances)
    verdicts = Counter(leak.verdict for glance in glances for leak in glance.report.leaks)
    found = [
        f"{verdicts[verdict]:,} {name_of(verdict)}" for verdict in Verdict if verdicts[verdict]
    ]
    total = count_of(sum(states.values()), "open socket")
    if not found and not any(glance.narrowed for glance in glances):
        found = ["no leak"]
    of_all = f"{', '.join(found)} of {total}" if found else total
    yield from folded(f"  {of_all}: {_told_states(states)}", "    ")
    shares = sorted(glances, key=_share, reverse=True)
    for glance in shares[:_MOST_PROCESSES]:
        which = f"process {glance.report.pid}: " if len(glances) > 1 else ""
        yield from folded(f"  {which}{_descriptors(glance)}", "    ")


def _share(glance: Glance) -> tuple[float, int]:
    used, limit = glance.report.fd_used or 0, glance.report.fd_limit
    return (used / limit if limit else 0.0, len(glance.report.accused))


def _told_states(states: Mapping[str, int]) -> str:
    """`ESTABLISHED 10, CLOSE_WAIT 3`, the most frequent first."""
    most = sorted(states.items(), key=lambda item: -item[1])
    return ", ".join(f"{state} {times:,}" for state, times in most) or "none"


def _descriptors(glance: Glance) -> str:
    used, limit = glance.report.fd_used, glance.report.fd_limit
    if used is None:
        return "descriptors in use unknown"
    if not limit:
        return f"{count_of(used, 'descriptor')} in use, without a limit"
    text = f"{used:,} of {limit:,} descriptors in use ({used / limit:.0%})"
    waiting = glance.states.get(State.CLOSE_WAIT, 0)
    return f"{text}; {waiting:,} in CLOSE_WAIT ({waiting / limit:.1%})" if waiting else text


def _summed(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def _unseen(only: Sequence[Glance]) -> list[str]:
    """What could not be seen of these processes, each sentence once."""
    notes = [note for glance in only for note in glance.report.coverage.notes]
    general = [note for note, times in Counter(notes).items() if times == len(only)]
    return folded(f"Cannot see {'; '.join(general)}.", "  ") if general else []


def _rest(found: Found, only: Sequence[Glance]) -> Iterator[str]:
    shown = {glance.report.pid for glance in only}
    rest = [glance for glance in found.glances if glance.report.pid not in shown]
    sockets = sum(glance.report.open_sockets for glance in rest)
    if sockets or not only:
        processes = count_of(len(rest), "process")
        text = f"Nothing wrong with {count_of(sockets, 'socket')} of {processes}."
        yield from folded(text, "  ")
