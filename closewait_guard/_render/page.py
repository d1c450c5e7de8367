"""Render reports as a page of HTML that needs nothing else: `page.html` with its gaps filled. Pure.

The words are those of the text, with all calls, holders and threads, and what is not a leak. What
comes from a program is escaped, and the page's policy lets nothing run but its own script.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import chain, groupby
from pkgutil import get_data
from typing import NamedTuple

from closewait_guard._format import (
    Block,
    Fact,
    Layout,
    Style,
    format_duration,
    format_time,
    page_of,
    pluralize,
    summarize_addresses,
)
from closewait_guard._render.descriptors import open_at_end_lines
from closewait_guard._render.family import LastReport, MergedReport, merge_family
from closewait_guard._render.markup import escape_text, join_parts, line_text, link_to, with_code
from closewait_guard._render.site import describe_site, verdict_name
from closewait_guard._render.stacks import StackCall, StackCounts, count_stacks, flame_graph
from closewait_guard._render.text import (
    alert_lines,
    closed_late_lines,
    is_quiet,
    not_covered,
    package_totals,
    program_name,
    totals,
)
from closewait_guard.model import Finding, Frame, Observation, SiteGroup

__all__ = [
    "Part",
    "count_stacks_of",
    "render_page",
]


# No line of a page is folded here.
_WIDTH = 1 << 20
_MAX_PEERS = 20
_MAX_SOCKETS = 100
# Where there are so few, all are unfolded.
_FEW = 3


class Part(NamedTuple):
    """What a page shows of one program.

    Attributes:
        members: The last report of each of its processes.
        title: What distinguishes it from another part of the same program.
        is_complete: Whether they are of all processes that may have leaked.
    """

    members: Sequence[LastReport]
    title: str = ""
    is_complete: bool = True


class _Program(NamedTuple):
    """A part as it is shown."""

    name: str
    merged: MergedReport
    groups: Sequence[SiteGroup]


class _Site(NamedTuple):
    """The findings of one site, and what the page calls them."""

    key: str
    program: _Program
    group: SiteGroup
    block: Block


def render_page(
    parts: Sequence[Part],
    layout: Layout | None = None,
    notes: Sequence[str] = (),
    *,
    interval: float | None = None,
) -> str:
    """Render reports as a page that can be read without any other file.

    Args:
        parts: The programs.
        layout: The directory that paths are relative to.
        notes: Sentences on what is missing of all programs.
        interval: After how many seconds the page asks for what is new; None for a file.
    """
    layout = (layout or Layout())._replace(width=_WIDTH, everything=True, verbose=True)
    programs = [_program(part, layout) for part in parts]
    sites = [*_sites(programs)]
    counts = _count_stacks(programs, layout)
    gaps = {
        "title": escape_text(": ".join(["closewait-guard", *map(_headline, programs[:1])])),
        "interval": "" if interval is None else f"{interval:g}",
        "programs": join_parts(_program_section(each, layout) for each in programs),
        "notes": join_parts(f"<p>{with_code(note)}</p>" for note in notes),
        "flame": _flame(counts, programs),
        "table": _table(sites, programs, layout),
        "findings": join_parts(
            _details(site, layout, is_open=not place or len(sites) <= _FEW)
            for place, site in enumerate(sites)
        ),
        "codes": link_to(page_of(), page_of()),
    }
    return _fill(_template(), gaps | {"connect": "'none'" if interval is None else "'self'"})


def count_stacks_of(parts: Sequence[Part], layout: Layout) -> StackCounts:
    """How many sockets of all programs have each stack."""
    return _count_stacks([_program(part, layout) for part in parts], layout)


def _count_stacks(programs: Sequence[_Program], layout: Layout) -> StackCounts:
    counts: Counter[tuple[StackCall, ...]] = Counter()
    for each in programs:
        name = each.name if len(programs) > 1 else ""
        counts.update(count_stacks(each.merged.report, layout, name))
    return counts


def _program(part: Part, layout: Layout) -> _Program:
    merged = merge_family(part.members, is_complete=part.is_complete)
    name = program_name(merged.report.command, layout) or "a program without a name"
    name = f"{part.title}: {name}" if part.title else name
    return _Program(name, merged, merged.report.by_site())


# Text in a page.


def _template() -> str:
    data = get_data("closewait_guard._render", "page.html")
    assert data is not None  # noqa: S101 - it lies beside this file
    return data.decode()


def _fill(template: str, gaps: dict[str, str]) -> str:
    """Fill the gaps, and allow the script and the styles that the template has, and no others."""
    for name in ("style", "script"):
        content = template.partition(f"<{name}>")[2].partition(f"</{name}>")[0]
        gaps[f"{name}-hash"] = b64encode(sha256(content.encode()).digest()).decode()
    return _GAP.sub(lambda found: gaps[found[1]], template)


_GAP = re.compile(r"\{\{([a-z-]+)\}\}")


# What a program is, and how much it has leaked.


def _headline(program: _Program) -> str:
    return next(iter(totals(program.merged.report, program.groups, program.merged.scope)), "")


def _program_section(program: _Program, layout: Layout) -> str:
    report, scope, notes = program.merged
    first, *others = [*totals(report, program.groups, scope)] or [""]
    name = escape_text(program.name)
    who = escape_text(f"({scope.who}, {format_time(report.taken_at, ' %Z')})")
    kinds = f": {scope.kinds}" if scope.kinds else ""
    sockets = report.open_sockets + (report.coverage.native or 0)
    sentences = [
        *others,
        " ".join(package_totals(program.groups)),
        f"{pluralize(sockets, 'open socket')}.",
        f"File descriptors: {scope.descriptors}{kinds}.",
    ]
    alerts = chain.from_iterable(alert_lines(alert, layout) for alert in report.alerts)
    late = [
        *closed_late_lines(report.closed_late, layout),
        *open_at_end_lines(report.open_at_end, layout),
    ]
    return join_parts(
        [
            f'<section class="program"><h2>{name} <small>{who}</small></h2>',
            f'<p class="totals {_state_of(program)}">{escape_text(first)}</p>',
            f"<p>{' '.join(map(escape_text, filter(None, sentences)))}</p>",
            *(f'<p class="alert {line.style.value}">{line_text(line)}</p>' for line in alerts),
            *(f'<p class="note">{line_text(line)}</p>' for line in late),
            *(f'<p class="note">{escape_text(note)}</p>' for note in notes),
            _not_covered(not_covered(report.coverage), layout),
            "</section>",
        ]
    )


def _state_of(program: _Program) -> str:
    """How the totals are coloured; the words say the same."""
    if program.merged.report.leaks:
        return max((group.severity for group in program.groups), key=lambda each: each.rank).value
    is_known = program.merged.scope.is_complete and not program.merged.report.omitted
    is_quiet_only = all(is_quiet(group.verdict, group.severity) for group in program.groups)
    return "clear" if is_known and is_quiet_only else "warning"


def _not_covered(notes: Sequence[str], layout: Layout) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{with_code(layout.relative(note))}</li>" for note in notes)
    return f'<div class="not-covered"><strong>Not covered:</strong><ul>{items}</ul></div>'


def _flame(counts: StackCounts, programs: Sequence[_Program]) -> str:
    healthy = sum(_healthy_without_stack(each) for each in programs)
    note = f"{pluralize(healthy, 'healthy socket')} not shown: only a full scan describes them."
    return join_parts([flame_graph(counts), f'<p class="note">{note}</p>' if healthy else ""])


def _healthy_without_stack(program: _Program) -> int:
    report = program.merged.report
    if report.observations:
        return 0
    found = [each for each in report.findings if not (each.is_gone or each.observation.owner)]
    return max(0, report.open_sockets - sum(each.count for each in found))


# The sites, as a table and one by one.


def _sites(programs: Sequence[_Program]) -> Iterator[_Site]:
    known: Counter[str] = Counter()
    for place, program in enumerate(programs, 1):
        for group in program.groups:
            key = f"p{place}-{group.fingerprint}"
            known[key] += 1
            # The same for a site whenever the page is rendered again.
            number = f"-{known[key]}" if known[key] > 1 else ""
            where = program.merged.scope.where_of(group)
            block = describe_site(group, where, verbose=True)
            yield _Site(f"{key}{number}", program, group, block)


_COLUMNS = ("count", "verdict", "code", "opened", "package", "peer", "since")
_NUMBERS = frozenset({"count", "since"})


def _table(sites: Sequence[_Site], programs: Sequence[_Program], layout: Layout) -> str:
    columns = [*_COLUMNS]
    if any(fact.key == "process" for site in sites for fact in site.block.facts):
        columns.append("process")
    if len(programs) > 1:
        columns.append("program")
    head = "".join(
        f'<th scope="col" class="{name}"><button type="button">{name}</button></th>'
        for name in columns
    )
    rows = join_parts(_row(site, columns, layout) for site in sites)
    return f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"


def _row(site: _Site, columns: Sequence[str], layout: Layout) -> str:
    group, seen = site.group, [finding.observation for finding in site.group.findings]
    age = max(each.ended_for for each in seen)
    processes = next((fact.text for fact in site.block.facts if fact.key == "process"), "")
    texts = {
        "count": f"{group.count:,}",
        "verdict": verdict_name(group.verdict),
        "code": group.code,
        "opened": _place_of(site, layout),
        "package": group.findings[0].package,
        "peer": summarize_addresses(_peers_of(seen)),
        "since": format_duration(age) if age else "",
        "process": processes,
        "program": site.program.name,
    }
    numbers = {"count": group.count, "since": age}
    cells = "".join(
        f'<td class="{name}" data-number="{numbers[name]:.3f}">{escape_text(texts[name])}</td>'
        if name in _NUMBERS
        else f'<td class="{name}">{_cell(name, texts[name], site)}</td>'
        for name in columns
    )
    return f'<tr class="{group.severity.value}" data-verdict="{group.verdict.value}">{cells}</tr>'


def _cell(name: str, text: str, site: _Site) -> str:
    return (
        f'<a href="#{site.key}">{escape_text(text)}</a>' if name == "opened" else escape_text(text)
    )


def _place_of(site: _Site, layout: Layout) -> str:
    """The line that opened it, or why there is none."""
    if site.group.site is not None:
        return layout.relative(site.group.site.call)
    return next((fact.text for fact in site.block.facts if fact.key in _OPENED), "unknown")


_OPENED = ("opened", "taken")


def _peers_of(seen: Iterable[Observation]) -> list[str]:
    peers = [peer for each in seen if each.owner is not None for peer in each.owner.peers]
    return [*peers, *(each.peer for each in seen if each.peer)]


def _details(site: _Site, layout: Layout, *, is_open: bool) -> str:
    block, group = site.block, site.group
    severity = "" if block.severity is None else block.severity.value
    verdict, _, what = block.title.partition("  ")
    facts = [*block.facts, *_peer_facts(group)]
    return join_parts(
        [
            f'<details class="finding {severity}" id="{site.key}" '
            f'data-verdict="{group.verdict.value}"{" open" if is_open else ""}>',
            f'<summary><span class="count">{block.sockets or group.count:,}</span> '
            f'<span class="verdict">{escape_text(verdict)}</span> <span>{escape_text(what)}</span> '
            f'<span class="place">{escape_text(_place_of(site, layout))}</span> '
            f'<span class="code">{escape_text(" ".join(_marks(block)))}</span></summary>',
            f"<dl>{_facts(facts, layout)}{_code_fact(group.code)}</dl>",
            _calls(group.findings[0].observation.record.blamed.stack, layout),
            _sockets(group.findings),
            "</details>",
        ]
    )


def _marks(block: Block) -> Iterator[str]:
    if block.code:
        yield block.code
    if block.severity is not None:
        yield block.severity.value


def _peer_facts(group: SiteGroup) -> Iterator[Fact]:
    """All peers, where the title has not room for them."""
    peers = _peers_of(finding.observation for finding in group.findings)
    if len(set(peers)) > 1:
        yield Fact("peers", summarize_addresses(peers, _MAX_PEERS))


def _code_fact(code: str) -> str:
    if not code:
        return ""
    return f"<dt>code</dt><dd>{escape_text(code)}: {link_to(page_of(code), page_of(code))}</dd>"


def _facts(facts: Iterable[Fact], layout: Layout) -> str:
    parts = []
    for key, group in groupby(facts, key=lambda fact: fact.key):
        lines = "<br>".join(_fact(fact, layout) for fact in group)
        name = escape_text(key)
        parts.append(f'<dt>{name}</dt><dd class="{name.replace(" ", "-")}">{lines}</dd>')
    return "\n".join(parts)


def _fact(fact: Fact, layout: Layout) -> str:
    before = with_code(layout.relative(fact.text))
    if fact.style is Style.CODE:
        return f'<code class="source">{escape_text(fact.text)}</code>'
    if fact.frame is not None:
        before += f'<span class="place">{escape_text(layout.relative(fact.frame.call))}</span>'
    return f'<span class="note">{before}</span>' if fact.style is Style.NOTE else before


def _calls(stack: Sequence[Frame], layout: Layout) -> str:
    """The whole stack, with the calls of libraries."""
    if not stack:
        return ""
    items = "\n".join(_call(frame, layout) for frame in stack)
    return (
        f'<details class="more"><summary>{pluralize(len(stack), "call")}, the innermost first'
        f"</summary><ol>{items}</ol></details>"
    )


def _call(frame: Frame, layout: Layout) -> str:
    awaited = "awaited from " if frame.is_awaiting else ""
    source = f'<br><code class="source">{escape_text(frame.source)}</code>' if frame.source else ""
    call = escape_text(layout.relative(frame.call))
    return f'<li class="{frame.kind.value}">{awaited}<span class="place">{call}</span>{source}</li>'


_SOCKET_COLUMNS = ("process", "fd", "state", "local", "peer", "since", "unread")


def _sockets(findings: Sequence[Finding]) -> str:
    """One line for each socket that has a descriptor."""
    shown = [finding.observation for finding in findings if finding.observation.fd >= 0]
    if not shown:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in _SOCKET_COLUMNS)
    rows = "\n".join(map(_socket, shown[:_MAX_SOCKETS]))
    more = len(shown) - _MAX_SOCKETS
    note = f'<p class="note">(and {more:,} more)</p>' if more > 0 else ""
    return (
        f'<details class="more"><summary>{pluralize(len(shown), "socket")}</summary>'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f"</div>{note}</details>"
    )


def _socket(seen: Observation) -> str:
    since = format_duration(seen.ended_for, at_least=seen.is_lower_bound) if seen.ended_for else ""
    cells = (
        str(seen.record.pid),
        str(seen.fd),
        seen.state.value,
        seen.local or "",
        seen.peer or "",
        since,
        "" if seen.unread is None else f"{seen.unread:,}",
    )
    return f"<tr>{''.join(f'<td>{escape_text(cell)}</td>' for cell in cells)}</tr>"
