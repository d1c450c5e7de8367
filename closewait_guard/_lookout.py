"""Everything that there is to see in one look: sockets with an object, and native ones."""

from __future__ import annotations

from closewait_guard import _patch
from closewait_guard._attribute import Attribution
from closewait_guard._clock import pause
from closewait_guard._natives import SETTLED_AFTER, Natives
from closewait_guard._observe import Observer
from closewait_guard._probe import Probe
from closewait_guard._registry import Registry
from closewait_guard._sight import Sight
from closewait_guard.model import Connection, Coverage, Observation

__all__ = ["Lookout"]


class Lookout:
    """Looks at what the registry knows, and at the sockets that no object is known for."""

    def __init__(self, registry: Registry, probe: Probe, stack_depth: int, grace: float) -> None:
        self._registry = registry
        self._grace = grace
        self._natives = Natives(registry)
        self._attribution = Attribution(self._natives, stack_depth)
        self._observers = (Observer(registry, probe), Observer(self._natives, probe))

    @property
    def natives(self) -> int | None:
        """How many sockets no object was known for, at the last census; None if nobody says."""
        return self._natives.count

    def take_census(self) -> None:
        """Take in the native sockets that are open by now: they are older than what follows."""
        self._natives.living(thorough=True)

    def look(self, *, full: bool = False, born_after: int | None = None) -> Sight:
        """One look at all of them; see `Observer.look`."""
        self._attribution.refresh()
        ours, natives = (
            observer.look(full=full, born_after=born_after) for observer in self._observers
        )
        if born_after is not None:
            natives = natives.only(_is_anybodys)
        if natives.suspects:
            natives = self._settled(natives, self._grace if born_after is None else 0.0)
        return ours.with_natives(natives)

    def _settled(self, natives: Sight, grace: float) -> Sight:
        """Without those that pass; waits for them if they would be accused, and are new."""
        ended = [seen for seen in natives.suspects if (seen.suspect_for or 0.0) >= grace]
        for wait in _WAITS:
            if not any(not _is_live(seen) and self._natives.is_new(seen) for seen in ended):
                break
            pause(wait)
        return natives.only(lambda seen: _is_live(seen) or self._natives.is_still(seen))

    def coverage(self, notes: tuple[str, ...]) -> Coverage:
        """What was seen, and what could not be."""
        births, dropped, failures = self._registry.totals()
        return Coverage(
            births=births,
            adopted=self._registry.adopted_now(),
            dropped=dropped,
            forgotten=dropped - len(self._registry.dropped()),
            failures=failures,
            notes=notes,
            native=self.natives,
        )

    def attribute(self, *names: str) -> None:
        """Know where native sockets are born."""
        with _patch.changing():
            self._attribution.wrap(*names)

    def close(self) -> None:
        """Take the wrappers of `attribute` out again."""
        self._attribution.undo()

    def after_fork(self) -> None:
        """In the child: what was known is now of inherited sockets."""
        self._natives.after_fork()
        for observer in self._observers:
            observer.after_fork()


def _is_anybodys(seen: Observation) -> bool:
    """Whether the program has to do with a native socket, as far as is known.

    Native code may have its reasons to open one for good, in any thread, at any time.
    """
    return bool(seen.record.stack) or not _is_live(seen)


def _is_live(seen: Observation) -> bool:
    return seen.connection not in _ENDED


# They double, and are as long together as it takes.
_WAITS = [SETTLED_AFTER / 2**number for number in range(10, 0, -1)]
_ENDED = frozenset({Connection.PEER_CLOSED, Connection.GONE})
