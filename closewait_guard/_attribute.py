"""Births for native sockets: callables during which descriptors appear are wrapped, and told."""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from closewait_guard import _patch
from closewait_guard._heap import loaded
from closewait_guard._natives import Natives
from closewait_guard._objects import is_any_of
from closewait_guard._stack import Stack, capture
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.integrations import ATTRIBUTED, OWNERS

__all__ = ["Attribution"]


class Attribution:
    """Wraps callables for one guard, until `undo`."""

    def __init__(self, natives: Natives, stack_depth: int) -> None:
        self._natives = natives
        self._depth = stack_depth
        self._undo: dict[str, Callable[[], None]] = {}
        # Objects that may open a descriptor later than they were made.
        self._made: dict[int, tuple[weakref.ref[Any], Stack]] = {}

    def wrap(self, *names: str) -> None:
        """Wrap each `module:callable`, or all that is known of a library. Idempotent."""
        for name in names:
            for reference in ATTRIBUTED.get(name, (name,)):
                if reference not in self._undo:
                    self._undo[reference] = self._wrapped(reference)

    def _wrapped(self, reference: str) -> Callable[[], None]:
        module, _, path = reference.partition(":")
        *holders, last = path.split(".")
        try:
            place: Any = import_module(module)
            for holder in holders:
                place = getattr(place, holder)
            return _patch.interpose(place, last, self._around)
        except Exception as error:
            known = ", ".join(sorted(ATTRIBUTED))
            raise ConfigurationError(
                f"attribute({reference!r}): {type(error).__name__}: {error}; give the "
                f'"module:callable" of something written in Python, or one of {known}'
            ) from error

    def _around(self, wrapped: Any, _: object, args: Any, kwargs: Any) -> Any:
        if not self._undo:
            return wrapped(*args, **kwargs)
        claim = partial(
            self._claim, self._natives.present(), capture(sys._getframe(1), self._depth)
        )
        result = wrapped(*args, **kwargs)
        # A coroutine, also one of Cython's, which inspect does not take for one.
        if inspect.isawaitable(result) and hasattr(result, "send"):
            return _claimed(result, claim)
        claim(result)
        return result

    def _claim(self, before: set[int], stack: Stack, result: object) -> None:
        """Of what the result tells, else of all descriptors that have appeared."""
        with contextlib.suppress(Exception):  # Nothing of ours is raised into the program.
            self._claim_of(before, stack, result)

    def _claim_of(self, before: set[int], stack: Stack, result: object) -> None:
        owner = result[0] if type(result) is tuple and result else result
        told = _descriptors(owner)
        if told is not None and not told:
            self._remember(owner, stack)
        self._natives.claim((self._natives.present() - before) if told is None else told, stack)

    def _remember(self, owner: object, stack: Stack) -> None:
        for key, (ref, _) in self._made.copy().items():
            if ref() is None:
                self._made.pop(key, None)
        ref = weakref.ref(owner)
        # By address, because the hash of the reference would be that of the program's object.
        self._made[id(ref)] = (ref, stack)

    def refresh(self) -> None:
        """Ask what was made for the descriptors that it has opened since."""
        for ref, stack in self._made.copy().values():
            owner = ref()
            if owner is not None:
                self._natives.claim(_descriptors(owner) or (), stack)

    def undo(self) -> None:
        """Put back what was found, unless somebody has wrapped it since: then fall silent."""
        undo, self._undo = self._undo, {}
        self._made.clear()
        for restore in undo.values():
            restore()


async def _claimed(result: Any, claim: Callable[[object], None]) -> Any:
    made = await result
    claim(made)
    return made


def _descriptors(owner: object) -> set[int] | None:
    """What an object of a known kind has open; None for any other."""
    for kind in OWNERS:
        if is_any_of(owner, loaded(kind.classes)):
            try:
                return {fd for fd in kind.descriptors(owner) if fd >= 0}
            except Exception:
                # Not open yet, or busy with something that it does not allow.
                return set()
    return None
