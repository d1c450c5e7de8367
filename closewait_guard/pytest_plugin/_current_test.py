"""The test that runs at this moment."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from closewait_guard.pytest_plugin._attribution import Owner
from closewait_guard.pytest_plugin._options import Plan

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin._failing import Failure
    from closewait_guard.pytest_plugin._findings import OwnerFinding

__all__ = ["CurrentTest"]


class CurrentTest:
    """One run of a test, from its set-up to the end of its teardown.

    Attributes:
        has_run_body: Its body came to its end.
        in_teardown: Its own teardown has begun, and may be over.
        is_checked: Its sockets have been checked.
        may_have_collected: For that, garbage may have been collected.
        failures: What its phases have raised.
        failure: What to fail it with.
    """

    has_run_body = False
    in_teardown = False
    is_checked = False
    may_have_collected = False
    failures: tuple[BaseException, ...] = ()
    failure: Failure | None = None

    def __init__(self, item: pytest.Item, plan: Plan, owner: Owner) -> None:
        self.item = item
        self.plan = plan
        self.owner = owner

    def collect_failures(self) -> list[BaseException]:
        """What went wrong so far, and is kept for a debugger."""
        # Where pytest keeps what has failed in the body of the test, for debuggers.
        last = getattr(sys, "last_value", None)
        return [*self.failures, *([last] if isinstance(last, BaseException) else [])]

    def add_finding(self, finding: OwnerFinding) -> None:
        """Remember what to fail the test with; add what the XML file says of it."""
        from closewait_guard.pytest_plugin._failing import make_failure
        from closewait_guard.pytest_plugin._text import junit_properties

        if finding.report is not None and self.plan.allow_reason is None:
            self.item.user_properties += junit_properties(finding)
        if finding.is_failure:
            self.failure = make_failure(finding, self.item.config)

    def take_unraisable(self) -> Exception | None:
        """Have pytest take what finalizers raised while the check collected garbage.

        Otherwise the next test would get it: pytest itself has looked before, but for versions
        below 8.4, which look when we have returned.

        Returns:
            What pytest raises for it where warnings are errors.
        """
        config = self.item.config
        plugin = config.pluginmanager.get_plugin("unraisableexception")
        collect = getattr(plugin, "collect_unraisable", None)
        if self.may_have_collected and collect is not None:
            try:
                collect(config)
            except Exception as error:
                return error
        return None

    def add_section(self, error: Exception | None) -> None:
        """Show an error in the report of the test, which fails with another."""
        if error is not None:
            text = "".join(traceback.format_exception(error))
            self.item.add_report_section("teardown", "unraisable exceptions", text)

    def has_passed(self) -> bool:
        """Whether its body came to its end, and nothing went wrong."""
        return self.has_run_body and not self.collect_failures()

    def make_unused_waiver(self) -> OwnerFinding:
        """The finding that its marker is not needed any more."""
        from closewait_guard.pytest_plugin._findings import Outcome, OwnerFinding

        return OwnerFinding(
            owner=self.owner.name,
            nodeid=self.owner.nodeid,
            kind="test",
            outcome=Outcome.UNUSED_WAIVER,
            reason=self.plan.allow_reason,
        )

    def find_own_functions(self) -> frozenset[tuple[str, str]]:
        """File and name of its function, and of the fixtures that are made for it alone."""
        functions = (inspect.unwrap(function) for function in _functions_of(self.item))
        codes = (getattr(function, "__code__", None) for function in functions)
        return frozenset((code.co_filename, code.co_qualname) for code in codes if code is not None)


def _functions_of(item: pytest.Item) -> Iterator[Any]:
    function = getattr(item, "function", None)
    if function is not None:
        yield function
    known = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    for definitions in known.values():
        if definitions[-1].scope == "function":
            yield definitions[-1].func
