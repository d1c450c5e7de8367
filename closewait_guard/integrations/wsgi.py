"""WSGI: Flask and every other application of the kind, whatever serves it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

from closewait_guard._capture import LABELS
from closewait_guard.integrations._app import (
    NO_ROUTE,
    AppMonitor,
    RequestLabel,
    WatchedApp,
    require_application,
    without_numbers,
)
from closewait_guard.integrations._page import PAGE, StatusPage

__all__ = ["wsgi"]


_App = TypeVar("_App", bound=Callable[..., Any])


def wsgi(app: _App, *, page: str = PAGE, token: str | None = None, **settings: Any) -> _App:
    """Watch a WSGI application: a monitor for its life, a label for each request, a status page.

    The label has the method and the route, such as `GET /items/<id>`, and lasts until the answer is
    sent. The monitor starts with the first request, in each process that has one, and ends with
    the process.

    Args:
        app: The application. What is returned has its attributes too.
        page: Where the status page is: a report of the process that answers, as text, or as JSON
            with `?format=json`.
        token: What a request for it must have, as `Authorization: Bearer TOKEN`; the environment
            variable CLOSEWAIT_GUARD_PAGE_TOKEN when left out. Without a token there is no page.
        **settings: As for `watch()`: interval, reporters, at_exit, settings, and single settings.

    Raises:
        ConfigurationError: A setting, the path or the token cannot be used, or the application
            cannot be called.

    Example:
        `app = cwg.wsgi(app)`, or with Flask `app.wsgi_app = cwg.wsgi(app.wsgi_app)`.
    """
    require_application(app, "wsgi")
    return cast(_App, _WsgiApp(app, AppMonitor(**settings), StatusPage(page, token)))


class _WsgiApp(WatchedApp):
    """The application in its place."""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        app, monitor, page = self._closewait_parts
        if not monitor.is_started:
            monitor.start()
        if page.path and _is_asked_for(page, environ):
            return _page_body(page, environ, start_response)
        label = _Label()

        def start(status: str, headers: Any, exc_info: Any = None) -> Any:
            # Flask lets go of its request before it returns; and not every client closes the body.
            label.end()
            if exc_info is None:
                return start_response(status, headers)
            return start_response(status, headers, exc_info)

        before = label.enter(environ)
        try:
            body = app(environ, start)
        except BaseException:
            label.end()
            raise
        finally:
            label.leave(before)
        if _is_complete(body, environ):
            label.end()
            return body
        return (_SizedBody if hasattr(body, "__len__") else _Body)(body, label)


class _Body:
    """Each part of a body is made, and it is closed, with the label, in whatever thread.

    Not in between: a client for tests may close it late, or never.
    """

    __slots__ = ("_body", "_label", "_labels")

    def __init__(self, body: Any, label: RequestLabel) -> None:
        self._body, self._label = body, label
        before = label.resume()
        self._labels = LABELS.get()
        label.leave(before)

    def __iter__(self) -> Iterator[bytes]:
        parts = None
        while True:
            before = LABELS.set(self._labels)
            try:
                if parts is None:
                    parts = iter(self._body)
                part = next(parts, _END)
            finally:
                # With those that the program has set around several parts.
                self._labels = LABELS.get()
                LABELS.reset(before)
            if part is _END:
                return
            yield part

    def close(self) -> None:
        """As the server must do at the end."""
        close = getattr(self._body, "close", None)
        before = LABELS.set(self._labels)
        try:
            if close is not None:
                close()
        finally:
            LABELS.reset(before)
            self._label.end()


_END: Any = object()


class _Werkzeug(NamedTuple):
    """What it makes the body of a response with."""

    body: Any
    parts: Any
    close: Any


def _is_complete(body: Any, environ: dict[str, Any]) -> bool:
    """Whether no code of the program runs any more while a body is sent, or the server wants it.

    That is a list, and a file that the server sends itself. In Flask most are a list too, in a
    response that calls nothing when it is closed: to label each part and the end of these would
    cost more than all the rest.
    """
    made = _werkzeug() if "werkzeug.wrappers" in sys.modules else None
    if made is not None and type(body) is made.body:
        try:
            first, last = body._callbacks
            response = last.__self__
            return (
                first.__self__.gi_code is made.parts
                and last.__func__ is made.close
                and type(response.response) is list
                and not response._on_close
            )
        except Exception:
            # One of the application's own, or of another version.
            return False
    file_wrapper = environ.get("wsgi.file_wrapper")
    is_file = isinstance(file_wrapper, type) and isinstance(body, file_wrapper)
    return is_file or type(body) in (list, tuple)


@cache
def _werkzeug() -> _Werkzeug | None:
    """None where it makes bodies in another way."""
    try:
        response = sys.modules["werkzeug.wrappers.response"]
        return _Werkzeug(
            sys.modules["werkzeug.wsgi"].ClosingIterator,
            response._iter_encoded.__code__,
            response.Response.close,
        )
    except (AttributeError, KeyError):
        return None


class _SizedBody(_Body):
    """One of which the server may want to know how many parts there are."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)


class _Label(RequestLabel):
    __slots__ = ()

    def _keep(self, environ: dict[str, Any]) -> tuple[str, str]:
        method = environ["REQUEST_METHOD"]
        try:
            # Below what it is mounted at, as by `DispatcherMiddleware`.
            mounted_at = environ.get("SCRIPT_NAME", "")
            return method, mounted_at + environ["werkzeug.request"].url_rule.rule
        except (AttributeError, KeyError):
            return method, _route_of(environ)

    def _describe(self, kept: tuple[str, str]) -> str:
        return " ".join(kept)


_NOT_FLASK = object()


def _route_of(environ: dict[str, Any]) -> str:
    """The template of the route, if the application has one; Flask and Bottle say which."""
    request = environ.get("werkzeug.request", _NOT_FLASK)
    if request is None:
        # Flask lets go of it before it raises what a view has raised; the path may name a customer.
        return "(unknown route)"
    found = getattr(request, "url_rule", _NOT_FLASK)
    if found is not _NOT_FLASK:
        return getattr(found, "rule", NO_ROUTE)
    rule = getattr(environ.get("bottle.route"), "rule", None)
    return rule or without_numbers(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", ""))


def _is_asked_for(page: StatusPage, environ: dict[str, Any]) -> bool:
    method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
    return page.is_asked_for(method, path, environ.get("HTTP_AUTHORIZATION", ""))


def _page_body(
    page: StatusPage, environ: dict[str, Any], start_response: Callable[..., Any]
) -> list[bytes]:
    answer = page.answer(environ.get("HTTP_ACCEPT", ""), environ.get("QUERY_STRING", ""))
    start_response(answer.status, answer.headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]
