"""What a forked child keeps open of a test's sockets, and what could not be looked at."""

from __future__ import annotations

import json
import sys

import pytest

from suites import FORKING

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")

PREAMBLE = f"""
import atexit, contextlib, multiprocessing, os, signal, socketserver, subprocess, sys
{FORKING}
def spin():
    end = time.monotonic() + 20
    while time.monotonic() < end:
        pass

"""


@linux
def test_a_connection_that_only_a_child_keeps_open_fails_its_test(suite):
    source = """
def test_it():
    ours, theirs = connect()
    with theirs:
        fork(lambda: (theirs.close(), time.sleep(60)))
        ours.close()
        time.sleep(0.1)

def test_other(): connect_and_close = [sock.close() for sock in connect()]
"""
    result = suite.fail(PREAMBLE + source, "-rE", apart=True)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            "leaked 1 socket (still open * after the test)",
            "INHERITED  TCP to 127.0.0.1:*CWG501",
            "*opened   test_it.py:* in connect()",
            "*held by  process * (*)",
            "*fix      close it in the child, or open it after forking*",
            "ERROR test_it.py::test_it - line *: leaked 1 socket",
        ]
    )


@linux
@pytest.mark.parametrize(
    "start",
    [
        "fork(lambda: time.sleep(0.3))",
        "fork(lambda: None)",
        "multiprocessing.get_context('fork').Process(target=time.sleep, args=[0.3]).start()",
        "subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)",
    ],
)
def test_a_child_that_ends_soon_or_has_no_copies_fails_no_test(suite, start):
    source = f"""
def test_it():
    ours, theirs = connect()
    KEPT.append({start})
    ours.close()
    theirs.close()
"""
    result = suite.fail(PREAMBLE + source, "--socket-leaks-grace=20", apart=True)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*socket leaks*")


@linux
def test_a_pool_of_a_wider_fixture_is_no_leak_of_the_tests_that_use_it(suite):
    source = """
@pytest.fixture(scope="module")
def pool():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        yield pool

@pytest.mark.parametrize("number", [1, 2])
def test_it(pool, number):
    for sock in connect():
        with sock:
            assert pool.apply(abs, [-number]) == number
"""
    suite.fail(PREAMBLE + source, apart=True).assert_outcomes(passed=2)


@linux
def test_the_children_of_a_forking_server_may_serve_on(suite):
    source = """
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line == b"wait\\n":
                time.sleep(60)
            self.wfile.write(line)

class Server(socketserver.ForkingTCPServer):
    block_on_close = False

@pytest.fixture(scope="module")
def address():
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server.server_address
        server.shutdown()
        thread.join()
        CHILDREN.extend(server.active_children or ())
        end_children()

@pytest.mark.parametrize("answered", [False, True])
def test_client(address, answered):
    with socket.create_connection(address) as client:
        client.sendall(b"x\\n" if answered else b"wait\\n")
        client.settimeout(20 if answered else 0.3)
        if answered:
            assert client.recv(2) == b"x\\n"
        else:
            with pytest.raises(TimeoutError):
                client.recv(1)
"""
    result = suite.fail(PREAMBLE + source, apart=True)
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("*socket leaks*")


@linux
def test_a_child_that_may_use_its_copy_is_warned_of_at_the_end_of_the_run(suite):
    source = """
def test_it():
    ours, theirs = connect()
    fork(spin)
    ours.close()
    theirs.close()

"""
    ends = "def test_ends(): end_children()\n"
    result = suite.fail(PREAMBLE + source, apart=True)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "test_it.py:*: 1 socket left to a running thread, process, loop or record*",
            "    test_it.py::test_it (process * still runs and has a copy)",
        ]
    )
    suite.fail(PREAMBLE + source + ends, apart=True).stdout.no_fnmatch_line("*socket leaks*")
    result = suite.fail(PREAMBLE + source + ends, "--socket-leaks-threads=fail", apart=True)
    result.assert_outcomes(passed=2, errors=1)


@linux
def test_a_failed_test_is_not_failed_again_for_the_children_that_it_has_left(suite):
    source = """
def test_it():
    ours, theirs = connect()
    fork()
    ours.close()
    theirs.close()
    assert not "as it should be"
"""
    suite.fail(PREAMBLE + source, apart=True).assert_outcomes(failed=1)


FAILING = """
from closewait_guard._capture import registry

def fail_to_record():
    [each] = list(registry._subscribed)
    each.on_error()

"""


@pytest.mark.parametrize("more", ["", "socket.socket().close()"])
@pytest.mark.parametrize("workers", [[], ["-p", "xdist", "-n", "1"]])
def test_a_run_in_which_recording_has_failed_names_the_test_and_is_no_success(suite, more, workers):
    source = f"""
def test_before(): socket.socket().close()

def test_it():
    {more or "pass"}
    fail_to_record()

def test_after(): socket.socket().close()
"""
    options = ["--socket-leaks-json=leaks.jsonl", "--junitxml=out.xml", *workers]
    result = suite.fail(FAILING + source, *options, apart=True)
    result.assert_outcomes(passed=3)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.stdout.str().count("leaks unknown") == 1
    said = "test_it.py::test_it: leaks unknown: recording sockets has failed (1 time); the"
    result.stdout.fnmatch_lines(["*socket leaks*", said, "    run fails, unless the test is *"])
    [line] = (suite.pytester.path / "leaks.jsonl").read_text().splitlines()
    data = json.loads(line)
    assert (data["outcome"], data["owner"]) == ("unknown", "test_it.py::test_it")
    assert data["reason"] == "recording sockets has failed (1 time)"
    assert "socket_leaks_unknown" in (suite.pytester.path / "out.xml").read_text()
    shown = suite.pytester.run(sys.executable, "-m", "closewait_guard", "show", "leaks.jsonl")
    shown.stdout.fnmatch_lines(["*test_it.py::test_it*", "*leaks of * unknown*", "*1 time*"])
    arguments = ["-m", "closewait_guard", "show", "leaks.jsonl", "--fail-on-leak"]
    assert (shown.ret, suite.pytester.run(sys.executable, *arguments).ret) == (0, 87)


@pytest.mark.parametrize("marker", ['socket_leaks("warn")', 'allow_socket_leaks(reason="known")'])
def test_a_marker_lets_a_run_succeed_though_recording_has_failed(suite, marker):
    source = f"""
@pytest.mark.{marker}
def test_it():
    keep(socket.socket())
    fail_to_record()
"""
    result = suite.fail(FAILING + source, apart=True)
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.OK
    assert ("leaks unknown" in result.stdout.str()) == ("warn" in marker)


@linux
def test_a_child_that_cannot_be_looked_into_is_named(suite):
    source = """
def refuse(pid, *_):
    raise PermissionError(pid)

@pytest.mark.parametrize("seconds", [0.1, 60])
def test_it(seconds, monkeypatch):
    from closewait_guard._processes import procfs
    procfs.sockets_of_process = refuse
    ours, theirs = connect()
    fork(lambda: time.sleep(seconds))
    ours.close()
    theirs.close()

def test_after(): socket.socket().close()
"""
    result = suite.fail(PREAMBLE + source, "--socket-leaks-grace=2", apart=True)
    result.assert_outcomes(passed=3)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.stdout.str().count("leaks unknown") == 1
    said = "leaks unknown: what 1 child process may keep open: not*"
    result.stdout.fnmatch_lines([f"test_it.py::test_it[[]60[]]: {said}"])


SHOP = {
    "shop/__init__.py": """
class Client:
    is_closed = False
    def close(self):
        self.is_closed = True
""",
    "shop/_guard.py": """
import closewait_guard as cwg
KINDS = cwg.OwnerKind(
    "shop:Client", "shop.Client", lambda one: one.is_closed, lambda one: [1 / one.is_closed]
)
""",
    "shop-1.0.dist-info/entry_points.txt": (
        "[closewait_guard.libraries]\nany = shop._guard:KINDS\n"
    ),
}


def test_a_client_that_cannot_be_asked_is_named_with_its_test(suite, monkeypatch):
    for name, text in SHOP.items():
        file = suite.pytester.path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(suite.pytester.path))
    source = """
import shop

def test_before(): socket.socket().close()

@pytest.mark.parametrize("close", [True, False])
def test_it(close):
    client = keep(shop.Client())
    if close:
        client.close()

def test_after(): socket.socket().close()
"""
    result = suite.fail(source, apart=True)
    result.assert_outcomes(passed=4)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.stdout.str().count("leaks unknown") == 1
    said = "leaks unknown: looking at 1 shop.Client*"
    result.stdout.fnmatch_lines([f"test_it.py::test_it[[]False[]]: {said}"])
