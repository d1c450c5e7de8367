"""A project of Django on real servers: which process has a monitor, and what its reports say."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from test_frameworks import load, reports_of, until

from command_line import environment
from servers import end, free_port, get, web

pytest.importorskip("django")
pytestmark = pytest.mark.whole_program

FILES = {
    "manage.py": """
import sys
from django.core.management import execute_from_command_line

execute_from_command_line(sys.argv)
""",
    "shop/settings.py": """
import os

ALLOWED_HOSTS = ["*"]
DEBUG = True
INSTALLED_APPS = ["closewait_guard.integrations.django"]
MIDDLEWARE = ["closewait_guard.integrations.django.Middleware"]
ROOT_URLCONF = "shop.views"
SECRET_KEY = "of no use"
WSGI_APPLICATION = "shop.wsgi.application"
CLOSEWAIT_GUARD = {
    "interval": 0.2,
    "grace": 0.1,
    "checkout_grace": 0.1,
    "reporters": ["json_lines:" + os.environ["REPORTS"]],
}
""",
    "shop/views.py": """
import os
import requests
from django.http import HttpResponse
from django.urls import path

service, kept = os.environ["SERVICE"], []

def item(request, pk):
    assert len(requests.get(service).content) == 1000
    return HttpResponse("done")

def leak(request, pk):
    kept.append(requests.get(service + "/partial", stream=True))
    return HttpResponse("done")

async def leak_async(request, pk):
    return leak(request, pk)

urlpatterns = [
    path("items/<int:pk>", item),
    path("leaks/<int:pk>", leak, name="leak"),
    path("async/<int:pk>", leak_async, name="leak"),
]
""",
    "shop/wsgi.py": """
from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()
""",
    "shop/asgi.py": """
from django.core.asgi import get_asgi_application

application = get_asgi_application()
""",
}


@pytest.fixture(scope="module")
def service():
    with web() as served:
        yield served.url


@pytest.fixture
def project(tmp_path):
    (tmp_path / "shop").mkdir()
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    return tmp_path


def variables(project, service):
    return environment(
        DJANGO_SETTINGS_MODULE="shop.settings",
        PYTHONPATH=str(project),
        REPORTS=str(project / "reports"),
        SERVICE=service,
    )


@contextmanager
def running(project, service, *command):
    """A server of the project; its errors, in the end."""
    errors = []
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=project,
        env=variables(project, service),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            yield server, errors
        finally:
            errors.append(end(server, signal.SIGTERM))


SERVERS = {
    "leaks": "gunicorn -w 2 -k gthread --threads 2 --preload --log-level error -b 127.0.0.1:{} "
    "shop.wsgi",
    "async": "uvicorn --log-level error --port {} shop.asgi:application",
}


@pytest.mark.parametrize("place", SERVERS)
def test_workers_are_silent_under_load_and_a_leak_has_its_route_and_line(project, service, place):
    port, path = free_port(), project / "reports"
    command = SERVERS[place].format(port).split()
    with running(project, service, "-m", *command) as (server, errors):
        get(port, "/items/0")
        with ThreadPoolExecutor(4) as clients:
            assert all(clients.map(load, [port] * 4, [1.5] * 4))
        before = until(lambda: reports_of(path))
        assert not [each for report in before for each in report.findings]
        get(port, f"/{place}/1")
        (leaking,) = until(lambda: [each for each in reports_of(path) if each.leaks][:1])
        pids = {report.pid for report in reports_of(path)}
    (leak,) = leaking.leaks
    assert len(pids) == (2 if place == "leaks" else 1)
    assert server.pid not in pids or place == "async"
    assert leak.observation.record.labels == (f"GET /{place}/<int:pk> (leak)",)
    assert 'kept.append(requests.get(service + "/partial", stream=True))' in str(leaking)
    assert errors == [""]


def test_of_a_development_server_the_child_that_serves_has_a_monitor_and_no_command_has_one(
    project, service
):
    port, path = free_port(), project / "reports"
    for command in (["check"], ["shell", "-c", "import threading; print(threading.enumerate())"]):
        done = subprocess.run(
            [sys.executable, "manage.py", *command],
            cwd=project,
            env=variables(project, service),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        assert "closewait" not in done.stdout
    assert not path.exists()
    with running(project, service, "manage.py", "runserver", f"127.0.0.1:{port}") as (server, _):
        get(port, "/leaks/1")
        (leak,) = until(lambda: [each for report in reports_of(path) for each in report.leaks][:1])
        pids = {report.pid for report in reports_of(path)}
    assert leak.observation.record.labels == ("GET /leaks/<int:pk> (leak)",)
    assert len(pids - {server.pid}) == len(pids) == 1
