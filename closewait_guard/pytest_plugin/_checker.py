"""The check of one test or fixture: which of its sockets are leaks.

Those that a wider fixture keeps are that fixture's, some are excused, and the rest get time to
close.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from closewait_guard._capture import Creation
from closewait_guard._clock import now, pause
from closewait_guard._enums import Connection, Origin
from closewait_guard._guard import Guard
from closewait_guard._no_leaks import Settling
from closewait_guard.pytest_plugin._attribution import (
    NO_OWNER,
    Owner,
    Ownership,
    WiderFixture,
    opened_in,
)
from closewait_guard.pytest_plugin._current_test import CheckContext, CurrentTest
from closewait_guard.pytest_plugin._excuses import (
    IdleEventLoops,
    copies_in_use,
    find_running,
    is_below,
    is_ignored,
    is_of_default_loop,
    kept_by_records,
    kept_by_responses,
    note_on_searches,
    reachable,
)
from closewait_guard.pytest_plugin._failing import UnraisableOfOther, UnraisablesOfOthers
from closewait_guard.pytest_plugin._findings import (
    Ends,
    Outcome,
    OwnerFinding,
    definition_of,
    ends_of,
    merge_by_variable,
    split_by_outcome,
)
from closewait_guard.pytest_plugin._module_variables import ModuleVariables, Variable
from closewait_guard.pytest_plugin._options import Mode, Plan

if TYPE_CHECKING:
    from closewait_guard.model import Finding, Observation, Report

__all__ = ["LeakChecker"]


# A wait worth reporting of a test whose sockets were closed in time.
_MIN_SETTLE_REPORTED = 0.01


class LeakChecker:
    """Reports each socket once, at the end of its owner.

    Args:
        guard: Knows the sockets.
        ownership: Who owns what.
        plan: That of fixtures, and of tests that are over.
        variables: Finds those that keep idle connections in a pool.
        worker: The name of this process, if it is one of pytest-xdist's.
        warn: Takes what finalizers raise over a socket of another owner than the test.
        split_known: Takes the leaks that are known out of what fails.
        has_paused: Automatic collections are off until the first check.
    """

    def __init__(
        self,
        guard: Guard,
        ownership: Ownership,
        plan: Plan,
        variables: ModuleVariables,
        worker: str | None,
        warn: Callable[[UnraisableOfOther], None],
        split_known: Callable[[list[OwnerFinding]], list[OwnerFinding]],
        *,
        has_paused: bool,
    ) -> None:
        self._guard = guard
        self._ownership = ownership
        self._plan = plan
        self._variables = variables
        self._worker = worker
        self._warn = warn
        self._split_known = split_known
        self._has_paused = has_paused
        # By serial: what has been reported, excused or allowed, and what has another owner by now.
        self._settled: set[int] = set()
        self._moved: dict[int, Owner] = {}
        # The addresses of both ends of the connections among them, the program's own first.
        self._settled_connections: set[Ends] = set()
        # What cannot be said yet, and by name of the owner how to check it at the end of the run.
        self._deferred: list[CheckContext] = []
        self._contexts: dict[str, CheckContext] = {}
        self._is_last = False
        self._totals = (0, 0, 0, 0)

    @property
    def has_deferred(self) -> bool:
        """Whether there is something for `check_deferred`."""
        return bool(self._deferred)

    def check_test(
        self, test: CurrentTest, wider_fixtures: Sequence[WiderFixture]
    ) -> list[OwnerFinding]:
        """Check what a test has left behind at its end."""
        return self._check(
            CheckContext(
                test.owner,
                "test",
                test.plan,
                wider_fixtures,
                test.collect_failures,
                test.find_kept,
                test.find_own_functions,
            )
        )

    def check_fixture(
        self, fixture: WiderFixture, wider_fixtures: Sequence[WiderFixture]
    ) -> list[OwnerFinding]:
        """Check what a wider fixture has left behind when it is finalized."""
        return self._check(
            CheckContext(
                fixture.owner,
                "fixture",
                self._plan,
                wider_fixtures,
                fixture.collect_failures,
                fixture.find_result,
            )
        )

    def check_deferred(self) -> Iterator[OwnerFinding]:
        """Check again what pytest kept; what it keeps even now is left to the end of the run."""
        contexts, self._deferred = self._deferred, []
        for context in contexts:
            yield from self._check(context)
        self._deferred = []

    def check_leftovers(self, since: int) -> list[OwnerFinding]:
        """Check what was opened after a mark and left behind, or deferred, since the last check.

        All of it is given the grace time together.
        """
        return merge_by_variable(self._check_leftovers(since))

    def _check_leftovers(self, since: int) -> Iterator[OwnerFinding]:
        self._is_last = True
        left, began = self._creations_since(since), now()
        for owner in dict.fromkeys(map(self._owner_of, left)):
            if owner is not NO_OWNER and self._plan.mode is not Mode.OFF:
                context = self._contexts.get(owner.name, CheckContext(owner, "test", self._plan))
                grace = max(0.0, context.plan.grace - (now() - began))
                yield from self._check(context._replace(plan=context.plan._replace(grace=grace)))
        self._resume_collections()

    def _check(self, context: CheckContext) -> list[OwnerFinding]:
        with self._unraisables_of_others(context):
            self._resume_collections()
            findings = self._split_known(self._check_owner(context))
            return [*findings, *self._find_unknown(context)]

    def _resume_collections(self) -> None:
        if self._has_paused:
            self._has_paused = False
            gc.enable()

    def _check_owner(self, context: CheckContext) -> list[OwnerFinding]:
        if self._guard._pipeline.has_unrecorded(context.owner.mark):
            # What is garbage of it is not found before.
            gc.collect()
        creations = self._creations_of(context)
        if context.plan.mode is Mode.OFF:
            if creations:
                self._settle_as(self._find_open(_serials(creations), context.owner))
            self._settled |= _serials(creations)
            return []
        creations = self._hand_over(creations, context.wider_fixtures)
        suspects = self._without_excused(creations, context)
        if not suspects:
            return []
        variables: dict[int, Variable] = {}
        waited, is_open = self._settle(creations, suspects, context, variables)
        running = self._find_running(creations, suspects, context) if is_open else {}
        suspects |= variables.keys()
        # Only now are their holders searched for, through the whole heap.
        report = self._report(suspects, context) if is_open or variables else None
        self._settled |= self._with_owners(suspects)
        if report is not None:
            self._settle_as(report.findings)
            report = replace(report, findings=self._without_other_ends(report.findings))
        return self._findings(context, waited, report, running, variables)

    def _unraisables_of_others(self, context: CheckContext) -> UnraisablesOfOthers:
        creations, owner = self._guard._open_creations(-math.inf), context.owner
        booked = context.kind == "test" and not owner.finished
        return UnraisablesOfOthers(creations, self._owner_of, owner, self._warn, booked=booked)

    def _creations_of(self, context: CheckContext) -> list[Creation]:
        """The sockets of an owner that are open, or were dropped, and not reported yet."""
        owner = context.owner
        creations = self._creations_since(owner.mark)
        foreign = [each for each in creations if self._owner_of(each) is not owner]
        if foreign:
            functions = context.own_functions()
            self._moved |= {each.serial: owner for each in foreign if is_below(each, functions)}
        return [each for each in creations if self._owner_of(each) is owner]

    def _creations_since(self, mark: int) -> list[Creation]:
        creations = self._guard._open_creations(mark)
        # What was said of all its sockets was said of their owner.
        for serial, sockets in self._guard._sockets_of_ended().items():
            if sockets and sockets <= self._settled:
                self._settled.add(serial)
        return [each for each in creations if each.serial not in self._settled]

    def _targets(self, creations: Iterable[Creation]) -> dict[int, int]:
        """What has their descriptors, by the address: the socket, or what it was handed over to."""
        creations = list(creations)
        sockets = {each.object_id: each.serial for each in creations if each.sock() is not None}
        return sockets | self._guard._owners(_serials(creations))

    def _owner_of(self, creation: Creation) -> Owner:
        return self._moved.get(creation.serial) or self._ownership.by_name(opened_in(creation))

    def _hand_over(
        self, creations: list[Creation], wider_fixtures: Iterable[WiderFixture]
    ) -> list[Creation]:
        """Give each socket that a wider fixture keeps to that fixture; the rest."""
        targets, kept_by_any = self._targets(creations), set[int]()
        for fixture in wider_fixtures:
            if not targets:
                break
            kept = reachable(fixture.find_roots(), targets)
            self._moved |= dict.fromkeys(kept, fixture.owner)
            targets = {key: serial for key, serial in targets.items() if serial not in kept}
            kept_by_any |= kept
        return [each for each in creations if each.serial not in kept_by_any]

    def _without_excused(self, creations: list[Creation], context: CheckContext) -> set[int]:
        if not creations:
            return set()
        failures = context.failures()
        excused = reachable(failures, self._targets(creations))
        suspects, other_ends = _serials(creations), set[int]()
        for finding in self._find_open(suspects, context.owner):
            record = finding.observation.record
            ignored = is_ignored(record, context.owner.fixture, context.plan.ignore)
            # What has failed may not have come to the end of its child processes.
            is_due_to_failure = bool(failures) and record.origin is Origin.INHERITED
            if ignored or is_due_to_failure or is_of_default_loop(record):
                excused.add(record.serial)
            if record.serial in excused:
                self._settle_as([finding])
            elif self._is_other_end(finding):
                other_ends.add(record.serial)
        self._settled |= excused
        return suspects - excused - other_ends

    def _settle_as(self, findings: Iterable[Finding]) -> None:
        """Remember the connections of what has been settled: they have another end each."""
        self._settled_connections |= {ends_of(finding) for finding in findings}

    def _is_other_end(self, finding: Finding) -> bool:
        """Whether it was accepted and is open only because the end that was settled is.

        Of a connection within the process, who opened it is to close it.
        """
        observation = finding.observation
        return (
            observation.record.opener.origin is Origin.ACCEPTED
            and observation.connection is Connection.LIVE
            and ends_of(finding)[::-1] in self._settled_connections
        )

    def _without_other_ends(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        """Without those that the program has not accepted itself: it cannot close them."""
        return tuple(
            each
            for each in findings
            if each.observation.record.blamed is each.observation.record.opener
            or not self._is_other_end(each)
        )

    def _settle(
        self,
        creations: list[Creation],
        suspects: set[int],
        context: CheckContext,
        variables: dict[int, Variable],
    ) -> tuple[float, bool]:
        """Give the suspects time to close: how long it took, and whether any is still open.

        What a module keeps in a pool of its own is not waited for, and noted in `variables`; nor is
        what a record keeps at the end of the run.
        """
        began, recorded = now(), set[int]()
        settling = Settling(
            lambda: self._find_open(suspects, context.owner),
            context.plan.grace,
            lambda: recorded.update(self._collect(creations, suspects, context, variables)),
            lambda _: self._guard._pipeline.has_unseen,
        )
        loops = IdleEventLoops(self._targets(creations))
        for wait in settling:
            loops.run_once()
            pause(wait)
        suspects |= recorded
        return now() - began, bool(recorded or settling.findings)

    def _collect(
        self,
        creations: list[Creation],
        suspects: set[int],
        context: CheckContext,
        variables: dict[int, Variable],
    ) -> set[int]:
        """Collect garbage; leave out what a module keeps for itself, and what only pytest keeps.

        Whether that is a leak shows when pytest has let go of it. At the end of the run: what
        records keep even then.
        """
        gc.collect()
        found = self._find_open(suspects, context.owner)
        open_ones = [each.observation for each in found if not each.is_gone]
        if context.plan.allow_reason is None:
            variables |= self._take_out_kept(open_ones, suspects, context)
        targets = self._targets(each for each in creations if each.serial in suspects)
        records = kept_by_records(targets)
        suspects -= records
        recorded = records if self._is_last else set[int]()
        if kept := (records - recorded) | kept_by_responses(context.kept(), open_ones) & suspects:
            self._leave_to_the_end(kept, suspects, context)
            self._deferred.append(self._contexts[context.owner.name])
        return recorded

    def _take_out_kept(
        self, open_ones: list[Observation], suspects: set[int], context: CheckContext
    ) -> dict[int, Variable]:
        """Take out of the suspects what a module keeps in a pool; by serial, what to report now.

        What a module of the project keeps may be closed until the end of the run.
        """
        kept = self._variables.find_keeping(open_ones)
        ignored = {serial for serial in kept if kept[serial].is_ignored(context.plan.ignore)}
        self._settle_as(self._find_open(ignored, context.owner))
        self._settled |= ignored
        later = set() if self._is_last else {key for key in kept if not kept[key].is_of_library}
        if left := later - ignored:
            self._leave_to_the_end(left, suspects, context)
        suspects.difference_update(kept)
        return {serial: kept[serial] for serial in kept.keys() - ignored - later}

    def _leave_to_the_end(
        self, serials: set[int], suspects: set[int], context: CheckContext
    ) -> None:
        self._settle_as(self._find_open(serials, context.owner))
        # What later tests open below the same functions is theirs.
        self._contexts[context.owner.name] = context._replace(own_functions=frozenset)
        suspects -= serials

    def _find_running(
        self, creations: list[Creation], suspects: set[int], context: CheckContext
    ) -> dict[int, str]:
        """What a thread or a loop still uses: it may close it, as the end of the run shows."""
        if context.plan.allow_reason is not None:
            return {}
        open_ones = [each for each in creations if each.serial in suspects]
        threads = {each.serial: each.thread for each in open_ones}
        targets = self._targets(open_ones)
        running = find_running(targets, threads, with_records=self._is_last)
        running |= copies_in_use(self._find_open(suspects, context.owner))
        if self._is_last or context.plan.threads is Mode.FAIL:
            return running
        self._leave_to_the_end(set(running), suspects, context)
        return {}

    def _with_owners(self, suspects: set[int]) -> set[int]:
        """The same, and what has ended unclosed meanwhile and stands for some of them."""
        ended = self._guard._sockets_of_ended().items()
        return suspects | {serial for serial, sockets in ended if sockets & suspects}

    def _find_open(self, suspects: set[int], owner: Owner) -> tuple[Finding, ...]:
        return _only(self._with_owners(suspects), self._guard._open_since(owner.mark))

    def _report(self, suspects: set[int], context: CheckContext) -> Report | None:
        report = self._guard.check(context.owner.mark)
        findings, coverage = _only(self._with_owners(suspects), report.findings), report.coverage
        coverage = replace(coverage, notes=(*coverage.notes, *note_on_searches()))
        return replace(report, findings=findings, coverage=coverage) if findings else None

    def _findings(
        self,
        context: CheckContext,
        waited: float,
        report: Report | None,
        running: dict[int, str],
        variables: dict[int, Variable],
    ) -> list[OwnerFinding]:
        plan = context.plan
        finding = self._finding_of(context)._replace(waited=waited, reason=plan.allow_reason)
        if report is None:
            is_told = waited >= _MIN_SETTLE_REPORTED and not plan.allow_reason
            return [finding] if is_told else []
        return split_by_outcome(finding, plan, report, running, variables)

    def _find_unknown(self, context: CheckContext) -> Iterator[OwnerFinding]:
        """Say what could not be looked at since the check before: a leak may be missing."""
        pipeline, plan = self._guard._pipeline, context.plan
        self._guard._registry.has_failed = False
        why = pipeline.take_unseen(self._totals)
        if why and plan.mode is not Mode.OFF and plan.allow_reason is None:
            report = replace(self._guard.check(context.owner.mark), findings=())
            outcome = Outcome.UNKNOWN if plan.mode is Mode.FAIL else Outcome.WARNED
            finding = self._finding_of(context)
            yield finding._replace(outcome=outcome, reason="; ".join(why), report=report)
        # That check has been said all of.
        pipeline.take_unseen(self._totals)
        self._totals = pipeline.totals()

    def _finding_of(self, context: CheckContext) -> OwnerFinding:
        """What all findings of an owner have in common."""
        return OwnerFinding(
            owner=context.owner.name,
            nodeid=context.owner.nodeid,
            kind=context.kind,
            outcome=Outcome.SETTLED,
            worker=self._worker,
            defined_at=definition_of(context.owner.code),
            last_test=context.owner.last_test,
        )


def _serials(creations: Iterable[Creation]) -> set[int]:
    return {creation.serial for creation in creations}


def _only(suspects: set[int], findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(each for each in findings if each.observation.record.serial in suspects)
