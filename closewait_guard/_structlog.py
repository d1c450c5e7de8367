"""The only importer of structlog, which is imported when it is first needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from closewait_guard._format import escape_line
from closewait_guard._stream import print_error

__all__ = [
    "bound_context",
    "get_logger",
    "log_error",
    "log_warning",
]

_MAX_LINES, _MAX_CHARACTERS = 60, 500


def bound_context() -> Callable[[], Mapping[str, object]]:
    """The function that returns the context variables bound with structlog."""
    from structlog.contextvars import get_contextvars

    return get_contextvars


def get_logger(name: str) -> Any:
    """A logger with the program's own configuration, which is read at its first use."""
    import structlog

    return structlog.get_logger(name)


def log_warning(event: str, **fields: Any) -> None:
    """Log something about the guard that the program's owner should know, or print it on stderr."""
    _log("warning", event, fields)


def log_error(
    event: str,
    error: BaseException,
    redact: Callable[[str], str] = str,
    **fields: Any,
) -> None:
    """Log one of our own failures: with its traceback where the program has configured structlog.

    Else it is one line on stderr.

    Not as `exc_info`, of which some processors show the variables: whole reports, unredacted.

    Args:
        event: What has failed.
        error: Why.
        redact: Applied to each line of the traceback; must raise nothing.
        **fields: More fields of the event.
    """
    lines = [redact(line) for line in _lines_of(error)]
    _log("error", event, {**fields, "error": lines[-1], "exception": "\n".join(lines)})


def _lines_of(error: BaseException) -> list[str]:
    """The lines of the traceback, the last ones if it is long; the last line names the error."""
    try:
        from traceback import format_exception

        text = "".join(format_exception(error))
    except Exception:
        # With no descriptor left, the module that reads source lines cannot be imported.
        text = f"{type(error).__name__}: {error}"
    lines = text.rstrip("\n").split("\n")[-_MAX_LINES:]
    return [escape_line(line)[:_MAX_CHARACTERS] for line in lines]


def _log(level: str, event: str, fields: Mapping[str, Any]) -> None:
    if not _is_configured():
        # The library's own defaults write to stdout, which belongs to the program.
        values = ", ".join(f"{name}={fields[name]!r}" for name in fields if name != "exception")
        print_error(f"{event}: {values}")
        return
    getattr(get_logger("closewait_guard"), level)(event, **fields)


def _is_configured() -> bool:
    """Whether the program logs through structlog; it is not imported to find that out."""
    module = sys.modules.get("structlog")
    return bool(getattr(module, "is_configured", bool)())
