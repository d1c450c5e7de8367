"""A project of Django in the tests' own process: settings, routes, and views that open sockets."""

from __future__ import annotations

import socket

import django
from asgiref.sync import sync_to_async
from django.conf import settings
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import include, path, re_path

MIDDLEWARE = "closewait_guard.integrations.django.Middleware"

# What the views have opened.
opened = []


def configure():
    """Once in a process."""
    if settings.configured:
        return
    settings.configure(
        ALLOWED_HOSTS=["*"],
        INSTALLED_APPS=["closewait_guard.integrations.django"],
        MIDDLEWARE=[MIDDLEWARE, "django.middleware.common.CommonMiddleware"],
        ROOT_URLCONF=__name__,
        SECRET_KEY="of no use",
    )
    django.setup()


def open_one(*_):
    opened.append(socket.socket())


def item(request, pk):
    open_one()
    return HttpResponse("item")


def stream(request, pk):
    def parts():
        open_one()
        yield b"x"

    open_one()
    return StreamingHttpResponse(parts())


async def async_item(request, pk):
    open_one()
    await sync_to_async(open_one)()

    async def parts():
        open_one()
        yield b"x"

    return StreamingHttpResponse(parts())


regular = [re_path(r"^items/(?P<pk>[0-9]{1,4})/$", item, name="old")]
urlpatterns = [
    path("items/<int:pk>/", item, name="item"),
    path("streams/<int:pk>/", stream),
    path("async/<int:pk>/", async_item, name="async"),
    path("shops/", include((regular, "shop"))),
]
