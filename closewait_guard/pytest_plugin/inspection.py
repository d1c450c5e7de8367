"""Look at what one owner has left behind: hand over what others keep, excuse, settle, accuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from closewait_guard._birth import Birth
from closewait_guard._clock import now, pause
from closewait_guard._frames import resolve
from closewait_guard._guard import Guard
from closewait_guard._settling import Settling
from closewait_guard.pytest_plugin.excuses import is_ignored, is_of_default_loop, kept_by_failure
from closewait_guard.pytest_plugin.keepers import Keeper
from closewait_guard.pytest_plugin.options import Plan
from closewait_guard.pytest_plugin.ownership import BORN_IN, Owner, Ownership
from closewait_guard.pytest_plugin.reach import reached
from closewait_guard.pytest_plugin.turns import Turns

if TYPE_CHECKING:
    from closewait_guard.model import Report

__all__ = ["Circumstances", "Inspector", "Result"]


class Circumstances(NamedTuple):
    """What an inspection has to take into account.

    Attributes:
        keepers: The wider fixtures that stay, the widest first.
        failures: The exceptions whose tracebacks are kept for who debugs them.
        own_calls: Files and names of the test's own functions; what was born below one is its own
            even if a runner of a wider fixture carried it out.
    """

    plan: Plan
    keepers: Sequence[Keeper] = ()
    failures: Callable[[], Sequence[BaseException]] = tuple
    own_calls: Callable[[], frozenset[tuple[str, str]]] = frozenset


class Result(NamedTuple):
    """The last look at the suspects, and how long it took them to settle."""

    report: Report
    waited: float


class Inspector:
    """Accuses each socket once: what has been told, excused or allowed is nobody's afterwards."""

    def __init__(self, guard: Guard, ownership: Ownership) -> None:
        self._guard = guard
        self._ownership = ownership
        self._done: set[int] = set()
        self._moved: dict[int, Owner] = {}

    def inspect(self, owner: Owner, around: Circumstances) -> Result | None:
        """What `owner` has leaked; None when nothing was suspect at all."""
        births = self._births_of(owner, around)
        if not births:
            return None
        births = self._not_handed_over(births, around.keepers)
        suspects = self._not_excused(owner, births, around)
        if not suspects:
            return None
        began = now()
        settling = Settling(lambda: self._look(owner, suspects), around.plan.grace)
        turns = Turns(_targets(births))
        for wait in settling:
            turns()
            pause(wait)
        waited = now() - began
        # Only now is it asked who holds them, which goes through the whole heap.
        report = self._look(owner, suspects, explain=True) if settling.report.leaks else None
        self._done |= suspects
        return Result(report or settling.report, waited)

    def adopt(self, owner: Owner) -> None:
        """Accuse nobody of what this owner has left behind so far."""
        self._done |= {birth.serial for birth in self._births_of(owner, Circumstances(Plan()))}

    def owners_of_leftovers(self, since: int) -> list[Owner]:
        """Whose sockets, born after a mark, are open or were dropped without being told."""
        left = (birth for birth in self._guard.unfinished(since) if birth.serial not in self._done)
        return list(dict.fromkeys(self._owner_of(birth) for birth in left))

    def _owner_of(self, birth: Birth) -> Owner:
        return self._moved.get(birth.serial) or self._ownership.called(_born_in(birth))

    def _births_of(self, owner: Owner, around: Circumstances) -> list[Birth]:
        unfinished = self._guard.unfinished(owner.mark)
        births = [birth for birth in unfinished if birth.serial not in self._done]
        foreign = [birth for birth in births if self._owner_of(birth) is not owner]
        if foreign:
            calls = around.own_calls()
            self._moved |= {birth.serial: owner for birth in foreign if _is_below(birth, calls)}
        return [birth for birth in births if self._owner_of(birth) is owner]

    def _not_handed_over(self, births: list[Birth], keepers: Iterable[Keeper]) -> list[Birth]:
        """Give each socket that a wider fixture keeps to that fixture."""
        for keeper in keepers:
            if not births:
                break
            kept = reached(keeper.roots(), _targets(births))
            self._moved |= dict.fromkeys(kept, keeper.owner)
            births = [birth for birth in births if birth.serial not in kept]
        return births

    def _not_excused(self, owner: Owner, births: list[Birth], around: Circumstances) -> set[int]:
        if not births:
            return set()
        excused = reached(kept_by_failure(around.failures()), _targets(births))
        suspects = {birth.serial for birth in births}
        for leak in self._look(owner, suspects).leaks:
            record = leak.observation.record
            if is_ignored(record, around.plan.ignore) or is_of_default_loop(record):
                excused.add(record.serial)
        self._done |= excused
        return suspects - excused

    def _look(self, owner: Owner, suspects: set[int], *, explain: bool = False) -> Report:
        report = self._guard.check(owner.mark, explain=explain)
        leaks = (leak for leak in report.leaks if leak.observation.record.serial in suspects)
        return replace(report, leaks=tuple(leaks))


def _born_in(birth: Birth) -> object:
    """By its birth: that of the descriptor, where it was wrapped later."""
    while birth.parent is not None and birth.origin in _SAME_DESCRIPTOR:
        birth = Birth._make(birth.parent)
    return birth.context.get(BORN_IN)


_SAME_DESCRIPTOR = frozenset({"wrapped", "detached", "inherited"})


def _targets(births: Iterable[Birth]) -> dict[int, int]:
    """The sockets that are alive, by the address of the object."""
    return {birth.key: birth.serial for birth in births if birth.sock() is not None}


def _is_below(birth: Birth, calls: frozenset[tuple[str, str]]) -> bool:
    return bool(calls) and any(
        (frame.filename, frame.function) in calls for frame in resolve(birth.stack)
    )
