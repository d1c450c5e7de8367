"""Leaks that are known: a file lists them, and the tests that have them do not fail.

A leak is known by its place, which is the function that opened the socket and the libraries that it
called, and by its tests: another that calls the same function may have to close what it gets. Lines
shift, and are no part of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from closewait_guard._format import pluralize
from closewait_guard.pytest_plugin._options import Options

if TYPE_CHECKING:
    from closewait_guard.model import Finding, Frame, SocketRecord
    from closewait_guard.pytest_plugin._findings import OwnerFinding

__all__ = [
    "Baseline",
    "KnownLeak",
    "Place",
    "is_defined",
    "leaks_by_place",
    "load_baseline",
    "plain_id",
]

_FORMAT = "closewait-guard-baseline/"
_SCHEMA = f"{_FORMAT}1"
_OPTION = "socket_leaks_baseline"
_VARIABLE = f"CLOSEWAIT_GUARD_{_OPTION.upper()}"


class Place(NamedTuple):
    """Where a leak is to be fixed.

    Attributes:
        file: From the rootdir on.
        inside: The function, and for which wider fixture; or the wider fixture, or the variable,
            that keeps what tests open.
        via: The libraries that it called, the outermost first.
        what: A socket, or what else was not closed or given back.
    """

    file: str
    inside: str
    via: str
    what: str

    @property
    def is_counted(self) -> bool:
        """Whether it has as many sockets however many tests run."""
        return not self.inside.startswith(("fixture ", "variable "))

    def describe(self) -> str:
        """All of it in one line."""
        via = f" via {self.via}" if self.via else ""
        return f"{self.file}: {self.what} of {self.inside}{via}"


class KnownLeak(NamedTuple):
    """One entry of the file.

    Attributes:
        most: How many one test or fixture may have; None where that grows with the tests.
        tests: Those that had it, without their parameters. Of a fixture or variable, some of those
            that used it.
    """

    place: Place
    most: int | None
    tests: frozenset[str]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file."""
        file, inside, via, what = self.place
        found = {"file": file, "in": inside, "via": via, "what": what, "count": self.most}
        # What says nothing is left out.
        return {key: value for key, value in found.items() if value} | {"tests": sorted(self.tests)}

    @classmethod
    def from_dict(cls, data: Any) -> KnownLeak:
        """The inverse.

        Raises:
            ValueError: It is no such entry.
        """
        if not isinstance(data, dict):
            raise ValueError("is not an object")
        texts = [data.get(key, "") for key in ("file", "in", "via", "what")]
        count, tests = data.get("count"), data.get("tests")
        if not all(isinstance(text, str) for text in texts) or not all(texts[1::2]):
            raise ValueError("needs names as in and what, and may have file and via")
        if count is not None and (type(count) is not int or count < 1):
            raise ValueError("has no number as count")
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise ValueError("needs a list of names as tests")
        return cls(Place(*map(str, texts)), count, frozenset(tests))

    def merge(self, other: KnownLeak) -> KnownLeak:
        """Both, of one place."""
        is_counted = self.most is not None and other.most is not None
        most = max(self.most or 0, other.most or 0) if is_counted else None
        return self._replace(most=most, tests=self.tests | other.tests)


class Baseline:
    """The leaks that a file allows.

    Args:
        path: The file.
        name: As it was given.
        root: What the paths in it are relative to.
        leaks: What it lists.
        is_updated: It is written again, so that every leak counts as known.

    Attributes:
        collected: The tests that there are, as far as they were collected, without parameters.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        root: Path,
        leaks: Iterable[KnownLeak],
        *,
        is_updated: bool,
    ) -> None:
        self.path = path
        self.name = name
        self.root = root
        self.is_updated = is_updated
        self.leaks: dict[Place, KnownLeak] = {}
        for each in leaks:
            known = self.leaks.get(each.place)
            self.leaks[each.place] = each if known is None else known.merge(each)
        self.collected: set[str] = set()
        self._moved: dict[Place, KnownLeak | None] = {}
        # By place and name, the old name of a test.
        self._renamed: dict[tuple[Place, str], str] = {}

    def find(self, place: Place) -> KnownLeak | None:
        """The entry of a place, or of what seems to have been renamed to it."""
        if place in self.leaks:
            return self.leaks[place]
        if place not in self._moved:
            taken = [each for each in self._moved.values() if each is not None]
            free = (each for each in self.leaks.values() if each not in taken)
            moved = (each for each in free if _has_moved(each.place, place, self.root))
            self._moved[place] = next(moved, None)
        return self._moved[place]

    def split(self, findings: Iterable[OwnerFinding]) -> list[OwnerFinding]:
        """Take the known leaks out of what fails a test, or would."""
        return [part for finding in findings for part in self._split(finding)]

    def _split(self, finding: OwnerFinding) -> Iterator[OwnerFinding]:
        from closewait_guard.pytest_plugin._findings import Outcome

        report = finding.report
        judged = finding.outcome in (Outcome.FAILED, Outcome.WARNED)
        if not judged or report is None or not report.findings:
            yield finding
            return
        known: list[Finding] = []
        new: list[Finding] = []
        notes = [finding.reason]
        for place, leaks in leaks_by_place(finding, self.root).items():
            why_new = None if self.is_updated else self._why_new(finding, place, len(leaks))
            if why_new is None:
                known += leaks
            else:
                new += leaks
                notes.append(why_new)
        if new:
            reason = "; ".join(note for note in notes if note) or None
            yield finding._replace(reason=reason, report=replace(report, findings=tuple(new)))
        if known:
            yield finding._replace(
                outcome=Outcome.KNOWN, report=replace(report, findings=tuple(known))
            )

    def _why_new(self, finding: OwnerFinding, place: Place, count: int) -> str | None:
        """None for a known leak; else what is known there, which may be nothing."""
        entry = self.find(place)
        if entry is None:
            return ""
        if entry.most is not None and count > entry.most:
            return f"{self.name} allows {entry.most} of these in {place.inside}"
        test = plain_id(finding.nodeid)
        if finding.kind != "test" or test in entry.tests or self._has_old_name(entry, test):
            return None
        others = pluralize(len(entry.tests), "other test")
        return f"{self.name} allows this of {others}: of {place.inside}"

    def _has_old_name(self, entry: KnownLeak, test: str) -> bool:
        """Whether a test is listed that is there no more: this one may be the same."""
        key = entry.place, test
        if key not in self._renamed:
            free = entry.tests - {
                old for (place, _), old in self._renamed.items() if place == key[0]
            }
            missing = [each for each in sorted(free) if self._is_missing(each)]
            if not missing:
                return False
            self._renamed[key] = missing[0]
        return True

    def _is_missing(self, test: str) -> bool:
        file, _, name = test.partition("::")
        path = self.root / file
        return not path.exists() or (test not in self.collected and not is_defined(path, name))

    def to_data(self) -> dict[str, Any]:
        """What a worker of pytest-xdist needs to know of it."""
        return {"name": self.name, "leaks": [each.to_dict() for each in self.leaks.values()]}

    def write(self, leaks: Iterable[KnownLeak]) -> None:
        """Replace the file by one that lists these: all of it, or nothing.

        Raises:
            OSError: It cannot be written.
        """
        entries = [each.to_dict() for each in sorted(leaks, key=lambda each: each.place)]
        text = json.dumps({"schema": _SCHEMA, "leaks": entries}, indent=2, ensure_ascii=False)
        # In a string of JSON, what replaces half a surrogate pair is the escape for it.
        _replace_file(self.path.resolve(), f"{text}\n".encode("utf-8", "backslashreplace"))


def _replace_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else None
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("xb") as file:
            file.write(content)
        if mode is not None:
            part.chmod(mode)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load_baseline(config: pytest.Config, options: Options) -> Baseline:
    """Read the file of this run; a worker of pytest-xdist gets what the controller has read.

    Raises:
        pytest.UsageError: There is none, or it is something else.
    """
    root, is_updated = config.rootpath, options.updates_baseline
    sent = getattr(config, "workerinput", {}).get("socket_leaks_baseline")
    if sent is not None:
        known = map(KnownLeak.from_dict, sent["leaks"])
        return Baseline(root, sent["name"], root, known, is_updated=is_updated)
    name = str(options.baseline)
    path = _folder_of(config) / name
    try:
        leaks = _parse(path.read_text("utf-8"))
    except FileNotFoundError:
        if not is_updated:
            raise pytest.UsageError(
                f"socket_leaks_baseline: {path} does not exist: "
                "--socket-leaks-update-baseline writes it"
            ) from None
        leaks = []
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise pytest.UsageError(f"socket_leaks_baseline: {path}: {reason}") from None
    return Baseline(path, name, root, leaks, is_updated=is_updated)


def _folder_of(config: pytest.Config) -> Path:
    """What the name of the file is relative to: an ini-file holds wherever pytest is started."""
    is_given = config.getoption(_OPTION) is not None or _VARIABLE in os.environ
    if is_given or config.inipath is None:
        return config.invocation_params.dir
    return config.inipath.parent


def _parse(text: str) -> list[KnownLeak]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, str) or not schema.startswith(_FORMAT):
        raise ValueError("it is not a list of known leaks")
    if schema != _SCHEMA:
        raise ValueError(f"its format {schema} is unknown to this version of closewait-guard")
    entries = data.get("leaks")
    if not isinstance(entries, list):
        raise ValueError("it has no list of leaks")
    found = []
    for number, entry in enumerate(entries, start=1):
        try:
            found.append(KnownLeak.from_dict(entry))
        except ValueError as error:
            raise ValueError(f"entry {number} of its leaks {error}") from None
    return found


def leaks_by_place(finding: OwnerFinding, root: Path) -> Mapping[Place, list[Finding]]:
    """The leaks of one test, fixture or variable, by where to fix them."""
    found: dict[Place, list[Finding]] = {}
    leaks = finding.report.findings if finding.report is not None else ()
    for leak in leaks:
        found.setdefault(_place_of(finding, leak, root), []).append(leak)
    return found


def _place_of(finding: OwnerFinding, leak: Finding, root: Path) -> Place:
    from closewait_guard.pytest_plugin._attribution import OPENED_IN
    from closewait_guard.pytest_plugin._findings import own_frame, relative_path

    observation = leak.observation
    what = "socket" if observation.owner is None else observation.owner.name
    if observation.checkout is not None:
        what = observation.checkout.library
    frame = own_frame(observation.record, root)
    file, owner = _owner_of(finding, root)
    is_kept = finding.kind != "test" and (
        observation.record.context.get(OPENED_IN) != finding.owner
    )
    if frame is None or is_kept:
        # No line of the project, or that of any test which has used it.
        return Place(file, owner, "", what)
    file = relative_path(frame.filename, root).replace("\\", "/")
    inside = _function_of(frame) + ("" if finding.kind == "test" else f" for {owner}")
    return Place(file, inside, _libraries_of(observation.record, frame), what)


def _owner_of(finding: OwnerFinding, root: Path) -> tuple[str, str]:
    from closewait_guard.pytest_plugin._findings import plain_name, relative_path

    if finding.kind == "test":
        file, _, test = plain_id(finding.nodeid).partition("::")
        return file, f"test {test}"
    file = (finding.defined_at or "").rpartition(":")[0]
    name = plain_name(finding.owner) if "'" in finding.owner else finding.owner
    return relative_path(file, root).replace("\\", "/") if file else "", f"{finding.kind} {name}"


def _function_of(frame: Frame) -> str:
    # Before 3.12 a comprehension is a function; a generator expression still is.
    name = re.sub(r"\.<locals>\.<(?:listcomp|setcomp|dictcomp|genexpr)>$", "", frame.function)
    return f"{name}()".replace(">()", ">")


def _libraries_of(record: SocketRecord, frame: Frame) -> str:
    from closewait_guard._format import unique
    from closewait_guard.model import FrameKind

    inner = record.blamed.stack[: record.blamed.stack.index(frame)]
    names = [each.module.partition(".")[0] for each in inner if each.kind is FrameKind.LIBRARY]
    # Whose code was made at runtime, as by dataclasses, depends on how pytest is started.
    return " > ".join(unique(name for name in reversed(names) if not name.startswith("<")))


def plain_id(nodeid: str) -> str:
    """The id of a test without its parameters, which may differ from run to run."""
    file, colons, name = nodeid.partition("::")
    return f"{file}{colons}{name.partition('[')[0]}"


def _has_moved(old: Place, new: Place, root: Path) -> bool:
    """Whether all speaks for it that a function, or its file, has another name now."""
    if old.what != new.what or old.via != new.via:
        return False
    if old.inside == new.inside:
        return old.file != new.file and not (root / old.file).exists()
    functions = old.inside.endswith("()") and new.inside.endswith("()")
    return functions and old.file == new.file and not is_defined(root / old.file, old.inside)


def is_defined(path: Path, name: str) -> bool:
    """Whether a file has a function of this name; where that cannot be read, it may have."""
    last = re.split(r"\.|::", name.removesuffix("()"))[-1]
    if not last.isidentifier():
        return True
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        return True
    return re.search(rf"\bdef\s+{last}\b", text) is not None
