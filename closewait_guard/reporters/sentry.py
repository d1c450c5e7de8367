"""The reporter `sentry`: one event for each cause, through the program's own Sentry SDK."""

from __future__ import annotations

import linecache
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from closewait_guard._format import pluralize
from closewait_guard._render import verdict_name
from closewait_guard._structlog import log_warning
from closewait_guard.exceptions import MissingExtraError
from closewait_guard.model import (
    AlertStatus,
    Frame,
    FrameKind,
    Report,
    Reporter,
    Severity,
    SiteGroup,
)
from closewait_guard.reporters.events import (
    Event,
    alert_event,
    closed_late_events,
    site_event,
)
from closewait_guard.reporters.filters import subject_of

__all__ = [
    "sentry",
]


_MAX_EVENTS, _MAX_REMEMBERED = 20, 1000
_MAX_FRAMES, _MAX_VALUES, _MAX_CHARACTERS = 60, 10, 500
# Of a file on each side of a line, and the largest file that is read for it.
_LINES_AROUND, _MAX_FILE = 5, 1_000_000
_FLUSH_SECONDS = 2.0
_LEVELS = {Severity.INFO: "info", Severity.WARNING: "warning", Severity.CRITICAL: "fatal"}
# What sends the events. To report what it leaves open would have it open more.
_TRANSPORT, _TRANSPORT_THREADS = ("sentry_sdk.transport", "sentry_sdk.worker"), "sentry-sdk."


def sentry() -> Reporter:
    """Send an event to Sentry for each line that leaks, and for each alert.

    The program's own `sentry_sdk.init()` says where to, before or after this is made; without it
    one sentence says so. Events are grouped by `SiteGroup.fingerprint`, with the creation stack as
    their stack trace. The same cause is sent again only when its sockets have doubled, or it is
    more severe. What is closed late, and the end of an alert, is a breadcrumb of the events that
    follow.

    Raises:
        MissingExtraError: sentry_sdk 2 or newer is not installed.
    """
    return _Sentry()


class _Sent(NamedTuple):
    """What was last sent of one cause."""

    sockets: int
    rank: int


class _Cause(NamedTuple):
    """What may have to be sent."""

    key: str
    size: _Sent
    event: Event
    group: SiteGroup | None = None


class _Sentry:
    def __init__(self) -> None:
        self._sdk = _import_sdk()
        # The oldest first. A child that is forked remembers what its parent has sent.
        self._sent: dict[str, _Sent] = {}
        self._has_warned = False

    def __call__(self, report: Report, /) -> None:
        if not self._sdk.get_client().is_active():
            self._warn_once()
            return
        self._leave_breadcrumbs(report)
        news = [cause for cause in _causes(report) if self._is_news(cause.key, cause.size)]
        for cause in news[:_MAX_EVENTS]:
            self._send(cause.key, cause.size, _as_sentry_event(cause, report))
        more = len(news) - _MAX_EVENTS
        if more > 0 and self._is_news(_MORE, _Sent(more, 0)):
            text = f"{pluralize(more, 'more cause')}, reported in full by other reporters"
            self._send(_MORE, _Sent(more, 0), {**_common(_MORE, report), "message": text})

    def flush(self) -> None:
        """Wait for what the SDK has not sent yet: the process ends."""
        self._sdk.flush(timeout=_FLUSH_SECONDS)

    def __repr__(self) -> str:
        return "sentry()"

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            log_warning("reports are not sent to Sentry: the program has not called init()")

    def _is_news(self, key: str, size: _Sent) -> bool:
        sent = self._sent.get(key)
        return sent is None or size.sockets >= 2 * sent.sockets or size.rank > sent.rank

    def _send(self, key: str, size: _Sent, event: dict[str, Any]) -> None:
        self._sdk.capture_event(event)
        # Not before: the next report has it again if the program's own functions have raised.
        self._sent.pop(key, None)
        self._sent[key] = size
        while len(self._sent) > _MAX_REMEMBERED:
            del self._sent[next(iter(self._sent))]

    def _leave_breadcrumbs(self, report: Report) -> None:
        for event in closed_late_events(report):
            if str(event.fields["fingerprint"]) in self._sent:
                self._leave_breadcrumb(event)
        for alert in report.alerts:
            key = _alert_key(alert.kind, subject_of(alert))
            if alert.status is AlertStatus.RESOLVED and key in self._sent:
                del self._sent[key]
                self._leave_breadcrumb(alert_event(alert, report))

    def _leave_breadcrumb(self, event: Event) -> None:
        # The other scopes end with this thread.
        self._sdk.get_global_scope().add_breadcrumb(
            category="closewait_guard", level="info", message=event.message
        )


_MORE = "more"


def _import_sdk() -> Any:
    try:
        import sentry_sdk
    except ImportError as error:
        raise MissingExtraError(
            f"the reporter sentry needs sentry_sdk: pip install sentry-sdk ({error})"
        ) from error
    if not hasattr(sentry_sdk, "get_global_scope"):
        version = getattr(sentry_sdk, "VERSION", "unknown")
        raise MissingExtraError(
            f"the reporter sentry needs sentry_sdk 2 or newer, and {version} is installed"
        )
    return sentry_sdk


def _causes(report: Report) -> Iterator[_Cause]:
    """The alerts, and the sites that are worth a message, the worst first."""
    for alert in report.alerts:
        if alert.status is not AlertStatus.RESOLVED:
            key = _alert_key(alert.kind, subject_of(alert))
            yield _Cause(key, _Sent(1, alert.severity.rank), alert_event(alert, report))
    seen = set[str]()
    for group in report.by_site():
        event = site_event(group, report.pid)
        if event.is_news and group.fingerprint not in seen and not _is_transport(group):
            seen.add(group.fingerprint)
            size = _Sent(group.count, group.severity.rank)
            yield _Cause(group.fingerprint, size, event, group)


def _alert_key(kind: str, subject: object) -> str:
    return kind if subject is None else f"{kind} {subject}"


def _is_transport(group: SiteGroup) -> bool:
    opener = group.findings[0].observation.record.opener
    return opener.thread.startswith(_TRANSPORT_THREADS) or any(
        frame.module.startswith(_TRANSPORT) for frame in opener.stack
    )


def _as_sentry_event(cause: _Cause, report: Report) -> dict[str, Any]:
    fields = cause.event.fields
    event = _common(cause.key, report) | {
        "level": _LEVELS[cause.event.level],
        "tags": {
            f"closewait_guard.{name}": str(fields[name])[:200]
            for name in ("code", "verdict", "kind", "package", "caller")
            if fields.get(name) is not None
        },
        "contexts": {"closewait_guard": _bounded(fields)},
    }
    if cause.group is None:
        return event | {"message": cause.event.message}
    finding = cause.group.findings[0]
    owner = finding.observation.owner
    exception: dict[str, Any] = {
        "type": f"{verdict_name(finding.verdict)} {'socket' if owner is None else owner.name}",
        "value": cause.event.message,
        "mechanism": {"type": "closewait_guard", "handled": True},
    }
    if stack := finding.observation.record.blamed.stack[:_MAX_FRAMES]:
        frames = [_as_sentry_frame(frame, report) for frame in reversed(stack)]
        exception["stacktrace"] = {"frames": frames}
    event["contexts"]["closewait_guard"] |= _several(cause.group)
    return event | {"exception": {"values": [exception]}}


def _common(key: str, report: Report) -> dict[str, Any]:
    return {
        "level": "warning",
        "logger": "closewait_guard",
        "timestamp": report.taken_at,
        "fingerprint": ["closewait_guard", key],
    }


def _several(group: SiteGroup) -> dict[str, Any]:
    """What an event of a log has the first of only."""
    observations = [finding.observation for finding in group.findings]
    holders = (holder for finding in group.findings for holder in finding.holders)
    owned = (peer for seen in observations if seen.owner for peer in seen.owner.peers)
    peers = (*(seen.peer for seen in observations if seen.peer), *owned)
    return {"held_by": _first(holders), "peers": _first(peers)}


def _first(values: Iterable[str]) -> list[str]:
    distinct = list(dict.fromkeys(values))
    return [value[:_MAX_CHARACTERS] for value in distinct[:_MAX_VALUES]]


def _bounded(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value[:_MAX_CHARACTERS] if isinstance(value, str) else value
        for name, value in fields.items()
    }


def _as_sentry_frame(frame: Frame, report: Report) -> dict[str, Any]:
    is_own = frame.kind is FrameKind.USER
    shown: dict[str, Any] = {
        "filename": _short_name(frame),
        "abs_path": frame.filename,
        "function": frame.function,
        "module": frame.module,
        "lineno": frame.lineno,
        "in_app": is_own,
    }
    if frame.source is not None:
        shown["context_line"] = frame.source
        # The lines around have not been redacted, and may be what was to be removed.
        if is_own and not report.redacted:
            shown |= _context_of(frame)
    return shown


def _short_name(frame: Frame) -> str:
    """The path within the folder that the module is imported from.

    Example:
        >>> _short_name(Frame("/srv/shop/api/views.py", 3, "get", "api.views"))
        'api/views.py'
    """
    parts, depth = frame.filename.replace("\\", "/").split("/"), frame.module.count(".") + 1
    if parts[-1] == "__init__.py":
        depth += 1
    return "/".join(parts[-depth:])


def _context_of(frame: Frame) -> dict[str, Any]:
    """The lines around, where the file is still the one that was run."""
    lines = list[str]()
    with suppress(Exception):
        status = os.stat(frame.filename)  # noqa: PTH116 - the name may be any text
        if stat.S_ISREG(status.st_mode) and status.st_size <= _MAX_FILE:
            linecache.checkcache(frame.filename)
            lines = linecache.getlines(frame.filename)
    at = frame.lineno - 1
    if not 0 <= at < len(lines) or lines[at].strip() != frame.source:
        return {}
    around = [line.rstrip("\n")[:_MAX_CHARACTERS] for line in lines]
    return {
        "pre_context": around[max(0, at - _LINES_AROUND) : at],
        "context_line": around[at],
        "post_context": around[at + 1 : at + 1 + _LINES_AROUND],
    }
