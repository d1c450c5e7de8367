"""Every setting, its default and its meaning, written once.

Values come from keywords, from the environment (`CLOSEWAIT_GUARD_GRACE=2`), from
`[tool.closewait_guard]` in the nearest `pyproject.toml`, and from the defaults, in this order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from closewait_guard import _defaults as defaults
from closewait_guard import _parse as parse
from closewait_guard._parse import ContextProvider, Redactor
from closewait_guard._pyproject import nearest_pyproject
from closewait_guard._vocabulary import Scalar
from closewait_guard.exceptions import ConfigurationError

__all__ = ["ContextProvider", "Redactor", "Settings"]

ENVIRONMENT_PREFIX = "CLOSEWAIT_GUARD_"
# Variables that begin alike and belong to the pytest plugin.
PLUGIN_PREFIX = f"{ENVIRONMENT_PREFIX}SOCKET_LEAKS"


def _setting(default: object, parse: Callable[[object], object], meaning: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a guard looks and judges. Immutable; every field has a default.

    Example:
        >>> Settings(grace=2, stack_depth=0).grace
        2.0
    """

    grace: float = _setting(
        1.0, parse.seconds, "Seconds that a program has to close a socket before it is accused."
    )
    stack_depth: int = _setting(
        defaults.stack_depth,
        parse.count,
        "Calls to remember of each birth. Between user code and the socket lie 1 call with "
        "create_connection, 13 with httpx and urllib, 14 with requests, and 21 with boto3; 32 "
        "leaves room for ten calls of the program's own. A shallow stack costs no more for a deep "
        "limit. 0 remembers none.",
    )
    context: ContextProvider | str | None = _setting(
        defaults.context,
        parse.context,
        'A callable that returns a mapping to keep with each birth, or "structlog" for the '
        "context variables bound there.",
    )
    redact: Redactor | None = _setting(
        None,
        parse.redact,
        "A callable from text to text, applied to addresses, labels, context, source lines and "
        "holders before anything is reported.",
    )
    probe: str = _setting("auto", parse.probe, "How to ask the kernel: auto, linux or portable.")
    half_close_idle: float = _setting(
        30.0,
        parse.seconds,
        "Seconds after its last sending for which a program that goes on sending to a peer that "
        "has closed its side is taken to be serving a half-closed connection.",
    )
    count_warning: int = _setting(
        100, parse.count, "More sockets than this in CLOSE_WAIT make each a warning."
    )
    fd_share_critical: float = _setting(
        0.5, parse.share, "A greater share of the descriptor limit in CLOSE_WAIT is critical."
    )
    age_warning: float = _setting(
        300.0, parse.seconds, "Seconds in CLOSE_WAIT that make a warning."
    )
    age_critical: float = _setting(
        1800.0, parse.seconds, "Seconds in CLOSE_WAIT that are critical."
    )
    fd_used_critical: float = _setting(
        0.8,
        parse.share,
        "A greater share of the descriptor limit in use, for anything, is critical.",
    )
    growth_window: int = _setting(
        30,
        parse.window,
        "Reports over which a site must keep growing for a growth or churn alert; slower growth is "
        "looked for over twice, four times ... as many. 0 looks for none.",
    )
    interval: float = _setting(60.0, parse.interval, "Seconds between two reports of a monitor.")
    reporters: tuple[str, ...] = _setting(
        (),
        parse.names,
        "Who is told, by name, when the program names nobody itself: text, console, structlog, "
        "logging, json_lines:PATH, warn, or another that is installed.",
    )
    reporter_timeout: float = _setting(
        10.0,
        parse.interval,
        "Seconds that a reporter may take before the others are told without waiting for it.",
    )
    at_exit: bool = _setting(
        True,  # noqa: FBT003 - a default like the others
        parse.switch,
        "Whether a monitor reports once more at exit.",
    )
    signal: int | None = _setting(
        None,
        parse.signal,
        "A signal, such as SIGUSR1, upon which install() prints a report to stderr.",
    )
    dropped_kept: int = _setting(
        defaults.dropped_kept,
        parse.count,
        "Records to keep of sockets that were garbage-collected while open.",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            source = f"Settings({item.name}=...)"
            value = _parsed(item.name, getattr(self, item.name), source)
            object.__setattr__(self, item.name, value)

    @classmethod
    def load(
        cls,
        overrides: Mapping[str, object] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> Settings:
        """Read the settings from every source; keywords win over the environment, and so on.

        Args:
            overrides: Values that win over every other source, as keywords do.
            environ: The environment to read instead of the process's own.
            directory: Where to begin the search for a `pyproject.toml`; here by default.

        Raises:
            ConfigurationError: A value cannot be used, or a name is unknown.
        """
        values: dict[str, Any] = {}
        values |= _checked(_from_pyproject(Path(directory or ".")))
        values |= _checked(_from_environment(os.environ if environ is None else environ))
        values |= _checked(
            (name, value, f"keyword {name}") for name, value in (overrides or {}).items()
        )
        return cls(**values)

    @classmethod
    def given(
        cls, settings: Settings | None, overrides: Mapping[str, object] | None = None
    ) -> Settings:
        """What a caller means by settings, or none, and keywords that win over them."""
        if settings is None:
            return cls.load(overrides)
        if not isinstance(settings, Settings):
            raise ConfigurationError(f"settings must be a Settings, not {settings!r}")
        return settings.replaced(**(overrides or {}))

    def replaced(self, **overrides: object) -> Settings:
        """The same settings but for some.

        Example:
            >>> Settings(grace=2).replaced(stack_depth=0).grace
            2.0
        """
        values = _checked((name, value, f"keyword {name}") for name, value in overrides.items())
        return replace(self, **values)  # type: ignore[arg-type]

    def source_of(self, name: str) -> str:
        """Where a value came from, for who has to change it.

        Example:
            >>> Settings(grace=2).source_of("grace")
            'Settings(grace=...)'
        """
        value, found = getattr(self, name), f"Settings({name}=...)"
        # A source that cannot be read has given nothing.
        with suppress(ConfigurationError):
            for other, text, source in (*_from_pyproject(Path()), *_from_environment(os.environ)):
                if other == name and _parsed(name, text, source) == value:
                    found = source
        return found

    def describe(self) -> dict[str, Scalar]:
        """The values as plain data, callables by their name."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}


def _plain(value: object) -> Scalar:
    return getattr(value, "__qualname__", None) or (
        value if isinstance(value, Scalar) else repr(value)
    )


_Given = Iterator[tuple[str, object, str]]


def _checked(given: _Given) -> dict[str, object]:
    return {name: _parsed(name, value, source) for name, value, source in given}


def _parsed(name: str, value: object, source: str) -> object:
    item = _FIELDS.get(name)
    if item is None:
        known = ", ".join(_FIELDS)
        raise ConfigurationError(f"{source}: no setting is called {name!r}; known are {known}")
    try:
        return item.metadata["parse"](value)
    except ValueError as error:
        raise ConfigurationError(f"{source}: {name} must be {error}, not {value!r}") from None


_FIELDS = {item.name: item for item in fields(Settings) if item.default is not MISSING}


def _from_environment(environ: Mapping[str, str]) -> _Given:
    for key, value in environ.items():
        if key.startswith(ENVIRONMENT_PREFIX) and not key.startswith(PLUGIN_PREFIX):
            name = key.removeprefix(ENVIRONMENT_PREFIX).lower()
            yield name, value, f"environment variable {key}"


def _from_pyproject(directory: Path) -> _Given:
    path = nearest_pyproject(directory)
    if path is None:
        return
    # Where there is no such file, nobody waits for its parser.
    import tomllib

    try:
        table = tomllib.loads(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    for name in ("tool", "tool.closewait_guard"):
        table = table.get(name.rpartition(".")[2], {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"{path}: [{name}] must be a table, not {table!r}")
    for name, value in table.items():
        yield name, value, f"[tool.closewait_guard] in {path}"
