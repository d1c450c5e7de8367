"""The only importer of structlog, and only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["bound_context", "logger_of", "tell", "tell_failure"]


def bound_context() -> Mapping[str, object]:
    """The context variables that the program has bound with structlog."""
    from structlog.contextvars import get_contextvars

    return get_contextvars()


def logger_of(name: str) -> Any:
    """A logger after the program's own configuration, read when it is first used."""
    import structlog

    return structlog.get_logger(name)


def tell(event: str, **facts: Any) -> None:
    """Log something that the program's owner should know of us."""
    logger_of("closewait_guard").warning(event, **facts)


def tell_failure(event: str, error: BaseException, **facts: Any) -> None:
    """Log one of our own failures, with its traceback, through the program's structlog."""
    logger_of("closewait_guard").error(event, exc_info=error, **facts)
