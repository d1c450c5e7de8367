"""The reporter `structlog`: one structured event for each site and each alert."""

from __future__ import annotations

from typing import Any

from closewait_guard._structlog import get_logger
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Report, Reporter
from closewait_guard.reporters.events import Event, NewSockets, events

__all__ = [
    "structlog",
]


def structlog(logger: Any = None) -> Reporter:
    """Log flat events that can be queried, by the program's own structlog configuration.

    The events are `socket_leak`, `socket_alert` and `socket_closed_late`, and `socket_finding` for
    what is not a leak. Severity gives the level; a leak is at least a warning, and a finding of
    severity info is logged at debug level.

    Args:
        logger: A structlog logger; by default what `structlog.get_logger()` gives.

    Example:
        >>> from closewait_guard import Guard
        >>> with Guard(reporters=[structlog()]) as guard:
        ...     _ = guard.report()
    """
    if logger is not None and not callable(getattr(logger, "critical", None)):
        raise ConfigurationError(f"structlog: expected a structlog logger, got {logger!r}")
    log = logger if logger is not None else get_logger("closewait_guard.reports")
    new_sockets = NewSockets()

    def structlog_reporter(report: Report) -> None:
        for event in events(report, new_sockets):
            getattr(log, _level(event))(event.name, **event.fields)

    return structlog_reporter


def _level(event: Event) -> str:
    return event.level.value if event.is_news else "debug"
