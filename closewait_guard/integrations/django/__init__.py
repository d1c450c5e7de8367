"""Django: a monitor in each process that serves, labels of requests, a system check, a command.

`INSTALLED_APPS += ["closewait_guard.integrations.django"]` has the monitor start with the first
request of a process: only those that serve have one. `Middleware` labels requests.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import fields
from typing import Any, NamedTuple

from closewait_guard import _api
from closewait_guard._capture import LABELS
from closewait_guard._config import shown, unknown_name
from closewait_guard._threads import in_child
from closewait_guard.exceptions import ConfigurationError, MissingExtraError
from closewait_guard.integrations._app import (
    NO_ROUTE,
    AppMonitor,
    RequestLabel,
    off_loop,
    warn_of_failure,
)
from closewait_guard.integrations._page import (
    FROM_ENVIRONMENT,
    PAGE,
    PageAnswer,
    StatusPage,
)
from closewait_guard.reporters.names import known_names, named
from closewait_guard.settings import Settings

try:
    from django import conf
    from django.core.signals import request_started
    from django.http import HttpRequest, HttpResponse
    from django.utils.deprecation import MiddlewareMixin
except ImportError as missing:
    raise MissingExtraError(
        "closewait_guard.integrations.django needs Django: "
        f"pip install 'closewait-guard[django]' ({missing})"
    ) from missing

__all__ = ["Middleware", "ProjectOptions", "read_project_options", "watch_first_request"]


class ProjectOptions(NamedTuple):
    """What CLOSEWAIT_GUARD in the settings of a Django project says.

    Attributes:
        given: The settings of the guard that it has, as they stand there.
        settings: The same with those of all other sources.
        page: The status page.
    """

    given: Mapping[str, Any]
    settings: Settings
    page: StatusPage

    def make_monitor(self) -> AppMonitor:
        """The monitor that they ask for; sockets are recorded from now on."""
        parsed = {"interval": self.settings.interval, "at_exit": self.settings.at_exit}
        return AppMonitor(**{name: parsed.get(name, value) for name, value in self.given.items()})


_SETTING = "CLOSEWAIT_GUARD"
_OF_PAGE = ("page", "token")


def read_project_options() -> ProjectOptions:
    """What CLOSEWAIT_GUARD says; it may be missing.

    Raises:
        ConfigurationError: One of the settings cannot be used; the text names it, and where it is.
    """
    options = getattr(conf.settings, _SETTING, {})
    if not isinstance(options, dict):
        raise ConfigurationError(f"{_place()}: expected a dict, got {shown(options)}")
    known = (*(item.name for item in fields(Settings)), *_OF_PAGE)
    for name in options:
        if name not in known:
            why = unknown_name("setting", name, known, "Settings")
            raise ConfigurationError(f"{_place()}: {why}")
    given = {name: value for name, value in options.items() if name not in _OF_PAGE}
    try:
        settings = Settings.load({name: given[name] for name in given if name != "reporters"})
    except ConfigurationError as error:
        text = re.sub(r"\bkeyword (\w+)", lambda found: _place(found[1]), str(error))
        raise ConfigurationError(text) from None
    _require_known(given.get("reporters", ()))
    return ProjectOptions(given, settings, _page(options))


def _place(name: str = "") -> str:
    return f"{_SETTING}{name and f'[{name!r}]'} in the Django settings"


def _require_known(reporters: Any) -> None:
    """Refuse a reporter that there is not. A check makes none that opens a file as another user."""
    if isinstance(reporters, str) or not isinstance(reporters, list | tuple):
        expected = f"expected a list of reporters, got {shown(reporters)}"
        raise ConfigurationError(f"{_place('reporters')}: {expected}")
    for each in reporters:
        text = each if isinstance(each, str) else shown(each)
        opens_file = "json_lines" in text and text.strip().partition(":")[0] in known_names()
        try:
            if not (callable(each) or opens_file):
                named(text)
        except ConfigurationError as error:
            raise ConfigurationError(f"{_place('reporters')}: {error}") from None


def _page(options: Mapping[str, Any]) -> StatusPage:
    try:
        return StatusPage(options.get("page", PAGE), options.get("token"))
    except ConfigurationError as error:
        name, _, why = str(error).partition(": ")
        if name == FROM_ENVIRONMENT:
            raise
        raise ConfigurationError(f"{_place(name)}: {why}") from None


class _Served(NamedTuple):
    """What a process has that serves an application."""

    monitor: AppMonitor
    page: StatusPage


_lock = threading.Lock()
_served: _Served | None = None
_is_prepared = False


@in_child
def _after_fork() -> None:
    """Another thread of the parent may have been at it."""
    global _lock
    _lock = threading.Lock()


def _prepare() -> _Served | None:
    """Record from now on, once in a process; None in tests, or where a setting cannot be used."""
    global _served, _is_prepared
    if _is_testing():
        return None
    with _lock:
        if not _is_prepared:
            # Not again with the next request, if it fails.
            _is_prepared = True
            try:
                options = read_project_options()
                _served = _Served(options.make_monitor(), options.page)
                # Its databases are asked by C code, which connects out of sight.
                _api.install()._attribute_on_import(())
            except Exception as error:
                warn_of_failure(f"the application is served without a monitor: {error}")
        return _served


def _is_testing() -> bool:
    """Whether the test runner, or pytest-django, has prepared the process for tests."""
    state = getattr(sys.modules.get("django.test.utils"), "_TestState", None)
    return hasattr(state, "saved_data")


def watch_first_request(sender: type, **_: object) -> None:
    """Start the monitor of this process, which has begun to serve: a receiver of the signal."""
    if sender.__module__.startswith("django.test."):
        return
    # A receiver costs each request of an ASGI server a change of threads.
    request_started.disconnect(watch_first_request)
    if (served := _prepare()) is not None:
        served.monitor.start()


class Middleware(MiddlewareMixin):
    """Labels each request with its method, its route and its view; has the status page.

    The label, such as `GET /items/<int:pk>/ (shop:item)`, marks what the request opens in
    middleware below this one, in views of both kinds, and while its answer is streamed. So
    it stands first in MIDDLEWARE. Where it stands, sockets are recorded as soon as the
    application is made, before its first request.
    """

    def __init__(self, get_response: Any) -> None:
        super().__init__(get_response)
        served = _prepare()
        # Without a token there is none.
        self._page = served.page if served is not None and served.page.path else None

    def __call__(self, request: HttpRequest) -> Any:
        if self.async_mode:
            return self.__acall__(request)
        if self._page is not None and _is_asked_for(self._page, request):
            return _page_response(request, self._page.answer(*_asked_how(request)))
        label = _Label()
        before = label.enter(request)
        try:
            response = self.get_response(request)
        finally:
            label.leave(before)
            label.end()
        return _labelled(response, label) if response.streaming else response

    async def __acall__(self, request: HttpRequest) -> HttpResponse:
        """The same under ASGI."""
        if self._page is not None and _is_asked_for(self._page, request):
            answer = await off_loop(self._page.answer, *_asked_how(request))
            return _page_response(request, answer)
        label = _Label()
        before = label.enter(request)
        try:
            response = await self.get_response(request)
        finally:
            label.leave(before)
            label.end()
        return _labelled(response, label) if response.streaming else response


class _Label(RequestLabel):
    __slots__ = ()

    def _keep(self, request: HttpRequest) -> tuple[Any, ...]:
        match = request.resolver_match
        if match is None:
            return (request.method,)
        # Not the match: it has what the customer has asked for.
        return request.method, match.route, match.view_name

    def _describe(self, kept: tuple[Any, ...]) -> str:
        method, *of_route = kept
        if not of_route:
            return f"{method} {NO_ROUTE}"
        route, view = of_route
        return f"{method} {_readable(route)} ({view})"


def _readable(route: str) -> str:
    """A route as a path: those that are regular expressions without what only they need.

    Example:
        >>> _readable("items/<int:pk>/"), _readable(r"shops/^items/(?P<pk>[0-9]+)/$")
        ('/items/<int:pk>/', '/shops/items/<pk>/')
    """
    plain = re.sub(r"\(\?P(<\w+>)(?:[^()\\]|\\.)*\)", r"\1", route.removesuffix("\\Z"))
    return "/" + plain.replace("^", "").removesuffix("$")


def _labelled(response: Any, label: RequestLabel) -> Any:
    """The response that is streamed; what makes its parts has the label, too."""
    # A file goes to the server as it is.
    if getattr(response, "file_to_stream", None) is None:
        parts = response.streaming_content
        make = _async_parts if response.is_async else _parts
        response.streaming_content = make(parts, label)
    return response


_Labels = tuple[object, ...]


def _parts(parts: Iterator[bytes], label: RequestLabel) -> Iterator[bytes]:
    labels: _Labels | None = None
    while True:
        before = label.resume() if labels is None else LABELS.set(labels)
        try:
            part = next(parts)
        except StopIteration:
            return
        finally:
            # With those that the program has set around several parts.
            labels = LABELS.get()
            label.leave(before)
        yield part


async def _async_parts(parts: Any, label: RequestLabel) -> AsyncIterator[bytes]:
    labels: _Labels | None = None
    async with aclosing(parts):
        while True:
            before = label.resume() if labels is None else LABELS.set(labels)
            try:
                part = await anext(parts)
            except StopAsyncIteration:
                return
            finally:
                labels = LABELS.get()
                label.leave(before)
            yield part


def _is_asked_for(page: StatusPage, request: HttpRequest) -> bool:
    authorization = request.META.get("HTTP_AUTHORIZATION", "")
    return page.is_asked_for(request.method, request.path_info, authorization)


def _asked_how(request: HttpRequest) -> tuple[str, str]:
    return request.META.get("HTTP_ACCEPT", ""), request.META.get("QUERY_STRING", "")


def _page_response(request: HttpRequest, answer: PageAnswer) -> HttpResponse:
    body = b"" if request.method == "HEAD" else answer.body
    return HttpResponse(body, status=answer.code, headers=dict(answer.headers))
