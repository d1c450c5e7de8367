"""Scans of other processes as text, by program and peer.

What could not be looked into is said at the end.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter

from closewait_guard._format import (
    Block,
    Fact,
    Layout,
    Style,
    block_lines,
    escape_line,
    pluralize,
    truncate,
    unique,
)
from closewait_guard._processes.model import ProcessReport, ProcessScan
from closewait_guard._render import (
    SHARE_WORTH_A_SENTENCE,
    alert_lines,
    codes_lines,
    connection_summary,
    descriptor_kinds,
    fd_numbers,
    group_by_peer,
    has_descriptor_alert,
    holder_facts,
    is_quiet,
    peer_phrase,
    socket_kind,
    verdict_name,
)
from closewait_guard.model import Finding, Observation, Severity, State, Verdict

__all__ = [
    "healthy_lines",
    "how_to_be_permitted",
    "join_paragraphs",
    "render_inaccessible",
    "render_processes",
    "sentences_on_others",
    "user",
]


_MAX_NUMBERS = 10
_MAX_PEERS = 12
_MAX_PROCESSES = 8


def _split(group: Sequence[Finding]) -> Iterator[Sequence[Finding]]:
    """What has bytes that were never read apart from what has not: only the first is stuck."""
    for has_unread in (True, False):
        if part := [each for each in group if bool(each.observation.unread) is has_unread]:
            yield part


def _weight(group: Sequence[Finding]) -> tuple[int, int, int]:
    return (group[0].verdict.rank, -_severity(group).rank, -len(group))


def _severity(group: Sequence[Finding]) -> Severity:
    return max({leak.severity for leak in group}, key=attrgetter("rank"))


def _group_lines(group: Sequence[Finding], layout: Layout, *, several: bool) -> Iterator[str]:
    """The lines of one group.

    Args:
        group: Findings with one verdict and peer.
        layout: The width.
        several: They may be of several processes.
    """
    seen = [leak.observation for leak in group]
    first = group[0]
    title = f"{verdict_name(first.verdict).upper()}  {socket_kind(seen[0])} {peer_phrase(seen[0])}"
    parent = seen[0].record.parent
    facts = [
        *([Fact("opened", f"inherited over fork() from process {parent.pid}")] if parent else ()),
        *([Fact("fix", first.hint)] if first.hint else ()),
        *holder_facts(group),
    ]
    summary = connection_summary(seen)
    if all(each.state is State.CLOSE_WAIT and each.unread == 0 for each in seen):
        summary += ", nothing unread"
    if summary:
        facts.append(Fact("state", summary))
    if several:
        facts.append(_processes(unique(str(each.record.pid) for each in seen)))
    elif len(seen) <= _MAX_NUMBERS:
        facts.append(Fact("fds", ", ".join(str(each.fd) for each in seen), Style.NOTE))
    block = Block(
        len(group),
        title.rstrip(),
        first.code,
        _severity(group),
        tuple(facts),
        is_leak=first.is_leak,
    )
    yield from (line.text for line in block_lines(block, layout))


def _processes(pids: Sequence[str]) -> Fact:
    more = len(pids) - _MAX_NUMBERS
    text = ", ".join(pids[:_MAX_NUMBERS]) + (f" and {more:,} more" if more > 0 else "")
    return Fact("process", text, Style.NOTE)


def healthy_lines(seen: Sequence[Observation]) -> Iterator[str]:
    """One line for each state and peer."""
    if not seen:
        return
    lines = Counter((each.state, socket_kind(each), peer_phrase(each)) for each in seen)
    yield ""
    ordered = sorted(lines.items(), key=lambda item: (item[0][0], -item[1]))
    for (state, kind, peer), times in ordered:
        name = state if state in _TCP else "-"
        yield truncate(f"  {name:<12}{times:>7,} x {kind} {peer}".rstrip())


_TCP = frozenset(State) - {State.UNIX, State.NONE}


def join_paragraphs(blocks: Iterable[str]) -> Iterator[str]:
    """Those with anything in them, a blank line between two."""
    for place, block in enumerate(filter(None, blocks)):
        yield f"\n{block}" if place else block


def render_inaccessible(found: ProcessScan, layout: Layout | None = None) -> str:
    """What may not be seen; of its sockets, what the kernel shows to everyone."""
    layout = layout or Layout()
    parts = [part(found, layout) for part in (_unowned, _not_permitted, _failed, _hidden)]
    return "\n".join(join_paragraphs("\n".join(lines) for lines in parts))


def _unowned(found: ProcessScan, layout: Layout) -> Iterator[str]:
    """Of others, whose processes may not be seen, what the kernel shows to everyone."""
    for uid, seen in found.unowned.items():
        yield from layout.wrap(
            f"{pluralize(len(seen), 'socket')} in CLOSE_WAIT of user {user(uid)}, whose processes "
            "may not be looked into",
            "  ",
        )
        peers = Counter(peer_phrase(each) for each in seen)
        for peer, times in peers.most_common(_MAX_PEERS):
            of_peer = [each for each in seen if peer_phrase(each) == peer]
            summary = f"  {times:,} x TCP {peer}: {connection_summary(of_peer)}"
            yield from layout.wrap(summary, "    ")


def user(uid: int | None) -> str:
    """A user's name, or the number of one that has none here."""
    try:
        import pwd

        return pwd.getpwuid(uid if uid is not None else -1).pw_name
    except (ImportError, KeyError, OverflowError):
        return "unknown" if uid is None else str(uid)


def _not_permitted(found: ProcessScan, layout: Layout) -> list[str]:
    users = Counter(user(each.uid) for each in found.inaccessible if each.exists and not each.why)
    if not users:
        return []
    names = ", ".join(sorted(users))
    many = pluralize(sum(users.values()), "process")
    return layout.wrap(
        f"Not permitted to look into {many} of {names}: {how_to_be_permitted(_SEE_THEM)}.", "  "
    )


def _failed(found: ProcessScan, layout: Layout) -> Iterator[str]:
    """Those that something else than a lack of rights keeps from being looked into."""
    reasons = Counter(each.why for each in found.inaccessible if each.exists and each.why)
    for why, times in reasons.items():
        yield from layout.wrap(f"Not looked into: {pluralize(times, 'process')} that {why}.", "  ")


def _hidden(found: ProcessScan, layout: Layout) -> list[str]:
    if not found.hides_processes:
        return []
    return layout.wrap(
        "Processes of other users are hidden here: /proc is mounted with hidepid: "
        f"{how_to_be_permitted(_SEE_THEM)}.",
        "  ",
    )


def how_to_be_permitted(of_user: str = "run as root, or as that user") -> str:
    """What to do; even root may lack the right, in a container for instance.

    Args:
        of_user: What to say to a user who is not root.
    """
    if getattr(os, "geteuid", int)():
        return of_user
    return (
        "root needs CAP_SYS_PTRACE here (docker run --cap-add SYS_PTRACE, docker exec "
        "--privileged, kubectl debug --profile=sysadmin)"
    )


_SEE_THEM = "run as root to see them"


def render_processes(
    found: ProcessScan, *, only: Sequence[ProcessReport], layout: Layout | None = None
) -> str:
    """Everything that is to be printed, of some of the processes that were found."""
    layout = layout or Layout()
    programs = sorted(_by_program(found, only), key=_severity_and_count, reverse=True)
    blocks = [
        "\n".join(_program(processes, layout, _starter(found, processes))) for processes in programs
    ]
    codes = [finding.code for process in only for finding in process.report.findings]
    notes = [*_unseen(only, layout), *(line.text for line in codes_lines(codes))]
    blocks += ["\n".join(lines) for lines in (notes, _rest(found, only, layout))]
    blocks.append(render_inaccessible(found, layout))
    return "".join(f"{block}\n" for block in join_paragraphs(blocks))


# The parent of what has lost its own: what it has started need not be of one program.
_INIT = 1


def _by_program(
    found: ProcessScan, only: Sequence[ProcessReport]
) -> Iterator[Sequence[ProcessReport]]:
    """Processes that have one name, and one parent or each other as parent, are of one program."""
    known = {process.report.pid: process for process in found.processes}
    programs: dict[tuple[str, int, int], list[ProcessReport]] = {}
    for process in sorted(only, key=lambda process: (process.report.command, process.report.pid)):
        first = _oldest(process, known)
        parent = known.get(first.parent)
        is_alone = first.parent <= _INIT and not (parent and parent.report.python)
        name = first.report.command, first.parent, first.report.pid if is_alone else 0
        programs.setdefault(name, []).append(process)
    yield from programs.values()


def _oldest(process: ProcessReport, known: Mapping[int, ProcessReport]) -> ProcessReport:
    """The first of its ancestors that has the same name."""
    for _ in known:
        parent = known.get(process.parent)
        if parent is None or parent.report.command != process.report.command:
            break
        process = parent
    return process


def _severity_and_count(processes: Sequence[ProcessReport]) -> tuple[int, int]:
    leaks = [leak for process in processes for leak in process.report.leaks]
    severities = {leak.severity for leak in leaks}
    return max((severity.rank for severity in severities), default=-1), len(leaks)


def _starter(found: ProcessScan, processes: Sequence[ProcessReport]) -> str:
    """What has started a program that has no name of its own, as a worker of uvicorn has none."""
    if not processes[0].report.command.endswith(" -c"):
        return ""
    known = {process.report.pid: process for process in found.processes}
    parent = known.get(_oldest(processes[0], known).parent)
    if parent is None or not parent.report.command:
        return ""
    return f", started by {escape_line(parent.report.command)} (pid {parent.report.pid})"


def _program(
    processes: Sequence[ProcessReport], layout: Layout, starter: str = ""
) -> Iterator[str]:
    reports = [process.report for process in processes]
    name = escape_line(reports[0].command) or "a process without a name"
    pids = ", ".join(str(report.pid) for report in reports[:_MAX_PROCESSES])
    more = len(reports) - _MAX_PROCESSES
    many = "pid" if len(reports) == 1 else f"{len(reports)} processes:"
    which = f"({many} {pids}" + (f" and {more} more)" if more > 0 else ")")
    yield from layout.wrap(f"{name}  {which}{starter}", "  ")
    yield from _fd_numbers(processes, layout)
    for alert in (alert for report in reports for alert in report.alerts):
        yield from (line.text for line in alert_lines(alert, layout))
    by_peer = group_by_peer(
        finding
        for report in reports
        for finding in report.findings
        if layout.everything or not is_quiet(finding.verdict, finding.severity)
    )
    groups = sorted((part for group in by_peer.values() for part in _split(group)), key=_weight)
    for group in groups[:_MAX_PEERS]:
        yield ""
        yield from _group_lines(group, layout, several=len(reports) > 1)
    if len(groups) > _MAX_PEERS:
        rest = [leak for group in groups[_MAX_PEERS:] for leak in group]
        yield ""
        yield f"and {len(rest):,} more with {len(groups) - _MAX_PEERS:,} other peers"
    yield from healthy_lines([seen for report in reports for seen in report.observations])
    for address, times in _merge(process.backlog for process in processes).items():
        yield from layout.wrap(_waiting(address, times), "  ")
    for address, times in _merge(process.uncertain_backlog for process in processes).items():
        yield from layout.wrap(
            f"{_waiting(address, times)}; another process listens at this address, too, and the "
            "kernel does not say which of them has them",
            "  ",
        )


def _waiting(address: str, times: int) -> str:
    return (
        f"{pluralize(times, 'connection')} in CLOSE_WAIT in the backlog of {address}: the peer "
        "closed before accept() was called"
    )


def _merge(backlogs: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Of a listener that several processes share, once."""
    found: dict[str, int] = {}
    for backlog in backlogs:
        found |= backlog
    return found


def _fd_numbers(processes: Sequence[ProcessReport], layout: Layout) -> Iterator[str]:
    """Sockets by state for all of them, descriptors for each of those that have most."""
    states = _add_up(process.states for process in processes)
    verdicts = Counter(leak.verdict for process in processes for leak in process.report.findings)
    found = [
        f"{verdicts[verdict]:,} {verdict_name(verdict)}" for verdict in Verdict if verdicts[verdict]
    ]
    total = pluralize(sum(states.values()), "open socket")
    is_certain = not any(verdict.is_leak or verdict is _UNDECIDED for verdict in verdicts)
    if is_certain and not any(process.narrowed for process in processes):
        found = ["no leaks", *found]
    of_all = f"{', '.join(found)} of {total}" if found else total
    is_empty = found == ["no leaks"] and not states.total()
    numbers = "no open sockets" if is_empty else f"{of_all}: {_format_states(states)}"
    yield from layout.wrap(numbers, "  ")
    shares = sorted(processes, key=_share, reverse=True)
    for process in shares[:_MAX_PROCESSES]:
        which = f" of process {process.report.pid}" if len(processes) > 1 else ""
        waiting = process.states.get(State.CLOSE_WAIT, 0)
        limit = process.report.fd_limit
        is_news = limit and waiting / limit >= SHARE_WORTH_A_SENTENCE
        share = f", CLOSE_WAIT: {waiting:,} ({waiting / limit:.0%})" if limit and is_news else ""
        report = process.report
        is_asked = layout.everything or has_descriptor_alert(report)
        kinds = descriptor_kinds(report) if is_asked else ""
        text = f"File descriptors{which}: {fd_numbers(report)}{share}{kinds and f': {kinds}'}"
        yield from layout.wrap(text, "  ")


_UNDECIDED = Verdict.IDLE_OR_LEAKED


def _share(process: ProcessReport) -> tuple[float, int]:
    used, limit = process.report.fd_used or 0, process.report.fd_limit
    return (used / limit if limit else 0.0, len(process.report.leaks))


def _format_states(states: Mapping[str, int]) -> str:
    """`ESTABLISHED 10, CLOSE_WAIT 3`, the most frequent first."""
    most = sorted(states.items(), key=lambda item: -item[1])
    return ", ".join(f"{state} {times:,}" for state, times in most) or "none"


def _add_up(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def _unseen(only: Sequence[ProcessReport], layout: Layout) -> list[str]:
    """What could not be seen of these processes, each sentence once."""
    notes = [note for process in only for note in process.report.coverage.notes]
    general = [note for note, times in Counter(notes).items() if times == len(only)]
    return layout.wrap(f"Not covered: {'; '.join(general)}.", "  ") if general else []


def sentences_on_others(found: ProcessScan, *, only: Sequence[ProcessReport]) -> list[str]:
    """What is said of all but some of the processes, and of those that may not be seen."""
    layout = Layout(_UNFOLDED)
    return [
        *_rest(found, only, layout),
        *filter(None, render_inaccessible(found, layout).splitlines()),
    ]


# As wide as any paragraph.
_UNFOLDED = 1 << 20


def _rest(found: ProcessScan, only: Sequence[ProcessReport], layout: Layout) -> Iterator[str]:
    shown = {process.report.pid for process in only}
    rest = [process for process in found.processes if process.report.pid not in shown]
    sockets = sum(process.report.open_sockets for process in rest)
    if sockets or not only:
        processes = pluralize(len(rest), "process")
        other = processes.replace(" ", " other ", 1) if only else processes
        yield from layout.wrap(f"No leaks in {other} ({pluralize(sockets, 'socket')}).", "  ")
