"""Reporters by name: `text`, `json_lines:/var/log/leaks.jsonl`, `at_least:warning:structlog`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from closewait_guard._config import count as parse_count
from closewait_guard._config import did_you_mean, refusal, shown, unknown_name
from closewait_guard._config import seconds as parse_seconds
from closewait_guard.exceptions import CloseWaitGuardError, ConfigurationError
from closewait_guard.model import Reporter, Severity
from closewait_guard.reporters.console import console
from closewait_guard.reporters.filters import at_least, changes, every
from closewait_guard.reporters.json_lines import json_lines
from closewait_guard.reporters.logging import logging
from closewait_guard.reporters.sentry import sentry
from closewait_guard.reporters.structlog import structlog
from closewait_guard.reporters.text import text
from closewait_guard.reporters.warn import warn
from closewait_guard.reporters.webhook import slack, webhook

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

__all__ = [
    "GROUP",
    "known_names",
    "named",
]


GROUP = "closewait_guard.reporters"


def named(name: str) -> Reporter:
    """Make the reporter that a name stands for, with its argument after a colon.

    Names are those of the factories in `closewait_guard.reporters`, and of entry points in the
    group `closewait_guard.reporters`. A reporter that wraps another is written before it.

    Raises:
        ConfigurationError: No reporter has that name, or the argument is not valid.

    Example:
        >>> named("at_least:warning:changes:text")
        at_least(changes(text()))
    """
    word, colon, argument = name.strip().partition(":")
    make = _FACTORIES.get(word)
    if make is not None:
        return make(argument)
    for point in _installed():
        if point.name == word:
            return _make_installed(point, [argument] if colon else [])
    known = known_names()
    usages = ", ".join(_USAGE.get(each, each) for each in known)
    raise ConfigurationError(
        f"unknown reporter {shown(word)}.{did_you_mean(word, known)} Available: {usages}"
    )


def known_names() -> list[str]:
    """The names that `named` understands."""
    return [
        *_FACTORIES,
        *sorted({point.name for point in _installed()} - {*_FACTORIES}),
    ]


def _installed() -> EntryPoints:
    # It takes long to import, and most programs name none.
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)


def _make_installed(point: EntryPoint, arguments: list[str]) -> Reporter:
    """Call an installed factory; what it raises becomes a ConfigurationError of one sentence."""
    try:
        reporter: Reporter = point.load()(*arguments)
    except CloseWaitGuardError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"reporter {point.name!r} ({point.value}) cannot be created: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(reporter):
        raise ConfigurationError(
            f"reporter {point.name!r} ({point.value}) is not callable: {shown(reporter)}"
        )
    return reporter


def _without_argument(name: str, make: Callable[[], Reporter]) -> Callable[[str], Reporter]:
    def make_without_argument(argument: str) -> Reporter:
        if argument:
            raise ConfigurationError(f"{name} takes no argument, got {shown(argument)}")
        return make()

    return make_without_argument


def _for_people(name: str, make: Callable[..., Reporter]) -> Callable[[str], Reporter]:
    def make_for_people(argument: str) -> Reporter:
        if argument not in ("", "all"):
            raise ConfigurationError(f"{name} takes no argument except all, got {shown(argument)}")
        return make(everything=bool(argument))

    return make_for_people


def _json_lines(argument: str) -> Reporter:
    option, _, path = argument.partition(":")
    if not option.startswith(_EXAMPLES):
        option, path = "", argument
    if not path:
        raise ConfigurationError("json_lines needs a path, as in json_lines:leaks.jsonl")
    if not option:
        return json_lines(path)
    number = option.removeprefix(_EXAMPLES)
    try:
        examples = parse_count(number)
    except ValueError as error:
        raise ConfigurationError(f"json_lines: examples: {refusal(error, number)}") from None
    return json_lines(path, examples=examples)


_EXAMPLES = "examples="


def _logging(argument: str) -> Reporter:
    return logging(argument or None)


def _changes(argument: str) -> Reporter:
    return changes(_make_wrapped("changes", argument))


def _at_least(argument: str) -> Reporter:
    severity, _, rest = argument.partition(":")
    if severity not in tuple(Severity):
        why = unknown_name("severity", severity, Severity, "Severities")
        raise ConfigurationError(f"at_least: {why}")
    return at_least(severity, _make_wrapped(f"at_least:{severity}", rest))


def _every(argument: str) -> Reporter:
    number, _, rest = argument.partition(":")
    try:
        seconds = parse_seconds(number)
    except ValueError as error:
        raise ConfigurationError(f"every: {refusal(error, number)}") from None
    return every(seconds, _make_wrapped(f"every:{number}", rest))


def _make_wrapped(before: str, rest: str) -> Reporter:
    if not rest:
        raise ConfigurationError(f"{before} needs another reporter, as in {before}:text")
    return named(rest)


# How to write a name that takes an argument.
_USAGE = {
    "text": "text[:all]",
    "console": "console[:all]",
    "logging": "logging[:LOGGER]",
    "json_lines": "json_lines:[examples=N:]PATH",
    "changes": "changes:REPORTER",
    "at_least": "at_least:SEVERITY:REPORTER",
    "every": "every:SECONDS:REPORTER",
    "webhook": "webhook:URL",
    "slack": "slack:URL",
}

_FACTORIES: dict[str, Callable[[str], Reporter]] = {
    "text": _for_people("text", text),
    "console": _for_people("console", console),
    "structlog": _without_argument("structlog", structlog),
    "logging": _logging,
    "json_lines": _json_lines,
    "warn": _without_argument("warn", warn),
    "sentry": _without_argument("sentry", sentry),
    "webhook": webhook,
    "slack": slack,
    "changes": _changes,
    "at_least": _at_least,
    "every": _every,
}
