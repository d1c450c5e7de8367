"""`manage.py closewait_guard`: the command line of the guard, with the settings of the project."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from closewait_guard._config import ENVIRONMENT_PREFIX
from closewait_guard.commands import main
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.integrations.django import ProjectOptions, read_project_options

__all__ = ["Command"]


_COMMANDS = ("scan", "watch", "report", "attach", "show", "doctor")


class Command(BaseCommand):
    """What runs in the processes of the project is asked from outside."""

    help = (
        "Check running processes for leaked sockets (scan, watch), ask them for a report (report, "
        "attach), print saved reports (show), or show what can be tracked here (doctor). "
        "All are commands of closewait-guard, and count by CLOSEWAIT_GUARD in the settings."
    )
    # It is for the moment when something is wrong.
    requires_system_checks = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Say what can be given."""
        parser.add_argument("subcommand", choices=_COMMANDS, metavar="COMMAND", help=_listed())
        parser.add_argument(
            "arguments", nargs=argparse.REMAINDER, help="its own; COMMAND --help shows them"
        )

    def handle(self, *, subcommand: str, arguments: list[str], **_: Any) -> None:
        """Run it; its exit code is that of closewait-guard."""
        try:
            variables = dict(_variables(read_project_options()))
        except ConfigurationError as error:
            raise CommandError(str(error)) from None
        before = dict(os.environ)
        os.environ.update(variables)
        try:
            code = main([subcommand, *arguments])
        finally:
            for name in variables:
                os.environ.pop(name, None)
            os.environ.update(before)
        if code:
            sys.exit(code)


def _listed() -> str:
    return ", ".join(_COMMANDS)


def _variables(options: ProjectOptions) -> Iterator[tuple[str, str]]:
    """The settings as the command line reads them: variables of the environment."""
    for name, value in options.given.items():
        if name == "reporters":
            # Reports of running processes are printed here.
            continue
        text = f"{value.__module__}:{value.__qualname__}" if callable(value) else str(value)
        if "<" in text:
            raise ConfigurationError(
                f"CLOSEWAIT_GUARD[{name!r}] in the Django settings: the command cannot import "
                f"{value.__qualname__}; give the name of a function, as 'module:name'"
            )
        yield ENVIRONMENT_PREFIX + name.upper(), "" if value is None else text
