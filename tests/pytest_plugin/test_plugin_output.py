"""The terminal, JSON lines, junit XML, annotations."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import jsonschema
import pytest

import closewait_guard as cwg
from closewait_guard.pytest_plugin._findings import Outcome, OwnerFinding
from command_line import call
from schema import SCHEMA

HELPED = """
def helper():
    return keep(socket.socket())

def test_one(): helper()
def test_two(): helper()
def test_three(): socket.socket()
"""


def test_the_stack_shows_the_tests_own_calls_and_none_of_pytests(suite):
    result = suite.fail(HELPED)
    text = result.stdout.str()
    block = text[text.index("teardown of test_one") : text.index("teardown of test_two")]
    assert re.search(r"opened   test_it.py:\d+ in helper\(\)\n +return keep", block)
    assert re.search(r"from test_it.py:\d+ in test_one\(\)\n", block)
    assert "library call" not in block
    assert "opened_in" not in block


def test_tests_that_were_installed_with_a_package_are_shown_with_the_line_that_opened_the_socket(
    suite,
):
    source = """
import socket, unittest

class TestIt(unittest.TestCase):
    def test_it(self): self.kept = KEPT.append(socket.socket())

KEPT = []
"""
    folder = suite.pytester.mkdir("site-packages")
    (folder / "test_installed.py").write_text(source, encoding="utf-8")
    result = suite.fail(None, "site-packages")
    result.stdout.re_match_lines([r"  opened   \S+test_installed\.py:5 in TestIt\.test_it\(\)"])
    result.stdout.no_fnmatch_line("*at an unknown place*")


def test_paths_are_relative_to_the_rootdir_wherever_pytest_was_started(suite, monkeypatch):
    suite.pytester.makeini("[pytest]\n")
    folder = suite.pytester.mkdir("deep")
    suite.write("def test_it(): keep(socket.socket())\n")
    monkeypatch.chdir(folder)
    result = suite.fail(None, "--rootdir=..", "../test_it.py")
    result.stdout.re_match_lines([r"  opened   test_it\.py:\d+ in test_it\(\)"])


def test_what_holds_the_socket_is_named(suite):
    result = suite.fail("def test_it(): keep(socket.socket())\n")
    result.stdout.fnmatch_lines(["*held by  test_it.KEPT*"])


def test_a_fixture_that_holds_the_socket_is_named_and_none_of_pytests_calls(suite):
    result = suite.fail(
        """
def make(): return socket.socket()

@pytest.fixture(scope="session")
def returned(): return {"conn": make()}

@pytest.fixture
def own(): return [make()]

def test_it(returned, own): pass
def test_last(returned): pass
"""
    )
    held = [line.strip() for line in result.outlines if line.startswith("  held by ")]
    assert held[0] == "held by  item.funcargs['own'][0] (what pytest keeps of test_it)"
    assert held[1].startswith("held by  item.funcargs['returned']['conn'] (what pytest keeps of ")
    assert len(held) == 2


@pytest.mark.parametrize("mode", ["warn", "fail"])
def test_verbose_shows_whole_stacks(suite, mode):
    source = "def test_it(): keep(socket.create_server(('127.0.0.1', 0)))\n"
    result = suite.fail(source, f"--socket-leaks={mode}", "-v")
    result.stdout.fnmatch_lines(
        ["*the whole stack, innermost call first:", "*socket.py:* in create_server()", "*test_it()"]
    )


def test_warnings_are_shown_in_the_summary_only(suite):
    result = suite.fail(HELPED, "--socket-leaks=warn")
    result.assert_outcomes(passed=3)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        [
            "*= socket leaks =*",
            "*leaked by 2 tests (socket_leaks=warn)",
            "    fix: close() it on every path *",
        ]
    )
    result.stdout.no_fnmatch_line("*ERROR*")


CAUSES = """
def helper(): return socket.create_server(("127.0.0.1", 0))

@pytest.fixture(scope="module")
def server():
    yield
    keep(helper())

def test_keeps(server): keep(helper())
def test_drops(): helper()
"""


def test_unlike_causes_at_one_line_are_apart_in_summary_and_annotations(suite, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    result = suite.fail(CAUSES)
    lines = (suite.pytester.path / "test_it.py").read_text(encoding="utf-8").splitlines()
    line = 1 + lines.index("def server():")
    fixture = f"module fixture 'server' of test_it.py (test_it.py:{line})"
    result.stdout.fnmatch_lines(
        [
            "test_it.py:*: 1 socket leaked by 1 test",
            "    test_it.py::test_keeps",
            "test_it.py:*: 1 dropped socket leaked by 1 test",
            "    test_it.py::test_drops",
            "test_it.py:*: 1 socket leaked by 1 fixture",
            f"    {fixture}",
            "::error *leaked by test_it.py::test_keeps; fix: use `with`, or close() it:*",
            "::error *leaked by test_it.py::test_drops; fix: use `with`, or close() in *",
            f"::error *leaked by {fixture}; fix: *",
        ]
    )


def test_the_error_of_a_fixture_names_the_line_of_the_fixture_where_it_is_defined(suite):
    suite.pytester.makeconftest(
        "import pytest, socket\n\nKEPT = []\n\n"
        "@pytest.fixture(\n    scope='session',\n)\n"
        "def connection():\n    KEPT.append(socket.socket())\n"
    )
    result = suite.fail("def test_it(connection): pass\n", "-rE")
    result.stdout.fnmatch_lines(
        [
            "session fixture 'connection' leaked 1 socket *",
            "  defined at conftest.py:8",
            "ERROR * - conftest.py:8 fixture 'connection' leaked 1 socke*",
        ]
    )


def test_the_summary_groups_by_line_and_shows_waits_with_verbose(suite):
    result = suite.fail(HELPED, "--socket-leaks-grace=0.1")
    result.stdout.fnmatch_lines(
        [
            "*= socket leaks =*",
            "test_it.py:*: 2 dead sockets leaked by 2 tests",
            "    test_it.py::test_one",
            "    test_it.py::test_two",
            "test_it.py:*: 1 dropped socket leaked by 1 test",
            "    test_it.py::test_three",
        ]
    )
    result.stdout.no_fnmatch_line("Slowest to settle*")
    result = suite.fail(None, "--socket-leaks-grace=0.1", "-v")
    result.stdout.fnmatch_lines(["Slowest to settle: * s test_it.py::test_*"])


SHORT = """
@pytest.fixture(scope="module")
def client():
    sockets = socket.socketpair()
    yield
    keep(sockets)

def test_four(client):
    for number in range(4): keep(
        socket.socket())
    keep(socket.socket())
    keep(socket.socket())
    keep(socket.socket())
"""


@pytest.mark.parametrize("options", [(), ("-n1", "-p", "xdist")], ids=["alone", "xdist"])
@pytest.mark.parametrize("ci", [False, True], ids=["desk", "ci"])
def test_the_short_summary_has_a_line_for_each_error_that_names_the_lines_that_leak(
    suite, monkeypatch, ci, options
):
    for name in ("CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)
    if ci:
        monkeypatch.setenv("CI", "true")
    # Away from a CI server, lines are cut to the width of the terminal.
    monkeypatch.setenv("COLUMNS", "200")
    result = suite.fail(SHORT, *options, apart=bool(options))
    lines = (suite.pytester.path / "test_it.py").read_text(encoding="utf-8").splitlines()
    numbers = dict(enumerate(lines, 1))
    pair, *others = [n for n, line in numbers.items() if "socket.socket" in line]
    [fixture] = [n for n, line in numbers.items() if line.startswith("def client")]
    first = ", ".join(f"line {n}" for n in others[:3])
    begun = next(n for n, line in enumerate(result.outlines) if "= short test summary" in line)
    printed = result.outlines[begun + 1 :]
    who = "ERROR test_it.py::test_four -"
    assert printed[:2] == [
        f"{who} {first}, 1 more line: leaked 7 sockets",
        f"{who} test_it.py:{fixture} fixture 'client' leaked 2 sockets: test_it.py:{pair}",
    ]
    assert "2 errors" in printed[2]


def test_many_tests_at_one_site_are_counted_not_listed(suite):
    tests = "".join(f"def test_{n}(): leak()\n" for n in range(6))
    result = suite.fail("def leak(): socket.socket()\n" + tests)
    result.stdout.fnmatch_lines(["*6 dropped sockets leaked by 6 tests", "    and 3 more"])


def test_a_run_that_leaks_nothing_prints_nothing(suite):
    result = suite.fail("def test_it(): socket.socket().close()\n")
    result.stdout.no_fnmatch_line("*socket*")


def test_json_has_one_line_for_each_leaking_test_and_fixture(suite):
    found = suite.findings(
        HELPED
        + """
@pytest.mark.allow_socket_leaks(reason="old")
def test_allowed(): keep(socket.socket())
@pytest.mark.allow_socket_leaks(reason="gone")
def test_waiver(): pass
@pytest.fixture(scope="session")
def client(): return keep(socket.socket())
def test_client(client): pass
"""
    )
    assert [(line["owner"], line["kind"], line["outcome"], line["reason"]) for line in found] == [
        ("test_it.py::test_one", "test", "failed", None),
        ("test_it.py::test_two", "test", "failed", None),
        ("test_it.py::test_three", "test", "failed", None),
        ("test_it.py::test_allowed", "test", "allowed", "old"),
        ("session fixture 'client'", "fixture", "failed", None),
    ]
    for line in found:
        assert line["schema"] == "closewait-guard-pytest/1"
        jsonschema.validate(line["report"], SCHEMA)
        [leak] = cwg.from_dict(line["report"]).findings
        assert leak.observation.record.context == {"opened_in": line["owner"]}
        assert OwnerFinding.from_dict(line).to_dict() == line


def test_a_finding_is_the_same_after_json():
    finding = OwnerFinding("a", "a", "test", Outcome.ALLOWED, 0.5, "why", cwg.scan(), "gw0")
    assert OwnerFinding.from_dict(json.loads(json.dumps(finding.to_dict()))) == finding


def test_the_json_file_is_there_though_nothing_leaks(suite):
    suite.fail("def test_it(): pass\n", "--socket-leaks-json=deep/er/leaks.jsonl")
    assert (suite.pytester.path / "deep" / "er" / "leaks.jsonl").read_text() == ""


def test_a_json_file_that_cannot_be_written_is_a_usage_error(suite):
    result = suite.fail(HELPED, "--socket-leaks-json=/proc/no/file")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: socket_leaks_json: /proc/no/file cannot be written: *"])


def test_junit_xml_has_the_error_and_properties(suite):
    suite.fail(HELPED, "--junitxml=junit.xml")
    root = ET.parse(suite.pytester.path / "junit.xml").getroot()
    for case in root.iter("testcase"):
        [error] = case.findall("error")
        assert "  opened   " in error.text
        properties = {each.get("name"): each.get("value") for each in case.iter("property")}
        assert properties["socket_leaks"] == "1"
        verdict = re.fullmatch(
            r"(dead|dropped) opened at test_it\.py:\d+", properties["socket_leak"]
        )[1]
        end = r" \(dropped\)" if verdict == "dropped" else ""
        assert re.search(rf"line \d+{end}: leaked 1 socket\"?$", error.get("message"))


def test_github_annotates_the_line(suite, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(suite.pytester.path.parent))
    result = suite.fail(HELPED)
    folder = suite.pytester.path.name
    result.stdout.re_match_lines(
        [
            rf"::error file={folder}/test_it.py,line=\d+::2 sockets opened here leaked by 2 tests;",
            rf"::error file={folder}/test_it.py,line=\d+::1 socket .* by test_it.py::test_three;",
        ]
    )
    result = suite.fail(HELPED, "--socket-leaks=warn")
    result.stdout.re_match_lines(["::warning file="])


def test_without_github_there_are_no_annotations(suite):
    suite.fail(HELPED).stdout.no_fnmatch_line("::error*")


def test_a_connection_that_waits_in_a_pool_is_not_nothing_to_do_for_the_test_that_has_left_it(
    suite,
):
    result = suite.fail(
        """
import http.server, requests

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.close_connection = True

    def log_message(self, *_): pass

def test_it():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        session = keep(requests.Session())
        session.get(f"http://127.0.0.1:{server.server_port}")
        time.sleep(0.3)
"""
    )
    text = " ".join(result.stdout.str().split())
    assert "NEVER CLOSED TCP to" in text, text
    assert "nothing to do" not in text
    assert "use `with requests.Session() as session:`" in text


def test_show_prints_what_was_written_as_json_lines(suite):
    suite.fail(HELPED, "--socket-leaks-json=leaks.jsonl")
    done = call("show", suite.pytester.path / "leaks.jsonl", "--fail-on-leak", code=1)
    for owner in ("test_one", "test_two", "test_three"):
        assert f"\ntest_it.py::{owner} (failed)\n" in done.stdout
    assert done.stdout.count("NEVER CLOSED") + done.stdout.count("\nDEAD ") == 2
    assert done.stdout.count("DROPPED") == 1


def test_show_says_of_a_test_what_pytest_has_said(suite):
    source = """
def test_one(): keep(socket.create_connection(LISTENER.getsockname()))
def test_two(): socket.socket()
LISTENER = listener()
"""
    printed = suite.fail(source, "--socket-leaks-json=leaks.jsonl").stdout.str()
    shown = call("show", "leaks.jsonl", cwd=suite.pytester.path, code=0).stdout
    assert shown.startswith("2 of 2 reports of a test run: 2 failed\n")
    for name in ("one", "two"):
        _, _, text = shown.partition(f"test_it.py::test_{name} (failed)\n")
        head, _, block = text.partition("\n\nReport ")[0].partition("\n\n")
        assert f"{head}\n\n" in printed
        [title, *facts] = block.splitlines()
        assert title.startswith(("NEVER CLOSED  ", "DROPPED  "))
        # Only pytest has the module at hand, and says where its global variable is defined.
        assert [
            line for line in facts if "(module global)" not in line and line not in printed
        ] == []


LIBRARY = """
import socket

__version__ = "3.13"

def connect(address):
    return socket.create_connection(address)

class Listener:
    def __init__(self, sock):
        self.sock = sock

    def accept(self):
        return self._wrapped()

    def _wrapped(self):
        return self.sock.accept()
"""
USES_LIBRARY = """
import socket, threading
import mylib

KEPT = []

def listener():
    return socket.create_server(("127.0.0.1", 0))

def test_connects():
    with listener() as server:
        KEPT.append(mylib.connect(server.getsockname()))

def test_accepts():
    with listener() as server, socket.create_connection(server.getsockname()):
        KEPT.append(mylib.Listener(server).accept())

def test_handles():
    def handler(listener):
        KEPT.append(listener.accept())

    with listener() as server, socket.create_connection(server.getsockname()):
        thread = threading.Thread(target=handler, args=(mylib.Listener(server),))
        thread.start()
        thread.join()
"""


@pytest.mark.parametrize("place", [".", "site-packages/mylib/test"])
def test_the_line_of_a_test_wins_over_a_librarys_even_if_it_is_installed_with_it(
    suite, monkeypatch, place
):
    folder = suite.pytester.path / "site-packages" / "mylib"
    (folder / "test").mkdir(parents=True)
    (folder / "__init__.py").write_text(LIBRARY, encoding="utf-8")
    metadata = folder.parent / "mylib-3.13.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: mylib\nVersion: 3.13\n", encoding="utf-8")
    (suite.pytester.path / place / "test_own.py").write_text(USES_LIBRARY, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    result = suite.fail(None, f"{place}/test_own.py", apart=True)
    result.assert_outcomes(passed=3, errors=3)
    text = " ".join(result.stdout.str().split())
    assert [*dict.fromkeys(re.findall(r"test_own\.py:\d+ in \S+\(\)", text))] == [
        "test_own.py:12 in test_connects()",
        "test_own.py:16 in test_accepts()",
        "test_own.py:20 in test_handles.<locals>.handler()",
    ]
    assert "opened   listener at" not in result.stdout.str()
    result.stdout.fnmatch_lines(
        [
            f"  opened   {'' if place == '.' else place + '/'}test_own.py:12 in test_connects()",
            "               KEPT.append(*",
            "           by mylib 3.13 (mylib/__init__.py:7)",
        ]
    )


OWN_POOL = """
import urllib3

default = None

def get(url):
    global default
    if default is None:
        default = urllib3.PoolManager()
    return default.request("GET", url).data
"""
USES_OWN_POOL = """
import http.server, tinyhttp

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

def test_it():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    tinyhttp.get(f"http://127.0.0.1:{server.server_port}/")
    server.shutdown()
    server.server_close()
"""


@pytest.mark.parametrize("named_by", ["src/tinyhttp", "pyproject.toml"])
def test_the_project_under_test_is_no_library_though_it_is_installed(suite, monkeypatch, named_by):
    root = suite.pytester.path
    installed = root / "elsewhere" / "site-packages"
    for name, text in {
        "tinyhttp.py" if named_by != "src/tinyhttp" else "tinyhttp/__init__.py": OWN_POOL,
        "tiny_http-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-http\nVersion: 1\n",
        "tiny_http-1.dist-info/RECORD": "tinyhttp.py,,\n",
    }.items():
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text(text, encoding="utf-8")
    if named_by == "src/tinyhttp":
        (root / "src" / "tinyhttp").mkdir(parents=True)
        (root / "src" / "tinyhttp" / "__init__.py").write_text(OWN_POOL, encoding="utf-8")
        suite.pytester.makeini("[pytest]\n")
    else:
        project = '[project]\nname = "tiny-http"\n[tool.pytest.ini_options]\n'
        (root / "pyproject.toml").write_text(project, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(installed))
    result = suite.fail(USES_OWN_POOL, apart=True)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.re_match_lines(
        [r"  opened   .*tinyhttp\S*\.py:\d+ in get\(\)", r" +by urllib3 \S+ \(urllib3/"]
    )
    result.stdout.no_fnmatch_line("*a library's own pool*")


@pytest.mark.parametrize("length", [10, 60, 200])
def test_file_and_number_are_shown_however_long_the_directory_is(suite, monkeypatch, length):
    folder = suite.pytester.path.joinpath("d" * length, "e-" * (length // 2))
    folder.mkdir(parents=True)
    source = USES_LIBRARY.replace("import mylib", "").replace("mylib.Listener", "")
    (folder / "test_own.py").write_text(source, encoding="utf-8")
    result = suite.fail(None, str(folder), "-k", "accepts")
    result.stdout.re_match_lines([r"  opened   .*/test_own\.py:16( in test_accepts\(\))?$"])
    result.stdout.re_match_lines([r".*listener opened at.*"])
    text = result.stdout.str()
    assert re.search(r"listener opened at\s+\S+/test_own\.py:8$", text, re.MULTILINE)
