"""The command line: one file for each command, imported only when it is called.

`--help` is answered before argparse is imported.
"""

from __future__ import annotations

import os
import sys

from closewait_guard.commands._output import (
    FINE,
    USAGE,
    OutputError,
    discard_lost_errors,
    discard_output,
    flush_output,
    help_text,
    prepare_streams,
    say,
)

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "main",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command; the process's exit code is what it returns."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        prepare_streams()
        try:
            return _run(given)
        finally:
            # Also after a help text.
            flush_output()
    except BrokenPipeError:
        return _die_of("SIGPIPE")
    except KeyboardInterrupt:
        return _die_of("SIGINT")
    except Exception as error:
        return _report_failure(error)
    finally:
        discard_lost_errors()


def _report_failure(error: Exception) -> int:
    """One sentence of what is no mistake of ours."""
    from closewait_guard._stream import print_error
    from closewait_guard.exceptions import CloseWaitGuardError

    if isinstance(error, OutputError):
        discard_output()
    if not isinstance(error, CloseWaitGuardError | OSError):
        raise error
    print_error(str(error))
    return USAGE


def _run(given: list[str]) -> int:
    if given[:1] in (["-h"], ["--help"]):
        say(help_text(), end="")
        return FINE
    from closewait_guard.commands._parser import parse_arguments

    arguments = parse_arguments(given)
    code: int = arguments.run(arguments)
    return code


def _die_of(name: str) -> int:
    """End as a program ends that has not caught the signal, so that shells and loops see it."""
    import signal

    number = getattr(signal, name, signal.SIGINT)
    discard_output()
    if os.name == "posix":
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return 128 + int(number)
