"""A wider fixture's sockets are its own: by who made them, by what keeps them, by the thread."""

from __future__ import annotations

import pytest

from closewait_guard.pytest_plugin._attribution import NO_OWNER, Ownership

SERVER = """
@pytest.fixture(scope="module")
def server():
    server, stop = listener(), []

    def serve():
        while True:
            conn, _ = server.accept()
            if stop:
                conn.close()
                return
            SERVED(conn)

    thread = threading.Thread(target=serve)
    thread.start()
    yield server.getsockname()
    stop.append(True)
    socket.create_connection(server.getsockname()).close()
    thread.join()
    server.close()
"""


@pytest.mark.parametrize("scope", ["class", "module", "package", "session"])
def test_a_wider_fixture_that_leaks_is_named(suite, scope):
    result = suite.fail(
        f"""
@pytest.fixture(scope="{scope}")
def client():
    yield keep(socket.socket())

class TestIt:
    def test_first(self, client): pass
    def test_last(self, client): pass
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [f"*ERROR at teardown of {scope} fixture 'client'*", f"{scope} fixture 'client'* leaked 1*"]
    )
    result.stdout.no_fnmatch_line("*teardown of test_last *")


def test_a_wider_fixture_that_closes_what_it_opened_is_fine(suite):
    result = suite.fail(
        """
@pytest.fixture(scope="session")
def client():
    with socket.socket() as sock:
        yield sock

def test_first(client): pass
def test_last(client): pass
"""
    )
    result.assert_outcomes(passed=2)


def test_each_parameter_of_a_fixture_is_checked_when_it_is_finalized(suite):
    result = suite.fail(
        """
@pytest.fixture(scope="module", params=["good", "bad"])
def client(request):
    sock = keep(socket.socket())
    yield sock
    if request.param == "good":
        sock.close()

def test_it(client): pass
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of module fixture 'client'?'bad'?*"])


@pytest.mark.parametrize(
    "value",
    [
        "pool",
        "[pool]",
        "{'deep': ({'in': pool},)}",
        "lambda: pool",
        "pool.connection",
        "__import__('functools').partial(pool.connection)",
        "__import__('types').SimpleNamespace(pool=pool)",
    ],
)
def test_a_socket_that_a_wider_fixtures_value_keeps_is_that_fixtures(suite, value):
    result = suite.fail(
        f"""
@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()

@pytest.fixture(scope="session")
def value(pool):
    return {value}

def test_first(value, pool): pool.connection()
def test_last(value, pool): pool.connection()
"""
    )
    result.assert_outcomes(passed=2)


def test_the_generator_of_a_fixture_keeps_what_its_value_does_not(suite):
    result = suite.fail(
        """
@pytest.fixture(scope="module")
def connect():
    pool = Pool()
    yield lambda weak=__import__("weakref").ref(pool): weak().connection() and None
    pool.close()

def test_it(connect): connect()
def test_other(): pass
"""
    )
    result.assert_outcomes(passed=2)


def test_a_pool_that_is_not_closed_is_its_fixtures_leak_though_a_test_filled_it(suite):
    result = suite.fail(
        """
@pytest.fixture(scope="module")
def pool():
    pool = keep(Pool())
    yield pool
    pool.server.close()

def test_fills(pool): pool.connection()
def test_uses(pool): pool.connection()
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        ["module fixture 'pool' of test_it.py leaked 1 socket*", "*from *in test_fills()"]
    )


def test_a_dropped_socket_of_a_pool_that_is_not_closed_is_its_fixtures_too(suite):
    result = suite.fail(
        """
@pytest.fixture(scope="module")
def pool():
    pool = Pool()
    yield pool
    pool.server.close()
    pool.free.clear()

def test_fills(pool): pool.connection()
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "module fixture 'pool' of test_it.py leaked 1 socket (garbage-collected while*",
            "DROPPED*",
        ]
    )


def test_a_response_that_reads_from_a_closed_socket_is_found_by_its_file(suite):
    result = suite.fail(
        """
@pytest.fixture(scope="module")
def responses():
    kept = []
    yield kept
    for file in kept:
        file.close()

def test_it(responses):
    ours, theirs = socket.socketpair()
    responses.append(ours.makefile("rb"))
    ours.close()
    theirs.close()
"""
    )
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize("where", ["unittest", "setup_class", "setup_module", "autouse"])
def test_what_the_set_up_of_a_class_or_module_assigns_is_its_own(suite, where):
    test = "def test_it(self): {0}pool.connection()\n    def test_other(self): {0}pool.connection()"
    sources = {
        "unittest": f"""
import unittest
class TestIt(unittest.TestCase):
    @classmethod
    def setUpClass(cls): cls.pool = Pool()
    @classmethod
    def tearDownClass(cls): cls.pool.close()
    {test.format("self.")}
""",
        "setup_class": f"""
class TestIt:
    @classmethod
    def setup_class(cls): cls.pool = Pool()
    @classmethod
    def teardown_class(cls): cls.pool.close()
    {test.format("self.")}
""",
        "setup_module": f"""
def setup_module():
    global pool
    pool = Pool()
def teardown_module(): pool.close()
class TestIt:
    {test.format("")}
""",
        "autouse": f"""
class TestIt:
    @pytest.fixture(scope="class", autouse=True)
    def pooling(self, request):
        request.cls.pool = Pool()
        yield
        request.cls.pool.close()
    {test.format("self.")}
""",
    }
    suite.fail(sources[where]).assert_outcomes(passed=2)
    result = suite.fail(sources[where].replace(".close()", ".server.close()"))
    result.assert_outcomes(passed=2, errors=1)
    names = {"unittest": "setUpClass of test_it.py::TestIt", "autouse": "class fixture 'pooling'"}
    result.stdout.fnmatch_lines([f"*{names.get(where, where)}* leaked 1 socket*"])


def test_a_test_case_that_leaves_its_socket_is_reported_like_any_test(suite):
    result = suite.fail(
        """
import unittest
class TestIt(unittest.TestCase):
    def setUp(self): self.sock = socket.socket()
    def test_leaks(self): pass
    def test_closes(self): self.sock.close()
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of TestIt.test_leaks*", "*in TestIt.setUp()"])


def test_what_the_thread_of_a_wider_fixture_accepts_is_that_fixtures(suite):
    closing = "import time\nSERVED = lambda conn: time.sleep(0.2) or conn.close()\n"
    test = """
def test_it(server):
    with socket.create_connection(server): time.sleep(0.05)
def test_other(): pass
"""
    suite.fail(closing + SERVER + test).assert_outcomes(passed=2)
    result = suite.fail("SERVED = keep\n" + SERVER + test)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["module fixture 'server' of test_it.py leaked 1 socket*"])


def test_threads_of_a_fixtures_threads_are_that_fixtures(suite):
    handler = """
def handle(conn):
    keep(socket.socket())
    conn.close()
SERVED = lambda conn: threading.Thread(target=handle, args=(conn,)).start()
"""
    result = suite.fail(
        handler
        + SERVER
        + """
def test_it(server):
    with socket.create_connection(server) as sock: sock.recv(1)
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["module fixture 'server' of test_it.py leaked 1 socket*"])


def test_a_thread_of_the_test_is_the_tests(suite):
    result = suite.fail(
        """
def test_it():
    thread = threading.Thread(target=lambda: keep(socket.socket()))
    thread.start()
    thread.join()
def test_other(): pass
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of *test_it _*", "leaked 1 socket *"])


def test_a_worker_of_a_shared_executor_serves_the_test_that_submits(suite):
    result = suite.fail(
        """
from concurrent.futures import ThreadPoolExecutor

@pytest.fixture(scope="session")
def executor():
    with ThreadPoolExecutor(1) as executor:
        yield executor

def test_first(executor): executor.submit(int).result()
def test_second(executor): executor.submit(lambda: keep(socket.socket()) and None).result()
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of *test_second _*", "leaked 1 socket *"])


def test_a_wide_fixture_that_is_set_up_within_a_test_is_still_a_wide_fixture(suite):
    result = suite.fail(
        """
@pytest.fixture(scope="module")
def client():
    with socket.socket() as sock:
        yield sock

def test_first(request): request.getfixturevalue("client")
def test_last(): pass
"""
    )
    result.assert_outcomes(passed=2)


def test_a_fixture_that_fails_leaks_nothing_that_its_traceback_keeps(suite):
    result = suite.fail(
        """
@pytest.fixture(scope="module")
def client():
    sock = socket.socket()
    raise ValueError(sock)

def test_first(client): pass
def test_last(client): pass
"""
    )
    result.assert_outcomes(errors=2)
    result.stdout.no_fnmatch_line("*leaked*")


def test_a_large_value_is_walked_for_a_bounded_time(suite, monkeypatch):
    monkeypatch.setattr("closewait_guard.pytest_plugin._excuses._MAX_OBJECTS", 100)
    result = suite.fail(
        """
@pytest.fixture(scope="session")
def large(): return [[] for _ in range(1000)] + [KEPT]

def test_it(large): keep(socket.socket())
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    said = "what else may keep the sockets of a test: the search ended at the limit of 100 objects"
    assert said in " ".join(result.stdout.str().split())


def test_the_last_test_of_a_module_is_checked_like_any_other(suite):
    """Before the fixtures go whose teardown would close its sockets by chance."""
    result = suite.fail(
        """
@pytest.fixture(scope="module")
def janitor():
    yield
    for sock in KEPT:
        sock.close()

def test_it(janitor): keep(socket.socket())
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of *test_it _*", "leaked 1 socket *"])


def test_owners_never_share_a_name_and_one_forgotten_is_found_again_where_it_was():
    ownership = Ownership()
    given = ["t", "t", "t (run 2)", "t", "u (run 2)", "u", "u"]
    owners = [ownership.make_owner(name, name, 0) for name in given]
    assert len({owner.name for owner in owners}) == len(owners)
    assert [owner.name for owner in owners[:2]] == ["t", "t (run 2)"]
    for owner in owners:
        ownership.forget(owner)
        again = ownership.by_name(owner.name)
        assert (again.name, again.nodeid, again.finished) == (owner.name, owner.nodeid, True)
        assert ownership.by_name(owner.name) is again
    assert ownership.by_name("") is ownership.by_name(None) is NO_OWNER


# Connections that have both ends in the process

HANDLING_SERVER = """
import socketserver

class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"!")
        while self.request.recv(10):
            pass
        if self.server.keeps:
            self.server.keeps.append(keep(self.request.dup()))

class Server(socketserver.ThreadingTCPServer):
    daemon_threads, block_on_close, keeps = True, False, []

@pytest.fixture(scope="{scope}")
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()

def connect(server):
    sock = socket.create_connection(server.server_address)
    assert sock.recv(1) == b"!"
    return sock
"""


UNIX_SERVER = (
    HANDLING_SERVER.replace("ThreadingTCPServer", "ThreadingUnixStreamServer")
    .replace('("127.0.0.1", 0)', '"./s"')
    .replace(
        "sock = socket.create_connection(server.server_address)",
        "sock = socket.socket(socket.AF_UNIX); sock.connect(server.server_address)",
    )
)


@pytest.mark.parametrize(
    ("server", "scope"),
    [(HANDLING_SERVER, "session"), (HANDLING_SERVER, "function"), (UNIX_SERVER, "session")],
    ids=["TCP, session", "TCP, function", "UNIX, session"],
)
def test_a_leaked_connection_within_the_process_is_one_finding_of_who_opened_it(
    suite, server, scope
):
    result = suite.fail(
        server.format(scope=scope)
        + """
def test_leaks(server): keep(connect(server))
def test_closes(server): connect(server).close()
def test_last(server): pass
""",
        apart=True,
    )
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of *test_leaks _*", "leaked 1 socket *", "  opened   *in connect()"]
    )
    result.stdout.no_fnmatch_line("*accepted*")


@pytest.mark.parametrize(
    "settles",
    [
        "@pytest.mark.allow_socket_leaks(reason='known')",
        "@pytest.mark.socket_leaks('off')",
    ],
)
def test_the_other_end_of_what_a_test_may_leave_open_is_no_leak_of_the_server(suite, settles):
    result = suite.fail(
        HANDLING_SERVER.format(scope="module")
        + settles
        + """
def test_leaks(server): keep(connect(server))

def test_last(server): pass
""",
        apart=True,
    )
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.OK


def test_the_other_end_of_what_a_failure_keeps_is_no_leak_of_the_server(suite):
    result = suite.fail(
        HANDLING_SERVER.format(scope="module")
        + """
def test_fails(server):
    sock = connect(server)
    assert sock is None

def test_last(server): pass
""",
        apart=True,
    )
    result.assert_outcomes(passed=1, failed=1)


def test_a_server_that_leaves_its_end_open_when_the_client_has_closed_is_to_blame(suite):
    result = suite.fail(
        HANDLING_SERVER.format(scope="module")
        + """
def test_it(server):
    server.keeps.append(None)
    connect(server).close()

def test_last(server): pass
""",
        apart=True,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*module fixture 'server' of test_it.py leaked 1 socket*"])


def test_both_ends_that_a_test_has_opened_and_accepted_itself_are_shown(suite):
    result = suite.fail(
        """
def test_it():
    with listener() as server:
        keep(socket.create_connection(server.getsockname()))
        keep(server.accept())
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of *test_it _*", "leaked 2 sockets *"])


def test_a_leaked_connection_within_a_worker_of_xdist_is_one_finding(suite):
    result = suite.fail(
        HANDLING_SERVER.format(scope="session")
        + """
def test_leaks(server): keep(connect(server))
def test_last(server): pass
""",
        "-p",
        "xdist",
        "-n1",
        apart=True,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.no_fnmatch_line("*accepted*")


LEAKY_FIXTURE = """
@pytest.fixture(scope="session")
def shared():
    pool = Pool()
    yield pool
    pool.server.close()

@pytest.mark.allow_socket_leaks(reason="bug 1")
def test_it(shared): keep(shared.connection())
"""


def test_a_pattern_allows_the_leak_of_a_wider_fixture_by_its_name(suite):
    suite.fail(LEAKY_FIXTURE, "--socket-leaks-ignore=fixture:other").assert_outcomes(
        passed=1, errors=1
    )
    suite.fail(LEAKY_FIXTURE, "--socket-leaks-ignore=fixture:sha*").assert_outcomes(passed=1)


def test_a_marker_that_does_not_cover_the_leak_of_a_fixture_is_not_called_unneeded(suite):
    result = suite.fail(LEAKY_FIXTURE)
    result.assert_outcomes(passed=1, errors=1)
    text = " ".join(result.stdout.str().split())
    assert (
        "test_it is allowed to leak sockets (bug 1), but the leak is of session fixture 'shared', "
        "which the marker does not cover: use socket_leaks_ignore = fixture:shared" in text
    )
    assert "remove its" not in text
