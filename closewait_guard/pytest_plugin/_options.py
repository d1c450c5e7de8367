"""Reads options: from markers, the command line, the environment, the ini-file, in this order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from closewait_guard._config import is_anything_given, refusal, seconds

if TYPE_CHECKING:
    from closewait_guard.settings import Settings

__all__ = [
    "Mode",
    "Options",
    "Plan",
    "is_enabled",
    "load_settings",
    "plan_for",
    "read_options",
]


class Mode(StrEnum):
    """What to do about leaks."""

    OFF = "off"
    WARN = "warn"
    FAIL = "fail"


class Plan(NamedTuple):
    """How one test is to be checked.

    Attributes:
        threads: What to do about sockets that a thread or an event loop still uses.
        libraries: What to do about idle connections in a library's own pool.
        allow_reason: The reason of its `allow_socket_leaks` marker, if it has one.
    """

    mode: Mode = Mode.OFF
    grace: float = 0.5
    ignore: tuple[str, ...] = ()
    threads: Mode = Mode.WARN
    libraries: Mode = Mode.WARN
    allow_reason: str | None = None


class Options(NamedTuple):
    """What a whole run asks for.

    Attributes:
        plan: That of a test without markers.
        fails_tests: A test that leaks is reported as failed, not with an error at its teardown.
        json: The file to write.
        baseline: The file of known leaks.
        updates_baseline: It is to be written.
    """

    plan: Plan = Plan()
    fails_tests: bool = False
    json: str | None = None
    baseline: str | None = None
    updates_baseline: bool = False


def read_options(config: pytest.Config, environ: Mapping[str, str] = os.environ) -> Options:
    """Read every source; the strongest wins, except that patterns add up.

    Raises:
        pytest.UsageError: A value cannot be used; the text names where it came from.
    """
    found: dict[str, Any] = {}
    for name, parse in _PARSERS.items():
        for value, source in _read_sources(config, environ, name):
            parsed = _parse_value(parse, value, source)
            found[name] = found.get(name, ()) + parsed if name == "ignore" else parsed
    fails_tests, path = found.pop("as", False), found.pop("json", None)
    baseline, is_updated = found.pop("baseline", None), config.getoption(_UPDATE)
    if is_updated and baseline is None:
        raise pytest.UsageError("--socket-leaks-update-baseline needs --socket-leaks-baseline=FILE")
    is_off = found.get("mode", Mode.OFF) is Mode.OFF
    if baseline is not None and is_off and (is_updated or "mode" not in found):
        # A file of known leaks that nothing is compared with would look like success.
        raise pytest.UsageError("socket_leaks_baseline needs socket_leaks=warn or fail")
    return Options(Plan(**found), fails_tests, path, baseline, is_updated)


def is_enabled(config: pytest.Config) -> bool:
    """Whether all tests are to be checked.

    Raises:
        pytest.UsageError: A value cannot be used.
    """
    return read_options(config).plan.mode is not Mode.OFF


def plan_for(item: pytest.Item, plan: Plan) -> Plan:
    """The plan of one test: what its markers, and the fixture that it asks for, make of it."""
    if "closewait_guard" in getattr(item, "fixturenames", ()):
        plan = plan._replace(mode=Mode.FAIL)
    for mark in item.iter_markers("socket_leaks"):
        return _add_waiver(item, plan._replace(**_read_marker(item, mark, plan)))
    return _add_waiver(item, plan)


def _read_sources(
    config: pytest.Config, environ: Mapping[str, str], name: str
) -> Iterator[tuple[object, str]]:
    """The values of an option, the weakest source first."""
    full = "socket_leaks" if name == "mode" else f"socket_leaks_{name}"
    ini, variable, option = (
        config.getini(full),
        f"CLOSEWAIT_GUARD_{full.upper()}",
        "--" + full.replace("_", "-"),
    )
    if ini:
        yield ini, f"ini value {full} in {config.inipath or 'the command line'}"
    if variable in environ:
        yield environ[variable], f"environment variable {variable}"
    if (value := config.getoption(full)) is not None:
        yield value, option


def _parse_value(parse: Callable[[object], object], value: object, source: str) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise pytest.UsageError(f"{source}: {refusal(error, value)}") from None


def _parse_mode(value: object) -> Mode:
    try:
        return Mode(value)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError("off, warn or fail") from None


def _parse_warn_or_fail(value: object) -> Mode:
    if value not in (Mode.WARN, Mode.FAIL):
        raise ValueError("warn or fail")
    return _parse_mode(value)


def _parse_as(value: object) -> bool:
    """Whether the test itself fails."""
    if value not in ("error", "fail"):
        raise ValueError("error or fail")
    return value == "fail"


def _parse_patterns(value: object) -> tuple[str, ...]:
    """One pattern or several: from a list, or from text with a comma or a new line between."""
    parts = value.replace("\n", ",").split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError("a pattern, or a list of patterns")
    patterns = tuple(part.strip() for part in parts if part.strip())
    if not patterns:
        raise ValueError("a pattern on a file, function or module")
    return patterns


def _parse_path(value: object) -> str:
    if not value:
        raise ValueError("the path of a file")
    return str(value)


_PARSERS: dict[str, Callable[[object], object]] = {
    "mode": _parse_mode,
    "grace": seconds,
    "ignore": _parse_patterns,
    "threads": _parse_warn_or_fail,
    "libraries": _parse_warn_or_fail,
    "as": _parse_as,
    "json": _parse_path,
    "baseline": _parse_path,
}
_UPDATE = "socket_leaks_update_baseline"


def _read_marker(item: pytest.Item, mark: pytest.Mark, plan: Plan) -> dict[str, Any]:
    source = f"{item.nodeid}: marker socket_leaks"
    given = {**dict(zip(("mode",), mark.args, strict=False)), **mark.kwargs}
    unknown = set(given) - {"mode", "grace", "ignore", "threads", "libraries"}
    if unknown or len(mark.args) > 1:
        raise pytest.UsageError(
            f"{source}: takes a mode, grace, ignore, threads and libraries, not {_as_written(mark)}"
        )
    found = {
        name: _parse_value(_PARSERS[name], value, f"{source}: {name}")
        for name, value in given.items()
    }
    if "ignore" in found:
        found["ignore"] = plan.ignore + found["ignore"]
    return found


def _add_waiver(item: pytest.Item, plan: Plan) -> Plan:
    mark = item.get_closest_marker("allow_socket_leaks")
    if mark is None:
        return plan
    reason = mark.kwargs.get("reason")
    if mark.args or set(mark.kwargs) != {"reason"} or not isinstance(reason, str) or not reason:
        raise pytest.UsageError(
            f"{item.nodeid}: marker allow_socket_leaks: needs a reason, as in "
            f'allow_socket_leaks(reason="..."), not {_as_written(mark)}'
        )
    return plan._replace(allow_reason=reason)


def _as_written(mark: pytest.Mark) -> str:
    arguments = [repr(value) for value in mark.args]
    arguments += [f"{name}={value!r}" for name, value in mark.kwargs.items()]
    return f"{mark.name}({', '.join(arguments)})"


def load_settings() -> Settings | None:
    """The settings, if any are given.

    Raises:
        pytest.UsageError: One cannot be used.
    """
    if not is_anything_given(os.environ):
        return None
    from closewait_guard.exceptions import ConfigurationError
    from closewait_guard.settings import Settings

    try:
        return Settings.load()
    except ConfigurationError as error:
        raise pytest.UsageError(str(error)) from error
