"""The only importer of structlog, and only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from closewait_guard._format import one_line
from closewait_guard._stream import print_error

__all__ = [
    "bound_context",
    "get_logger",
    "log_error",
    "log_warning",
]


def bound_context() -> Callable[[], Mapping[str, object]]:
    """What answers the context variables that the program has bound with structlog."""
    from structlog.contextvars import get_contextvars

    return get_contextvars


def get_logger(name: str) -> Any:
    """A logger after the program's own configuration, read when it is first used."""
    import structlog

    return structlog.get_logger(name)


def log_warning(event: str, **facts: Any) -> None:
    """Log something that the program's owner should know of us."""
    _log("warning", event, facts)


def log_error(
    event: str,
    error: BaseException,
    redact: Callable[[str], str] = str,
    **facts: Any,
) -> None:
    """Log one of our own failures, with its traceback, through the program's structlog.

    Not as `exc_info`, of which some processors show the variables: whole reports, unredacted.

    Args:
        event: What has failed.
        error: Why.
        redact: Applied to each line that the error makes; must raise nothing.
        **facts: What else to tell.
    """
    lines = [redact(line) for line in _lines_of(error)]
    _log("error", event, {**facts, "error": lines[-1], "exception": "\n".join(lines)})


def _lines_of(error: BaseException) -> list[str]:
    """The traceback as text, its end if it is long; the last line names the error."""
    try:
        from traceback import format_exception

        text = "".join(format_exception(error))
    except Exception:
        # With no descriptor left, what shows source lines cannot be imported.
        text = f"{type(error).__name__}: {error}"
    lines = text.rstrip("\n").split("\n")[-_MAX_LINES:]
    return [one_line(line)[:_MAX_LETTERS] for line in lines]


_MAX_LINES, _MAX_LETTERS = 60, 500


def _log(level: str, event: str, facts: Mapping[str, Any]) -> None:
    try:
        logger = get_logger("closewait_guard")
    except (ImportError, OSError):
        # It is imported with the first failure, and there may be no descriptor left to do so.
        known = ", ".join(f"{name}={facts[name]!r}" for name in facts if name != "exception")
        print_error(f"{event}: {known}")
        return
    getattr(logger, level)(event, **facts)
