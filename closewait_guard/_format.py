"""Text that fits 80 columns, and steers neither a terminal nor a build server: pure.

Numbers, times and addresses as people read them: pure.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable
from textwrap import wrap

__all__ = [
    "WIDTH",
    "date",
    "escape_control",
    "fit_path",
    "format_duration",
    "format_duration_range",
    "one_line",
    "pluralize",
    "summarize_addresses",
    "truncate",
    "unique",
    "wrap_text",
]


WIDTH = 80

# Azure Pipelines, TeamCity and GitHub look for their older commands anywhere in a line.
_COMMAND = re.compile(r"##(?=(?:vso|teamcity)?\[)")


_MOST_LETTERS = 10_000


def wrap_text(text: str, indent: str) -> list[str]:
    """A paragraph in lines, those after the first indented.

    Of one that is very long the end is left out: textwrap takes time by the square of its length.
    """
    if len(text) > _MOST_LETTERS:
        text = f"{text[:_MOST_LETTERS]}... ({len(text) - _MOST_LETTERS:,} more characters)"
    text = escape_control(text)
    lines = wrap(text, WIDTH, subsequent_indent=indent) or [""]
    safe = [_without_command(line) for line in lines]
    if safe != lines:
        # What was made longer would no longer fit.
        safe = [_without_command(line) for line in wrap(text, WIDTH - 8, subsequent_indent=indent)]
    return safe


def fit_path(prefix: str, path: str, suffix: str) -> str:
    """One line; a path too long for it loses its beginning, never its end."""
    path = escape_control(path)
    room = WIDTH - len(prefix) - len(suffix)
    if len(path) > room >= 20:
        path = "..." + path[-(room - 3) :]
    return truncate(prefix + path + suffix)


def truncate(line: str) -> str:
    """One line; what is too much is left out at its end."""
    line = one_line(line)
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def one_line(text: str) -> str:
    """A line of any length, whoever has chosen the names in it."""
    return _without_command(escape_control(text))


def escape_control(text: str) -> str:
    r"""Labels, paths and context come from outside: none of them may steer the terminal.

    Example:
        >>> escape_control("\x1b[31mMüller\u202e")
        '\\x1b[31mMüller\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def _without_command(line: str) -> str:
    """GitHub takes a line that begins with two colons for an order."""
    if line.lstrip().startswith("::"):
        line = line.replace("::", ": :", 1)
    return _COMMAND.sub("# #", line)


_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_ABSURD = 1e9


def pluralize(number: int, noun: str) -> str:
    """`1 socket`, `2 sockets`.

    Example:
        >>> pluralize(1, "byte"), pluralize(12_000, "byte"), pluralize(2, "process")
        ('1 byte', '12,000 bytes', '2 processes')
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}" + ("es" if noun.endswith("s") else "s")


def format_duration(duration: float) -> str:
    """A duration in the unit that suits it.

    Example:
        >>> [format_duration(number) for number in (0.25, 41, 540, 9000, 200_000)]
        ['0.2 s', '41 s', '9 min', '2.5 h', '2.3 days']
    """
    for size, name, limit in ((1, "s", 120), (_MINUTE, "min", _HOUR * 2), (_HOUR, "h", _DAY * 2)):
        if duration < limit:
            return f"{_short(duration / size)} {name}"
    return f"{_short(duration / _DAY)} days"


def date(at: float, zone: str = "%z") -> str:
    """A moment in local time; one that is in no calendar, by its seconds."""
    try:
        return time.strftime(f"%Y-%m-%d %H:%M:%S{zone}", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return f"{at:g} s after 1970"


def format_duration_range(shortest: float, longest: float) -> str:
    """Two durations as one, where they read alike.

    Example:
        >>> format_duration_range(41, 540), format_duration_range(41.1, 41.2)
        ('41 s to 9 min', '41 s')
    """
    first, last = format_duration(shortest), format_duration(longest)
    return first if first == last else f"{first} to {last}"


def summarize_addresses(peers: Iterable[str], most: int = 3) -> str:
    """The most frequent addresses, with counts.

    Example:
        >>> summarize_addresses(["10.0.0.1:80", "10.0.0.1:80", "10.0.0.2:80"])
        '10.0.0.1:80 (2), 10.0.0.2:80'
    """
    counted = Counter(peers).most_common()
    shown = [peer if times == 1 else f"{peer} ({times:,})" for peer, times in counted[:most]]
    more = len(counted) - most
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def unique(values: Iterable[str]) -> list[str]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))


def _short(number: float) -> str:
    if number < 10:
        return f"{number:.1f}".removesuffix(".0")
    return f"{number:.0f}" if number < _ABSURD else f"{number:.3g}"
