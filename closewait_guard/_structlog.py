"""The only importer of structlog, and only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from closewait_guard._stream import print_error

__all__ = ["bound_context", "logger_of", "tell", "tell_failure"]


def bound_context() -> Callable[[], Mapping[str, object]]:
    """What answers the context variables that the program has bound with structlog."""
    from structlog.contextvars import get_contextvars

    return get_contextvars


def logger_of(name: str) -> Any:
    """A logger after the program's own configuration, read when it is first used."""
    import structlog

    return structlog.get_logger(name)


def tell(event: str, **facts: Any) -> None:
    """Log something that the program's owner should know of us."""
    _log("warning", event, facts)


def tell_failure(event: str, error: BaseException, **facts: Any) -> None:
    """Log one of our own failures, with its traceback, through the program's structlog."""
    _log("error", event, {**facts, "exc_info": error})


def _log(level: str, event: str, facts: Mapping[str, Any]) -> None:
    try:
        logger = logger_of("closewait_guard")
    except (ImportError, OSError):
        # It is imported with the first failure, and there may be no descriptor left to do so.
        known = ", ".join(f"{name}={value!r}" for name, value in facts.items())
        print_error(f"{event}: {known}")
        return
    getattr(logger, level)(event, **facts)
