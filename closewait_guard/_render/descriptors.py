"""The descriptors of a process in words: how many of how many, and what they are. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from closewait_guard._enums import is_about_descriptors
from closewait_guard._format import (
    Layout,
    Style,
    StyledLine,
    escape_line,
    format_duration,
    pluralize,
)
from closewait_guard.model import (
    DescriptorKind,
    Descriptors,
    OpenAtEnd,
    Report,
    SocketOwner,
    State,
)

__all__ = [
    "SHARE_WORTH_A_SENTENCE",
    "descriptor_kinds",
    "fd_numbers",
    "has_descriptor_alert",
    "is_fd_share_news",
    "list_descriptors_of",
    "list_kinds",
    "open_at_end_lines",
]


# Of the descriptors: what is less is nothing to worry about.
SHARE_WORTH_A_SENTENCE = 0.01
_MAX_OPEN_PLACES = 4


def fd_numbers(report: Report) -> str:
    """How many descriptors are in use, of how many."""
    used, limit = report.fd_used, report.fd_limit
    if used is None:
        return "unknown"
    if not limit:
        return f"{used:,}"
    share = f" ({used / limit:.0%})" if is_fd_share_news(report) else ""
    return f"{used:,} of {limit:,}{share}"


def has_descriptor_alert(report: Report) -> bool:
    """Whether an alert is about descriptors of any kind."""
    return any(is_about_descriptors(alert.kind, alert.data) for alert in report.alerts)


def descriptor_kinds(report: Report) -> str:
    """What the descriptors are: `612 sockets (560 CLOSE_WAIT), 42 files (38 x /log/app.log)`."""
    waiting = sum(
        finding.count
        for finding in report.findings
        if finding.observation.state is State.CLOSE_WAIT and not finding.is_gone
    )
    return list_kinds(report.descriptors, waiting) if report.descriptors else ""


def list_kinds(found: Descriptors, waiting: int = 0) -> str:
    """The same of any descriptors, with so many sockets among them in CLOSE_WAIT."""
    details = {
        kind: _names(names, found.by_kind.get(kind, 0)) for kind, names in found.names.items()
    }
    details |= {kind: ", ".join(map(escape_line, owners)) for kind, owners in found.owners.items()}
    if waiting:
        details[DescriptorKind.SOCKET] = f"{waiting:,} CLOSE_WAIT"
    parts = [
        _counted(kind, number) + (f" ({details[kind]})" if details.get(kind) else "")
        for kind, number in found.by_kind.items()
    ]
    age = f" ({format_duration(found.counted_for)} ago)" if found.counted_for else ""
    return ", ".join(parts) + age


def list_descriptors_of(owners: Sequence[SocketOwner], count: int) -> str:
    """What some owners have open: `2 pipes each`, or of unlike ones all together."""
    each_has = [Counter({"socket": owner.sockets, **owner.descriptors}) for owner in owners]
    are_alike = count > 1 and all(found == each_has[0] for found in each_has)
    total = each_has[0] if are_alike else sum(each_has, Counter[str]())
    listed = " and ".join(_counted(kind, number) for kind, number in total.items() if number)
    return f"{listed} each" if listed and are_alike else listed


def open_at_end_lines(found: Sequence[OpenAtEnd], layout: Layout) -> list[StyledLine]:
    """What only the end of the process closes: a line, or one for each place below it."""
    if not found:
        return []
    shown = found if len(found) <= _MAX_OPEN_PLACES else found[: _MAX_OPEN_PLACES - 1]
    listed, total = [_opened_at(each) for each in shown], sum(each.count for each in found)
    if others := sum(each.count for each in found[len(shown) :]):
        listed.append(f"{others:,} others")
    verdict = "not a leak" if total == 1 else "not leaks"
    closed = f"closed only by the end of the program ({verdict})"
    texts = [f"Open at the end, {closed}:", *(f"  {each}" for each in listed)]
    if len(listed) == 1:
        texts = [f"Open at the end: {listed[0]}, {closed}."]
    return [StyledLine(line, Style.NOTE) for text in texts for line in layout.wrap(text, "    ")]


def _opened_at(found: OpenAtEnd) -> str:
    name, number = escape_line(found.name), found.count
    # A phrase has a plural, a class has not.
    what = pluralize(number, name) if " " in name else f"{number:,} {name}"
    where = f" opened at {escape_line(found.place)}" if found.place else ""
    return f"{what}{where}" + (f", in {found.processes:,} processes" if found.processes > 1 else "")


# Of the others, an "s" more.
_PLURALS = {kind: kind for kind in ("epoll", "inotify", "io_uring", "other")}
_PLURALS["directory"] = "directories"


def _counted(kind: str, number: int) -> str:
    kind = escape_line(kind)
    return f"{number:,} {kind if number == 1 else _PLURALS.get(kind, f'{kind}s')}"


def _names(counts: Mapping[str, int], total: int) -> str:
    return ", ".join(
        escape_line(name) if times in (1, total) else f"{times:,} x {escape_line(name)}"
        for name, times in counts.items()
    )


def is_fd_share_news(report: Report) -> bool:
    """Whether it is a percent of the descriptors or more, or nothing is known of that."""
    used, limit = report.fd_used, report.fd_limit
    return used is None or not limit or used / limit >= SHARE_WORTH_A_SENTENCE
