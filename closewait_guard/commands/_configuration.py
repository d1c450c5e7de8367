"""The settings of a command, which runs no code that a file names and says what it leaves out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from closewait_guard.settings import Settings

__all__ = [
    "add_no_config",
    "parse_argument",
    "settings_of",
    "variables_of",
]


_Number = TypeVar("_Number", int, float)


def parse_argument(parse: Callable[[object], _Number], text: str) -> _Number:
    """The number that was typed, or what was expected."""
    from closewait_guard._config import refusal

    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(refusal(error, text)) from None


def add_no_config(parser: argparse.ArgumentParser) -> None:
    """The option that keeps project files out."""
    parser.add_argument("--no-config", action="store_true", help="ignore pyproject.toml")


def variables_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The option as a variable of the environment, for this process or another."""
    from closewait_guard._config import NO_CONFIG

    return {NO_CONFIG: "1"} if arguments.no_config else {}


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that count here."""
    from closewait_guard._stream import print_error
    from closewait_guard.settings import Settings

    settings = Settings.load(environ=os.environ | variables_of(arguments), code_from_file=False)
    for note in settings.notes:
        print_error(note)
    return settings
