"""Every setting, its default and its meaning, written once.

Values come from keywords, from the environment (`CLOSEWAIT_GUARD_GRACE=2`), from
`[tool.closewait_guard]` in the nearest `pyproject.toml`, and from the defaults, in this order.
A project file that another user may have written is left out, and the settings say so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from closewait_guard import _config as parse
from closewait_guard._config import (
    RECORDING_DEFAULTS,
    ContextProvider,
    Given,
    Redactor,
    from_environment,
    from_pyproject,
    is_without_config,
    shown,
    unknown_name,
    without_code,
)
from closewait_guard._cpython import refuse_changes
from closewait_guard._enums import Scalar
from closewait_guard.exceptions import ConfigurationError

__all__ = [
    "ContextProvider",
    "Redactor",
    "Settings",
]


def _setting(
    default: object, parse: Callable[[object], object], meaning: str, *, may_be_secret: bool = False
) -> Any:
    return field(
        default=default, metadata={"parse": parse, "help": meaning}, repr=not may_be_secret
    )


class _Provenance:
    """Where the values of settings came from. No part of what they are: equal ones may differ."""

    __slots__ = ("_notes", "_sources")

    _notes: tuple[str, ...]
    _sources: Mapping[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out when the settings were read, one sentence each."""
        return getattr(self, "_notes", ())

    def source_of(self, name: str) -> str:
        """Where a value came from, for who has to change it.

        Example:
            >>> Settings(grace=2).source_of("grace")
            'Settings(grace=...)'
        """
        sources: Mapping[str, str] = getattr(self, "_sources", {})
        return sources.get(name, f"Settings({name}=...)")

    def is_given(self, name: str) -> bool:
        """Whether a value was read from somewhere, or given as a keyword."""
        return name in getattr(self, "_sources", {})

    def _remember(self, sources: Mapping[str, str], notes: tuple[str, ...]) -> None:
        object.__setattr__(self, "_sources", sources)
        object.__setattr__(self, "_notes", notes)


@refuse_changes
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(_Provenance):
    """How a guard scans and judges. Immutable; every field has a default.

    Example:
        >>> Settings(grace=2, stack_depth=0).grace
        2.0
    """

    grace: float = _setting(
        1.0, parse.seconds, "Seconds that a socket may stay open after the peer has closed it."
    )
    stack_depth: int = _setting(
        RECORDING_DEFAULTS.stack_depth,
        parse.count,
        "Frames to record per socket, 0 for none. Between user code and the socket lie 1 call "
        "with create_connection, 13 with httpx and urllib, 14 with requests, and 21 with boto3; "
        "32 leaves room for ten calls of the program's own. A deep limit does not make a shallow "
        "stack slower.",
    )
    context: ContextProvider | str | None = _setting(
        RECORDING_DEFAULTS.context,
        parse.context,
        'A callable that returns a mapping to record with each socket, or "structlog" for the '
        "context variables bound there.",
    )
    redact: Redactor | None = _setting(
        None,
        parse.redact,
        "A callable from text to text, applied to addresses, labels, context, names of threads and "
        "tasks, source lines, holders, alerts, host and command before anything is reported.",
    )
    probe: str = _setting("auto", parse.probe, "How to ask the kernel: auto, linux or portable.")
    half_close_idle: float = _setting(
        30.0,
        parse.seconds,
        "Seconds after its last send for which a program that still sends to a peer that has "
        "closed its side counts as serving a half-closed connection.",
    )
    count_warning: int = _setting(
        100, parse.count, "More sockets than this in CLOSE_WAIT raise the alert `count`."
    )
    fd_share_critical: float = _setting(
        0.5, parse.share, "A larger share of the descriptor limit in CLOSE_WAIT is critical."
    )
    age_warning: float = _setting(
        300.0, parse.seconds, "Seconds in CLOSE_WAIT that raise the alert `age`."
    )
    age_critical: float = _setting(
        1800.0, parse.seconds, "Seconds in CLOSE_WAIT that are critical."
    )
    checkout_grace: float = _setting(
        300.0,
        parse.seconds,
        "Seconds that a connection may be out of its pool, and unused, before it is reported as "
        "not given back.",
    )
    unanswered_grace: float = _setting(
        60.0,
        parse.seconds,
        "Seconds for which a peer may leave unacknowledged what was sent to it, before the "
        "connection is reported as unanswered; Linux only.",
    )
    fd_used_critical: float = _setting(
        0.8,
        parse.share,
        "A larger share of the descriptor limit in use, by anything, is critical.",
    )
    growth_window: int = _setting(
        30,
        parse.window,
        "Reports over which a site must keep growing for a growth or churn alert; slower growth is "
        "detected over twice, four times ... as many. 0 turns these alerts off.",
    )
    interval: float = _setting(60.0, parse.interval, "Seconds between two reports of a monitor.")
    heartbeat: float = _setting(
        3600.0,
        parse.seconds,
        "Seconds without news after which the reporters text and console of a monitor write one "
        "line that nothing has changed. Of other reports they write only what has; with 0, all.",
    )
    reporters: tuple[str, ...] = _setting(
        (),
        parse.names,
        "Reporters by name, for a program that names none itself: text, console, structlog, "
        "logging, json_lines:PATH, warn, sentry, webhook:URL, slack:URL, or another that is "
        "installed.",
        may_be_secret=True,
    )
    reporter_timeout: float = _setting(
        10.0,
        parse.interval,
        "Seconds that a reporter may take before the others get the report without waiting for it.",
    )
    at_exit: bool = _setting(
        True,  # noqa: FBT003 - a default like the others
        parse.switch,
        "Whether a monitor reports once more at exit.",
    )
    control: bool = _setting(
        False,  # noqa: FBT003 - a default like the others
        parse.switch,
        "Whether the process answers `closewait-guard report`, for its own user and root; under "
        "`run` it does unless this is set to false.",
    )
    signal: int | None = _setting(
        None,
        parse.signal,
        "A signal, such as SIGPROF, on which install() prints a report to stderr.",
    )
    dropped_kept: int = _setting(
        RECORDING_DEFAULTS.dropped_kept,
        parse.count,
        "Records to keep of sockets that were garbage-collected while open.",
    )
    speedups: bool = _setting(
        RECORDING_DEFAULTS.speedups,
        parse.switch,
        "Whether to record creations in C, where the package has its extension, instead of Python.",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            source = f"Settings({item.name}=...)"
            value = _parse(item.name, getattr(self, item.name), source)
            object.__setattr__(self, item.name, value)
        _require_order({item.name: getattr(self, item.name) for item in fields(self)}, {})

    @classmethod
    def load(
        cls,
        overrides: Mapping[str, object] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        directory: str | os.PathLike[str] | None = None,
        code_from_file: bool = True,
    ) -> Settings:
        """Read the settings from every source; keywords win over the environment, and so on.

        Args:
            overrides: Values that win over every other source, as keywords do.
            environ: The environment to read instead of the process's own.
            directory: Where to begin the search for a `pyproject.toml`; here by default.
            code_from_file: Whether a `pyproject.toml` may name code to import, as for `redact`.

        Raises:
            ConfigurationError: A value cannot be used, or a name is unknown.
        """
        environ = os.environ if environ is None else environ
        notes: list[str] = []
        given = (
            [] if is_without_config(environ) else from_pyproject(os.fspath(directory or "."), notes)
        )
        if not code_from_file:
            given = without_code(given, notes)
        given += from_environment(environ)
        given += [(name, value, f"keyword {name}") for name, value in (overrides or {}).items()]
        values, sources = _parse_all(given), {name: source for name, _, source in given}
        _require_order({name: _FIELDS[name].default for name in _FIELDS} | values, sources)
        settings = cls(**values)
        settings._remember(sources, tuple(notes))
        return settings

    @classmethod
    def resolve(
        cls, settings: Settings | None, overrides: Mapping[str, object] | None = None
    ) -> Settings:
        """What a caller means by settings, or none, and keywords that win over them."""
        if settings is None:
            return cls.load(overrides)
        if not isinstance(settings, Settings):
            raise ConfigurationError(f"settings: expected Settings, got {shown(settings)}")
        return settings.with_overrides(**(overrides or {}))

    def with_overrides(self, **overrides: object) -> Settings:
        """The same settings with some replaced.

        Example:
            >>> Settings(grace=2).with_overrides(stack_depth=0).grace
            2.0
        """
        given = [(name, value, f"keyword {name}") for name, value in overrides.items()]
        values = _parse_all(given)
        sources = {**getattr(self, "_sources", {}), **{name: source for name, _, source in given}}
        _require_order({name: getattr(self, name) for name in _FIELDS} | values, sources)
        settings = replace(self, **values)
        settings._remember(sources, self.notes)
        return settings

    def describe(self) -> dict[str, Scalar]:
        """The values as plain data, callables by their name."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    def changes_to(self, other: Settings) -> Iterator[str]:
        """The settings that differ from those of the other, each with both values.

        Example:
            >>> list(Settings(grace=2).changes_to(Settings(grace=3)))
            ['grace: 2.0 -> 3.0']
        """
        for item in fields(self):
            now, then = getattr(self, item.name), getattr(other, item.name)
            if now != then:
                yield f"{item.name}: {_plain(now)} -> {_plain(then)}"


# Of where reports are posted to: all but the host may be secret.
_ADDRESS = re.compile(r"(https?://)(?:[^/@\s'\"]*@)?([^/\s'\"]*)[^\s'\"]*")


def _plain(value: object) -> Scalar:
    return getattr(value, "__qualname__", None) or (
        value if isinstance(value, Scalar) else _ADDRESS.sub(r"\1\2/...", repr(value))
    )


def _parse_all(given: Iterable[Given]) -> dict[str, Any]:
    return {name: _parse(name, value, source) for name, value, source in given}


def _require_order(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Refuse an age that is a warning and has been critical before; the default may be that."""
    warning, critical = (
        _with_source(name, values[name], sources) for name in ("age_warning", "age_critical")
    )
    if values["age_warning"] > values["age_critical"] and not warning.endswith(_DEFAULT):
        raise ConfigurationError(f"{warning} is above {critical}")


_DEFAULT = "(the default)"


def _with_source(name: str, value: float, sources: Mapping[str, str]) -> str:
    keyword = f"Settings({name}=...)"
    source = sources.get(name, keyword)
    if source == keyword and value == _FIELDS[name].default:
        return f"{name} {value:g} {_DEFAULT}"
    return f"{name} {value:g} ({source.removeprefix(f'{name} in ')})"


def _parse(name: str, value: object, source: str) -> object:
    item = _FIELDS.get(name)
    if item is None:
        raise ConfigurationError(f"{source}: {unknown_name('setting', name, _FIELDS, 'Settings')}")
    try:
        return item.metadata["parse"](value)
    except ValueError as error:
        raise ConfigurationError(f"{source}: {parse.refusal(error, value)}") from None


_FIELDS = {item.name: item for item in fields(Settings) if item.default is not MISSING}
