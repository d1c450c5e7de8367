"""`no_leaks`: a block, or a function, must leave no socket behind, or no descriptor at all.

Before anything counts as a leak, sockets that are about to close get the time to do so.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from closewait_guard._capture import around
from closewait_guard._clock import nap, now, pause
from closewait_guard._config import require_number
from closewait_guard._config import seconds as parse_seconds
from closewait_guard._cpython import running_loop
from closewait_guard._enums import FOLLOWED, Verdict
from closewait_guard._format import pluralize
from closewait_guard._inspect import DescriptorsOfBlock
from closewait_guard._redact import Redaction
from closewait_guard._render import list_kinds, render_report
from closewait_guard._stream import layout_of
from closewait_guard.exceptions import ConfigurationError, SocketLeakError
from closewait_guard.model import Descriptors, Finding, Report

if TYPE_CHECKING:
    from closewait_guard._capture import Registry
    from closewait_guard._pipeline import Pipeline, Totals
    from closewait_guard.settings import Settings

__all__ = [
    "NoLeaks",
    "Settling",
]


_FIRST_WAIT = 0.001


class Settling:
    """Yields how long to wait before each further scan; `findings` are those of the last.

    The waits double until the grace time is over, by the clock or by their sum. Garbage is
    collected once. Neither happens when nothing is open.

    Args:
        find_open: Finds the sockets that are still open, or were dropped.
        grace: Seconds that the waits may take together.
        collect_garbage: Called once, to do so.
        leaves_more: Whether something else is to be waited for, with these findings.
    """

    def __init__(
        self,
        find_open: Callable[[], Sequence[Finding]],
        grace: float,
        collect_garbage: Callable[[], object] = gc.collect,
        leaves_more: Callable[[Sequence[Finding]], bool] = lambda _: False,
    ) -> None:
        self._find_open = find_open
        self._collect_garbage = collect_garbage
        self._leaves_more = leaves_more
        self._left = grace
        self._deadline = now() + grace
        self.findings: Sequence[Finding] = ()

    def __iter__(self) -> Generator[float, None, None]:
        wait, has_collected = _FIRST_WAIT, False
        while not self._has_settled():
            left = min(self._left, self._deadline - now())
            if left <= 0 and has_collected:
                return
            if left > 0:
                yield min(wait, left)
                self._left -= wait
            if not has_collected:
                # After one short wait: sockets that close by themselves cost no collection.
                self._collect_garbage()
                has_collected = True
            wait *= 2

    def _has_settled(self) -> bool:
        """Whether waiting can change nothing: all are closed, or were dropped."""
        self.findings = self._find_open()
        leaves_more = self._leaves_more(self.findings)
        return not leaves_more and all(each.is_gone for each in self.findings)


_F = TypeVar("_F", bound=Callable[..., object])

# The coarsest clock of an event loop, that of uvloop, counts milliseconds.
_CLOCK_TICK = 0.001


class _Guard(Protocol):
    """What is needed of a guard."""

    @property
    def installed(self) -> bool: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def _pipeline(self) -> Pipeline: ...
    @property
    def _registry(self) -> Registry: ...
    def install(self) -> object: ...
    def uninstall(self) -> None: ...
    def mark(self) -> int: ...
    def check(self, since: int) -> Report: ...
    def _open_since(self, mark: int) -> Sequence[Finding]: ...


class _Block(NamedTuple):
    """A block that has been entered.

    Attributes:
        guard: The guard that is used.
        is_ours: It was installed for the block.
        mark: The sockets that are opened in the block come after it.
        totals: What had been recorded until then.
        opened: All descriptors that are, where they count.
    """

    guard: _Guard
    is_ours: bool
    mark: int
    totals: Totals
    opened: DescriptorsOfBlock | None


class NoLeaks(AbstractContextManager[None], AbstractAsyncContextManager[None]):
    """Fails if a socket opened inside is still open at the end, or was dropped while open.

    Works with `with`, with `async with`, and as a decorator of functions and coroutine functions.
    Waits at most `grace` seconds for sockets that are about to close, and collects garbage once;
    neither happens when nothing is open. An exception from the block is not changed.

    Args:
        guard: Returns the guard to use. One that is not installed is installed for the block.
        grace: Seconds that sockets have to close after the block.
        allow_open: Accept sockets that are open and healthy, such as those of a pool that stays;
            not those that could not be described, nor a connection that was not given back.
        descriptors: Refuse everything else that is left open, too: files, pipes, epoll and so on.

    Raises:
        SocketLeakError: Sockets were leaked; the text is the report. Or something that may have
            been left open could not be looked at.
    """

    def __init__(
        self,
        guard: Callable[[], _Guard],
        grace: float,
        *,
        allow_open: bool,
        descriptors: bool = False,
    ) -> None:
        if callable(grace):
            raise ConfigurationError("no_leaks needs parentheses as a decorator: @no_leaks()")
        grace = require_number(parse_seconds, grace, "no_leaks(grace=...)")
        self._get_guard = guard
        self._grace = grace
        self._allow_open = allow_open
        self._descriptors = descriptors
        self._entered: list[_Block] = []

    def __call__(self, function: _F) -> _F:
        return around(
            function,
            lambda: NoLeaks(
                self._get_guard,
                self._grace,
                allow_open=self._allow_open,
                descriptors=self._descriptors,
            ),
        )

    def __enter__(self) -> None:
        guard = self._get_guard()
        is_ours = not guard.installed
        if is_ours:
            guard.install()
        try:
            mark, totals = guard.mark(), guard._pipeline.totals()
            opened = DescriptorsOfBlock() if self._descriptors else None
        except BaseException:
            if is_ours:
                guard.uninstall()
            raise
        self._entered.append(_Block(guard, is_ours, mark, totals, opened))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._ending(error) as waits:
            for wait in waits:
                pause(wait)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._ending(error) as waits:
            for wait in waits:
                await _sleep(wait)

    @contextmanager
    def _ending(self, error: BaseException | None) -> Iterator[Iterable[float]]:
        """Provide the waits at the end of the block; fail after the last if sockets are left."""
        guard, is_ours, mark, totals, opened = self._entered.pop()
        left: Descriptors | None = None

        def leaves_more(findings: Sequence[Finding]) -> bool:
            nonlocal left
            left = None if opened is None else self._left_open(opened, findings)
            return left is not None or guard._pipeline.has_unseen

        try:
            if error is not None:
                yield ()
                return
            if guard._pipeline.has_unrecorded(mark):
                # What is garbage of it is not found before.
                gc.collect()
            settling = Settling(
                lambda: guard._open_since(mark), self._grace, leaves_more=leaves_more
            )
            yield settling
            unseen = guard._pipeline.take_unseen(totals)
            if left is not None or unseen or self._refused(settling.findings):
                # Now with the holders of what is still open.
                if opened is not None and left is not None:
                    left = opened.with_owners(left, guard._registry, mark)
                redaction = Redaction(guard.settings.redact)
                shown = redaction.apply(lambda mask: mask.descriptors(left), left)
                self._raise_if_leaky(guard.check(mark), shown, unseen)
        finally:
            if is_ours:
                guard.uninstall()

    def _left_open(
        self, opened: DescriptorsOfBlock, findings: Sequence[Finding]
    ) -> Descriptors | None:
        """The other descriptors that the block has left open, if there are any."""
        judged = {each.observation.fd for each in findings}
        found = opened.still_open(judged, sockets=not self._allow_open)
        return found if found.total else None

    def _raise_if_leaky(
        self, report: Report, left: Descriptors | None, unseen: Sequence[str]
    ) -> None:
        refused = self._refused(report.findings)
        if not refused and left is None and not unseen:
            return
        report, layout = replace(report, findings=refused), layout_of(everything=True)
        shown = replace(report, findings=tuple(map(_as_left_open, refused)))
        texts = []
        if unseen:
            what = "more sockets" if refused else "sockets"
            texts.append(f"Whether the block has left {what} open is unknown: {'; '.join(unseen)}.")
        if left is not None:
            texts.append(_describe_left(left))
        paragraphs = ["".join(f"{line}\n" for line in layout.wrap(each, "  ")) for each in texts]
        paragraphs += [render_report(shown, layout)] if refused else []
        raise SocketLeakError("\n".join(paragraphs), report, left)

    def _refused(self, findings: Iterable[Finding]) -> tuple[Finding, ...]:
        return tuple(
            each
            for each in findings
            # What could not be described is not known to be healthy.
            if not self._allow_open or each.verdict in FOLLOWED or not each.observation.is_described
        )


def _describe_left(left: Descriptors) -> str:
    """What a block has left open, and whether a line is known for all of it."""
    owned = sum(number for owners in left.owners.values() for number in owners.values())
    which = "the others" if owned else "them"
    unknown = f"; which line opened {which} is not recorded" if owned < left.total else ""
    return (
        f"{pluralize(left.total, 'descriptor')} left open by the block: {list_kinds(left)}. "
        f"Close them by `with`, or in a `finally` block{unknown}."
    )


def _as_left_open(finding: Finding) -> Finding:
    """As a block's error shows it: what a program may leave to a pool or its peer, no block may."""
    is_open = finding.verdict not in (Verdict.CLOSED_ELSEWHERE, Verdict.CHECKED_OUT)
    return finding if finding.is_leak or not is_open else replace(finding, verdict=Verdict.OPEN)


async def _sleep(seconds: float) -> None:
    """Wait in the event loop that is running, so that it can close what it is closing."""
    trio = sys.modules.get("trio")
    if (loop := running_loop()) is not None:
        await _wait(seconds, loop.time, sys.modules["asyncio"].sleep)
    elif trio is not None:
        await _wait(seconds, trio.current_time, trio.sleep)
    else:
        # Neither loop is running, so none is blocked.
        pause(seconds)


async def _wait(
    seconds: float, time: Callable[[], float], sleep: Callable[[float], Awaitable[object]]
) -> None:
    """Sleep in an event loop, even if a test has stopped its clock or set it forward."""
    end, before = now() + seconds, time()
    nap(_CLOCK_TICK)
    await sleep(0)
    if time() > before:
        await sleep(max(0.0, end - now()))
    while now() < end:
        nap(_CLOCK_TICK)
        await sleep(0)
