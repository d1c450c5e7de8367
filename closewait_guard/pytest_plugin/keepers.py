"""Wider fixtures: what each keeps alive, for as long as it lives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from closewait_guard.pytest_plugin.ownership import Owner

__all__ = ["Keeper", "name_of"]

_SCOPES = ("session", "package", "module", "class")
# How pytest calls the fixtures that it makes of the older ways to set up.
_SET_UPS = {
    "unittest_setUpClass_fixture": "setUpClass",
    "xunit_setup_class_fixture": "setup_class",
    "xunit_setup_module_fixture": "setup_module",
}


def name_of(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> str:
    """What people call this fixture, where it lives, and its parameter."""
    place = f" of {request.node.nodeid}" if request.node.nodeid not in ("", ".") else ""
    for prefix, name in _SET_UPS.items():
        if fixturedef.argname.lstrip("_").startswith(prefix):
            return f"{name}{place}"
    parameter = getattr(request, "param", None)
    shown = f"[{parameter!r:.40}]" if parameter is not None else ""
    return f"{fixturedef.scope} fixture {fixturedef.argname!r}{shown}{place}"


class Keeper:
    """A fixture that outlives a test.

    It keeps its value, its unfinished generator, and what its set-up has assigned to the class or
    the module.
    """

    def __init__(
        self, owner: Owner, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> None:
        self.owner = owner
        self.rank = _SCOPES.index(fixturedef.scope)
        self._fixturedef = fixturedef
        self._places = [
            place
            for place in (
                request.cls if fixturedef.scope == "class" else None,
                request.module if fixturedef.scope == "module" else None,
            )
            if place is not None
        ]
        self._before = [{name: id(value) for name, value in vars(p).items()} for p in self._places]
        self._assigned: list[tuple[Any, str]] = []

    def set_up(self) -> None:
        """Note what the set-up has assigned."""
        for place, before in zip(self._places, self._before, strict=True):
            for name, value in vars(place).items():
                if before.get(name) != id(value):
                    self._assigned.append((place, name))

    def roots(self) -> Iterator[object]:
        """Where to look for what it keeps."""
        yield getattr(self._fixturedef, "cached_result", None)
        yield list(getattr(self._fixturedef, "_finalizers", ()))
        for place, name in self._assigned:
            yield vars(place).get(name)

    def failures(self) -> list[BaseException]:
        """The exception that its set-up raised, if it did."""
        result = getattr(self._fixturedef, "cached_result", None)
        error = result[2] if result is not None else None
        error = error[0] if isinstance(error, tuple) else error
        return [error] if isinstance(error, BaseException) else []
