"""aiohttp: the applications of its server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from closewait_guard._capture import LABELS
from closewait_guard.exceptions import ConfigurationError, MissingExtraError
from closewait_guard.integrations._app import NO_ROUTE, AppMonitor, off_loop
from closewait_guard.integrations._page import PAGE, StatusPage

try:
    from aiohttp import web
except ImportError as missing:
    raise MissingExtraError(
        f"aiohttp() needs aiohttp: pip install 'closewait-guard[aiohttp]' ({missing})"
    ) from missing

__all__ = ["aiohttp"]


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def aiohttp(
    app: web.Application, *, page: str = PAGE, token: str | None = None, **settings: Any
) -> web.Application:
    """Watch an application of aiohttp: a monitor for its life, a label for each request, a page.

    The label has the method and the route, such as `GET /items/{id}`. It lasts until the handler
    returns: for a stream or a websocket, to its end. Subapplications have it too.

    Args:
        app: The application, before it starts, and before it is added to another.
        page: Where the status page is: a report of the process that answers, as text, or as JSON
            with `?format=json`.
        token: What a request for it must have, as `Authorization: Bearer TOKEN`; the environment
            variable CLOSEWAIT_GUARD_PAGE_TOKEN when left out. Without a token there is no page.
        **settings: As for `watch()`: interval, reporters, at_exit, settings, and single settings.

    Returns:
        The same application.

    Raises:
        ConfigurationError: A setting, the path or the token cannot be used, or the application has
            started or was added to another.
        MissingExtraError: aiohttp is not installed.
    """
    if not isinstance(app, web.Application):
        raise ConfigurationError(f"aiohttp(): expected an aiohttp.web.Application, got {app!r}")
    if app.pre_frozen:
        raise ConfigurationError(
            "aiohttp(): the application has started, or was added to another; call it before that"
        )
    monitor, status_page = AppMonitor(**settings), StatusPage(page, token)

    @web.middleware
    async def answer_page(request: web.Request, handler: _Handler) -> web.StreamResponse:
        if _is_asked_for(status_page, request):
            return await _page_response(status_page, request)
        return await handler(request)

    async def start(_: web.Application) -> None:
        monitor.start()

    async def stop(_: web.Application) -> None:
        await monitor.stop_off_loop()

    _label_requests(app)
    if status_page.path:
        app.middlewares.insert(0, answer_page)
    app.on_startup.insert(0, start)
    app.on_cleanup.append(stop)
    return app


class _RouteLabel(str):
    """One of these, beside the labels of the program."""

    __slots__ = ()


def _label_requests(app: web.Application) -> None:
    """When their route is found; a middleware would cost more than the label."""
    resolve = app.router.resolve

    async def resolve_and_label(request: web.Request) -> web.UrlMappingMatchInfo:
        match = await resolve(request)
        try:
            resource = match.route.resource
        except AttributeError:
            # A router of the program's own may find what has no route.
            resource = None
        route = NO_ROUTE if resource is None else resource.canonical
        label = _RouteLabel(f"{request.method} {route}")
        # For the context of this request, which has a task of its own. It is found again where a
        # subapplication is watched too, and where a middleware sends the request elsewhere.
        labels = LABELS.get()
        others = [each for each in labels if type(each) is not _RouteLabel] if labels else ()
        LABELS.set((*others, label))
        return match

    app.router.resolve = resolve_and_label  # type: ignore[method-assign]


def _is_asked_for(page: StatusPage, request: web.Request) -> bool:
    authorization = request.headers.get("Authorization", "")
    return page.is_asked_for(request.method, request.path, authorization)


async def _page_response(page: StatusPage, request: web.Request) -> web.Response:
    accept = request.headers.get("Accept", "")
    answer = await off_loop(page.answer, accept, request.query_string)
    return web.Response(status=answer.code, headers=dict(answer.headers), body=answer.body)
