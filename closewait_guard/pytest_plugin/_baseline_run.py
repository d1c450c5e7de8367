"""A run with a file of known leaks: which tests have run, what is no longer there, the new file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from closewait_guard._format import escape_line, pluralize
from closewait_guard.pytest_plugin._baseline import (
    Baseline,
    KnownLeak,
    Place,
    is_defined,
    leaks_by_place,
    load_baseline,
    plain_id,
)
from closewait_guard.pytest_plugin._options import Options

if TYPE_CHECKING:
    from closewait_guard.model import Finding
    from closewait_guard.pytest_plugin._findings import OwnerFinding

__all__ = ["BaselineRun", "follow_baseline"]

_MAX_GONE_SHOWN = 10
# What the check of the tests came to an end with.
_COMPLETE = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
_UPDATE = "--socket-leaks-update-baseline"


def follow_baseline(config: pytest.Config, options: Options) -> None:
    """Read the file of known leaks, and note what this run says of them."""
    run = BaselineRun(config, load_baseline(config, options))
    config.pluginmanager.register(run, "closewait_guard_baseline")


class BaselineRun:
    """What a run has found, beside what is known. With pytest-xdist the controller's is used.

    Attributes:
        baseline: What is known.
        failure: A sentence that says why the file was not written, if it should have been.
    """

    failure: str | None = None

    def __init__(self, config: pytest.Config, baseline: Baseline) -> None:
        self.baseline = baseline
        self._config = config
        self._collected: set[str] = set()
        self._deselected: set[str] = set()
        self._passed: set[str] = set()
        self._found: dict[Place, KnownLeak] = {}
        self._known: set[Place] = set()
        self._renamed: set[Place] = set()
        self._new: set[Place] = set()
        self._of_fixtures: set[Place] = set()
        # Of what was collected, once that is complete.
        self._ids_by_test: dict[str, set[str]] = {}
        self._files: set[str] = set()
        self._has_lost_worker = False
        self._lines: list[str] | None = None

    def pytest_deselected(self, items: Iterable[pytest.Item]) -> None:
        self._deselected |= {plain_id(item.nodeid) for item in items}
        self.baseline.collected |= self._deselected

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.pytest_xdist_node_collection_finished(item.nodeid for item in session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and (report.passed or hasattr(report, "wasxfail")):
            self._passed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """The controller of pytest-xdist has collected nothing itself."""
        sent = getattr(session.config, "workeroutput", None)
        if sent is not None:
            sent["socket_leaks_deselected"] = sorted(self._deselected)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["socket_leaks_baseline"] = self.baseline.to_data()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Iterable[str]) -> None:
        self._collected |= {*ids}
        self.baseline.collected |= {*map(plain_id, self._collected)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        sent = getattr(node, "workeroutput", {}).get("socket_leaks_deselected")
        self._has_lost_worker |= error is not None or sent is None
        self._deselected |= {*(sent or ())}

    def add(self, finding: OwnerFinding) -> None:
        """Note what a test, fixture or variable has leaked."""
        if finding.outcome not in ("failed", "warned", "known"):
            return
        for place, leaks in leaks_by_place(finding, self.baseline.root).items():
            if finding.kind == "fixture":
                self._of_fixtures.add(place)
            tests = frozenset(filter(None, (self._test_of(finding, leak) for leak in leaks)))
            found = KnownLeak(place, len(leaks) if place.is_counted else None, tests)
            before = self._found.get(place)
            self._found[place] = found if before is None else found.merge(before)
            entry = self.baseline.find(place)
            if finding.outcome != "known":
                self._new.add(place)
            elif entry is not None:
                self._known.add(entry.place)
                is_listed = finding.kind != "test" or tests <= entry.tests
                self._renamed |= set() if is_listed and entry.place == place else {entry.place}

    def _test_of(self, finding: OwnerFinding, leak: Finding) -> str:
        """The test that shows whether it is still there, when it runs again."""
        from closewait_guard.pytest_plugin._attribution import OPENED_IN

        opened_in = str(leak.observation.record.context.get(OPENED_IN, ""))
        if finding.kind == "test" or opened_in not in self._collected:
            opened_in = finding.last_test or finding.nodeid
        return plain_id(opened_in)

    def finish(self, exitstatus: int) -> list[str]:
        """The lines of the summary; the first time, also write the file if that is asked for."""
        if self._lines is None:
            self._group_tests()
            is_complete = exitstatus in _COMPLETE and not self._has_lost_worker
            if self.baseline.is_updated:
                self._lines = [self._update() if is_complete else self._refuse_update()]
            else:
                self._lines = list(self._compare(is_complete=is_complete))
        return [escape_line(line) for line in self._lines]

    def _group_tests(self) -> None:
        for nodeid in self._collected:
            self._ids_by_test.setdefault(plain_id(nodeid), set()).add(nodeid)
        tests = (*self._ids_by_test, *self._deselected)
        self._files = {each.partition("::")[0] for each in tests}

    def _compare(self, *, is_complete: bool) -> Iterator[str]:
        gone = [each.place for each in self._find_gone()] if is_complete else []
        if not (self._known or self._new or gone):
            return
        known = pluralize(len(self._known), "known leak") if self._known else "no known leak"
        moved = len(self._renamed)
        numbers = [
            f"{known} allowed by {self.baseline.name}" + (f" ({moved} renamed)" if moved else ""),
            *([f"{len(self._new):,} new"] if self._new else []),
            *([f"{len(gone):,} no longer there"] if gone else []),
        ]
        update = f": update with {_UPDATE}" if gone or moved else ""
        yield ", ".join(numbers) + update
        yield from (f"    no longer there: {place.describe()}" for place in gone[:_MAX_GONE_SHOWN])
        if len(gone) > _MAX_GONE_SHOWN:
            yield f"    and {len(gone) - _MAX_GONE_SHOWN:,} more"

    def _find_gone(self) -> Iterator[KnownLeak]:
        seen = {entry.place for place in self._found if (entry := self.baseline.find(place))}
        for place, known in sorted(self.baseline.leaks.items()):
            if place not in seen and known.tests and not self._tests_to_keep(known):
                yield known

    def _tests_to_keep(self, known: KnownLeak) -> set[str]:
        """The tests of an entry of which this run says nothing."""
        return {test for test in known.tests if not self._has_run(test) and not self._is_gone(test)}

    def _has_run(self, test: str) -> bool:
        """Whether it has passed, with all its parameters."""
        all_of_it = self._ids_by_test.get(test, set())
        has_parameters = any(each != test for each in all_of_it)
        if test in self._deselected or (has_parameters and self._is_selection):
            return False
        return bool(all_of_it) and all_of_it <= self._passed

    def _is_gone(self, test: str) -> bool:
        """Whether it was deleted or renamed: neither its file has it, nor what was collected."""
        file, _, name = test.partition("::")
        path = self.baseline.root / file
        if not path.exists():
            return True
        is_whole = file in self._files and not self._is_selection
        is_known = test in self._ids_by_test or test in self._deselected
        return is_whole and not is_known and not is_defined(path, name)

    @property
    def _is_selection(self) -> bool:
        """Whether files may have been collected in part, without anything deselected."""
        has_ids = any("::" in argument for argument in self._config.args)
        return has_ids or bool(self._config.getoption("lf", default=False))

    def _update(self) -> str:
        before = self.baseline.leaks
        after = {each.place: each for each in self._merged()}
        counts = pluralize(len(after), "known leak")
        if before == after and self.baseline.path.exists():
            return f"{self.baseline.name} is up to date: {counts}"
        try:
            self.baseline.write(after.values())
        except OSError as error:
            self.failure = (
                f"socket_leaks_baseline: {self.baseline.path} cannot be written: "
                f"{error.strerror or error}"
            )
            return f"{self.baseline.name} was not written: {counts}"
        changes = {"added": len(after.keys() - before.keys())}
        changes["removed"] = len(before.keys() - after.keys())
        shown = "".join(f", {number:,} {what}" for what, number in changes.items() if number)
        return f"{self.baseline.name} written: {counts}{shown}"

    def _merged(self) -> Iterator[KnownLeak]:
        """What was found, and what is known of tests that have not run."""
        seen = set()
        for place, found in self._found.items():
            known = self.baseline.find(place)
            if known is None:
                yield found
                continue
            seen.add(known.place)
            kept = self._tests_to_keep(known)
            tests = {*found.tests, *kept}
            if place in self._of_fixtures:
                # Which of its tests ran last says nothing, and may differ from run to run.
                tests = {each for each in known.tests if not self._is_gone(each)} or tests
            # Those that have not run may have more.
            merged = found.merge(known) if kept else found
            yield merged._replace(place=place, tests=frozenset(tests))
        for place, known in self.baseline.leaks.items():
            kept = self._tests_to_keep(known)
            if place not in seen and (kept or not known.tests):
                yield known._replace(tests=frozenset(kept))

    def _refuse_update(self) -> str:
        self.failure = f"{self.baseline.name} was not written: the run has not come to its end"
        return self.failure
