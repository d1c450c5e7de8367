"""Where settings are read from, and the parsers of their values.

A parser for each kind of value takes text or Python's own values, and raises a ValueError that says
what it expects; `refusal` makes a sentence of it. The nearest project file counts, if it may be
trusted. The defaults of recording stand here because a run of tests records without loading
`Settings`.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from closewait_guard.exceptions import ConfigurationError

__all__ = [
    "ENVIRONMENT_PREFIX",
    "NO_CONFIG",
    "PAGE_TOKEN",
    "RECORDING_DEFAULTS",
    "ContextProvider",
    "Given",
    "ProjectFile",
    "Redactor",
    "context",
    "count",
    "did_you_mean",
    "from_environment",
    "from_pyproject",
    "interval",
    "is_anything_given",
    "is_without_config",
    "names",
    "number_parser",
    "probe",
    "project_file",
    "redact",
    "refusal",
    "seconds",
    "share",
    "shown",
    "signal",
    "switch",
    "unknown_name",
    "whole_number_parser",
    "window",
    "without_code",
]


ContextProvider = Callable[[], Mapping[str, object]]
Redactor = Callable[[str], str]
_Number = TypeVar("_Number", int, float)
_MAX_SECONDS = 1_000_000_000
_MAX_NAME = 80
PROBES = ("auto", "linux", "portable")


def shown(value: object) -> str:
    """A value as a sentence quotes it: its text if that is short, and whatever it is, some text.

    Example:
        >>> shown("ten"), shown(-1), len(shown("x" * 1000)), shown(10**5000)
        ("'ten'", '-1', 80, 'an int that is too long to show')
    """
    try:
        return _BRIEF.repr(value)
    except Exception:
        return f"an {type(value).__name__} that is too long to show"


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


def refusal(error: ValueError, value: object) -> str:
    """Why a parser has refused a value, and which value that was.

    Example:
        >>> refusal(ValueError("true or false"), "maybe")
        "expected true or false, got 'maybe'"
    """
    return (
        str(error) if isinstance(error, _RefusedError) else f"expected {error}, got {shown(value)}"
    )


class _RefusedError(ValueError):
    """Says more than what was expected."""


def unknown_name(kind: str, name: object, known: Iterable[str], title: str) -> str:
    """What is wrong with a name that stands for nothing, and which names there are.

    Example:
        >>> unknown_name("setting", "grase", ["grace", "probe"], "Settings")
        "unknown setting 'grase'. Did you mean 'grace'? Settings: grace, probe"
    """
    names = list(known)
    near = did_you_mean(name, names) if isinstance(name, str) else ""
    return f"unknown {kind} {shown(name)}.{near} {title}: {', '.join(names)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names as a question; empty where none is near."""
    from difflib import get_close_matches

    by_lower_case = {each.lower(): str(each) for each in known}
    # The time it takes grows with the square of the length.
    is_short = len(name) <= _MAX_NAME
    near = get_close_matches(name.lower(), by_lower_case, 1, cutoff=0.7) if is_short else []
    return f" Did you mean {by_lower_case[near[0]]!r}?" if near else ""


def number_parser(what: str, allows: Callable[[float], bool]) -> Callable[[object], float]:
    """A parser of the numbers that are allowed; `what` says in words which they are."""

    def parse(value: object) -> float:
        number = _number(value)
        if number is None or not math.isfinite(number) or not allows(number):
            raise ValueError(what)
        return number

    return parse


def _duration_parser(what: str, allows: Callable[[float], bool]) -> Callable[[object], float]:
    """Locks and sleep() take no more than some hundred years, and raise OverflowError."""
    parse_number = number_parser(what, allows)

    def parse(value: object) -> float:
        if (number := parse_number(value)) > _MAX_SECONDS:
            raise ValueError(f"a number of seconds up to {_MAX_SECONDS:,}")
        return number

    return parse


def whole_number_parser(what: str, allows: Callable[[int], bool]) -> Callable[[object], int]:
    """A parser of the whole numbers that are allowed; `what` says in words which they are."""
    parse_number = number_parser(what, lambda number: number.is_integer() and allows(int(number)))
    return lambda value: int(parse_number(value))


seconds = _duration_parser("a non-negative number of seconds", lambda number: number >= 0)
interval = _duration_parser("a positive number of seconds", lambda number: number > 0)
share = number_parser("a number above 0 and at most 1", lambda number: 0 < number <= 1)
count = whole_number_parser("a non-negative integer", lambda number: 0 <= number <= 1_000_000_000)
# A window of reports that is long enough to distinguish growth from chance, or none.
window = whole_number_parser(
    "0, or an integer from 10 to 1000", lambda number: number == 0 or 10 <= number <= 1000
)


def require_number(parse: Callable[[object], _Number], value: object, place: str) -> _Number:
    """The number that a call was given, or one sentence of what was expected."""
    try:
        return parse(None if isinstance(value, str) else value)
    except ValueError as error:
        raise ConfigurationError(f"{place}: {refusal(error, value)}") from None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not (value.isascii() and "_" not in value):
        # What Python reads as a number, and no user means as one: other scripts' digits, 1_000.
        return None
    try:
        # Minus zero is zero.
        return float(value) + 0.0
    except (ValueError, OverflowError):
        return None


def switch(value: object) -> bool:
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, str | bool | int) and word in _SWITCH:
        return _SWITCH[word]
    raise ValueError("true or false")


# True and False are equal to 1 and 0.
_SWITCH: dict[str | int, bool] = {
    **dict.fromkeys((1, "1", "true", "yes", "on"), True),
    **dict.fromkeys((0, "0", "false", "no", "off", ""), False),
}


def names(value: object) -> tuple[str, ...]:
    """Several names; in text, commas lie between them."""
    if isinstance(value, str):
        return tuple(name for part in value.split(",") if (name := part.strip()))
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError("a list of names, or a string of names separated by commas")


def signal(value: object) -> int | None:
    """A signal by number or by name, with `SIG` or without, that means nothing else to programs."""
    if value in (None, ""):
        return None
    # It makes enumerations of all signals, and few programs name one.
    from signal import Signals

    text = str(value).upper()
    number = _number(value)
    try:
        # The enumeration refuses fractions and infinity.
        by_number = Signals(number) if number is not None else None  # type: ignore[arg-type]
        found = by_number or Signals["SIG" + text.removeprefix("SIG")]
    except (KeyError, ValueError):
        wanted = "SIG" + text.removeprefix("SIG")
        near = did_you_mean(wanted, (each.name for each in Signals))
        expected = f"expected the name or number of a signal, got {shown(value)}"
        raise _RefusedError(f"{expected}.{near or ' For example, SIGPROF.'}") from None
    for names, meaning in _MEANINGS.items():
        if found.name in names:
            raise _RefusedError(f"{found.name} {meaning}; choose another, such as SIGPROF")
    return int(found)


_MEANINGS = {
    ("SIGTERM", "SIGINT"): "ends programs, and would not any more",
    ("SIGKILL", "SIGSTOP"): "cannot be handled by any program",
    ("SIGCHLD", "SIGPIPE"): "comes from the system in normal work",
    ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT"): "means that the program has crashed",
}


def probe(value: object) -> str:
    if value not in PROBES:
        raise _RefusedError(unknown_name("probe", value, PROBES, "Probes"))
    return str(value)


def context(value: object) -> ContextProvider | str | None:
    return "structlog" if value == "structlog" else _callable(value, ' or "structlog"')


def redact(value: object) -> Redactor | None:
    return _callable(value)


def _callable(value: object, otherwise: str = "") -> Callable[..., Any] | None:
    if value is None or callable(value):
        return value
    if isinstance(value, str) and ":" in value:
        return _imported(value)
    # A ValueError whatever the type: it becomes the sentence of a ConfigurationError.
    raise ValueError(f'a callable or a "module:name"{otherwise}')


def _imported(reference: str) -> Callable[..., Any]:
    module, _, path = reference.partition(":")
    try:
        found: Any = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise _RefusedError(f"cannot import {shown(reference)} ({reason})") from error
    if not callable(found):
        raise _RefusedError(f"{shown(reference)} is not callable")
    return found  # type: ignore[no-any-return]


class _RecordingSettings(NamedTuple):
    """What recording reads of `Settings`."""

    context: ContextProvider | str | None = None
    dropped_kept: int = 1000
    speedups: bool = True
    stack_depth: int = 32


RECORDING_DEFAULTS = _RecordingSettings()


_TABLE = "closewait_guard"
# A file that installs the package names it too: a table's name with a hyphen is what matters.
_NAMES = (b"closewait_guard", b"tool.closewait-guard", b'tool."closewait-guard')


def is_anything_given(environ: Mapping[str, str]) -> bool:
    """Whether the environment or the nearest project file may have settings.

    Where they have none, a program that only records does not load what parses and keeps them.
    """
    if any(n.startswith(ENVIRONMENT_PREFIX) and not n.startswith(PLUGIN_PREFIX) for n in environ):
        return True
    file = project_file(".")
    return file is not None and file.may_have_settings


class ProjectFile(NamedTuple):
    """The project file that counts.

    Attributes:
        content: What it contains; nothing where it is left out.
        left_out: Why it is left out; empty if it is not.
    """

    path: str
    content: bytes
    left_out: str = ""

    @property
    def may_have_settings(self) -> bool:
        """Whether it names the guard, or is left out."""
        return bool(self.left_out) or _has_name(self.content)


def project_file(directory: str) -> ProjectFile | None:
    """The nearest one; none where another user's has nothing to do with the guard."""
    path = _nearest(directory)
    if path is None:
        return None
    # The parsers of values do without it.
    from closewait_guard._files import UntrustedFileError, read_trusted

    try:
        return ProjectFile(path, read_trusted(path))
    except UntrustedFileError as error:
        return ProjectFile(path, b"", str(error)) if _may_have_settings(path) else None
    except OSError as error:
        return ProjectFile(path, b"", f"it cannot be read: {error.strerror}")


def _may_have_settings(path: str) -> bool:
    """Many projects name the guard among what their tests need, and set nothing."""
    from closewait_guard._files import UntrustedFileError, read_untrusted

    try:
        content = read_untrusted(path)
    except (OSError, UntrustedFileError):
        return True
    if not _has_name(content):
        return False
    import tomllib

    try:
        return any(map(_is_meant, tomllib.loads(content.decode())["tool"]))
    except KeyError:
        return False
    except (ValueError, TypeError, RecursionError):
        return True


def _nearest(directory: str) -> str | None:
    """That of a folder, or of the first above it that has one."""
    # Not by pathlib, which takes a tenth of the time that a guard takes to load.
    try:
        folder = os.path.realpath(directory)
    except (OSError, ValueError):
        return None
    while True:
        path = os.path.join(folder, "pyproject.toml")  # noqa: PTH118
        if os.path.exists(path):  # noqa: PTH110
            return path
        above = os.path.dirname(folder)  # noqa: PTH120
        if above == folder:
            return None
        folder = above


# A name, its value, and where that came from.
Given = tuple[str, object, str]

ENVIRONMENT_PREFIX = "CLOSEWAIT_GUARD_"
NO_CONFIG = f"{ENVIRONMENT_PREFIX}NO_CONFIG"
PAGE_TOKEN = f"{ENVIRONMENT_PREFIX}PAGE_TOKEN"
# Variables that begin alike and belong to the pytest plugin.
PLUGIN_PREFIX = f"{ENVIRONMENT_PREFIX}SOCKET_LEAKS"
_NO_SETTINGS = (NO_CONFIG, PAGE_TOKEN, PLUGIN_PREFIX)
# Settings whose values name code to import.
_IMPORTING = frozenset({"context", "redact"})


def is_without_config(environ: Mapping[str, str]) -> bool:
    try:
        return switch(environ.get(NO_CONFIG, "0"))
    except ValueError as error:
        why = refusal(error, environ[NO_CONFIG])
        raise ConfigurationError(f"environment variable {NO_CONFIG}: {why}") from None


def from_environment(environ: Mapping[str, str]) -> Iterator[Given]:
    for key, value in environ.items():
        if key.startswith(ENVIRONMENT_PREFIX) and not key.startswith(_NO_SETTINGS):
            name = key.removeprefix(ENVIRONMENT_PREFIX).lower()
            yield name, value, f"environment variable {key}"


def from_pyproject(directory: str, notes: list[str]) -> list[Given]:
    """The table of the nearest project file; notes say why one is left out."""
    file = project_file(directory)
    if file is None or not file.may_have_settings:
        return []
    if file.left_out:
        notes.append(f"settings in {file.path} are ignored: {file.left_out}")
        return []
    table = _table_in(file.content, file.path)
    return [
        (name, value, f"{name} in [tool.closewait_guard] of {file.path}")
        for name, value in table.items()
    ]


def _table_in(content: bytes, path: str) -> dict[str, object]:
    # Where no such file names the guard, its parser is not loaded.
    import tomllib

    try:
        table = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    for name in ("tool", "tool.closewait_guard"):
        table = table.get(name.rpartition(".")[2], {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"{path}: [{name}]: expected a table, got {shown(table)}")
        for near in filter(_is_meant, table if name == "tool" else ()):
            if near != _TABLE:
                why = f"unknown table [tool.{near}]. Did you mean [tool.{_TABLE}]?"
                raise ConfigurationError(f"{path}: {why}")
    return table


def _has_name(content: bytes) -> bool:
    return any(name in content for name in _NAMES)


def _is_meant(name: str) -> bool:
    """Whether a table is ours, or would be with another spelling of the name."""
    return name.lower().replace("-", "_") == _TABLE


def without_code(given: Iterable[Given], notes: list[str]) -> list[Given]:
    """What names no code to import; notes say what is left out."""
    kept: list[Given] = []
    for name, value, source in given:
        if name in _IMPORTING and value != "structlog":
            notes.append(f"{source} is ignored: commands run no code that a file names")
        else:
            kept.append((name, value, source))
    return kept
