"""Format text for people: wrap, escape and truncate lines; numbers, durations, addresses. Pure."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable
from textwrap import wrap

__all__ = [
    "WIDTH",
    "escape_control",
    "escape_line",
    "fit_path",
    "format_duration",
    "format_duration_range",
    "format_time",
    "pluralize",
    "summarize_addresses",
    "truncate",
    "unique",
    "wrap_text",
]


WIDTH = 80

# Azure Pipelines, TeamCity and GitHub look for their older commands anywhere in a line.
_BUILD_SERVER_COMMAND = re.compile(r"##(?=(?:vso|teamcity)?\[)")
# The last part of a path; the end of a path with the number of a line, and punctuation.
_FILE = re.compile(r"[^/\\]*$")
_PLACE = re.compile(r":\d{1,9}[:;,.)]{0,3}$")
_MAX_CHARACTERS = 10_000
_MAX_PLAIN_NUMBER = 1e9
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def wrap_text(text: str, indent: str) -> list[str]:
    """Wrap a paragraph into lines, those after the first indented.

    A very long one loses its end, because textwrap takes quadratic time.
    """
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[:_MAX_CHARACTERS]}... ({len(text) - _MAX_CHARACTERS:,} more characters)"
    text = escape_control(text)
    if len(text) > WIDTH:
        text = " ".join(_fit_word(word, WIDTH - len(indent)) for word in text.split(" "))
    lines = _wrap(text, WIDTH, indent) or [""]
    safe = [_break_commands(line) for line in lines]
    if safe != lines:
        # A broken command is one character longer, so leave room for it.
        safe = [_break_commands(line) for line in _wrap(text, WIDTH - 8, indent)]
    return safe


def _wrap(text: str, width: int, indent: str) -> list[str]:
    # Paths have hyphens too: `site-packages`.
    return wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)


def fit_path(prefix: str, path: str, suffix: str) -> str:
    """Put a path on one line. If it is too long, folders at its beginning go, then the suffix.

    Example:
        >>> fit_path("at ", "/srv" * 20 + "/app.py:12", " in serve()")
        'at ...v/srv/srv/srv/srv/srv/srv/srv/srv/srv/srv/srv/srv/srv/app.py:12 in serve()'
    """
    path = _without_folders(escape_control(path), WIDTH - len(prefix) - len(suffix))
    return truncate(prefix + _last(path, WIDTH - len(prefix) - len("...")) + suffix)


def _fit_word(word: str, room: int) -> str:
    """A line of a file stays whole where a paragraph is wrapped; other words are cut anywhere."""
    if len(word) <= room or not _PLACE.search(word):
        return word
    path = word.lstrip("(")
    opening = word.removesuffix(path)
    return opening + _without_folders(path, room - len(opening))


def _without_folders(path: str, room: int) -> str:
    """Without what is too much at its beginning, but with all of the file's name."""
    return _last(path, max(room, len("...") + len(_FILE.findall(path)[0])))


def _last(text: str, room: int) -> str:
    return text if len(text) <= room else "..." + text[3 - room :]


def truncate(line: str) -> str:
    """Cut a line at its end so that it fits."""
    line = escape_line(line)
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def escape_line(text: str) -> str:
    """Make a line of any length safe to print: names in it may come from outside."""
    return _break_commands(escape_control(text))


def escape_control(text: str) -> str:
    r"""Escape control characters: labels, paths and context must not control the terminal.

    Example:
        >>> escape_control("\x1b[31mMüller\u202e")
        '\\x1b[31mMüller\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def _break_commands(line: str) -> str:
    """Break what a build server would run: GitHub runs a line that begins with two colons."""
    if line.lstrip().startswith("::"):
        line = line.replace("::", ": :", 1)
    return _BUILD_SERVER_COMMAND.sub("# #", line)


def pluralize(number: int, noun: str) -> str:
    """`1 socket`, `2 sockets`.

    Example:
        >>> pluralize(1, "byte"), pluralize(12_000, "byte"), pluralize(2, "process")
        ('1 byte', '12,000 bytes', '2 processes')
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}" + ("es" if noun.endswith("s") else "s")


def format_duration(duration: float, *, at_least: bool = False) -> str:
    """Format a duration in the unit that suits it, or what is a lower bound of one.

    Example:
        >>> [format_duration(seconds) for seconds in (0.25, 41, 540, 9000, 200_000)]
        ['0.2 s', '41 s', '9 min', '2.5 h', '2.3 days']
        >>> format_duration(41, at_least=True)
        'at least 41 s'
    """
    if at_least:
        return f"at least {format_duration(duration)}"
    for size, name, limit in ((1, "s", 120), (_MINUTE, "min", _HOUR * 2), (_HOUR, "h", _DAY * 2)):
        if duration < limit:
            return f"{_round_for_display(duration / size)} {name}"
    return f"{_round_for_display(duration / _DAY)} days"


def format_time(at: float, zone: str = "%z") -> str:
    """Format a time as local time, or in seconds if the calendar does not reach it."""
    try:
        return time.strftime(f"%Y-%m-%d %H:%M:%S{zone}", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return f"{at:g} s after 1970"


def format_duration_range(shortest: float, longest: float, *, at_least: bool = False) -> str:
    """Format two durations as a range, or as one where they read alike.

    Example:
        >>> format_duration_range(41, 540), format_duration_range(41.1, 41.2)
        ('41 s to 9 min', '41 s')
    """
    last = format_duration(longest)
    is_one = format_duration(shortest) == last
    first = format_duration(shortest, at_least=at_least)
    return first if is_one else f"{first} to {last}"


def summarize_addresses(peers: Iterable[str], limit: int = 3) -> str:
    """List the most frequent addresses, with counts.

    Example:
        >>> summarize_addresses(["10.0.0.1:80", "10.0.0.1:80", "10.0.0.2:80"])
        '10.0.0.1:80 (2), 10.0.0.2:80'
    """
    counted = Counter(peers).most_common()
    shown = [peer if times == 1 else f"{peer} ({times:,})" for peer, times in counted[:limit]]
    more = len(counted) - limit
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def unique(values: Iterable[str]) -> list[str]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))


def _round_for_display(number: float) -> str:
    if number < 10:
        return f"{number:.1f}".removesuffix(".0")
    return f"{number:.0f}" if number < _MAX_PLAIN_NUMBER else f"{number:.3g}"
