"""Format text for people: wrap, escape and truncate lines, lay out blocks of facts. Pure."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import groupby
from textwrap import wrap
from typing import NamedTuple

from closewait_guard.model import Frame, Severity, SiteGroup

__all__ = [
    "KEY_WIDTH",
    "WIDTH",
    "Block",
    "Fact",
    "Layout",
    "Section",
    "Style",
    "StyledLine",
    "block_lines",
    "escape_control",
    "escape_line",
    "first_few",
    "fit_path",
    "format_bytes",
    "format_duration",
    "format_duration_range",
    "format_time",
    "join_counts",
    "page_of",
    "pluralize",
    "shorten",
    "summarize_addresses",
    "truncate",
    "unique",
    "wrap_text",
]


WIDTH = 80
# Of the keys of a block.
KEY_WIDTH = 9

# Azure Pipelines, TeamCity and GitHub look for their older commands anywhere in a line.
_BUILD_SERVER_COMMAND = re.compile(r"##(?=(?:vso|teamcity)?\[)")
# The last part of a path; the end of a path with the number of a line, and punctuation.
_FILE = re.compile(r"[^/\\]*$")
_PLACE = re.compile(r":\d{1,9}[:;,.)]{0,3}$")
# Where each code is explained.
_CODES_PAGE = "https://closewait-guard.readthedocs.io/en/latest/codes/"
_MAX_CHARACTERS = 10_000
_MAX_WORD = 200
# Code in backticks, and a key in quotation marks: not broken at the spaces in them.
_CODE = re.compile(r"`[^`]+`|\['[^'\]]*'\]")
# No text has it once control characters are escaped.
_NO_BREAK = "\0"
_MAX_PLAIN_NUMBER = 1e9
# What is shorter reads as 0 s, rounded.
_SHORTEST = 0.05
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


class Layout(NamedTuple):
    """How a report is laid out.

    Attributes:
        width: Columns. A longer identifier stands on a line of its own rather than being cut.
        directory: Paths below it are shown relative to it; empty for absolute paths.
        everything: Show a block for what is not a leak, too.
        verbose: Show all calls, threads and holders.
        indent: How far the facts of a block are indented.
    """

    width: int = WIDTH
    directory: str = ""
    everything: bool = False
    verbose: bool = False
    indent: int = 4

    def relative(self, text: str) -> str:
        """The text, with the paths in it that lie below the directory relative to that.

        Example:
            >>> Layout(directory="/srv/shop").relative("opened at /srv/shop/app.py:3")
            'opened at app.py:3'
        """
        if len(self.directory) < 2 or self.directory not in text:
            return text
        return re.sub(rf"(?<![\w./\\-]){re.escape(self.directory)}[/\\]", "", text)

    def wrap(self, text: str, indent: str, first: str = "") -> list[str]:
        """Wrap a paragraph to the width; see `wrap_text`."""
        return wrap_text(self.relative(text), indent, self.width, first)


def wrap_text(text: str, indent: str, width: int = WIDTH, first: str = "") -> list[str]:
    """Wrap a paragraph into lines, never within an identifier, a path or code in backticks.

    A very long one loses its end, because textwrap takes quadratic time.

    Args:
        text: The paragraph.
        indent: What every line but the first begins with.
        width: Columns; a word that has more stands on a line of its own.
        first: What the first line begins with, if not with the text itself.
    """
    text = escape_control(shorten(text))
    if len(first) + len(text) > width:
        room = width - len(indent)
        text = " ".join(_fit_word(word, room) for word in text.split(" "))
        text = _keep_code_whole(text, room)
    lines = _wrap(text, width, indent, first)
    safe = [_break_commands(line) for line in lines]
    if safe != lines:
        # A broken command is one character longer, so leave room for it.
        safe = [_break_commands(line) for line in _wrap(text, width - 8, indent, first)]
    return safe


def shorten(text: str) -> str:
    """Without the end of what is longer than anyone reads."""
    more = len(text) - _MAX_CHARACTERS
    return f"{text[:_MAX_CHARACTERS]}... ({more:,} more characters)" if more > 0 else text


def _wrap(text: str, width: int, indent: str, first: str) -> list[str]:
    # Paths have hyphens too: `site-packages`.
    lines = wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines] or [first.rstrip()]


def _keep_code_whole(text: str, room: int) -> str:
    """Keep what stands in backticks, and quoted keys, on one line where it fits on one."""
    return _CODE.sub(
        lambda found: found[0].replace(" ", _NO_BREAK) if len(found[0]) <= room else found[0], text
    )


def fit_path(prefix: str, path: str, suffix: str, width: int = WIDTH) -> str:
    """Put a path on one line. If it is too long, folders at its beginning go, then the suffix.

    Example:
        >>> fit_path("at ", "/srv" * 20 + "/app.py:12", " in serve()")
        'at ...v/srv/srv/srv/srv/srv/srv/srv/srv/srv/srv/srv/srv/srv/app.py:12 in serve()'
    """
    path = _without_folders(escape_control(path), width - len(prefix) - len(suffix))
    return truncate(prefix + _last(path, width - len(prefix) - len("...")) + suffix, width)


def _fit_word(word: str, room: int) -> str:
    """A line of a file loses folders where it is too long; a word without end, its end."""
    if len(word) <= room:
        return word
    if not _PLACE.search(word):
        return word if len(word) <= _MAX_WORD else f"{word[: _MAX_WORD - 3]}..."
    path = word.lstrip("(")
    opening = word.removesuffix(path)
    return opening + _without_folders(path, room - len(opening))


def _without_folders(path: str, room: int) -> str:
    """Without what is too much at its beginning, but with all of the file's name."""
    return _last(path, max(room, len("...") + len(_FILE.findall(path)[0])))


def _last(text: str, room: int) -> str:
    return text if len(text) <= room else "..." + text[3 - room :]


def truncate(line: str, width: int = WIDTH) -> str:
    """Cut a line at its end so that it fits."""
    line = escape_line(line)
    return line if len(line) <= width else line[: width - 3] + "..."


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
        >>> [format_duration(seconds, at_least=True) for seconds in (41, 0)], format_duration(0)
        (['at least 41 s', 'an unknown time'], 'less than 0.1 s')
    """
    if duration < _SHORTEST:
        return "an unknown time" if at_least else f"less than {_SHORTEST * 2:g} s"
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
        >>> format_duration_range(2.8, 3.5), format_duration_range(2.8, 3.5, at_least=True)
        ('2.8-3.5 s', 'at least 2.8-3.5 s')
        >>> format_duration_range(0, 0.3), format_duration_range(0, 0.01)
        ('up to 0.3 s', 'less than 0.1 s')
    """
    if shortest < _SHORTEST <= longest:
        return f"up to {format_duration(longest)}"
    last, unit = format_duration(longest), format_duration(longest).partition(" ")[2]
    first_unit = format_duration(shortest).partition(" ")[2]
    first = format_duration(shortest, at_least=at_least)
    if format_duration(shortest) == last:
        return first
    if first_unit == unit:
        return f"{first.removesuffix(f' {unit}')}-{last}"
    return f"{first} to {last}"


def format_bytes(number: int) -> str:
    """A number of bytes: exact while it is small.

    Example:
        >>> format_bytes(1), format_bytes(1500), format_bytes(32_000), format_bytes(4_370_000)
        ('1 byte', '1,500 bytes', '32 kB', '4.4 MB')
    """
    if number < 10_000:
        return pluralize(number, "byte")
    size, unit = next(
        ((size, unit) for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if number >= size),
        (1e3, "kB"),
    )
    return f"{_round_for_display(number / size)} {unit}"


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


def page_of(code: str = "") -> str:
    """The address of the page that explains a code, or all of them."""
    # A saved report may have anything there.
    is_code = code.isascii() and code.isalnum()
    return f"{_CODES_PAGE}#{code.lower()}" if is_code else _CODES_PAGE


def unique(values: Iterable[str]) -> list[str]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))


def _round_for_display(number: float) -> str:
    if number < 10:
        return f"{number:.1f}".removesuffix(".0")
    return f"{number:.0f}" if number < _MAX_PLAIN_NUMBER else f"{number:.3g}"


class Style(Enum):
    """What a line or a fact is, for outputs with colours."""

    TEXT = "text"
    TITLE = "title"
    PLACE = "place"
    CODE = "code"
    FIX = "fix"
    NOTE = "note"
    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class StyledLine(NamedTuple):
    """One line of a report."""

    text: str
    style: Style = Style.TEXT


class Fact(NamedTuple):
    """One sentence of a block under its key; several in a row share the key.

    Attributes:
        key: What the sentence is about: opened, fix, held by, state ...
        text: The sentence; before a place, what is said of that.
        frame: The place, which is never folded.
    """

    key: str
    text: str
    style: Style = Style.TEXT
    frame: Frame | None = None


class Block(NamedTuple):
    """What is known of the sockets of one cause.

    Attributes:
        sockets: How many they are; None where that goes without saying.
        severity: None where all is as severe.
        is_leak: Whether a warning goes without saying.
    """

    sockets: int | None
    title: str
    code: str
    severity: Severity | None
    facts: tuple[Fact, ...]
    is_leak: bool = False


class Section(NamedTuple):
    """Lines that belong together, and the site that they describe."""

    lines: list[StyledLine]
    group: SiteGroup | None = None


def block_lines(
    block: Block, layout: Layout, number: str = "", digits: int = 0
) -> Iterator[StyledLine]:
    """The lines of a block; the first has count, verdict, kind, peers, code and severity.

    Args:
        block: The facts.
        layout: The width, and the directory that paths are relative to.
        number: What to call the block by, such as `[1]`.
        digits: The width of the count.
    """
    style = Style(block.severity.value) if block.severity is not None else Style.TITLE
    # Of a leak that is young and few, and of what is none, the verdict says it all.
    usual = Severity.WARNING if block.is_leak else Severity.INFO
    is_worth_noting = block.severity is not None and block.severity.rank > usual.rank
    severity = style.value if is_worth_noting else ""
    count = f"{block.sockets:>{digits},}" if block.sockets is not None else ""
    left = " ".join(filter(None, (number, count, block.title)))
    right = escape_line("  ".join(filter(None, (block.code, severity))))
    *lines, last = layout.wrap(left, " " * (layout.indent + 2))
    if len(last) + 2 + len(right) > layout.width:
        lines, last = [*lines, last], ""
    for text in (*lines, f"{last}{right:>{layout.width - len(last)}}"):
        yield StyledLine(text, style)
    yield from _fact_lines(block.facts, layout)


def _fact_lines(facts: Iterable[Fact], layout: Layout) -> Iterator[StyledLine]:
    later = " " * (layout.indent + KEY_WIDTH)
    for key, group in groupby(facts, key=lambda fact: fact.key):
        first = f"{'':{layout.indent}}{key:<{KEY_WIDTH}}"
        for fact in group:
            for text in _lines_of(fact, first, later, layout):
                yield StyledLine(text, fact.style)
            first = later


def _lines_of(fact: Fact, first: str, later: str, layout: Layout) -> list[str]:
    if fact.style is Style.CODE:
        return [truncate(f"{later}    {fact.text}", layout.width)]
    if fact.frame is None:
        return layout.wrap(fact.text, later, first)
    return _place_lines(f"{first}{escape_line(fact.text)}", fact.frame, later, layout)


def _place_lines(before: str, frame: Frame, later: str, layout: Layout) -> list[str]:
    """The file and line, and the function, on a line of its own if there is no room."""
    function = escape_line(f"in {frame.function}()".replace(">()", ">"))
    place = escape_line(layout.relative(frame.place))
    if len(before) + len(place) + 1 + len(function) <= layout.width:
        return [f"{before}{place} {function}"]
    return [fit_path(before, place, "", layout.width), *layout.wrap(function, later, later)]


def join_counts(counts: Mapping[str, int]) -> str:
    """How many of each thing, by its name; nothing that is zero.

    Example:
        >>> join_counts({"leaked socket": 2, "unclosed object": 1})
        '2 leaked sockets and 1 unclosed object'
    """
    return " and ".join(pluralize(number, what) for what, number in counts.items() if number)


def first_few(values: Sequence[str], limit: int = 3) -> str:
    """The first of some values, and how many more there are."""
    shown = ", ".join(values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"
