"""The test that runs at this moment."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from closewait_guard.pytest_plugin._attribution import Owner
from closewait_guard.pytest_plugin._options import Plan

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin._failing import Failure
    from closewait_guard.pytest_plugin._findings import OwnerFinding

__all__ = [
    "CurrentTest",
]


class CurrentTest:
    """One run of a test, from its set-up to the end of its teardown.

    Attributes:
        called: Its body came to its end.
        in_teardown: Its own teardown has begun, perhaps ended.
        checked: Its sockets have been looked at.
        failure: What to fail it with.
    """

    called = False
    in_teardown = False
    checked = False
    failures: tuple[BaseException, ...] = ()
    failure: Failure | None = None

    def __init__(self, item: pytest.Item, plan: Plan, owner: Owner) -> None:
        self.item = item
        self.plan = plan
        self.owner = owner

    def all_failures(self) -> list[BaseException]:
        """What went wrong so far, and is kept for a debugger."""
        # Where pytest keeps what has failed in the body of the test, for debuggers.
        last = getattr(sys, "last_value", None)
        return [*self.failures, *([last] if isinstance(last, BaseException) else [])]

    def take(self, finding: OwnerFinding) -> None:
        """Remember what to fail the test with, and what to tell of it in XML."""
        from closewait_guard.pytest_plugin._failing import failure_of
        from closewait_guard.pytest_plugin._text import properties

        if finding.report is not None and self.plan.allowed is None:
            self.item.user_properties += properties(finding)
        if finding.fails:
            self.failure = failure_of(finding, self.item.config)

    def has_ended_well(self) -> bool:
        """Whether it has run to its end, and nothing went wrong."""
        return self.called and not self.all_failures()

    def unused_waiver(self) -> OwnerFinding:
        """That its marker is not needed any more."""
        from closewait_guard.pytest_plugin._findings import Outcome, OwnerFinding

        return OwnerFinding(
            owner=self.owner.name,
            nodeid=self.owner.nodeid,
            kind="test",
            outcome=Outcome.UNUSED_WAIVER,
            reason=self.plan.allowed,
        )

    def own_calls(self) -> frozenset[tuple[str, str]]:
        """File and name of its function, and of the fixtures that are made for it alone."""
        functions = (inspect.unwrap(function) for function in _functions(self.item))
        codes = (getattr(function, "__code__", None) for function in functions)
        return frozenset((code.co_filename, code.co_qualname) for code in codes if code is not None)


def _functions(item: pytest.Item) -> Iterator[Any]:
    function = getattr(item, "function", None)
    if function is not None:
        yield function
    known = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    for definitions in known.values():
        if definitions[-1].scope == "function":
            yield definitions[-1].func
