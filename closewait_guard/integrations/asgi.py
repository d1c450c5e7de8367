"""ASGI: Starlette, FastAPI and every other application of the kind, whatever serves it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeVar, cast

from closewait_guard.integrations._app import (
    NO_ROUTE,
    AppMonitor,
    RequestLabel,
    WatchedApp,
    off_loop,
    require_application,
    without_numbers,
)
from closewait_guard.integrations._page import PAGE, StatusPage

__all__ = ["asgi"]


_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_Names = Sequence[tuple[str, str]]
_App = TypeVar("_App", bound=Callable[..., Any])


def asgi(app: _App, *, page: str = PAGE, token: str | None = None, **settings: Any) -> _App:
    """Watch an ASGI application: a monitor for its life, a label for each request, a status page.

    The label has the method and the route, such as `GET /items/{id}`. It lasts for the whole
    answer, the background tasks and the life of a websocket, and is there in tasks and in threads
    of `run_in_threadpool()`. Where the server has no lifespan, the monitor starts with the first
    request, and ends with the process.

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
        `app = cwg.asgi(app)`, or with Starlette and FastAPI `app.add_middleware(cwg.asgi)`.
    """
    require_application(app, "asgi")
    return cast(_App, _AsgiApp(app, AppMonitor(**settings), StatusPage(page, token)))


class _AsgiApp(WatchedApp):
    """The application in its place."""

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        app, monitor, page = self._closewait_parts
        if scope["type"] == "lifespan":
            await _serve_lifespan(app, monitor, scope, receive, send)
            return
        if not monitor.is_started:
            monitor.start()
        if page.path and _is_asked_for(page, scope):
            await _send_page(page, scope, send)
            return
        label = _Label()
        before = label.enter(scope)
        try:
            await app(scope, receive, send)
        finally:
            label.leave(before)
            label.end()


_ENDS = ("lifespan.shutdown.complete", "lifespan.shutdown.failed", "lifespan.startup.failed")


async def _serve_lifespan(
    app: Callable[..., Any], monitor: AppMonitor, scope: _Message, receive: _Receive, send: _Send
) -> None:
    """The monitor begins before the application, and ends when that has said that it is done.

    An application that has no lifespan raises here, and is served all the same.
    """
    monitor.start()

    async def send_on(message: _Message) -> None:
        if message["type"] in _ENDS:
            await monitor.stop_off_loop()
        await send(message)

    await app(scope, receive, send_on)


class _Label(RequestLabel):
    """Has the template of the route, where the application says which it is."""

    __slots__ = ()

    def _keep(self, scope: _Message) -> tuple[object, ...]:
        method = scope["method"] if scope["type"] == "http" else "WEBSOCKET"
        route = scope.get("route")
        path = getattr(route, "path", None)
        if not isinstance(path, str):
            return method, _without_route(scope)
        # Not the route: its function may have clients, and with them the socket of a record.
        return method, path, type(route), *_mounted_at(scope)

    def _describe(self, kept: tuple[Any, ...]) -> str:
        method, path, *of_route = kept
        return f"{method} {_template(path, *of_route) if of_route else path}"


def _without_route(scope: _Message) -> str:
    if "router" not in scope:
        return without_numbers(scope["path"])
    endpoint = scope.get("endpoint")
    if endpoint is None:
        return NO_ROUTE
    # Before 1.0 Starlette says only what answers, as does FastAPI of what is no route of its own.
    root, names = _mounted_at(scope)
    kind = type(endpoint).__qualname__
    above = f"{_template_of_root(root, names)}/{{path}}" if root else kind
    return getattr(endpoint, "__qualname__", above)


def _mounted_at(scope: _Message) -> tuple[str, _Names]:
    """The path that an application is mounted at within this one, and what may stand in it."""
    root, root_of_app = scope.get("root_path", ""), scope.get("app_root_path", "")
    if root == root_of_app or "app_root_path" not in scope:
        return "", ()
    values = scope.get("path_params", {}).items()
    names = [(name, value) for name, value in values if isinstance(value, str)]
    return root.removeprefix(root_of_app), names


def _template(path: str, kind: type, root: str, names: _Names) -> str:
    # What an application is mounted at stands before; a mount itself has it in both.
    if hasattr(kind, "routes"):
        return f"{_template_of_root(root, names)}/{{path}}"
    above = [each for each in names if not re.search(rf"{{{each[0]}[:}}]", path)]
    return f"{_template_of_root(root, above)}{path}"


def _template_of_root(root: str, names: _Names) -> str:
    """With the names of parameters for their values: only the path is known, and no template."""
    by_value = {value: f"{{{name}}}" for name, value in names}
    return without_numbers("/".join(by_value.get(part, part) for part in root.split("/")))


def _is_asked_for(page: StatusPage, scope: _Message) -> bool:
    if scope["type"] != "http" or not scope["path"].endswith(page.path):
        return False
    # A server may have put before it what a proxy has taken away.
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return page.is_asked_for(scope["method"], path, _header(scope, b"authorization"))


def _header(scope: _Message, wanted: bytes) -> str:
    found = (value for name, value in scope["headers"] if name.lower() == wanted)
    return bytes(next(found, b"")).decode("latin-1")


async def _send_page(page: StatusPage, scope: _Message, send: _Send) -> None:
    query = scope.get("query_string", b"").decode("latin-1")
    answer = await off_loop(page.answer, _header(scope, b"accept"), query)
    headers = [(name.lower().encode(), value.encode()) for name, value in answer.headers]
    await send({"type": "http.response.start", "status": answer.code, "headers": headers})
    body = b"" if scope["method"] == "HEAD" else answer.body
    await send({"type": "http.response.body", "body": body})
