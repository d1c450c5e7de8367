"""`run`: start a program with the guard in it."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from closewait_guard._config import ENVIRONMENT_PREFIX
from closewait_guard._preload import ChildConfig, prints_json
from closewait_guard._stream import print_error, write_text
from closewait_guard.commands._output import FAILED_ON_LEAK, NO_VERDICT
from closewait_guard.commands._parser import (
    add_files,
    add_metrics,
    add_no_config,
    checked_reporter,
    variables_of,
)
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.settings import Settings

if TYPE_CHECKING:
    from closewait_guard.commands._reports import ReportFiles
    from closewait_guard.commands._verdicts import Verdicts


_USAGE = "closewait-guard run [options] [--] TARGET [ARG ...]"
_DESCRIPTION = """\
Run TARGET (a script, -m MODULE, or a command) with leak tracking in it and in
its Python child processes. Print a report to stderr when it exits."""
_EPILOG = """\
exit status: that of TARGET; with --fail-on-leak 86 leaked, 87 unknown
example:     closewait-guard run --interval 60 -- uvicorn app:app"""

# The settings that are worth a line in the help.
_HELP = {
    "interval": ("SECONDS", "also report every SECONDS"),
    "grace": ("SECONDS", "time to close a socket after the peer closed it (1)"),
    "stack_depth": ("N", "frames to record per socket, 0 for none (32)"),
    "signal": ("NAME", "print a report on this signal, e.g. SIGPROF"),
}
_ELSEWHERE = ("reporters", "at_exit")


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.usage, parser.description = _USAGE, _DESCRIPTION
    parser.add_argument("target", nargs="...", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument(
        "--report",
        action="append",
        metavar="NAME",
        help="reporter, e.g. structlog, json_lines:PATH (repeatable)",
    )
    parser.add_argument(
        "--attribute",
        action="append",
        metavar="NAME",
        help=argparse.SUPPRESS,
    )
    parser.add_argument("--at-exit", action="store_true", default=None, help=argparse.SUPPRESS)
    parser.add_argument(
        "--no-at-exit",
        dest="at_exit",
        action="store_false",
        default=None,
        help="print no final report",
    )
    parser.add_argument(
        "--fail-on-leak", action="store_true", help="exit with 86 if TARGET succeeds but leaks"
    )
    add_metrics(parser)
    add_files(parser)
    add_no_config(parser)
    names = [item.name for item in fields(Settings) if item.name not in _ELSEWHERE]
    for name in sorted(names, key=[*_HELP, *names].index):
        metavar, meaning = _HELP.get(name, (None, argparse.SUPPRESS))
        parser.add_argument(_option(name), dest=name, metavar=metavar, help=meaning)
    others = ["--attribute", *(_option(name) for name in names if name not in _HELP)]
    text = fill(f"More, in the docs: {', '.join(others)}.", 80, break_on_hyphens=False)
    parser.epilog = f"{text}\n{_EPILOG}"
    parser.set_defaults(run=run)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def run(arguments: argparse.Namespace) -> int:
    """Become the program, or wait for it where the exit code is ours to change."""
    from closewait_guard.commands._launch import (
        can_stand_beside,
        command_of,
        exec_beside,
        exec_program,
        exit_like,
        run_and_wait,
    )

    if not arguments.target:
        raise ConfigurationError("run: missing TARGET (a script, -m MODULE, or a command)")
    command = command_of(arguments.target)
    settings = _settings(arguments)
    _refuse_taken_signal(arguments)
    reporters = tuple(checked_reporter("run --report", name) for name in arguments.report or ())
    if arguments.interval is not None and not reporters:
        reporters = _loaded(arguments).reporters or ("text",)
    prints_text = not prints_json(reporters or _loaded(arguments).reporters)
    handover = ChildConfig(reporters, None, _attributed(arguments), bool(arguments.metrics))
    has_report = _loaded(arguments).at_exit if arguments.at_exit is None else arguments.at_exit
    if arguments.metrics:
        _start_metrics(arguments)
    if not arguments.fail_on_leak and not (has_report and hasattr(socket, "AF_UNIX")):
        if arguments.html or arguments.collapsed:
            raise ConfigurationError("run: --html and --collapsed are written with the last report")
        return exec_program(command, handover.environment(settings, os.environ))
    from closewait_guard.commands._reports import ReportFiles
    from closewait_guard.commands._verdicts import Verdicts

    files = ReportFiles(arguments)
    is_beside = not arguments.fail_on_leak and can_stand_beside()
    with Verdicts(command, is_beside=is_beside) as verdicts:
        handover = handover._replace(channel=verdicts.channel)
        environ = handover.environment(settings, os.environ)
        if is_beside:

            def serve(program: int, end: int) -> None:
                verdicts.serve_beside(program, end)
                known = _print_report(verdicts, files, prints_text=prints_text)
                verdicts.serve_children()
                _print_report(verdicts, files, known, prints_text=prints_text)

            return exec_beside(command, environ, serve)
        code = run_and_wait(command, environ, verdicts.listen, verdicts.stop_listening)
        if code and not verdicts.has_messages:
            # It may not even have been started.
            return exit_like(code)
        unknown = _print_report(verdicts, files, prints_text=prints_text)
        if code or not arguments.fail_on_leak:
            return exit_like(code)
        return _judged(verdicts, has_unknown=bool(unknown))


def _start_metrics(arguments: argparse.Namespace) -> None:
    """Serve the numbers of the program's processes, from one beside it."""
    from closewait_guard._processes import ProcessScanner
    from closewait_guard.commands._launch import can_stand_beside, start_beside
    from closewait_guard.commands._metrics import MetricsServer, serve_program

    given = {} if arguments.control is None else {"control": arguments.control}
    settings = _loaded(arguments, given)
    if not can_stand_beside():
        raise ConfigurationError("run --metrics: needs Linux 5.3 or newer")
    if settings.is_given("control") and not settings.control:
        raise ConfigurationError(
            "run --metrics: the processes are asked at their control sockets, which the setting "
            "`control` turns off"
        )
    with MetricsServer(arguments.metrics) as server:
        program, scanner = os.getpid(), ProcessScanner(settings)
        end = os.pidfd_open(program)
        start_beside(lambda: serve_program(server, program, end, scanner))
        os.close(end)


def _print_report(
    verdicts: Verdicts, files: ReportFiles, known: list[str] | None = None, *, prints_text: bool
) -> list[str]:
    """Print what is known of all processes, and what is not, unless that is known; return it."""
    many = len(verdicts.members)
    unknown = verdicts.unknown()
    with suppress(OSError, ValueError):
        text = verdicts.report(is_complete=not unknown)
        write_text(sys.stderr, text if prints_text else "")
    for sentence in unknown:
        if sentence not in (known or ()):
            print_error(f"leaks unknown: {sentence}")
    if known is None or unknown != known or len(verdicts.members) > many:
        _write_files(verdicts, files, unknown)
    return unknown


def _write_files(verdicts: Verdicts, files: ReportFiles, unknown: Sequence[str]) -> None:
    """Write what is known until now; the exit status stays that of the program."""
    from closewait_guard.commands._reports import parts_of

    if not files:
        return
    if not verdicts.members:
        print_error("no report to write: no process has reported")
        return
    notes = [f"leaks unknown: {sentence}" for sentence in unknown]
    try:
        files.write(parts_of([verdicts.members], is_complete=not unknown), notes)
    except ConfigurationError as error:
        print_error(str(error))


def _judged(verdicts: Verdicts, *, has_unknown: bool) -> int:
    """The exit code of a program that has succeeded."""
    if verdicts.leaked:
        return FAILED_ON_LEAK
    return NO_VERDICT if has_unknown else 0


def _settings(arguments: argparse.Namespace) -> dict[str, str]:
    """As variables of the environment, which the program's processes read them from."""
    given = {
        item.name: str(value)
        for item in fields(Settings)
        if (value := getattr(arguments, item.name, None)) is not None
    }
    # A callable is imported in the program's process: here it might not be found.
    checked = {name: value for name, value in given.items() if name not in ("context", "redact")}
    try:
        _loaded(arguments, checked)
    except ConfigurationError as error:
        text = str(error)
        for name in checked:
            text = text.replace(f"keyword {name}", f"run {_option(name)}")
        raise ConfigurationError(text) from None
    variables = {ENVIRONMENT_PREFIX + name.upper(): value for name, value in given.items()}
    return variables | variables_of(arguments)


# What servers do upon signals, besides ending. They set handlers of their own after ours, some for
# their workers too.
_RESTARTS, _WORKERS = "to restart its workers", "to change the number of its workers"
_ENDS_WORKER = "to end a worker"
_TAKEN = {
    "gunicorn": {
        "SIGHUP": "to reload",
        "SIGUSR1": "to open its logs again",
        "SIGUSR2": "to replace itself",
        "SIGWINCH": "to end its workers",
        "SIGTTIN": _WORKERS,
        "SIGTTOU": _WORKERS,
    },
    "uvicorn": {"SIGHUP": _RESTARTS, "SIGTTIN": _WORKERS, "SIGTTOU": _WORKERS},
    "hypercorn": {"SIGHUP": _RESTARTS},
    "celery": {
        # A process of its pool ends by all that end one by default.
        **dict.fromkeys(("SIGALRM", "SIGPROF", "SIGSYS", "SIGTRAP"), _ENDS_WORKER),
        **dict.fromkeys(("SIGVTALRM", "SIGXCPU", "SIGXFSZ"), _ENDS_WORKER),
        "SIGHUP": "to restart",
        "SIGUSR1": "to limit the time of tasks and to print stacks",
        "SIGUSR2": "to start its debugger",
    },
}
# Others that mean something to every program are refused as a setting.
_ENDS = {"SIGQUIT": "to end"}


def _refuse_taken_signal(arguments: argparse.Namespace) -> None:
    """A report upon such a signal would not be made, or the server would not do its own work."""
    settings, server = _loaded(arguments), _server_of(arguments.target)
    if arguments.signal is not None:
        settings = settings.with_overrides(signal=arguments.signal)
    if settings.signal is None or server not in _TAKEN:
        return
    name = signal.Signals(settings.signal).name
    purpose = (_TAKEN[server] | _ENDS).get(name)
    if purpose is not None:
        given = "run --signal" if arguments.signal else settings.source_of("signal")
        instead = "choose another, such as SIGPROF"
        if "SIGPROF" in _TAKEN[server]:
            instead = "use --interval instead"
        raise ConfigurationError(f"{given}: {server} uses {name} {purpose}; {instead}")


def _server_of(target: Sequence[str]) -> str:
    """The name of the program that TARGET starts.

    Example:
        >>> _server_of(["/srv/bin/gunicorn", "app:app"]), _server_of(["-m", "uvicorn", "app:app"])
        ('gunicorn', 'uvicorn')
        >>> _server_of(["python3", "-m", "celery.bin.celery", "worker"])
        'celery'
    """
    name = Path(target[0]).name
    if "-m" in target[:-1] and (name == "-m" or name.startswith("python")):
        return target[target.index("-m") + 1].partition(".")[0]
    return name.removesuffix(".exe")


def _attributed(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Names that can be used. What they stand for is for the program to import."""
    if not arguments.attribute:
        return ()
    from closewait_guard._inspect import attributed_module

    for name in arguments.attribute:
        try:
            attributed_module(name)
        except ConfigurationError as error:
            raise ConfigurationError(f"run --attribute: {error}") from None
    return tuple(arguments.attribute)


def _loaded(arguments: argparse.Namespace, checked: Mapping[str, str] | None = None) -> Settings:
    """What the program will read, except code: that is for its own process to import."""
    environ = os.environ | variables_of(arguments)
    return Settings.load(checked, environ=environ, code_from_file=False)
