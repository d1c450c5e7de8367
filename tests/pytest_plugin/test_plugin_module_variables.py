"""A client that a module of the project keeps: checked at the end of the run, for its variable."""

from __future__ import annotations

import json

import pytest

PROJECT = """
import functools
import requests

client = requests.Session()

class Shop:
    session = requests.Session()
    def __init__(self):
        self.client = requests.Session()

shop = Shop()
clients = {"a": requests.Session()}
later = None
stored = None

@functools.lru_cache
def cached(): return requests.Session()

def make_later():
    global later
    if later is None:
        later = requests.Session()
    return later
"""
CLIENTS = {
    "client": "api.client",
    "shop": "api.shop.client",
    "Shop": "api.Shop.session",
    "clients": 'api.clients["a"]',
    "cached": "api.cached()",
    "later": "api.make_later()",
}
# With a server each: a connection that waits in the pool is used again.
TESTS = """
import requests
from myapp import api

class Server:
    def __init__(self):
        self.listener = listener()
        self.url = "http://127.0.0.1:%d/" % self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        self.connection, _ = self.listener.accept()
        self.connection.recv(10_000)
        self.connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")

    def close(self):
        self.thread.join()
        self.connection.close()
        self.listener.close()

@pytest.fixture(scope="module")
def servers():
    servers = []
    yield servers
    for each in servers: each.close()

@pytest.fixture
def url(servers):
    servers.append(Server())
    return servers[-1].url

def ask(url):
    session = requests.Session()
    session.get(url)
    return session
"""
ASKING_TWICE = """
def test_one(url): {client}.get(url)
def test_two(url): {client}.get(url)
"""
# It does not yield the client, so nothing says that the connections are the fixture's.
CLOSING = """
@pytest.fixture(scope="session", autouse=True)
def close():
    yield
    {client}.close()
"""


@pytest.fixture
def project(suite, monkeypatch):
    folder = suite.pytester.mkpydir("myapp")
    (folder / "api.py").write_text(PROJECT, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(suite.pytester.path))
    return suite


def found_in(project):
    lines = (project.pytester.path / "leaks.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_a_client_of_the_project_that_a_session_fixture_closes_is_no_leak(project, client):
    source = (TESTS + ASKING_TWICE + CLOSING).format(client=client)
    result = project.fail(source, apart=True)
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("*socket leaks*")


@pytest.mark.parametrize("variable", CLIENTS)
def test_one_that_is_never_closed_is_one_error_of_its_variable(project, variable):
    source = (TESTS + ASKING_TWICE).format(client=CLIENTS[variable])
    result = project.fail(source, "--socket-leaks-json=leaks.jsonl", apart=True)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            f"* ERROR at teardown of module variable 'myapp.api.{variable}' *",
            f"module variable 'myapp.api.{variable}' leaked 2 sockets (still open at the end of*",
            "  defined at myapp/api.py:*",
            "  first used by test_it.py::test_one and 1 more",
            "  fix      close it at the end of the run: in a session fixture*",
        ]
    )
    found = [(each["kind"], each["owner"], each["nodeid"]) for each in found_in(project)]
    owner = f"module variable 'myapp.api.{variable}'"
    assert found == [("variable", owner, "test_it.py::test_one")]


def test_the_error_of_a_variable_reaches_the_controller_of_xdist(project):
    options = ("-p", "xdist.plugin", "-n1")
    source = (TESTS + ASKING_TWICE).format(client="api.client")
    result = project.fail(source, *options, apart=True)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*leaked 2 sockets (still open at the end of*"])


def test_with_warn_the_summary_names_the_variable(project):
    source = (TESTS + ASKING_TWICE).format(client="api.client")
    result = project.run(source, "--socket-leaks=warn", apart=True)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        ["test_it.py:*: 1 socket leaked by 1 variable (*warn)", "    module variable 'myapp.*"] * 2
    )


@pytest.mark.parametrize("stored", ["client", "shop", "stored"])
def test_what_a_test_stores_in_a_variable_of_the_project_is_its_leak(project, stored):
    body = f"def test_it(url): api.{stored} = ask(url)\n" + CLOSING.format(client=f"api.{stored}")
    result = project.fail(TESTS + body, apart=True)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_it _*", "leaked 1 socket *"])


@pytest.mark.parametrize("place", ["test_it", "conftest", "own_fixtures"])
def test_a_client_in_a_variable_of_tests_or_fixtures_is_the_leak_of_the_test(project, place):
    own = "import requests\nclient = requests.Session()\n"
    body = "def test_one(url): client.get(url)\n" + CLOSING.format(client="client")
    if place == "test_it":
        source = TESTS + own + body
    else:
        project.pytester.makepyfile(**{place: own})
        source = TESTS + f"from {place} import client\n" + body
    result = project.fail(source, "-p", place if place == "own_fixtures" else "no:none", apart=True)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_one _*"])


def test_what_is_checked_out_of_the_pool_of_the_project_is_the_leak_of_the_test(project):
    body = "def test_it(url): keep(api.client.get(url, stream=True))\n"
    result = project.fail(TESTS + body, apart=True)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_it _*"])


def test_a_pattern_ignores_what_a_variable_keeps(project):
    source = (TESTS + ASKING_TWICE).format(client="api.client")
    pattern = "--socket-leaks-ignore=variable:myapp.api.cli*"
    result = project.fail(source, pattern, apart=True)
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("*socket leaks*")
