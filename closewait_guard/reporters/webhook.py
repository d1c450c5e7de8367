"""The reporters `webhook` and `slack`: post reports to an address, from a thread of their own."""

from __future__ import annotations

import atexit
import json
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from closewait_guard._clock import now
from closewait_guard._format import Layout, pluralize
from closewait_guard._render import render_report, to_dict, with_fewer_examples
from closewait_guard._structlog import log_warning
from closewait_guard._threads import allows_daemons, in_child
from closewait_guard.model import Report, Reporter, Severity
from closewait_guard.reporters.events import events
from closewait_guard.reporters.filters import changes
from closewait_guard.reporters.posting import Poster, PostError, WebAddress

__all__ = [
    "slack",
    "webhook",
]


SCHEMA = "closewait-guard-webhook/1"
_MAX_WAITING = 20
_MAX_BYTES = 256_000
# Slack cuts longer messages into several; and a block of code is as wide as its window.
_MAX_CHARACTERS, _WIDTH = 3500, 76
_POST_SECONDS, _FLUSH_SECONDS = 5.0, 3.0
_ATTEMPTS, _FIRST_DELAY, _MAX_DELAY = 3, 1.0, 60.0


def webhook(url: str) -> Reporter:
    """Post each report to an address as JSON, without the program waiting for it.

    The document has `schema` (`closewait-guard-webhook/1`), `text` (the report for people),
    `severity` (the worst of it), `events` (one flat object for each alert and each site, as
    structlog has them), `report` (all of it, as `to_dict()` has it) and `lost` (how many reports
    before this one did not arrive).

    Each post may take five seconds, and is tried three times, later if the server says so by
    `Retry-After`; a redirect is not followed. Up to twenty reports wait, then the oldest is lost.
    At the end of the program three seconds are left for what waits.

    Args:
        url: `https://host/path` or `http://host/path`; user and password are sent as a header. Only
            its host is ever shown.

    Raises:
        ConfigurationError: It is no such address.

    Example:
        >>> webhook("https://user:secret@alerts.internal/T0/secret")
        webhook('https://alerts.internal/...')
    """
    return _Webhook("webhook", url, _as_json)


def slack(url: str) -> Reporter:
    """Post what has changed to a webhook of Slack, as text; see `webhook` and `changes`.

    Mattermost, Rocket.Chat and others take the same form.

    Example:
        >>> slack("https://hooks.slack.com/services/T0/B0/secret")
        changes(slack('https://hooks.slack.com/...'))
    """
    return changes(_Webhook("slack", url, _as_slack))


class _Webhook:
    """Posts from a thread that is there while there is something to post.

    Attributes:
        lost: How many reports did not arrive, or made room for newer ones.
    """

    def __init__(self, name: str, url: str, form: Callable[[Report, int], bytes]) -> None:
        self._target = WebAddress.parse(name, url)
        self._name, self._form = name, form
        self.lost = self._lost_reported = 0
        self._has_failed = self._is_ending = False
        self.after_fork()
        if not _webhooks:
            # Called before what was registered before: after the last report of a monitor.
            atexit.register(_flush_all)
        _webhooks.add(self)

    def after_fork(self) -> None:
        """In the child: what waits is posted by the parent, whose thread is not here."""
        poster: Poster | None = getattr(self, "_poster", None)
        if poster is not None:
            poster.close()
        self._poster = Poster(self._target)
        self._waiting = deque[Report]()
        self._lock = threading.Lock()
        self._is_idle, self._is_hurried = threading.Event(), threading.Event()
        self._is_idle.set()
        self._end = self._not_before = 0.0
        self._thread: threading.Thread | None = None
        # What the thread is posting has been counted as lost.
        self._has_given_up = False

    def __call__(self, report: Report, /) -> None:
        thread = None
        with self._lock:
            is_full = len(self._waiting) >= _MAX_WAITING
            if is_full:
                self._waiting.popleft()
            self._waiting.append(report)
            if self._is_idle.is_set():
                self._is_idle.clear()
                self._thread = thread = threading.Thread(
                    target=self._run, name="closewait-guard-webhook", daemon=allows_daemons()
                )
        if is_full:
            self._note_lost(1, f"more than {_MAX_WAITING} reports wait")
        if thread is not None:
            self._start(thread)
        if self._is_ending:
            self.flush()

    def flush(self) -> None:
        """Wait until all is posted, for at most three seconds; what is not by then is lost."""
        with self._lock:
            if self._has_given_up and not self._waiting:
                return
        self._hurry()
        # A moment more, for the thread to give up by itself.
        is_idle = self._is_idle.wait(_FLUSH_SECONDS + 0.5)
        with self._lock:
            # Not one that an earlier call has given up, as where the name service hangs.
            left = len(self._waiting) + (not is_idle and not self._has_given_up)
            self._waiting.clear()
            self._has_given_up = not self._is_idle.is_set()
        self._do_not_hurry()
        if left:
            self._note_lost(left, "the program ends")
        thread = self._thread
        if is_idle and thread is not None and thread.is_alive():
            # It has nothing left to do, and no test is to see it.
            thread.join(_FLUSH_SECONDS)

    def close(self) -> None:
        self.flush()

    def flush_at_exit(self) -> None:
        """From now on each report is waited for: no thread outlives the program."""
        self._is_ending = True
        self.flush()

    def __repr__(self) -> str:
        return f"{self._name}({self._target.name!r})"

    def _start(self, thread: threading.Thread) -> None:
        try:
            if thread.daemon:
                thread.start()
                return
        except RuntimeError:
            # There are too many, or the interpreter ends.
            pass
        self._hurry()
        self._run()
        self._do_not_hurry()

    def _hurry(self) -> None:
        self._end = now() + _FLUSH_SECONDS
        self._is_hurried.set()

    def _do_not_hurry(self) -> None:
        self._end = 0.0
        self._is_hurried.clear()

    # In the thread.

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_idle.set()
                    return
                report = self._waiting.popleft()
            try:
                self._post(report)
            except Exception as error:
                with self._lock:
                    number = int(not self._has_given_up)
                self._note_lost(number, str(error) or type(error).__name__)
            else:
                self._has_failed = False
            with self._lock:
                self._has_given_up = False

    def _post(self, report: Report) -> None:
        """Post it, in several attempts.

        Raises:
            PostError: All of them have failed.
        """
        lost = self.lost
        body = self._form(report, lost - self._lost_reported)
        delay = _FIRST_DELAY
        for attempt in range(1, _ATTEMPTS + 1):
            self._wait()
            began = now()
            try:
                self._poster.post(body, partial(self._end_of, began))
            except PostError as error:
                self._not_before = now() + min(max(delay, error.retry_after), _MAX_DELAY)
                if error.is_final or attempt == _ATTEMPTS or self._is_over(self._not_before):
                    raise
                delay *= 2
            else:
                self._lost_reported = lost
                return

    def _wait(self) -> None:
        """Until the server may be asked again; where that is too late for the end, not at all."""
        while (left := self._not_before - now()) > 0:
            if self._is_over(self._not_before):
                raise PostError("the server wants it later than the program ends")
            # A flag that is set would not wait.
            is_hurried = self._is_hurried.is_set()
            (threading.Event() if is_hurried else self._is_hurried).wait(left)

    def _end_of(self, began: float) -> float:
        return min(began + _POST_SECONDS, self._end or began + _POST_SECONDS)

    def _is_over(self, at: float) -> bool:
        return bool(self._end) and at >= self._end

    def _note_lost(self, number: int, why: str) -> None:
        self.lost += number
        if self._has_failed:
            return
        self._has_failed = True
        log_warning("reports did not arrive", reporter=repr(self), lost=number, why=why)


_webhooks: weakref.WeakSet[_Webhook] = weakref.WeakSet()


def _flush_all() -> None:
    for each in list(_webhooks):
        each.flush_at_exit()


@in_child
def _after_fork() -> None:
    for each in list(_webhooks):
        each.after_fork()


def _as_json(report: Report, lost: int) -> bytes:
    body = b""
    for shorter in (report, *with_fewer_examples(report)):
        body = json.dumps(_document(shorter, lost), separators=(",", ":")).encode()
        if len(body) <= _MAX_BYTES:
            break
    return body


def _document(report: Report, lost: int) -> dict[str, Any]:
    found = [
        {**event.fields, "event": event.name, "level": event.level.value, "message": event.message}
        for event in events(report)
    ]
    return {
        "schema": SCHEMA,
        "text": render_report(report),
        "severity": _worst_of(report).value,
        "lost": lost,
        "events": found,
        "report": to_dict(report),
    }


def _worst_of(report: Report) -> Severity:
    severities = [each.level for each in events(report)]
    return max(severities, key=lambda each: each.rank, default=Severity.INFO)


def _as_slack(report: Report, lost: int) -> bytes:
    head = f"{pluralize(lost, 'report')} before this one did not arrive.\n" if lost else ""
    text = render_report(report, Layout(_WIDTH)).rstrip("\n")
    # Three of them would end the block; and what begins with an angle bracket is a command.
    text = text.replace("```", "'''")
    for character, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(character, name)
    if len(text) > _MAX_CHARACTERS:
        text = text[:_MAX_CHARACTERS].rpartition("\n")[0] + "\n(cut here)"
    return json.dumps({"text": f"{head}```\n{text}\n```"}).encode()
