"""Text that fits 80 columns and steers no terminal: pure."""

from __future__ import annotations

from textwrap import wrap

__all__ = ["WIDTH", "cut", "fitted", "folded", "printable"]

WIDTH = 80


_MOST_LETTERS = 10_000


def folded(text: str, indent: str) -> list[str]:
    """A paragraph in lines, those after the first indented.

    Of one that is very long the end is left out: textwrap takes time by the square of its length.
    """
    if len(text) > _MOST_LETTERS:
        text = f"{text[:_MOST_LETTERS]}... ({len(text) - _MOST_LETTERS:,} more characters)"
    return wrap(printable(text), WIDTH, subsequent_indent=indent) or [text]


def fitted(prefix: str, path: str, suffix: str) -> str:
    """One line; a path too long for it loses its beginning, never its end."""
    path = printable(path)
    room = WIDTH - len(prefix) - len(suffix)
    if len(path) > room >= 20:
        path = "..." + path[-(room - 3) :]
    return cut(prefix + path + suffix)


def cut(line: str) -> str:
    """One line; what is too much is left out at its end."""
    line = printable(line)
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def printable(text: str) -> str:
    """Labels, paths and context come from outside: none of them may steer the terminal."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )
