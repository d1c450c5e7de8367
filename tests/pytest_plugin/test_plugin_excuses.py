"""What pytest itself keeps is not the test's: whether it leaks shows when pytest has let go."""

from __future__ import annotations

import json

import pytest

LIBRARY = """
import logging, warnings
import urllib3

class Server:
    def __init__(self):
        self.listener = listener()
        self.url = "http://127.0.0.1:%d/" % self.listener.getsockname()[1]
        self.is_closing = False
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        connections = []
        while True:
            connection, _ = self.listener.accept()
            connections.append(connection)
            if self.is_closing:
                break
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
        for each in connections:
            each.close()

    def close(self):
        self.is_closing = True
        socket.create_connection(self.listener.getsockname()).close()
        self.thread.join()
        self.listener.close()

@pytest.fixture(scope="module")
def url():
    server = Server()
    yield server.url
    server.close()

def fail_after_asking(url):
    # Closes its connections by a finalizer, as soon as nothing holds the pool.
    pool = urllib3.PoolManager()
    pool.request("GET", url)
    raise ValueError("no price")
"""

# Each as the body of a test that asks, and lets go of the pool.
KEPT_BY_A_RECORD = {
    "the exception of a log record": """
    try:
        fail_after_asking(url)
    except ValueError:
        logging.getLogger().exception("failed")
""",
    "an argument of a log record": """
    pool = urllib3.PoolManager()
    pool.request("GET", url)
    logging.getLogger().error("asked by %s", pool)
""",
    "a recorded warning": """
    try:
        fail_after_asking(url)
    except ValueError as error:
        warnings.warn(UserWarning(error))
""",
    "what pytest.raises has caught": """
    with pytest.raises(ValueError) as caught:
        fail_after_asking(url)
    request.node.caught = caught
""",
    "a report": """
    with pytest.raises(ValueError) as caught:
        fail_after_asking(url)
    request.node.seen = pytest.CallInfo(None, caught, 0, 0, 0, "call", _ispytest=True)
""",
}


@pytest.mark.parametrize("body", KEPT_BY_A_RECORD.values(), ids=KEPT_BY_A_RECORD)
def test_a_pool_that_only_a_record_of_pytest_keeps_is_no_leak(suite, body):
    source = LIBRARY + f"def test_it(url, request): {body}\ndef test_other(): pass\n"
    suite.fail(source, "-W", "default", apart=True).assert_outcomes(passed=2, warnings=None)


RESPONSES = {
    "returned": "return requests.get(url, timeout=5)",
    "yielded and closed": """
    response = requests.get(url, timeout=5)
    yield response
    response.close()
""",
    "read, with its session closed": """
    with requests.Session() as session, session.get(url, stream=True, timeout=5) as response:
        response.content
        yield response
""",
    "of urllib3": """
    with urllib3.PoolManager() as http:
        return http.request("GET", url)
""",
}


@pytest.mark.parametrize("scope", ["function", "session"])
@pytest.mark.parametrize("body", RESPONSES.values(), ids=RESPONSES)
def test_a_pool_that_only_the_response_of_a_fixture_keeps_is_no_leak(suite, body, scope):
    pytest.importorskip("requests")
    source = f"""
import requests
{LIBRARY.replace('scope="module"', 'scope="session"')}
@pytest.fixture(scope="{scope}")
def response(url): {body}
def test_it(response): pass
def test_other(): pass
"""
    suite.fail(source, "-W", "default", apart=True).assert_outcomes(passed=2, warnings=None)


def test_a_pool_that_only_the_response_of_a_test_class_keeps_is_no_leak(suite):
    pytest.importorskip("requests")
    source = f"""
import requests
{LIBRARY}
class TestIt:
    @pytest.fixture(autouse=True)
    def ask(self, url): self.response = requests.get(url, timeout=5)
    def test_it(self): pass
    def test_other(self): pass
"""
    suite.fail(source, apart=True).assert_outcomes(passed=2, warnings=None)


KEPT_OTHERWISE = {
    "its session is open": "return requests.Session().get(url, timeout=5)",
    "it is kept elsewhere": "return keep(requests.get(url, timeout=5))",
    "it is not read": "return requests.get(url, stream=True, timeout=5)",
    "its session is kept": """
    session = requests.Session()
    session.get(url, timeout=5)
    return session
""",
}


@pytest.mark.parametrize("scope", ["function", "session"])
@pytest.mark.parametrize("body", KEPT_OTHERWISE.values(), ids=KEPT_OTHERWISE)
def test_the_response_of_a_fixture_excuses_nothing_that_the_fixture_can_close(suite, body, scope):
    pytest.importorskip("requests")
    source = f"""
import requests
{LIBRARY.replace('scope="module"', 'scope="session"')}
@pytest.fixture(scope="{scope}")
def response(url): {body}
def test_it(response): pass
"""
    suite.fail(source, apart=True).assert_outcomes(passed=1, errors=1, warnings=None)


def test_the_fix_for_a_kept_response_that_was_read_is_to_keep_its_content(suite):
    pytest.importorskip("requests")
    source = f"""
import requests
{LIBRARY}
def test_read(url): keep(requests.get(url, timeout=5))
def test_other(url): pass
"""
    text = " ".join(suite.fail(source, apart=True).stdout.str().split())
    assert "keep response.content or response.json() instead of the response" in text
    assert "close the streamed response" not in text


@pytest.mark.parametrize(
    ("library", "kept", "fix"),
    [
        ("requests", "requests.Session().get(url)", "close the session or client when you are"),
        ("requests", "requests.Session().get(url, stream=True)", "close the streamed response"),
        ("httpx", "httpx.Client().get(url)", "reuse one Client, or use `with httpx.Client() as"),
        ("aiohttp", "asyncio.run(ask(url))", "`await session.close()` when you are done"),
    ],
)
def test_the_fix_for_a_kept_response_of_an_open_client_goes_by_whether_it_was_read(
    suite, library, kept, fix
):
    pytest.importorskip(library)
    source = f"""
import {library}
{LIBRARY}
async def ask(url):
    async with (session := aiohttp.ClientSession()).get(url) as response:
        await response.read()
    return response, session
def test_it(url): keep({kept})
def test_other(url): pass
"""
    text = " ".join(suite.fail(source, apart=True).stdout.str().split())
    assert f"fix {fix}" in text


LOGGED = """
import logging

def test_it():
    try:
        sock = {socket}
        raise ValueError
    except ValueError:
        logging.getLogger().exception("failed")

def test_other(): pass
"""


@pytest.mark.parametrize(
    ("made", "verdict"), [("socket.socket()", "DROPPED"), ("keep(socket.socket())", "DEAD")]
)
def test_what_is_open_or_dropped_when_the_record_is_gone_fails_its_test(suite, made, verdict):
    result = suite.fail(LOGGED.format(socket=made), "-rE", apart=True)
    result.assert_outcomes(passed=2, errors=1)
    end = " (dropped)" if verdict == "DROPPED" else ""
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of *test_it _*",
            "leaked 1 socket *",
            f"{verdict}  *",
            f"ERROR test_it.py::test_it - line *{end}: leaked 1 socket",
        ]
    )


def test_what_is_open_when_the_record_is_gone_fails_its_test_under_xdist(suite):
    pytest.importorskip("xdist")
    source = LOGGED.format(socket="keep(socket.socket())")
    result = suite.fail(source, "-p", "xdist", "-n1", "-rE", apart=True)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["ERROR test_it.py::test_it - line *: leaked 1 socket"])


def test_what_a_record_keeps_beyond_the_run_is_warned_of_at_its_end(suite):
    source = """
def test_it():
    global caught
    with pytest.raises(ValueError) as caught:
        sock = socket.socket()
        raise ValueError(sock)

def test_other(): pass
"""
    result = suite.fail(source, apart=True)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            "test_it.py:*: 1 dead socket left to a running thread, process, loop or record*",
            "    test_it.py::test_it (a record of a log, a warning or an exception keeps it)",
        ]
    )


def test_what_a_record_keeps_is_not_waited_for(suite):
    body = KEPT_BY_A_RECORD["the exception of a log record"]
    source = LIBRARY + f"def test_it(url): {body}"
    result = suite.run(source, "--socket-leaks=fail", "--socket-leaks-grace=60")
    result.assert_outcomes(passed=1)
    assert result.duration < 30


FAILURES = {
    "an attribute": "raise with_socket(ValueError())",
    "a variable before pytest.fail": "sock = socket.socket(); pytest.fail('no')",
    "a variable in pytest.raises": "with pytest.raises(ValueError): sock = socket.socket()",
    "one of a group": "raise ExceptionGroup('several', [with_socket(ValueError())])",
    "a cause": "raise KeyError from with_socket(ValueError())",
}
WITH_SOCKET = """
def with_socket(error):
    error.socket = socket.socket()
    return error

"""


@pytest.mark.parametrize("body", FAILURES.values(), ids=FAILURES)
def test_a_test_that_failed_is_not_failed_again_for_what_its_failure_keeps(suite, body):
    suite.fail(f"{WITH_SOCKET}def test_it():\n    {body}\n").assert_outcomes(failed=1)


def test_a_test_that_failed_is_failed_again_for_what_something_else_leaks(suite):
    result = suite.fail("def test_it():\n    keep(socket.socket())\n    assert False\n")
    result.assert_outcomes(failed=1, errors=1)


def test_a_loop_that_is_left_in_the_policy_is_its_tests(suite):
    pytest.importorskip("pytest_asyncio")
    result = suite.fail(
        """
def test_leaves_it():
    asyncio.set_event_loop(asyncio.new_event_loop())

@pytest.mark.asyncio
async def test_awaits(): await asyncio.sleep(0)

def test_asks(): asyncio.get_event_loop_policy()

@pytest.mark.asyncio
async def test_awaits_again(): await asyncio.sleep(0)
""",
        *("-p", "pytest_asyncio.plugin", "-o", "asyncio_default_fixture_loop_scope=function"),
        apart=True,
    )
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of *test_leaves_it _*", "leaked 2 sockets *"])
    result.stdout.no_fnmatch_line("*fixture 'event_loop_policy'*")


# An object of which the descriptor is all that is left of two sockets: each end of a pipe.
PIPES = """
import logging, multiprocessing

@pytest.fixture(scope="module")
def pipes():
    kept = []
    yield kept
    for each in kept:
        each.close()

class Worker:
    def __init__(self):
        self.pipe = multiprocessing.Pipe()

    def wait(self):
        self.pipe[0].recv()

def fail_with_a_pipe():
    pipe = multiprocessing.Pipe()
    raise ValueError

"""
KEPT_AS_A_DESCRIPTOR = {
    "by a wider fixture": ("pipes.extend(multiprocessing.Pipe())", {"passed": 1}),
    "by a failure": ("fail_with_a_pipe()", {"failed": 1}),
    "by a record": (
        """
    try:
        fail_with_a_pipe()
    except ValueError:
        logging.exception("failed")""",
        {"passed": 1},
    ),
    "by a thread": (
        "threading.Thread(target=Worker().wait, daemon=True).start()",
        {"passed": 1},
    ),
}


@pytest.mark.parametrize(
    ("body", "outcomes"), KEPT_AS_A_DESCRIPTOR.values(), ids=KEPT_AS_A_DESCRIPTOR
)
def test_what_keeps_a_descriptor_without_its_socket_object_is_found_too(suite, body, outcomes):
    result = suite.fail(f"{PIPES}def test_it(pipes):\n    {body}\n", apart=True)
    result.assert_outcomes(**outcomes)


def test_a_descriptor_without_its_socket_object_that_the_test_keeps_fails_it(suite):
    result = suite.fail(PIPES + "def test_it(): keep(multiprocessing.Pipe())", apart=True)
    result.assert_outcomes(passed=1, errors=1)


# A library with a client of its own, made when it is first asked for, and places for others.
SHOP = """
import requests

http_client = None
registered, by_name = [], {}
settings = type("Settings", (), {"__module__": __name__})()
_session = None

def get(url):
    global _session
    if _session is None:
        _session = requests.Session()
    return _session.get(url)
"""
USING_SHOP = """
import requests, sys
sys.path.insert(0, "site-packages")
import shop

def ask_by_default(url): urllib3.request("GET", url)

def ask(url):
    session = requests.Session()
    session.get(url)
    return session
"""
# With a server each: a connection that waits in the pool is used again.
EQUAL_TESTS = """
@pytest.fixture(scope="module")
def servers():
    servers = []
    yield servers
    for each in servers: each.close()

@pytest.fixture
def peer_that_stays(servers):
    servers.append(Server())
    return servers[-1].url

@pytest.fixture
def peer_that_closes():
    server = Server()
    yield server.url
    server.close()

def test_one({peer}): {call}({peer})
def test_two({peer}): {call}({peer})
def test_three({peer}): {call}({peer})
"""


def equal_tests(call, peer="peer_that_stays"):
    return LIBRARY + USING_SHOP + EQUAL_TESTS.format(call=call, peer=peer)


@pytest.fixture
def shop(suite):
    folder = suite.pytester.mkdir("site-packages") / "shop"
    folder.mkdir()
    (folder / "__init__.py").write_text(SHOP, encoding="utf-8")
    return suite


@pytest.mark.parametrize("peer", ["peer_that_stays", "peer_that_closes"])
@pytest.mark.parametrize(
    ("call", "variable"),
    [("ask_by_default", "urllib3._DEFAULT_POOL"), ("shop.get", "shop._session")],
)
def test_a_librarys_own_pool_is_explained_once_for_the_run(shop, call, variable, peer):
    source = equal_tests(call, peer)
    result = shop.fail(source, "--socket-leaks-json=leaks.jsonl", apart=True)
    result.assert_outcomes(passed=3)
    assert result.stdout.str().count("keeps 3 connections open, the first opened at") == 1
    result.stdout.fnmatch_lines([f"{variable} keeps 3 connections *", "    test_it.py::test_one"])
    lines = (shop.pytester.path / "leaks.jsonl").read_text(encoding="utf-8").splitlines()
    found = [(each["outcome"], each["reason"]) for each in map(json.loads, lines)]
    assert found == [("library_default", variable)] * 3


def test_a_setting_decides_that_a_librarys_own_pool_fails_its_tests(shop):
    result = shop.fail(equal_tests("ask_by_default"), "--socket-leaks-libraries=fail", apart=True)
    result.assert_outcomes(passed=3, errors=3)
    result.stdout.fnmatch_lines(
        ["leaked 1 socket *", "  a library's own pool keeps it, urllib3._DEFAULT_POOL"]
    )


@pytest.mark.parametrize(
    "stored",
    [
        'urllib3._DEFAULT_POOL = urllib3.PoolManager(); urllib3.request("GET", url)',
        "pytest.MonkeyPatch().setattr(urllib3, '_DEFAULT_POOL', urllib3.PoolManager()); "
        'urllib3.request("GET", url)',
        "requests.my_leak = ask(url)",
        "shop.http_client = ask(url)",
        "shop.registered.append(ask(url))",
        "shop.by_name[1] = ask(url)",
        "shop.settings.session = [ask(url)]",
        "shop.kept = socket.socket()",
        'shop.kept = urllib3.request("GET", url, preload_content=False)',
        "keep(ask(url)); shop.get(url)",
    ],
)
def test_what_a_test_stores_in_a_library_is_its_leak(shop, stored):
    source = LIBRARY + USING_SHOP + f"def test_it(url): {stored}\n"
    result = shop.fail(source, apart=True)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of *test_it _*", "leaked 1 socket *"])
