"""Applications in their place: labels of requests, the monitor of a process, the status page."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import closewait_guard as cwg
from closewait_guard import _api
from closewait_guard._capture import LABELS
from closewait_guard.integrations import _app, _page
from leaking import fork

TOKEN = "a token of some length"


@pytest.fixture(autouse=True)
def leave_no_guard():
    yield
    for each in list(_app._served):
        each.stop()
    cwg.uninstall()
    # That of applications that are gone has ended with the guard.
    _app._monitor = None


@pytest.fixture
def reports():
    return []


@pytest.fixture
def opened():
    """Opens a socket and keeps it; in the end the labels of each, by the order of opening."""

    class Opened(list):
        def __call__(self, *_):
            self.append(socket.socket())

        def labels(self):
            seen = {
                each.record.serial: each.record.labels
                for each in cwg.scan(full=True).observations
                if each.fd in {sock.fileno() for sock in self}
            }
            return [seen[serial] for serial in sorted(seen)]

    found = Opened()
    yield found
    for sock in found:
        sock.close()


def http(path, method="GET", headers=(), query=b"", **more):
    return {
        "type": "http",
        "method": method,
        "path": path,
        "headers": list(headers),
        "query_string": query,
        "root_path": "",
    } | more


async def ask(app, scope, *messages):
    """The messages that an application sends."""
    sent, waiting = [], list(messages)

    async def receive():
        await asyncio.sleep(0)
        return waiting.pop(0) if waiting else {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


def ask_wsgi(app, path, method="GET", **environ):
    """The status, and the body."""
    started = []

    def start_response(status, headers, exc_info=None):
        started.append(status)
        return started.append

    body = app({"REQUEST_METHOD": method, "PATH_INFO": path} | environ, start_response)
    try:
        parts = list(body)
        return started[0], parts
    finally:
        if hasattr(body, "close"):
            body.close()


def test_what_a_request_opens_is_labelled_with_its_route_in_its_tasks_and_threads_too(opened):
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import StreamingResponse
    from starlette.routing import Mount, Route, WebSocketRoute

    async def item(request):
        opened()
        await asyncio.create_task(run_in_threadpool(opened))

        async def parts():
            opened()
            yield b"x"

        return StreamingResponse(parts(), background=BackgroundTask(opened))

    async def room(websocket):
        await websocket.accept()
        opened()

    routes = [
        Route("/items/{item}", item),
        Mount("/shops/{shop}", routes=[Route("/items/{item}", item)]),
        WebSocketRoute("/rooms/{room}", room),
        Mount("/{tenant}", routes=[Mount("/v1", routes=[Route("/v1/{v:path}", item)])]),
    ]

    async def main():
        app = cwg.asgi(Starlette(routes=routes), reporters=[print], at_exit=False)
        # One after another in one context, as on one connection.
        await ask(app, http("/items/42"))
        await ask(app, http("/shops/7/items/42"))
        # What is mounted is no template; a value may be that of another part of the path.
        await ask(app, http("/acme/v1/v1/v1"))
        scope = http("/rooms/1", type="websocket", subprotocols=[])
        await ask(app, scope, {"type": "websocket.connect"})
        opened()
        assert (await ask(app, http("/nothing/42")))[0]["status"] == 404
        assert app.routes == routes

    asyncio.run(main())
    assert opened.labels() == [
        *[("GET /items/{item}",)] * 4,
        *[("GET /shops/{shop}/items/{item}",)] * 4,
        *[("GET /{tenant}/v1/v1/{v:path}",)] * 4,
        ("WEBSOCKET /rooms/{room}",),
        (),
    ]


def test_what_is_no_route_of_fastapi_itself_has_the_name_or_the_place_of_what_answers(opened):
    fastapi = pytest.importorskip("fastapi")
    from starlette.routing import Route

    class Answer:
        async def __call__(self, scope, receive, send):
            opened()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    app = fastapi.FastAPI()
    app.router.routes.append(Route("/answers/{item}", Answer()))
    app.mount("/shops/{shop}", Answer())

    async def main():
        for path in ("/answers/acme", "/shops/acme/orders/miller"):
            await ask(cwg.asgi(app, reporters=[print], at_exit=False), http(path))

    asyncio.run(main())
    name = Answer.__qualname__
    assert opened.labels() == [(f"GET {name}"[:120],), ("GET /shops/{shop}/{path}",)]


def test_a_request_in_the_context_of_another_has_its_own_label_beside_those_of_the_program(opened):
    async def app(scope, receive, send):
        opened()
        if scope["path"] == "/outer/1234":
            await inner(http("/inner"), receive, send)

    async def main():
        with cwg.label("mine"):
            await ask(outer, http("/outer/1234"))

    inner, outer = cwg.asgi(app, reporters=[print]), cwg.asgi(app)
    asyncio.run(main())
    assert opened.labels() == [("mine", "GET /outer/{}"), ("mine", "GET /inner")]


def test_the_label_is_read_while_the_request_goes_on_and_keeps_nothing_of_it_alive(opened):
    class Scope(dict):
        pass

    class Route:
        path = "/found/{late}"

    async def app(scope, receive, send):
        opened()
        scope["route"] = Route()
        assert opened.labels() == [("GET /found/{late}",)]

    async def main():
        scope = Scope(http("/found/1"))
        await ask(cwg.asgi(app, reporters=[print]), scope)

    asyncio.run(main())
    assert not [each for each in gc.get_objects() if type(each) in (Scope, Route)]
    assert opened.labels() == [("GET /found/{late}",)]


def test_a_request_of_which_nothing_can_be_said_is_called_a_request(opened):
    async def app(scope, receive, send):
        opened()
        # Of the application; what it makes of it is its own.
        scope.pop("method")
        scope.pop("path")

    asyncio.run(ask(cwg.asgi(app, reporters=[print]), http("/")))
    assert opened.labels() == [("request",)]


@pytest.mark.parametrize("wrap", [cwg.asgi, cwg.wsgi])
def test_what_cannot_be_called_is_no_application(wrap):
    with pytest.raises(
        cwg.ConfigurationError, match=r"sgi\(\): expected an application.*'app:app'"
    ):
        wrap("app:app")
    assert _api.installed_guards() == ()


def test_a_body_that_is_never_closed_keeps_nothing_of_its_request_alive(opened):
    class Environ(dict):
        pass

    def app(environ, start_response):
        opened()
        start_response("200 OK", [])
        yield b"x"

    watched = cwg.wsgi(app, reporters=[print])
    body = watched(Environ(REQUEST_METHOD="GET", PATH_INFO="/a"), lambda *_: None)
    assert list(body) == [b"x"]
    del body
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is Environ]
    assert opened.labels() == [("GET /a",)]


def test_a_coroutine_that_is_closed_in_another_context_leaves_no_label_there():
    async def app(scope, receive, send):
        await receive()

    async def main():
        waiting = cwg.asgi(app, reporters=[print])(http("/"), asyncio.Event().wait, None)
        task = asyncio.create_task(asyncio.sleep(0))
        waiting.send(None)
        await task
        await asyncio.to_thread(waiting.close)

    asyncio.run(main())
    assert LABELS.get() == ()


def test_what_flask_opens_is_labelled_with_its_rule_while_it_streams_and_as_it_closes(opened):
    import flask

    app = flask.Flask("shop")

    @app.get("/items/<item>")
    def show(item):
        def parts():
            opened()
            yield b"x"

        opened()
        answer = flask.Response(parts())
        answer.call_on_close(opened)
        return answer

    @app.get("/customers/<name>")
    def fail(name):
        opened()
        return str(1 // 0)

    app.wsgi_app = cwg.wsgi(app.wsgi_app, reporters=[print], at_exit=False)
    client = app.test_client()
    assert client.get("/items/42", buffered=True).data == b"x"
    opened()
    # Its body is neither read nor closed.
    assert client.get("/nothing").status_code == 404
    assert LABELS.get() == ()
    assert opened.labels() == [*[("GET /items/<item>",)] * 3, ()]
    # No value of a customer stands in the place of the route that Flask has let go of.
    app.testing = True
    with pytest.raises(ZeroDivisionError):
        client.get("/customers/alice")
    assert opened.labels()[-1] == ("GET (unknown route)",)


def test_what_flask_opens_below_another_path_is_labelled_with_both(opened):
    import flask
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    app = flask.Flask("admin")
    app.get("/items/<item>")(lambda item: str(opened()))
    whole = cwg.wsgi(DispatcherMiddleware(lambda *_: [], {"/admin": app}), reporters=[print])
    with app.test_request_context("/admin/items/42") as context:
        assert ask_wsgi(whole, "", **context.request.environ)[0] == "200 OK"
    assert opened.labels() == [("GET /admin/items/<item>",)]


def test_only_a_response_of_flask_that_calls_nothing_more_goes_to_the_server_as_it_is(opened):
    import flask
    from werkzeug.wsgi import ClosingIterator

    class Closing(flask.Response):
        def close(self):
            opened()

    class Encoding(flask.Response):
        def iter_encoded(self):
            opened()
            return [b"x"]

    def closing_later():
        answer = flask.Response("x")
        answer.call_on_close(opened)
        return answer

    made = {
        "plain": lambda: "x",
        "closing-later": closing_later,
        "closing": lambda: Closing("x"),
        "encoding": lambda: Encoding("x"),
        "streamed": lambda: flask.Response(iter(["x"])),
    }
    app = flask.Flask("shop")
    app.get("/<kind>")(lambda kind: made[kind]())
    watched = cwg.wsgi(app.wsgi_app, reporters=[print], at_exit=False)
    is_as_it_is = {}
    for kind in made:
        with app.test_request_context(f"/{kind}") as context:
            environ = dict(context.request.environ)
        body = watched(environ, lambda *_: None)
        is_as_it_is[kind] = type(body) is ClosingIterator
        assert list(body) == [b"x"]
        body.close()
    assert is_as_it_is == {kind: kind == "plain" for kind in made}
    assert opened.labels() == [("GET /<kind>",)] * 3
    assert LABELS.get() == ()


def test_what_closes_with_a_body_of_werkzeug_that_the_program_has_made_is_labelled(opened):
    from werkzeug.wrappers import Response
    from werkzeug.wsgi import ClosingIterator

    def app(environ, start_response):
        return ClosingIterator(Response("x")(environ, start_response), opened)

    assert ask_wsgi(cwg.wsgi(app), "/") == ("200 OK", [b"x"])
    assert opened.labels() == [("GET /",)]


def test_a_label_around_several_parts_of_a_body_lasts_as_long_and_leaves_that_of_the_request(
    opened,
):
    def app(environ, start_response):
        start_response("200 OK", [])
        with cwg.label("import"):
            opened()
            yield b"1"
            opened()
            yield b"2"
        opened()
        yield b"3"
        opened()

    assert ask_wsgi(cwg.wsgi(app), "/") == ("200 OK", [b"1", b"2", b"3"])
    assert opened.labels() == [("GET /", "import")] * 2 + [("GET /",)] * 2
    assert LABELS.get() == ()


def test_a_wsgi_server_sees_the_application_as_it_is(opened):
    class File:
        def __init__(self, file):
            self.closed = False

        def __iter__(self):
            return iter([b"file"])

        def close(self):
            self.closed = True

    class Sized:
        def __len__(self):
            return 1

        def __iter__(self):
            opened()
            return iter([b"sized"])

    def fail(environ, start_response):
        opened()
        raise LookupError("of the program")

    def write(environ, start_response):
        start_response("200 OK", [])("written")
        yield b"generated"

    bodies = {"/list": [b"list"], "/file": File(None), "/sized": Sized()}

    def app(environ, start_response):
        special = {"/fail": fail, "/write": write}.get(environ["PATH_INFO"])
        if special is not None:
            return special(environ, start_response)
        start_response("200 OK", [])
        return bodies[environ["PATH_INFO"]]

    watched = cwg.wsgi(app, reporters=[print])
    assert ask_wsgi(watched, "/list") == ("200 OK", [b"list"])
    assert ask_wsgi(watched, "/sized") == ("200 OK", [b"sized"])
    assert ask_wsgi(watched, "/write") == ("200 OK", [b"generated"])
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/file", "wsgi.file_wrapper": File}
    assert watched(environ, lambda *_: None) is bodies["/file"]
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/sized"}
    body = watched(environ, lambda *_: None)
    assert len(body) == 1
    body.close()
    with pytest.raises(LookupError, match="of the program"):
        ask_wsgi(watched, "/fail")
    opened()
    assert opened.labels() == [("GET /sized",), ("GET /fail",), ()]


def test_all_applications_of_a_process_share_a_monitor_that_ends_with_the_last(reports):
    async def app(scope, receive, send):
        assert scope["type"] == "lifespan"
        for _ in range(2):
            kind = (await receive())["type"]
            during.append(_api.is_watched(by_program=True))
            await send({"type": f"{kind}.complete"})

    async def live(*applications):
        both = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
        scope = {"type": "lifespan"}
        await asyncio.gather(*(ask(each, scope, *both) for each in applications))

    during, others = [], []
    first = cwg.asgi(app, interval=60, reporters=[reports.append])
    second = cwg.asgi(app, reporters=[others.append])
    assert not _api.is_watched(by_program=True)
    asyncio.run(live(first, second))
    assert during == [True] * 4
    assert not _api.is_watched(by_program=True)
    assert len(reports) == len(others) == 1
    # As a test client does, which starts the application more than once.
    asyncio.run(live(first))
    assert len(reports) == 2


def test_applications_that_are_made_for_each_test_leave_neither_reporters_nor_monitors(reports):
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await send({"type": "lifespan.shutdown.complete"})

    guard = cwg.install()
    for scope in (http("/"), {"type": "lifespan"}):
        for _ in range(3):
            asyncio.run(ask(cwg.asgi(app, reporters=[reports.append]), scope))
            gc.collect()
    # Those without a lifespan have no end; and the last report of each of the others is one.
    assert len(reports) == 3
    assert (guard._delivery.reporters, guard._uninstall_callbacks) == ((), [])
    asyncio.run(ask(cwg.asgi(app, reporters=[print]), http("/")))
    assert guard._delivery.reporters == (print,)


def test_a_monitor_of_the_program_is_used_and_left_alone(reports):
    def app(environ, start_response):
        start_response("200 OK", [])
        return []

    with cwg.watch(60, reporters=[reports.append], at_exit=False) as monitor:
        ask_wsgi(cwg.wsgi(app), "/")
        with pytest.warns(RuntimeWarning, match="the program has a monitor"):
            ask_wsgi(cwg.wsgi(app, reporters=[print]), "/")
        assert _app._monitor is None
        for each in list(_app._served):
            each.stop()
        assert monitor.running
    assert reports == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_worker_has_a_monitor_of_its_own_with_its_first_request(reports):
    def app(environ, start_response):
        start_response("200 OK", [])
        return []

    watched = cwg.wsgi(app, reporters=[reports.append])
    ask_wsgi(watched, "/")
    parent = {each.name for each in threading.enumerate()}
    child = fork()
    if not child:
        try:
            before = len(threading.enumerate())
            ask_wsgi(watched, "/")
            here = {each.name for each in threading.enumerate()}
            os._exit(0 if before == 1 and "closewait-guard-monitor" in here & parent else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_failure_of_the_guard_is_a_warning_and_the_request_is_served(monkeypatch):
    def app(environ, start_response):
        start_response("200 OK", [])
        return [b"served"]

    def fail(*_, **__):
        raise RuntimeError("no thread can be started")

    watched = cwg.wsgi(app)
    monkeypatch.setattr(_api, "watch", fail)
    monkeypatch.setattr("closewait_guard.integrations.wsgi._route_of", fail)
    with pytest.warns(RuntimeWarning, match="without a monitor: no thread can be started"):
        assert ask_wsgi(watched, "/") == ("200 OK", [b"served"])
    assert ask_wsgi(watched, "/") == ("200 OK", [b"served"])


def test_attributes_are_set_on_the_application_itself():
    class App:
        dependency_overrides = None

        def __call__(self, *_):
            pass

    for how in (cwg.asgi, cwg.wsgi):
        app = App()
        watched = copy.copy(how(app, reporters=[print]))
        watched.dependency_overrides = {}
        assert watched.dependency_overrides is app.dependency_overrides is not None
        del watched.dependency_overrides
        assert app.dependency_overrides is None


def test_what_cannot_be_used_is_refused_before_anything_is_served(monkeypatch):
    for how in (cwg.asgi, cwg.wsgi):
        with pytest.raises(cwg.ConfigurationError, match="grase"):
            how(print, grase=2)
        with pytest.raises(cwg.ConfigurationError, match=r"interval: expected .* got -1"):
            how(print, interval=-1)
        with pytest.raises(cwg.ConfigurationError, match="structlo"):
            how(print, reporters=["structlo"])
        with pytest.raises(cwg.ConfigurationError, match=r"^token: .* at least 16 characters"):
            how(print, token="short")
        with monkeypatch.context() as environment:
            environment.setenv("CLOSEWAIT_GUARD_PAGE_TOKEN", "short")
            with pytest.raises(cwg.ConfigurationError, match=r"^environment .*_PAGE_TOKEN: the "):
                how(print)
        with pytest.raises(cwg.ConfigurationError, match="begins with '/'"):
            how(print, page="status")
        cwg.uninstall()


def authorized(token=TOKEN):
    return [(b"authorization", f"Bearer {token}".encode())]


def test_the_page_is_the_applications_own_without_the_token():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 404, "headers": []})

    async def main(watched, status, path="/_closewait", **scope):
        assert (await ask(watched, http(path, **scope)))[0]["status"] == status

    with_page = cwg.asgi(app, token=TOKEN, reporters=[print], at_exit=False)
    asyncio.run(main(with_page, 200, headers=authorized()))
    behind_proxy = {"path": "/api/_closewait", "root_path": "/api"}
    asyncio.run(main(with_page, 200, headers=authorized(), **behind_proxy))
    asyncio.run(main(with_page, 404))
    asyncio.run(main(with_page, 404, headers=authorized("another token of that length")))
    asyncio.run(main(with_page, 404, headers=authorized("\xff")))
    asyncio.run(main(with_page, 404, headers=authorized(), method="POST"))
    asyncio.run(main(with_page, 404, headers=authorized(), path="/other/_closewait"))
    asyncio.run(main(cwg.asgi(app), 404, headers=authorized()))
    asyncio.run(main(cwg.asgi(app), 404, headers=authorized("")))


def test_the_page_is_text_or_json_and_scans_no_more_often_than_it_may(monkeypatch):
    def app(environ, start_response):
        raise AssertionError("it is not asked")

    monkeypatch.setenv("CLOSEWAIT_GUARD_PAGE_TOKEN", TOKEN)
    scans, scan = [], _api.scan
    monkeypatch.setattr(_api, "scan", lambda: scans.append(scan()) or scans[-1])
    monkeypatch.setattr(_page, "now", lambda: clock[0])
    clock, watched = [0.0], cwg.wsgi(app, page="/status", reporters=[print], at_exit=False)
    secret = {"HTTP_AUTHORIZATION": f"Bearer {TOKEN}"}
    status, (text,) = ask_wsgi(watched, "/status", **secret)
    assert (status, text.decode()) == ("200 OK", str(scans[0]))
    for how in ({"QUERY_STRING": "format=json"}, {"HTTP_ACCEPT": "application/json, */*"}):
        _, (data,) = ask_wsgi(watched, "/status", **secret, **how)
        assert cwg.from_dict(json.loads(data)) == scans[0]
    assert ask_wsgi(watched, "/status", "HEAD", **secret) == ("200 OK", [])
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: ask_wsgi(watched, "/status", **secret), range(8)))
    assert len(scans) == 1
    clock[0] += 2
    ask_wsgi(watched, "/status", **secret)
    assert len(scans) == 2


def test_page_and_end_need_none_of_the_threads_of_the_event_loop():
    async def app(scope, receive, send):
        await asyncio.get_running_loop().shutdown_default_executor()
        await send({"type": "lifespan.shutdown.complete"})

    async def main():
        loop, is_over = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, is_over.wait)
        page = asyncio.create_task(ask(watched, http("/_closewait", headers=authorized())))
        done, _ = await asyncio.wait([page], timeout=10)
        is_over.set()
        await busy
        assert done
        assert page.result()[0]["status"] == 200
        assert len(await ask(watched, {"type": "lifespan"})) == 1
        assert not _api.is_watched(by_program=True)

    watched = cwg.asgi(app, token=TOKEN, reporters=[print])
    asyncio.run(main())
