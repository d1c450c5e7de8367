"""Django in this process: labels of requests, the monitor, the checks, the command."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path

import pytest

django = pytest.importorskip("django")

import closewait_guard as cwg  # noqa: E402
import django_project  # noqa: E402
from closewait_guard import _api  # noqa: E402
from closewait_guard._capture import LABELS  # noqa: E402
from closewait_guard.commands._parser import parse_arguments  # noqa: E402
from closewait_guard.integrations import _app  # noqa: E402
from closewait_guard.integrations import django as ours  # noqa: E402

django_project.configure()

from asgiref.sync import sync_to_async  # noqa: E402
from django.core import checks  # noqa: E402
from django.core.handlers.wsgi import WSGIHandler  # noqa: E402
from django.core.management import CommandError, call_command  # noqa: E402
from django.core.signals import request_started  # noqa: E402
from django.http import StreamingHttpResponse  # noqa: E402
from django.test import AsyncClient, Client, RequestFactory, override_settings  # noqa: E402
from django.test.utils import setup_test_environment, teardown_test_environment  # noqa: E402

from closewait_guard.integrations.django import apps  # noqa: E402

TOKEN = "a token of some length"


@pytest.fixture(autouse=True, scope="module")
def thread_of_synchronous_views():
    """It stays for the life of the process."""
    asyncio.run(sync_to_async(int)())


@pytest.fixture(autouse=True)
def process_that_has_not_served(monkeypatch):
    monkeypatch.setattr(ours, "_served", None)
    monkeypatch.setattr(ours, "_is_prepared", False)
    request_started.connect(ours.watch_first_request)
    yield
    for each in list(_app._served):
        each.stop()
    for sock in django_project.opened:
        sock.close()
    django_project.opened.clear()
    cwg.uninstall()


def options(**given):
    return override_settings(CLOSEWAIT_GUARD=given)


def serve(path="/items/42/", **environ):
    """One request, as a server has it answered: the status, and the body."""
    statuses = []
    answer = WSGIHandler()(
        RequestFactory()._base_environ(PATH_INFO=path, **environ),
        lambda status, headers: statuses.append(status),
    )
    body = b"".join(answer)
    answer.close()
    return statuses[0], body


def labels():
    """Those of what the views have opened, in order."""
    fds = {sock.fileno() for sock in django_project.opened}
    seen = [each.record for each in cwg.scan(full=True).observations if each.fd in fds]
    return [record.labels for record in sorted(seen, key=lambda record: record.serial)]


def test_what_a_request_opens_is_labelled_with_its_route_and_view_also_while_it_is_streamed():
    client = Client()
    for path in ("/items/42/", "/shops/items/7/"):
        assert client.get(path).content == b"item"
    assert client.get("/streams/1/").getvalue() == b"x"
    assert client.get("/nothing/").status_code == 404
    django_project.open_one()
    stream = ("GET /streams/<int:pk>/ (django_project.stream)",)
    assert labels() == [
        ("GET /items/<int:pk>/ (item)",),
        ("GET /shops/items/<pk>/ (shop:old)",),
        stream,
        stream,
        (),
    ]


def test_an_asynchronous_view_has_its_label_in_threads_and_in_its_stream_too():
    async def main():
        client = AsyncClient()
        both = [await client.get(path) for path in ("/async/1/", "/items/1/")]
        assert [part async for part in both[0].streaming_content] == [b"x"]

    asyncio.run(main())
    # The last is that of the stream, which was read after the second request.
    asynchronous = ("GET /async/<int:pk>/ (async)",)
    assert labels() == [
        asynchronous,
        asynchronous,
        ("GET /items/<int:pk>/ (item)",),
        asynchronous,
    ]


def test_a_label_around_several_parts_of_a_stream_lasts_as_long_and_leaves_that_of_the_request():
    def parts():
        with cwg.label("import"):
            for part in (b"1", b"2"):
                django_project.open_one()
                yield part
        django_project.open_one()

    async def asynchronous_parts():
        for part in parts():
            yield part

    async def read(response):
        return [part async for part in response.streaming_content]

    request = RequestFactory().get("/")
    make = ours.Middleware(lambda _: StreamingHttpResponse(parts()))
    assert list(make(request).streaming_content) == [b"1", b"2"]
    make = ours.Middleware(lambda _: StreamingHttpResponse(asynchronous_parts()))
    assert asyncio.run(read(make(request))) == [b"1", b"2"]
    own = "GET (no route)"
    assert labels() == [(own, "import"), (own, "import"), (own,)] * 2
    assert LABELS.get() == ()


def test_a_process_has_one_monitor_from_its_first_request_on_and_no_receiver_afterwards():
    reports = []
    with options(interval=30, reporters=[reports.append], at_exit=False, grace=7):
        WSGIHandler()
        # What is opened from now on has its line, but reports are for who serves.
        assert _api._guard.settings.grace == 7
        assert not _api.is_watched(by_program=True)
        for _ in range(2):
            assert serve() == ("200 OK", b"item")
    assert _api.is_watched(by_program=True)
    assert len(_app._served) == 1
    assert not request_started.disconnect(ours.watch_first_request)


def test_what_drivers_of_databases_open_in_c_has_a_line_too():
    psycopg = pytest.importorskip("psycopg")
    before = psycopg.connect
    with options(reporters=[print], at_exit=False):
        WSGIHandler()
    assert psycopg.connect.__wrapped__ == before
    cwg.uninstall()
    assert psycopg.connect == before


def test_without_the_middleware_the_monitor_starts_with_the_first_request_too():
    with options(reporters=[print], at_exit=False), override_settings(MIDDLEWARE=[]):
        WSGIHandler()
        assert _api._guard is None
        serve()
    assert _api.is_watched(by_program=True)


def test_neither_a_test_client_nor_a_server_of_tests_starts_a_monitor():
    Client().get("/items/42/")
    assert not _api.is_watched(by_program=True)
    cwg.uninstall()
    setup_test_environment()
    try:
        serve()
        Client().get("/items/42/")
        assert _api._guard is None
    finally:
        teardown_test_environment()


BAD = {
    "an unknown setting": (
        {"intervall": 30},
        "CLOSEWAIT_GUARD in the Django settings: unknown setting 'intervall'. "
        "Did you mean 'interval'?",
    ),
    "a bad value": (
        {"grace": "ten"},
        "CLOSEWAIT_GUARD['grace'] in the Django settings: expected a non-negative number of "
        "seconds, got 'ten'",
    ),
    "two that contradict each other": (
        {"age_warning": 9000},
        "age_warning 9000 (CLOSEWAIT_GUARD['age_warning'] in the Django settings) is above",
    ),
    "a reporter": (
        {"reporters": ["strutlog"]},
        "CLOSEWAIT_GUARD['reporters'] in the Django settings: unknown reporter 'strutlog'. "
        "Did you mean 'structlog'?",
    ),
    "one reporter": (
        {"reporters": "text"},
        "CLOSEWAIT_GUARD['reporters'] in the Django settings: expected a list of reporters, got",
    ),
    "a token": (
        {"token": "short"},
        "CLOSEWAIT_GUARD['token'] in the Django settings: the token of the status page must have",
    ),
    "a page": (
        {"page": "sockets"},
        "CLOSEWAIT_GUARD['page'] in the Django settings: expected a path that begins with '/'",
    ),
    "no dict": ("grace", "CLOSEWAIT_GUARD in the Django settings: expected a dict, got 'grace'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_setting_is_an_error_of_the_check_and_a_warning_of_a_server_that_answers(case):
    given, sentence = BAD[case]
    with override_settings(CLOSEWAIT_GUARD=given):
        (error,) = checks.run_checks(tags=["closewait_guard"])
        assert (error.level, error.id) == (checks.ERROR, "closewait_guard.E001")
        assert error.msg.startswith(sentence)
        with pytest.warns(RuntimeWarning) as caught:
            assert serve() == ("200 OK", b"item")
    (warned,) = {str(each.message) for each in caught}
    assert warned == f"closewait_guard: the application is served without a monitor: {error.msg}"
    assert not _api.is_watched(by_program=True)


def test_a_token_of_the_environment_that_is_refused_is_not_said_to_be_in_the_settings(monkeypatch):
    monkeypatch.setenv("CLOSEWAIT_GUARD_PAGE_TOKEN", "short")
    with override_settings(CLOSEWAIT_GUARD={"page": "/sockets"}):
        (error,) = checks.run_checks(tags=["closewait_guard"])
    assert error.msg.startswith("environment variable CLOSEWAIT_GUARD_PAGE_TOKEN: the token of")


def test_a_check_opens_no_file_of_a_reporter(tmp_path):
    path = tmp_path / "reports"
    with options(reporters=[f"changes:json_lines:{path}", "at_least:warning:text", print]):
        assert checks.run_checks(tags=["closewait_guard"]) == []
    assert not path.exists()


def test_the_checks_warn_of_a_project_file_that_is_ignored(tmp_path, monkeypatch):
    file = tmp_path / "pyproject.toml"
    file.write_text("[tool.closewait_guard]\ngrace = 2\n")
    file.chmod(0o666)
    monkeypatch.chdir(tmp_path)
    (warning,) = checks.run_checks(tags=["closewait_guard"])
    assert warning.id == "closewait_guard.W001"
    assert f"settings in {file} are ignored" in warning.msg


def test_the_checks_warn_of_what_does_not_do_what_it_says(monkeypatch):
    with options(token=TOKEN):
        assert checks.run_checks(tags=["closewait_guard"], include_deployment_checks=True) == []
        with override_settings(MIDDLEWARE=[]):
            (warning,) = checks.run_checks(tags=["closewait_guard"])
        assert (warning.id, MIDDLEWARE_HINT) == ("closewait_guard.W002", warning.hint)
    monkeypatch.setattr(apps, "why_no_speedups", lambda: "it was not compiled")
    assert checks.run_checks(tags=["closewait_guard"]) == []
    (slower,) = checks.run_checks(tags=["closewait_guard"], include_deployment_checks=True)
    assert slower.id == "closewait_guard.W003"
    assert slower.msg.endswith("slower: it was not compiled")
    with options(speedups=False):
        assert checks.run_checks(tags=["closewait_guard"], include_deployment_checks=True) == []


MIDDLEWARE_HINT = f"Add {django_project.MIDDLEWARE!r} as the first to MIDDLEWARE."


def test_the_status_page_is_for_who_has_the_token_under_wsgi_and_asgi():
    secret = {"HTTP_AUTHORIZATION": f"Bearer {TOKEN}"}
    with options(token=TOKEN, page="/sockets", reporters=[print], at_exit=False):
        assert serve("/sockets")[0] == "404 Not Found"
        status, text = serve("/sockets", **secret)
        assert (status, text.startswith(b"closewait-guard")) == ("200 OK", True)
        _, data = serve("/sockets", QUERY_STRING="format=json", **secret)
        assert cwg.from_dict(json.loads(data)).pid == os.getpid()
        assert serve("/sockets", REQUEST_METHOD="HEAD", **secret) == ("200 OK", b"")
        headers = {"Authorization": f"Bearer {TOKEN}"}
        answer = asyncio.run(AsyncClient().get("/sockets", headers=headers))
        assert answer.content == text


def names_no_customer(text):
    return text.replace("127", "x")


def test_the_command_hands_on_to_the_command_line_with_the_settings_of_the_project(capsys):
    before = dict(os.environ)
    with options(grace=7, redact=names_no_customer, page="/sockets", reporters=[print]):
        call_command("closewait_guard", "doctor")
    assert dict(os.environ) == before
    printed = " ".join(capsys.readouterr().out.split())
    assert "Settings: grace=7.0, redact=names_no_customer" in printed
    with pytest.raises(SystemExit) as ended:
        call_command("closewait_guard", "scan", "999999999")
    assert ended.value.code == 2
    assert "999999999" in capsys.readouterr().err


def test_the_commands_of_the_page_can_be_given():
    page = Path(__file__).parents[2].joinpath("docs/guides/django.md").read_text(encoding="utf-8")
    given = re.findall(r"^python manage.py closewait_guard ([^#\n]+)", page, re.MULTILINE)
    found = [parse_arguments(each.replace("PID", "1").split()).command for each in given]
    assert found == ["scan", "report"]


def test_the_command_refuses_what_it_cannot_use():
    with options(grase=7), pytest.raises(CommandError, match="Did you mean 'grace'"):
        call_command("closewait_guard", "doctor")
    # Without it, it would print what must not leave the project.
    with options(redact=lambda text: text), pytest.raises(CommandError, match="'module:name'"):
        call_command("closewait_guard", "doctor")
    with pytest.raises(CommandError, match="invalid choice: 'demo'"):
        call_command("closewait_guard", "demo")
