"""The reporter `logging`: the events of a report through the standard library's logging."""

from __future__ import annotations

import logging as standard
from collections.abc import Mapping

from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Report, Reporter, Scalar, Severity
from closewait_guard.reporters.events import NewSockets, events

__all__ = [
    "logging",
]


_LEVELS = {
    Severity.INFO: standard.INFO,
    Severity.WARNING: standard.WARNING,
    Severity.CRITICAL: standard.CRITICAL,
}

_Logger = standard.Logger | standard.LoggerAdapter[standard.Logger]


def logging(logger: _Logger | str | None = None) -> Reporter:
    """Log one message for each site and each alert, with the fields as `extra`.

    No handler is added and no level changed. A leak is logged at least as a warning; findings that
    are not leaks are the event `socket_finding`, at debug level where their severity is info.

    Args:
        logger: A logger, or its name; `closewait_guard` by default.
    """
    if logger is None or isinstance(logger, str):
        logger = standard.getLogger(logger or "closewait_guard")
    if not isinstance(logger, standard.Logger | standard.LoggerAdapter):
        raise ConfigurationError(f"logging: expected a logger or its name, got {logger!r}")
    log, new_sockets = logger, NewSockets()

    def logging_reporter(report: Report) -> None:
        for event in events(report, new_sockets):
            level = _LEVELS[event.level] if event.is_news else standard.DEBUG
            _log(log, level, "%s", event.message, {"event": event.name, **event.fields})

    return logging_reporter


def _log(
    logger: _Logger, level: int, template: str, message: str, fields: Mapping[str, Scalar]
) -> None:
    if isinstance(logger, standard.LoggerAdapter):
        # Before Python 3.13 an adapter replaces the `extra` of the caller by its own.
        template, changed = logger.process(template, {"extra": fields})
        fields = {**fields, **(changed.get("extra") or {})}
        _log(logger.logger, level, template, message, fields)
    else:
        logger.log(level, template, message, extra=fields)
