"""The only importer of structlog, and only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["bound_context", "tell_failure"]


def bound_context() -> Mapping[str, object]:
    """The context variables that the program has bound with structlog."""
    from structlog.contextvars import get_contextvars

    return get_contextvars()


def tell_failure(event: str, error: BaseException, **facts: Any) -> None:
    """Log one of our own failures, with its traceback, through the program's structlog."""
    import structlog

    structlog.get_logger("closewait_guard").error(event, exc_info=error, **facts)
