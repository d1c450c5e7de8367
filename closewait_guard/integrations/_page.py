"""The status page: a report of this process for who has the token, and nothing for others."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, NamedTuple

from closewait_guard import _api
from closewait_guard._clock import now
from closewait_guard._config import PAGE_TOKEN
from closewait_guard._cpython import compare_digest
from closewait_guard._render import to_dict
from closewait_guard.exceptions import ConfigurationError

if TYPE_CHECKING:
    from closewait_guard.model import Report

__all__ = ["FROM_ENVIRONMENT", "PAGE", "PageAnswer", "StatusPage"]


# Where it is, unless the application says otherwise.
PAGE = "/_closewait"
# How a refusal of what no argument has given begins.
FROM_ENVIRONMENT = f"environment variable {PAGE_TOKEN}"
_FEWEST_CHARACTERS = 16
# What lies between two scans, however often the page is asked for.
_MIN_SECONDS = 1.0
_MAX_SHARE = 0.01


class PageAnswer(NamedTuple):
    """What is answered.

    Attributes:
        status: The HTTP status, as a number and a phrase.
        content_type: Of the body.
        body: The report, or why there is none.
    """

    status: str
    content_type: str
    body: bytes

    @property
    def code(self) -> int:
        """The number of the status."""
        return int(self.status.partition(" ")[0])

    @property
    def headers(self) -> list[tuple[str, str]]:
        """What goes before the body."""
        return [
            ("Content-Type", self.content_type),
            ("Content-Length", str(len(self.body))),
            ("Cache-Control", "no-store"),
        ]


class StatusPage:
    """A report of this process, at an address that is off until a token is set.

    Args:
        path: Where it is.
        token: What a request must have, as `Authorization: Bearer TOKEN`; the environment variable
            CLOSEWAIT_GUARD_PAGE_TOKEN when left out. Without one there is no page.

    Raises:
        ConfigurationError: The path or the token cannot be used.
    """

    def __init__(self, path: str = PAGE, token: str | None = None) -> None:
        if not (isinstance(path, str) and path.startswith("/")):
            raise ConfigurationError(f"page: expected a path that begins with '/', got {path!r}")
        # One that is set to nothing is none.
        place = "token" if token else FROM_ENVIRONMENT
        token = token or os.environ.get(PAGE_TOKEN) or None
        if token is not None and not (isinstance(token, str) and len(token) >= _FEWEST_CHARACTERS):
            raise ConfigurationError(
                f"{place}: the token of the status page must have at least {_FEWEST_CHARACTERS} "
                "characters"
            )
        # A path that no request can have.
        self.path = path if token is not None else ""
        self._wanted = f"Bearer {token}".encode()
        self._begin()

    def _begin(self) -> None:
        """A forked worker has nothing of its parent: no report, and no lock."""
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._report: Report | None = None
        self._next = 0.0

    def is_asked_for(self, method: str, path: str, authorization: str) -> bool:
        """Whether a request is for this page, and may see it. All others are the application's."""
        return (
            bool(self.path)
            and path == self.path
            and method in ("GET", "HEAD")
            and compare_digest(authorization.encode(errors="replace"), self._wanted)
        )

    def answer(self, accept: str, query: str) -> PageAnswer:
        """The report as text, or as JSON where that is asked for. Scans, so it takes a moment."""
        try:
            report = self._latest()
            if "format=json" in query.split("&") or "application/json" in accept:
                text, content_type = json.dumps(to_dict(report)), "application/json"
            else:
                text, content_type = str(report), _TEXT
        except Exception as error:
            failure = f"closewait-guard: the scan failed: {error}\n"
            return PageAnswer("500 Internal Server Error", _TEXT, failure.encode(errors="replace"))
        return PageAnswer("200 OK", content_type, text.encode(errors="replace"))

    def _latest(self) -> Report:
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            if self._report is None or now() >= self._next:
                began = now()
                self._report = _api.scan()
                self._next = now() + max(_MIN_SECONDS, (now() - began) / _MAX_SHARE)
            return self._report


_TEXT = "text/plain; charset=utf-8"
