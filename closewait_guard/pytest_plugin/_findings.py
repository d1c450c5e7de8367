"""What the check of a test or a fixture has found: a value, and for machines a dict and lines.

Groups by line and cause; the properties in junit XML; the annotations of GitHub.
"""

from __future__ import annotations

import linecache
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

from closewait_guard._format import escape_line, join_counts, pluralize
from closewait_guard.model import TEST_SCHEMA, Finding, Frame, FrameKind, SocketRecord
from closewait_guard.pytest_plugin._options import Mode, Plan

if TYPE_CHECKING:
    from closewait_guard.model import Report
    from closewait_guard.pytest_plugin._module_variables import Variable

__all__ = [
    "FAILED_ALREADY",
    "Ends",
    "Outcome",
    "OwnerFinding",
    "Site",
    "count_leaked",
    "definition_of",
    "ends_of",
    "find_declaration",
    "format_location",
    "github_commands",
    "group_by_site",
    "junit_properties",
    "merge_by_variable",
    "own_frame",
    "plain_name",
    "relative_path",
    "split_by_outcome",
    "unknown_sentence",
]


class Outcome(StrEnum):
    """What became of a finding."""

    FAILED = "failed"
    WARNED = "warned"
    STILL_RUNNING = "still_running"
    UNKNOWN = "unknown"
    LIBRARY_DEFAULT = "library_default"
    KNOWN = "known"
    ALLOWED = "allowed"
    UNUSED_WAIVER = "unused_waiver"
    SETTLED = "settled"


# The reason of a finding where the warning of Python was an error.
FAILED_ALREADY = "failed by its ResourceWarning"


class OwnerFinding(NamedTuple):
    """What the check of one owner has found: its leaks, or that a marker is not needed any more.

    Attributes:
        owner: The test's id, or the fixture's name and place, or the variable.
        nodeid: The test, or the module or class of the fixture; empty for the whole session. Of a
            variable, what has used it first.
        kind: `test`, `fixture`, or `variable` for one of a module of the project.
        waited: Seconds that the sockets were given to settle.
        reason: Why it is allowed to leak, or what holds it: of a library's own pool, the variable.
        report: Has the leaks of this owner only.
        worker: The pytest-xdist worker that found it.
        defined_at: The file and line of a fixture or variable.
        last_test: The id of the test that used a fixture last: `--lf` finds the fixture by that.
    """

    owner: str
    nodeid: str
    kind: str
    outcome: Outcome
    waited: float = 0.0
    reason: str | None = None
    report: Report | None = None
    worker: str | None = None
    defined_at: str | None = None
    last_test: str | None = None

    @property
    def is_failure(self) -> bool:
        """Whether a test or a fixture fails for it."""
        return self.outcome is Outcome.FAILED

    @property
    def is_unknown(self) -> bool:
        """Whether it only says what could not be looked at; the reason is a sentence."""
        is_said = self.outcome in (Outcome.UNKNOWN, Outcome.WARNED)
        return is_said and self.report is not None and not self.report.findings

    @property
    def has_failed_already(self) -> bool:
        """Whether the test has failed for it before it was checked."""
        return self.reason == FAILED_ALREADY

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and for pytest-xdist."""
        from closewait_guard._render import to_dict

        return {
            "schema": TEST_SCHEMA,
            "owner": self.owner,
            "nodeid": self.nodeid,
            "kind": self.kind,
            "outcome": self.outcome.value,
            "waited": round(self.waited, 3),
            "reason": self.reason,
            "worker": self.worker,
            "defined_at": self.defined_at,
            "last_test": self.last_test,
            "report": to_dict(self.report) if self.report is not None else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OwnerFinding:
        """The inverse of `to_dict`."""
        from closewait_guard._render import from_dict

        values = {name: value for name, value in data.items() if name != "schema"}
        values["outcome"] = Outcome(values["outcome"])
        if values["report"] is not None:
            values["report"] = from_dict(values["report"])
        return cls(**values)


class Site(NamedTuple):
    """One line of code, and the tests and fixtures that leaked the sockets opened there."""

    frame: Frame | None
    outcome: Outcome
    leaks: tuple[Finding, ...]
    owners: tuple[OwnerFinding, ...]

    def describe_owners(self) -> str:
        """The only owner, or how many tests and fixtures."""
        if len(self.owners) == 1:
            return self.owners[0].owner
        kinds = Counter(owner.kind for owner in self.owners)
        return " and ".join(pluralize(number, kind) for kind, number in kinds.items())


def own_frame(record: SocketRecord, folder: str | Path) -> Frame | None:
    """The innermost call of the reader's own code: below the folder, and of no library."""
    for frame in record.blamed.stack:
        is_below = relative_path(frame.filename, folder) != frame.filename
        if frame.kind is FrameKind.USER and is_below:
            return frame
    return None


def find_declaration(finding: OwnerFinding, root: Path) -> tuple[str, int] | None:
    """The file of a test or fixture and its line in it; the file's first if that is not found."""
    if finding.defined_at is not None:
        file, _, line = finding.defined_at.rpartition(":")
        return file, int(line)
    path, *names = finding.nodeid.split("::")
    lines = linecache.getlines(str(root / path)) if path else []
    number = 0
    for name in names:
        words = re.compile(rf"\s*(?:class|(?:async )?def) {re.escape(name.partition('[')[0])}\b")
        after = (place for place in range(number, len(lines)) if words.match(lines[place]))
        number = next(after, number - 1) + 1
    return (str(root / path), max(number, 1)) if lines else None


def definition_of(code: CodeType | None) -> str | None:
    """The file and line of a function, below its decorators."""
    if code is None:
        return None
    lines = linecache.getlines(code.co_filename)
    numbers = range(code.co_firstlineno, len(lines) + 1)
    words = re.compile(rf"\s*(?:async )?def {re.escape(code.co_name)}\b")
    number = next((each for each in numbers if words.match(lines[each - 1])), code.co_firstlineno)
    return f"{code.co_filename}:{number}"


def group_by_site(findings: Iterable[OwnerFinding], root: Path) -> list[Site]:
    """Group leaks by line, outcome and cause; those with the most owners first.

    What one fixture or variable leaks is a group of its own: another place is to be changed.
    """
    groups: dict[object, list[tuple[Finding, OwnerFinding]]] = {}
    for finding in findings:
        wider = plain_name(finding.owner) if finding.kind != "test" else None
        for leak in finding.report.findings if finding.report is not None else ():
            cause = leak.verdict, leak.hint, wider, finding.defined_at
            groups.setdefault((_place_of(leak, root), finding.outcome, cause), []).append(
                (leak, finding)
            )
    found = [
        Site(
            _place_of(group[0][0], root),
            group[0][1].outcome,
            tuple(leak for leak, _ in group),
            tuple({id(owner): owner for _, owner in group}.values()),
        )
        for group in groups.values()
    ]
    order = list(Outcome)
    return sorted(found, key=lambda site: (order.index(site.outcome), -len(site.owners)))


def _place_of(leak: Finding, root: Path) -> Frame | None:
    record = leak.observation.record
    return own_frame(record, root) or record.site


Ends = tuple[str, str]


def ends_of(finding: Finding) -> Ends:
    """The two addresses of a connection, the own one first; of IPv4 the same within IPv6."""
    observation = finding.observation
    local, peer = observation.local or "", observation.peer or ""
    return _plain_address(local), _plain_address(peer)


def _plain_address(address: str) -> str:
    return address.replace("[::ffff:", "").replace("]", "")


def plain_name(owner: str) -> str:
    """The name of a fixture without its scope and place, or of a variable, as a pattern has it."""
    quoted = re.match(r"\w+ (?:fixture|variable) '([^']+)'", owner)
    return quoted[1] if quoted is not None else owner.partition(" ")[0]


def split_by_outcome(
    finding: OwnerFinding,
    plan: Plan,
    report: Report,
    running: Mapping[int, str],
    variables: Mapping[int, Variable],
) -> list[OwnerFinding]:
    """What the check of an owner has found, one finding for each outcome.

    Args:
        finding: What they have in common.
        plan: How the owner was checked.
        report: All that was left open.
        running: By serial, what still runs and holds it.
        variables: By serial, the global variable that keeps it in a pool.
    """
    found: dict[tuple[Outcome, Variable | None], list[Finding]] = {}
    for each in report.findings:
        serial = each.observation.record.serial
        variable = variables.get(serial)
        outcome = _outcome(plan, variable, is_running=serial in running)
        # Each variable is explained by itself.
        is_of_library = variable is not None and variable.is_of_library
        if is_of_library and outcome is not Outcome.LIBRARY_DEFAULT:
            variable = None
        found.setdefault((outcome, variable), []).append(each)
    reasons = {
        key: f"a library's own pool keeps it, {each.name}" for key, each in variables.items()
    }
    reasons |= running
    findings = []
    for (outcome, variable), leaks in found.items():
        part = finding._replace(outcome=outcome, report=replace(report, findings=tuple(leaks)))
        if variable is None:
            reason = _reason_of(leaks, reasons) or plan.allow_reason
            findings.append(part._replace(reason=reason))
        elif variable.is_of_library:
            findings.append(part._replace(reason=variable.name))
        else:
            findings.append(_of_variable(part, variable.name))
    return findings


def _outcome(plan: Plan, variable: Variable | None, *, is_running: bool) -> Outcome:
    if plan.allow_reason is not None:
        return Outcome.ALLOWED
    if variable is not None and variable.is_of_library and plan.libraries is not Mode.FAIL:
        return Outcome.LIBRARY_DEFAULT
    if is_running and plan.threads is not Mode.FAIL:
        return Outcome.STILL_RUNNING
    return Outcome.FAILED if plan.mode is Mode.FAIL else Outcome.WARNED


def _reason_of(leaks: Iterable[Finding], reasons: Mapping[int, str]) -> str | None:
    """What holds some of them, each once."""
    found = (reasons.get(each.observation.record.serial) for each in leaks)
    return "; ".join(dict.fromkeys(filter(None, found))) or None


_CLOSE_AT_THE_END = "close it at the end of the run: in a session fixture, after its `yield`"


def _of_variable(finding: OwnerFinding, name: str) -> OwnerFinding:
    """A finding of what a module of the project keeps; the reason names who opened it."""
    from closewait_guard.pytest_plugin._module_variables import find_definition

    place = find_definition(name)
    leaks = finding.report.findings if finding.report is not None else ()
    advised = tuple(replace(each, hint=_CLOSE_AT_THE_END) for each in leaks)
    return finding._replace(
        owner=f"module variable {name!r}",
        kind="variable",
        reason=finding.owner,
        defined_at=None if place is None else f"{place[0]}:{place[1]}",
        report=finding.report and replace(finding.report, findings=advised),
    )


def merge_by_variable(findings: Iterable[OwnerFinding]) -> list[OwnerFinding]:
    """Those of one variable of the project as one, however many tests have used its pool.

    Its id is that of the first test, with which it can be repeated.
    """
    merged: list[OwnerFinding] = []
    groups: dict[tuple[str, Outcome], list[OwnerFinding]] = {}
    for finding in findings:
        if finding.kind == "variable":
            groups.setdefault((finding.owner, finding.outcome), []).append(finding)
        else:
            merged.append(finding)
    for first, *others in groups.values():
        users = list(dict.fromkeys(str(each.reason) for each in (first, *others)))
        reports = [each.report for each in (first, *others) if each.report is not None]
        leaks = tuple(leak for report in reports for leak in report.findings)
        more = f" and {len(users) - 1} more" if len(users) > 1 else ""
        merged.append(
            first._replace(
                reason=f"first used by {users[0]}{more}",
                report=replace(reports[0], findings=leaks),
            )
        )
    return merged


def format_location(frame: Frame | None, root: Path) -> str:
    """File and line, as pytest writes them: from its root folder on."""
    if frame is None:
        return "an unknown place"
    return f"{relative_path(frame.filename, root)}:{frame.lineno}"


def relative_path(filename: str, folder: str | Path) -> str:
    """From a folder on; the whole path of what lies elsewhere, or in no file."""
    if filename.startswith("<"):
        return filename
    try:
        path = os.path.relpath(filename, folder)
    except ValueError:
        # Without a name, or on another drive.
        return filename
    return filename if path.startswith("..") else path


def count_leaked(leaks: Sequence[Finding], kind: str = "") -> str:
    """How many sockets, of one kind, and how many clients and event loops were not closed."""
    owners = sum(leak.observation.owner is not None for leak in leaks)
    return join_counts({f"{kind}socket": len(leaks) - owners, "unclosed object": owners})


def junit_properties(finding: OwnerFinding, root: Path) -> list[tuple[str, object]]:
    """What the XML file says of a leaking test: how many, and each verdict with its line."""
    if finding.is_unknown:
        return [("socket_leaks_unknown", escape_line(str(finding.reason)))]
    leaks = finding.report.findings if finding.report is not None else ()
    found: list[tuple[str, object]] = [("socket_leaks", len(leaks))]
    for leak in leaks:
        frame = _place_of(leak, root)
        place = f" opened at {format_location(frame, root)}" if frame is not None else ""
        found.append(("socket_leak", escape_line(f"{leak.verdict}{place}")))
    return found


def unknown_sentence(finding: OwnerFinding) -> str:
    """What could not be looked at, and in which test."""
    sentence = f"{finding.owner}: leaks unknown: {finding.reason}"
    if finding.outcome is Outcome.UNKNOWN:
        sentence += '; the run fails, unless the test is marked socket_leaks("warn")'
    return sentence


_GITHUB_LEVELS = {
    Outcome.FAILED: "error",
    Outcome.WARNED: "warning",
    Outcome.STILL_RUNNING: "warning",
}


def github_commands(findings: Iterable[OwnerFinding], root: Path) -> Iterator[str]:
    """One command of GitHub Actions for each line that leaks, and for what is unknown."""
    findings = tuple(findings)
    for finding in findings:
        if finding.is_unknown and (own := find_declaration(finding, root)) is not None:
            path = _escape(relative_path(own[0], root), ",:")
            yield f"::warning file={path},line={own[1]}::{_escape(unknown_sentence(finding))}"
    for site in group_by_site(findings, root):
        level = _GITHUB_LEVELS.get(site.outcome)
        if level is None:
            continue
        checkout = os.environ.get("GITHUB_WORKSPACE") or str(root)
        frame = own_frame(site.leaks[0].observation.record, checkout)
        # Of a file outside the checkout GitHub shows nothing.
        own = find_declaration(site.owners[0], root)
        place = (frame.filename, frame.lineno) if frame is not None else own
        if place is not None:
            path = relative_path(place[0], checkout)
            path = path if path == place[0] else path.replace("\\", "/")
            said = _message(site, root, is_here=frame is not None)
            yield f"::{level} file={_escape(path, ',:')},line={place[1]}::{said}"


def _message(site: Site, root: Path, *, is_here: bool) -> str:
    sockets = count_leaked(site.leaks) + (" opened here" if is_here else "")
    defined_at = site.owners[0].defined_at
    where = f" ({relative_path(defined_at, root)})" if defined_at is not None else ""
    hint = site.leaks[0].hint
    return _escape(f"{sockets} leaked by {site.describe_owners()}{where}; fix: {hint}")


def _escape(text: str, others: str = "") -> str:
    text = escape_line(text)
    for character in "%\r\n" + others:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
