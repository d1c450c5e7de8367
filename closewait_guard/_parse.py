"""What a setting's value may be: a parser for each kind, from text or from Python's own values.

A value that will not do raises a ValueError that says what it must be.
"""

from __future__ import annotations

import math
import reprlib
import signal as signals
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = [
    "ContextProvider",
    "Redactor",
    "context",
    "count",
    "interval",
    "names",
    "probe",
    "redact",
    "seconds",
    "share",
    "shown",
    "signal",
    "switch",
    "window",
]

ContextProvider = Callable[[], Mapping[str, object]]
Redactor = Callable[[str], str]
_MOST_SECONDS = 1_000_000_000
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


def seconds(value: object) -> float:
    number = _number(value)
    if number is None or not math.isfinite(number) or number < 0:
        raise ValueError("a number of seconds, zero or more")
    return _that_can_be_waited_for(number)


def interval(value: object) -> float:
    number = _number(value)
    if number is None or not math.isfinite(number) or number <= 0:
        raise ValueError("a number of seconds above zero")
    return _that_can_be_waited_for(number)


def _that_can_be_waited_for(number: float) -> float:
    """Locks and sleep() take no more than some hundred years, and raise OverflowError."""
    if number > _MOST_SECONDS:
        raise ValueError(f"a number of seconds up to {_MOST_SECONDS:,}")
    return number


def count(value: object) -> int:
    number = _number(value)
    if number is None or not number.is_integer() or not 0 <= number <= 1_000_000_000:
        raise ValueError("a whole number, zero or more")
    return int(number)


def window(value: object) -> int:
    """A window of reports that is long enough to tell growth from chance, or none."""
    number = _number(value)
    if number is None or not number.is_integer() or not (number == 0 or 10 <= number <= 1000):
        raise ValueError("a whole number from 10 to 1000, or 0")
    return int(number)


def share(value: object) -> float:
    number = _number(value)
    if number is None or not 0 < number <= 1:
        raise ValueError("a share above 0 and up to 1")
    return number


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not (value.isascii() and "_" not in value):
        # What Python reads as a number, and nobody means as one: other scripts' digits, 1_000.
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
    raise ValueError("names with commas between them, or a list of names")


def signal(value: object) -> int | None:
    """A signal by number or by name, with `SIG` or without."""
    if value in (None, ""):
        return None
    text = str(value).upper()
    number = _number(value)
    try:
        if number is None:
            return int(signals.Signals["SIG" + text.removeprefix("SIG")])
        # The enumeration refuses fractions and infinity.
        return int(signals.Signals(number))  # type: ignore[arg-type]
    except (KeyError, ValueError):
        raise ValueError("the name or number of a signal, such as SIGUSR1") from None


def probe(value: object) -> str:
    if value not in PROBES:
        raise ValueError(f"one of {', '.join(PROBES)}")
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
    raise ValueError(f'a callable or its "module:name"{otherwise}')


def _imported(reference: str) -> Callable[..., Any]:
    module, _, path = reference.partition(":")
    try:
        found: Any = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"something that can be imported ({reason})") from error
    if not callable(found):
        raise ValueError("the name of a callable")
    return found  # type: ignore[no-any-return]
