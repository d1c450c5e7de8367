"""Everything that there is to see in one look: sockets with an object, and native ones."""

from __future__ import annotations

from closewait_guard import _patch
from closewait_guard._attribute import Attribution
from closewait_guard._natives import Natives
from closewait_guard._observe import Observer, Sight
from closewait_guard._probe import Probe
from closewait_guard._registry import Registry
from closewait_guard.model import Connection, Coverage, Observation

__all__ = ["Lookout"]


class Lookout:
    """Looks at what the registry knows, and at the sockets that no object is known for."""

    def __init__(self, registry: Registry, probe: Probe, stack_depth: int) -> None:
        self._registry = registry
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
        return ours.with_natives(natives)

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
    return bool(seen.record.stack) or seen.connection in _ENDED


_ENDED = frozenset({Connection.PEER_CLOSED, Connection.GONE})
