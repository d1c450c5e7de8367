"""What was seen from outside as text, 80 columns wide, by program and peer: pure."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter

from closewait_guard._block import kind_of, name_of, story
from closewait_guard._lines import cut, folded
from closewait_guard._outside._onlooker import Found, Glance
from closewait_guard._words import count_of, distinct
from closewait_guard.model import Leak, Observation, Origin, Report, Severity, State, Verdict

__all__ = ["host_of", "peer_of", "told", "told_missing", "user"]

_MOST_PEERS = 12
_MOST_PROCESSES = 8
_MOST_NUMBERS = 10


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
    return "".join(f"{block}\n" for block in _apart(blocks))


def _apart(blocks: Iterable[str]) -> Iterator[str]:
    """Those with anything in them, a blank line between two."""
    for place, block in enumerate(filter(None, blocks)):
        yield f"\n{block}" if place else block


def told_missing(found: Found) -> str:
    """What may not be seen; of its sockets, what the kernel tells everybody."""
    return "\n".join(_apart(["\n".join(_strays(found)), "\n".join(_refused(found))]))


def _badness(glances: Sequence[Glance]) -> tuple[int, int]:
    leaks = [leak for glance in glances for leak in glance.report.accused]
    return max((leak.severity.rank for leak in leaks), default=-1), len(leaks)


def _program(glances: Sequence[Glance]) -> Iterator[str]:
    reports = [glance.report for glance in glances]
    name = reports[0].command or "a process without a name"
    pids = ", ".join(str(report.pid) for report in reports[:_MOST_PROCESSES])
    more = len(reports) - _MOST_PROCESSES
    many = "process" if len(reports) == 1 else f"{len(reports)} processes:"
    yield from folded(f"{name}, {many} {pids}" + (f" and {more} more" if more > 0 else ""), "  ")
    yield from _numbers(glances)
    groups = _groups(reports)
    for group in groups[:_MOST_PEERS]:
        yield ""
        yield from _group(group, several=len(reports) > 1)
    if len(groups) > _MOST_PEERS:
        rest = [leak for group in groups[_MOST_PEERS:] for leak in group]
        yield ""
        yield f"  and {len(rest):,} more with {len(groups) - _MOST_PEERS:,} other peers"
    for fix in distinct(leak.hint for report in reports for leak in report.leaks if leak.hint):
        yield ""
        yield from folded(f"  fix: {fix}", "    ")
    yield from _healthy([seen for report in reports for seen in report.observations])
    for address, times in _backlog(glances).items():
        yield from folded(
            f"  {count_of(times, 'connection')} in CLOSE_WAIT in the backlog of {address}: the "
            "peer has gone before anybody called accept()",
            "    ",
        )


def _backlog(glances: Sequence[Glance]) -> dict[str, int]:
    """Of a listener that several processes share, once."""
    found: dict[str, int] = {}
    for glance in glances:
        found |= glance.backlog
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
    yield from folded(f"  {of_all}: {told_states(states)}", "    ")
    shares = sorted(glances, key=_share, reverse=True)
    for glance in shares[:_MOST_PROCESSES]:
        which = f"process {glance.report.pid}: " if len(glances) > 1 else ""
        yield from folded(f"  {which}{_descriptors(glance)}", "    ")


def _share(glance: Glance) -> tuple[float, int]:
    used, limit = glance.report.fd_used or 0, glance.report.fd_limit
    return (used / limit if limit else 0.0, len(glance.report.accused))


def told_states(states: Mapping[str, int]) -> str:
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


def _groups(reports: Iterable[Report]) -> list[list[Leak]]:
    """By verdict and peer, worst first."""
    groups: dict[tuple[Verdict, str], list[Leak]] = {}
    for report in reports:
        for leak in report.leaks:
            groups.setdefault((leak.verdict, peer_of(leak.observation)), []).append(leak)
    return sorted(groups.values(), key=_weight)


def _weight(group: Sequence[Leak]) -> tuple[int, int, int]:
    return (group[0].verdict.rank, -_severity(group).rank, -len(group))


def _severity(group: Sequence[Leak]) -> Severity:
    return max((leak.severity for leak in group), key=attrgetter("rank"))


def peer_of(seen: Observation) -> str:
    """Whom the socket is connected to; of one who came to us, the port tells nothing."""
    if seen.peer is None:
        return f"at {seen.local}" if seen.local else ""
    return f"from {host_of(seen.peer)}" if came_to_us(seen) else f"to {seen.peer}"


def came_to_us(seen: Observation) -> bool:
    """Whether the other end has made the connection."""
    record = seen.record
    return Origin.ACCEPTED in (record.origin, record.parent.origin if record.parent else None)


def host_of(address: str) -> str:
    """An address without its port.

    Example:
        >>> host_of("[::1]:80"), host_of("10.0.0.1:80")
        ('[::1]', '10.0.0.1')
    """
    return address.rpartition(":")[0] or address


def _group(group: Sequence[Leak], *, several: bool) -> Iterator[str]:
    seen = [leak.observation for leak in group]
    what = f"{name_of(group[0].verdict).upper()}  {kind_of(seen[0])} {peer_of(seen[0])}"
    yield from folded(f"  {_severity(group).upper()}  {len(group):,} x {what.rstrip()}", "    ")
    yield from folded(f"    {story(seen)}", "      ")
    if several:
        pids = distinct(str(each.record.pid) for each in seen)
        yield from folded(f"    {_some('process', pids)}", "      ")
    else:
        yield from folded(f"    {_some('descriptor', [str(each.fd) for each in seen])}", "      ")
    parent = seen[0].record.parent
    if parent is not None:
        yield f"    inherited over fork() from process {parent.pid}"
    for holder in _some_of(distinct(holder for leak in group for holder in leak.holders)):
        yield from folded(f"    held by {holder}", "      ")


def _some(noun: str, numbers: Sequence[str]) -> str:
    shown = ", ".join(numbers[:_MOST_NUMBERS])
    more = len(numbers) - _MOST_NUMBERS
    plural = {"process": "processes", "descriptor": "descriptors"}[noun]
    word = noun if len(numbers) == 1 else plural
    return f"{word} {shown}" + (f" and {more:,} more" if more > 0 else "")


def _some_of(holders: Sequence[str], most: int = 3) -> Iterator[str]:
    yield from holders[:most]
    if len(holders) > most:
        yield f"{len(holders) - most} more"


def _healthy(seen: Sequence[Observation]) -> Iterator[str]:
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


def _summed(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def _strays(found: Found) -> Iterator[str]:
    """Of others, whose processes may not be seen, what the kernel tells everybody."""
    for uid, seen in found.strays.items():
        yield from folded(
            f"{count_of(len(seen), 'socket')} in CLOSE_WAIT of user {user(uid)}, whose processes "
            "may not be looked into",
            "  ",
        )
        peers = Counter(peer_of(each) for each in seen)
        for peer, times in peers.most_common(_MOST_PEERS):
            of_peer = [each for each in seen if peer_of(each) == peer]
            yield from folded(f"  {times:,} x TCP {peer}: {story(of_peer)}", "    ")


def user(uid: int | None) -> str:
    """A user's name, or the number of one that has none here."""
    try:
        import pwd

        return pwd.getpwuid(uid if uid is not None else -1).pw_name
    except (ImportError, KeyError, OverflowError):
        return "unknown" if uid is None else str(uid)


def _unseen(only: Sequence[Glance]) -> list[str]:
    """What could not be seen of these processes, each sentence once."""
    notes = [note for glance in only for note in glance.report.coverage.notes]
    general = [note for note, times in Counter(notes).items() if times == len(only)]
    return folded(f"Cannot see {'; '.join(general)}.", "  ") if general else []


def _rest(found: Found, only: Sequence[Glance]) -> Iterator[str]:
    shown = {glance.report.pid for glance in only}
    rest = [glance for glance in found.glances if glance.report.pid not in shown]
    sockets = sum(glance.report.open_sockets for glance in rest)
    if rest:
        yield from folded(
            f"Nothing wrong with {count_of(sockets, 'socket')} of {_processes(len(rest))}.", "  "
        )


def _refused(found: Found) -> list[str]:
    users = Counter(user(each.uid) for each in found.refused if each.exists)
    if not users:
        return []
    names = ", ".join(sorted(users))
    many = _processes(sum(users.values()))
    return folded(f"Not permitted to look into {many} of {names}{_HOW}.", "  ")


# Even root may be kept from some, in a container for instance.
_HOW = ": run as root to see them" if getattr(os, "geteuid", int)() else ""


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number:,} processes"
