"""Text that fits 80 columns, and steers neither a terminal nor a build server: pure."""

from __future__ import annotations

import re
from textwrap import wrap

__all__ = ["WIDTH", "cut", "fitted", "folded", "one_line", "printable"]

WIDTH = 80

# Azure Pipelines, TeamCity and GitHub look for their older commands anywhere in a line.
_COMMAND = re.compile(r"##(?=(?:vso|teamcity)?\[)")


_MOST_LETTERS = 10_000


def folded(text: str, indent: str) -> list[str]:
    """A paragraph in lines, those after the first indented.

    Of one that is very long the end is left out: textwrap takes time by the square of its length.
    """
    if len(text) > _MOST_LETTERS:
        text = f"{text[:_MOST_LETTERS]}... ({len(text) - _MOST_LETTERS:,} more characters)"
    text = printable(text)
    lines = wrap(text, WIDTH, subsequent_indent=indent) or [""]
    safe = [_without_command(line) for line in lines]
    if safe != lines:
        # What was made longer would no longer fit.
        safe = [_without_command(line) for line in wrap(text, WIDTH - 8, subsequent_indent=indent)]
    return safe


def fitted(prefix: str, path: str, suffix: str) -> str:
    """One line; a path too long for it loses its beginning, never its end."""
    path = printable(path)
    room = WIDTH - len(prefix) - len(suffix)
    if len(path) > room >= 20:
        path = "..." + path[-(room - 3) :]
    return cut(prefix + path + suffix)


def cut(line: str) -> str:
    """One line; what is too much is left out at its end."""
    line = one_line(line)
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def one_line(text: str) -> str:
    """A line of any length, whoever has chosen the names in it."""
    return _without_command(printable(text))


def printable(text: str) -> str:
    r"""Labels, paths and context come from outside: none of them may steer the terminal.

    Example:
        >>> printable("\x1b[31mMüller\u202e")
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
