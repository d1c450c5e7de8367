"""Describe the findings of one site: what happened, where it was opened, what to change. Pure.

Every output takes its words from here; `block_lines` lays them out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from closewait_guard._format import (
    Block,
    Fact,
    Style,
    first_few,
    format_duration_range,
    pluralize,
    summarize_addresses,
    unique,
)
from closewait_guard._render.connection import connection_summary
from closewait_guard._render.descriptors import list_descriptors_of
from closewait_guard.model import (
    Finding,
    Frame,
    FrameKind,
    Observation,
    Origin,
    SiteGroup,
    SocketRecord,
    Verdict,
)

__all__ = [
    "codes_of",
    "describe_site",
    "holder_facts",
    "places_of",
    "socket_kind",
    "verdict_name",
    "why_unknown",
]


_MAX_CALLERS = 3
_MAX_HOLDERS = 4
_MAIN_THREAD = "MainThread"


def describe_site(
    group: SiteGroup, where: str = "", library_line: str = "", *, verbose: bool = False
) -> Block:
    """The facts of one site, in the order what, opened, fix, held by, state.

    Args:
        group: The findings of the site.
        where: In which processes they are, in a report of several.
        library_line: Where a library has opened them, if that is to be shown.
        verbose: All calls, holders and threads.
    """
    observations = [finding.observation for finding in group.findings]
    depth = len(observations[0].record.blamed.stack) if verbose else _MAX_CALLERS
    facts = [
        *_as_taken(
            observations[0],
            [*_opened_facts(observations, depth), *_package_facts(group, library_line)],
        ),
        *_fix_facts(group),
        *holder_facts(group.findings, 100 if verbose else _MAX_HOLDERS),
        *_state_facts(group, observations),
        *([Fact("process", where)] if where else ()),
        *_context_facts([seen.record for seen in observations], verbose=verbose),
    ]
    title = _describe_sockets(group, observations)
    is_leak = group.verdict.is_leak
    codes = ", ".join(codes_of(group))
    return Block(group.count, title, codes, group.severity, tuple(facts), is_leak)


# Where it was opened.


def _opened_facts(observations: Sequence[Observation], most: int) -> Iterator[Fact]:
    record = observations[0].record
    site, blamed = record.site, record.blamed
    if site is None:
        if unknown := why_unknown(record):
            yield Fact("opened", unknown)
        elif blamed.stack:
            yield Fact("opened", f"{_in_thread(blamed)}with {_NO_OWN_LINE}", Style.PLACE)
            yield Fact("opened", "at ", Style.NOTE, _begun_by(blamed.stack))
    else:
        listener = "" if blamed is record.opener else "listener at "
        if blamed.origin is Origin.ADOPTED:
            listener = "elsewhere; taken over at "
        if site.is_awaiting:
            yield Fact("opened", f"{listener}in a task, awaited from ", Style.PLACE, site)
        elif blamed.task is not None and site.kind is not FrameKind.USER:
            library = site.module.partition(".")[0]
            text = f"{listener}in a background task of {library}; {_NO_OWN_LINE}"
            yield Fact("opened", text, Style.PLACE)
            yield Fact("opened", "at ", Style.NOTE, site)
        elif site.kind is not FrameKind.USER and (thread := _in_thread(blamed)):
            # As by `asyncio.to_thread(requests.get, url)`.
            yield Fact("opened", f"{listener}{thread}with {_NO_OWN_LINE}", Style.PLACE)
            yield Fact("opened", "at ", Style.NOTE, site)
        else:
            yield Fact("opened", listener, Style.PLACE, site)
        if site.source:
            yield Fact("opened", site.source, Style.CODE)
        outer = blamed.stack[blamed.stack.index(site) + 1 :]
        yield from _caller_facts(_up_to_own_code(outer), most)
    if origin := _describe_origin(observations):
        yield Fact("opened", origin)


def _in_thread(record: SocketRecord) -> str:
    return "in a thread " if record.stack[-1].module == "threading" else ""


_NO_OWN_LINE = "no line of your code on the stack"
# What runs the calls that a thread is given.
_RUNNERS = ("threading", "concurrent.futures.thread", "multiprocessing.pool", "_thread", "runpy")


def _begun_by(stack: Sequence[Frame]) -> Frame:
    """The outermost call, which a thread was given."""
    calls = [frame for frame in stack if frame.module not in _RUNNERS]
    return (calls or stack)[-1]


def _as_taken(seen: Observation, facts: Iterable[Fact]) -> Iterator[Fact]:
    """Where it was opened, of one that the program has taken from a pool: where it did that."""
    for fact in facts:
        yield fact if seen.checkout is None else fact._replace(key="taken")


def _package_facts(group: SiteGroup, line: str) -> Iterator[Fact]:
    """Which library has opened it, unless the line above is of that library and says so."""
    first = group.findings[0]
    package, site = first.package, group.site
    if not package or package == first.caller or site is None:
        return
    module = site.module.partition(".")[0].lower()
    is_said = site.kind is not FrameKind.USER and package.lower().startswith(module)
    if first.via or not is_said:
        via = f" via {first.via}" if first.via else ""
        yield Fact("opened", f"by {package}{via}{f' ({line})' if line else ''}")


def _up_to_own_code(stack: Sequence[Frame]) -> Sequence[Frame]:
    """Without the calls of libraries by which the program was started."""
    own = [place for place, frame in enumerate(stack) if frame.kind is FrameKind.USER]
    return stack[: own[-1] + 1] if own else ()


def why_unknown(record: SocketRecord) -> str:
    """Why there is no line to show."""
    if record.origin is Origin.ADOPTED and not record.stack:
        return "before install(): no stack was recorded"
    if record.origin is Origin.NATIVE and not record.stack and record.parent is None:
        return "by a C extension, or received as a file descriptor: there is no Python stack"
    if record.opened_at is not None and not record.blamed.stack:
        return "at an unknown place: no stack is recorded with stack_depth=0"
    return ""


def _caller_facts(outer: Sequence[Frame], most: int) -> Iterator[Fact]:
    """The calls outside the site; those of libraries are folded where they are."""
    shown = 0
    for is_user, frames in groupby(outer, key=lambda frame: frame.kind is FrameKind.USER):
        run = list(frames)
        if not is_user:
            yield Fact("opened", f"({pluralize(len(run), 'library call')})", Style.NOTE)
            continue
        for frame in run[: most - shown]:
            yield Fact("opened", "from ", Style.TEXT, frame)
        shown += len(run)
        if shown > most:
            yield Fact("opened", f"({pluralize(shown - most, 'more call')})", Style.NOTE)
            return


def _describe_origin(observations: Sequence[Observation]) -> str:
    """How the descriptor came to be, unless it was simply created."""
    record = observations[0].record
    parent = record.parent.site if record.parent is not None else None
    where = f" at {parent.place}" if parent is not None else ""
    match record.opener.origin, record.origin:
        case Origin.ACCEPTED, _:
            if record.blamed is not record.opener:
                return f"accepted by library code{_describe_maker(record.blamed)}"
            return f"accepted by the listener opened{where}" if where else ""
        case _, Origin.CHECKED_OUT:
            return f"opened by the pool{where}" if where and parent != record.site else ""
        case _, Origin.DUPLICATED:
            return f"duplicated from the socket opened{where}" if where else ""
        case _, Origin.DETACHED:
            taken = _describe_taking(record)
            return f"its socket object gave the descriptor away by detach(){taken}"
        case _, Origin.WRAPPED if not observations[0].tls and (taken := _describe_taking(record)):
            return f"handed over by its number{taken}"
        case _, Origin.INHERITED:
            return (
                f"inherited over fork() from process {record.parent.pid}" if record.parent else ""
            )
        case _, Origin.NATIVE if not record.stack and where:
            return f"a copy, as a mere number, of the socket opened{where}"
        case _, Origin.ADOPTED if record.stack:
            return f"{_describe_coming(record)}: where it was opened is unknown"
    return ""


def _describe_coming(record: SocketRecord) -> str:
    """How a descriptor came from outside."""
    is_received = any(frame.module == "multiprocessing.reduction" for frame in record.stack)
    return "received by multiprocessing" if is_received else "it came as a number"


def _describe_maker(listener: SocketRecord) -> str:
    """Where the socket was opened that a listener is a duplicate of."""
    made = listener.parent.site if listener.parent is not None else None
    if listener.origin is not Origin.DUPLICATED or made is None:
        return ""
    return f", by a duplicate of the listener opened at {made.place}"


def _describe_taking(record: SocketRecord) -> str:
    """Where another object has taken the descriptor over, unless it is still a mere number."""
    taken = replace(record, parent=None).site
    return f"; taken over at {taken.place}" if taken is not None and taken != record.site else ""


# What to change.


def codes_of(group: SiteGroup) -> list[str]:
    """The code of each of its causes; most often there is one."""
    return unique(cause.code for cause in _causes(group)) or [group.code]


def _fix_facts(group: SiteGroup) -> Iterator[Fact]:
    """One fix; of sockets that only an unknown place has brought together, one for each cause."""
    fixes: Counter[str] = Counter()
    for cause in _causes(group):
        fixes[cause.hint] += cause.count
    if len(fixes) < _FEWEST_CAUSES:
        yield from [Fact("fix", group.hint, Style.FIX)] if group.hint else ()
        return
    for hint, count in fixes.most_common(_MAX_HOLDERS):
        yield Fact("fix", f"{hint} ({count:,} of the {group.count:,} sockets)", Style.FIX)


_FEWEST_CAUSES = 2


def _causes(group: SiteGroup) -> list[Finding]:
    """The findings that say what is to be changed, each for its own sockets."""
    if group.site is not None:
        return []
    return [finding for finding in group.findings if finding.holders and finding.hint]


# What holds it.


def holder_facts(findings: Sequence[Finding], most: int = _MAX_HOLDERS) -> Iterator[Fact]:
    """The holders; those that differ only by an index or a key share a line.

    The search may not have come to all sockets: then it is said for how many of them it has.
    """
    alike: dict[str, dict[str, None]] = {}
    held: Counter[str] = Counter()
    known = [finding.holders for finding in findings if finding.holders]
    for holders in known:
        for holder in holders:
            alike.setdefault(_without_keys(holder), {})[holder] = None
        held.update(set(map(_without_keys, holders)))
    total = len(findings)
    for key, (first, *others) in list(alike.items())[:most]:
        more = f", and {len(others):,} more like it" if others else ""
        of = f" ({held[key]:,} of the {total:,} sockets)" if held[key] < total else ""
        yield Fact("held by", f"{first}{more}{of}")
    if len(alike) > most:
        yield Fact("held by", f"(and {len(alike) - most:,} more)", Style.NOTE)
    unknown = total - len(known)
    if alike and unknown:
        text = f"(not known of {unknown:,}: not found, or no time to search)"
        yield Fact("held by", text, Style.NOTE)


def _without_keys(holder: str) -> str:
    """Leave out indexes and keys, in linear time whatever brackets there are.

    Example:
        >>> _without_keys("app.pool['a'].free[12]"), _without_keys("odd [[ text")
        ('app.pool[].free[]', 'odd [[ text')
    """
    *closed, rest = holder.split("]")
    return "]".join([*(_up_to_bracket(part) for part in closed), rest])


def _up_to_bracket(part: str) -> str:
    before, bracket, _ = part.partition("[")
    return before + bracket


# What state it is in.


def _state_facts(group: SiteGroup, observations: Sequence[Observation]) -> Iterator[Fact]:
    yield from _pool_facts(observations)
    if summary := connection_summary(observations):
        yield Fact("state", summary)
    newer = sum(finding.replaced_by is not None for finding in group.findings)
    if newer:
        some = f"{newer:,} of {len(group.findings):,} " if newer < len(group.findings) else ""
        yield Fact("state", f"{some}replaced by a newer connection from the same line")
    closed = sum(finding.count for finding in group.findings if finding.closed_at_exit)
    if closed:
        some = f"{closed:,} of them " if closed < group.count else ""
        what = "closed only when the program ended, by a finalizer or with the event loop"
        yield Fact("state", f"{some}{what}")
    if group.count > len(observations):
        shown = f"the facts are those of {len(observations):,} of them"
        yield Fact("state", f"({shown}; the others are only counted here)", Style.NOTE)


def _pool_facts(observations: Sequence[Observation]) -> Iterator[Fact]:
    """How many of the connections of a pool are out, and since when these are."""
    checkouts = [seen.checkout for seen in observations if seen.checkout is not None]
    ages = [each.seconds for each in checkouts]
    for pool in unique(each.pool for each in checkouts):
        of_name = [each for each in checkouts if each.pool == pool]
        newest = min(of_name, key=lambda each: each.seconds)
        name = f"{pool}, one of several" if len(of_name) > newest.out else pool
        of = "" if newest.max_size is None else f" of {newest.max_size:,}"
        yield Fact("pool", f"{name}: {newest.out:,}{of} checked out")
    if ages:
        since = format_duration_range(min(ages), max(ages))
        yield Fact("state", f"checked out {since} ago, and not given back")


# What it is.


def verdict_name(verdict: Verdict) -> str:
    """A verdict in words."""
    return "still open" if verdict is Verdict.OPEN else verdict.replace("_", " ")


def _describe_sockets(group: SiteGroup, observations: Sequence[Observation]) -> str:
    """Verdict, kind of socket and peers."""
    first = observations[0]
    if first.checkout is not None and first.fd < 0:
        return f"{verdict_name(group.verdict).upper()}  {first.checkout.pool}"
    if first.owner is not None:
        return f"{verdict_name(group.verdict).upper()}  {_describe_owners(group, observations)}"
    kinds = unique(socket_kind(observation) for observation in observations)
    what = f"{verdict_name(group.verdict).upper()}  {', '.join(kinds)}"
    peers = [observation.peer for observation in observations if observation.peer]
    if peers:
        preposition = "from" if first.record.opener.origin is Origin.ACCEPTED else "to"
        return f"{what} {preposition} {_list_addresses(peers)}"
    local = [
        observation.local
        for observation in observations
        if observation.local and not observation.local.endswith(":0")
    ]
    return f"{what} at {_list_addresses(local)}" if local else what


def _describe_owners(group: SiteGroup, observations: Sequence[Observation]) -> str:
    """What was not closed, what it had, and to whom."""
    owners = [seen.owner for seen in observations if seen.owner is not None]
    held, peers = list_descriptors_of(owners, group.count), [p for o in owners for p in o.peers]
    what = owners[0].name + (f" with {held}" if held else "")
    return f"{what} to {_list_addresses(peers)}" if peers else what


def _list_addresses(addresses: Sequence[str]) -> str:
    """With their counts, unless there is one address only."""
    return addresses[0] if len(set(addresses)) == 1 else summarize_addresses(addresses)


def socket_kind(observation: Observation) -> str:
    """The kind of socket in everyday words: TCP, UDP, UNIX, TLS over TCP."""
    if observation.family in ("AF_INET", "AF_INET6"):
        protocol = {"SOCK_STREAM": "TCP", "SOCK_DGRAM": "UDP"}.get(observation.type)
        name = protocol or observation.type.removeprefix("SOCK_")
    elif observation.family == "AF_UNIX":
        kind = observation.type.removeprefix("SOCK_").lower()
        name = "UNIX" if kind == "stream" else f"UNIX {kind}"
    else:
        name = f"{observation.family.removeprefix('AF_')} {observation.type}"
    return f"TLS over {name}" if observation.tls else name


# In what it was opened.


def _context_facts(records: Iterable[SocketRecord], *, verbose: bool) -> Iterator[Fact]:
    """Threads other than the main one, tasks, labels and context, each value once."""
    openers = [record.opener for record in records]
    threads = unique(record.thread for record in openers if record.thread)
    if threads == [_MAIN_THREAD] and not verbose:
        threads = []
    values_by_name = {
        "thread": threads,
        "task": unique(record.task for record in openers if record.task),
        "label": unique(label for record in openers for label in record.labels),
    }
    parts = [f"{name} {first_few(values)}" for name, values in values_by_name.items() if values]
    for name in unique(name for record in openers for name in record.context):
        values = unique(str(record.context[name]) for record in openers if name in record.context)
        parts.append(f"{name}={first_few(values)}")
    if parts:
        yield Fact("context", ", ".join(parts))


def places_of(leaks: Sequence[SiteGroup]) -> str:
    """From how many places leaks come, as far as these are known."""
    known = {group.site.place for group in leaks if group.site}
    if all(group.site for group in leaks):
        return pluralize(len(known), "place")
    if known:
        return f"{pluralize(len(known), 'place')} and unknown ones"
    return "an unknown place" if sum(group.count for group in leaks) == 1 else "unknown places"
