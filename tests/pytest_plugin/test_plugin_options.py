"""Options, environment, ini-file, markers, the fixture; and a run that uses none of them."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

LEAKY = "def test_leaks(): keep(socket.socket())\ndef test_fine(): pass\n"
OUTCOMES = {"off": {"passed": 2}, "warn": {"passed": 2}, "fail": {"passed": 2, "errors": 1}}


@pytest.mark.parametrize("mode", ["off", "warn", "fail"])
@pytest.mark.parametrize("source", ["option", "environment", "ini"])
def test_every_source_can_set_the_mode(suite, monkeypatch, source, mode):
    options = []
    if source == "option":
        options = [f"--socket-leaks={mode}", "--socket-leaks-grace=0"]
    elif source == "environment":
        monkeypatch.setenv("CLOSEWAIT_GUARD_SOCKET_LEAKS", mode)
        monkeypatch.setenv("CLOSEWAIT_GUARD_SOCKET_LEAKS_GRACE", "0")
    else:
        suite.pytester.makeini(f"[pytest]\nsocket_leaks = {mode}\nsocket_leaks_grace = 0\n")
    result = suite.run(LEAKY, *options)
    result.assert_outcomes(**OUTCOMES[mode])
    summaries = [line for line in result.outlines if "= socket leaks =" in line]
    assert len(summaries) == (mode != "off")


def test_a_run_that_does_not_use_it_imports_nothing_and_patches_nothing(suite):
    source = """
import sys
def test_it():
    loaded = {name for name in sys.modules if name.startswith("closewait_guard")}
    assert loaded == {"closewait_guard", "closewait_guard.pytest_plugin"}
    assert "wrapt" not in sys.modules and "structlog" not in sys.modules
    assert socket.socket.__init__.__module__ == "socket"
    assert not hasattr(socket.socket.__init__, "__wrapped__")
    assert threading.Thread.start.__module__ == "threading"
    assert not hasattr(threading.Thread.start, "__wrapped__")
"""
    suite.run(source, apart=True).assert_outcomes(passed=1)


def test_the_entry_point_is_imported_in_a_moment():
    code = (
        "import time, pytest, closewait_guard\n"
        "began = time.process_time(); import closewait_guard.pytest_plugin\n"
        "print((time.process_time() - began) * 1e3)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 5


def test_the_markers_are_registered(suite):
    result = suite.run(None, "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.allow_socket_leaks(reason)*", "*socket_leaks(mode*"])


def test_the_strongest_source_wins(suite, monkeypatch):
    suite.pytester.makeini("[pytest]\nsocket_leaks = warn\nsocket_leaks_grace = 0\n")
    suite.run(LEAKY).assert_outcomes(passed=2)
    monkeypatch.setenv("CLOSEWAIT_GUARD_SOCKET_LEAKS", "fail")
    suite.run(LEAKY).assert_outcomes(passed=2, errors=1)
    suite.run(LEAKY, "--socket-leaks=warn").assert_outcomes(passed=2)
    marked = "@pytest.mark.socket_leaks('fail')\n" + LEAKY
    suite.run(marked, "--socket-leaks=warn").assert_outcomes(passed=2, errors=1)
    marked = "@pytest.mark.socket_leaks('off')\n" + LEAKY
    suite.run(marked, "--socket-leaks=fail").assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("socket_leaks", "on", "expected off, warn or fail, got 'on'"),
        ("socket_leaks_grace", "soon", "expected a non-negative number of seconds, got 'soon'"),
        ("socket_leaks_grace", "-1", "expected a non-negative number of seconds, got '-1'"),
    ],
)
@pytest.mark.parametrize("source", ["option", "environment", "ini"])
def test_a_bad_value_is_a_usage_error_that_names_where_it_came_from(
    suite, monkeypatch, source, name, value, wanted
):
    option = "--" + name.replace("_", "-")
    options, origin = [], f"ini value {name} in *tox.ini"
    if source == "option":
        options, origin = [f"{option}={value}"], f"*{option}"
    elif source == "environment":
        origin = f"environment variable CLOSEWAIT_GUARD_{name.upper()}"
        monkeypatch.setenv(f"CLOSEWAIT_GUARD_{name.upper()}", value)
    else:
        suite.pytester.makeini(f"[pytest]\n{name} = {value}\n")
    result = suite.run(LEAKY, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    if not (source == "option" and name == "socket_leaks"):
        result.stderr.fnmatch_lines([f"ERROR: {origin}: {wanted}*"])
    else:
        result.stderr.fnmatch_lines(["*argument --socket-leaks: invalid choice: 'on'*"])


def test_a_pattern_that_says_nothing_is_a_usage_error(suite, monkeypatch):
    result = suite.fail(LEAKY, "--socket-leaks-ignore= ")
    result.stderr.fnmatch_lines(["ERROR: --socket-leaks-ignore: expected a pattern on a file, *"])
    monkeypatch.setenv("CLOSEWAIT_GUARD_SOCKET_LEAKS_IGNORE", ",")
    result = suite.fail(None)
    result.stderr.fnmatch_lines(["ERROR: environment variable *_IGNORE: expected a pattern on *"])


@pytest.mark.parametrize(
    ("marker", "complaint"),
    [
        ("allow_socket_leaks", "allow_socket_leaks: needs a reason*not allow_socket_leaks()"),
        ("allow_socket_leaks()", "allow_socket_leaks: needs a reason*not allow_socket_leaks()"),
        ("allow_socket_leaks('x')", "*needs a reason*not allow_socket_leaks('x')"),
        ("allow_socket_leaks(reason='')", "*needs a reason*"),
        ("allow_socket_leaks(reason=1)", "*needs a reason*not allow_socket_leaks(reason=1)"),
        ("allow_socket_leaks(reason='x', until=2)", "*needs a reason*"),
        ("socket_leaks('maybe')", "socket_leaks: mode: expected off, warn or fail, got 'maybe'"),
        (
            "socket_leaks(grace='x')",
            "socket_leaks: grace: expected a non-negative number of seconds*",
        ),
        ("socket_leaks('off', 1)", "socket_leaks: takes a mode, grace, ignore, threads and *"),
        ("socket_leaks(patience=1)", "socket_leaks: takes a mode, grace, ignore, threads and *"),
    ],
)
def test_a_bad_marker_is_a_usage_error_that_names_the_test(suite, marker, complaint):
    result = suite.fail(f"@pytest.mark.{marker}\ndef test_it(): pass\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: test_it.py::test_it: marker {complaint}"])


def test_a_bad_setting_of_the_guard_is_a_usage_error_too(suite, monkeypatch):
    monkeypatch.setenv("CLOSEWAIT_GUARD_GRACE", "soon")
    result = suite.fail(LEAKY)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: environment variable CLOSEWAIT_GUARD_GRACE: *'soon'"])


def test_the_settings_are_those_with_which_the_run_has_begun(suite, monkeypatch):
    monkeypatch.setenv("CLOSEWAIT_GUARD_STACK_DEPTH", "1")
    result = suite.fail(
        """
def leak():
    global kept
    kept = socket.socket()

def test_it(monkeypatch):
    monkeypatch.setenv("CLOSEWAIT_GUARD_STACK_DEPTH", "many")
    socket.socket().close()
    leak()
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*kept = socket.socket()*"])
    result.stdout.no_fnmatch_line("*in test_it*")


def test_the_variables_of_the_plugin_are_no_settings_of_the_guard(monkeypatch):
    import closewait_guard as cwg

    monkeypatch.setenv("CLOSEWAIT_GUARD_SOCKET_LEAKS_GRACE", "2")
    assert cwg.Settings.load() == cwg.Settings()


def test_the_fixture_checks_one_test(suite):
    result = suite.run(
        """
@pytest.fixture
def before(): return keep(socket.socket())

def test_unchecked(): keep(socket.socket())

def test_leaks(before, closewait_guard):
    sock = socket.socket()
    assert closewait_guard.installed
    assert closewait_guard.scan(full=True).open_sockets >= 2
    sock.close()

@pytest.mark.socket_leaks(grace=0)
def test_fine(closewait_guard): socket.socket().close()

def test_patched_no_more(): assert not hasattr(socket.socket.__init__, "__wrapped__")
""",
        "--socket-leaks-grace=0.05",
    )
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of *test_leaks _*", "leaked 1 socket *", "*in before()"]
    )


def test_the_fixture_may_be_requested_within_a_test(suite):
    result = suite.run(
        """
def test_leaks(request):
    keep(socket.socket())
    assert request.getfixturevalue("closewait_guard").installed
    keep(socket.create_server(("127.0.0.1", 0)))
def test_other(): keep(socket.socket())
""",
        "--socket-leaks-grace=0.05",
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of *test_leaks _*", "leaked 1 socket *"])


def test_the_fixture_fails_its_test_where_others_are_warned_of(suite):
    result = suite.run(
        "def test_it(closewait_guard): keep(socket.socket())\n" + LEAKY,
        "--socket-leaks=warn",
        "--socket-leaks-grace=0",
    )
    result.assert_outcomes(passed=3, errors=1)


def test_an_allowed_test_does_not_fail_and_is_reported_with_its_reason(suite):
    result = suite.fail(
        """
@pytest.mark.allow_socket_leaks(reason="bug 17")
def test_it(): keep(socket.socket())
"""
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*, allowed (1 test)", "*test_it (bug 17)"])


def test_an_allowed_test_that_no_longer_leaks_is_reported(suite):
    result = suite.fail(
        """
waiver = pytest.mark.allow_socket_leaks(reason="bug 17")
@waiver
def test_opens_none(): pass
@waiver
def test_closes(): socket.socket().close()
@waiver
@pytest.mark.skip
def test_skipped(): pass
@waiver
@pytest.mark.xfail
def test_known(): assert 0
"""
    )
    result.assert_outcomes(passed=2, skipped=1, xfailed=1)
    text = " ".join(result.stdout.str().split())
    advice = r"no longer leaks: remove its marker allow_socket_leaks \(bug 17\)"
    assert re.findall(rf"::(\w+) {advice}", text) == ["test_opens_none", "test_closes"]


IGNORED = {
    "function": "pool_of_the_library",
    "module": "helper",
    "module_wildcard": "help*",
    "file": "helper.py",
    "path": "*/helper.py",
}


@pytest.mark.parametrize("pattern", IGNORED.values(), ids=IGNORED)
def test_patterns_fit_files_functions_and_modules(suite, pattern):
    suite.pytester.makepyfile(
        helper="import socket\ndef pool_of_the_library(): return socket.socket()\n"
    )
    source = "import helper\ndef test_it(): keep(helper.pool_of_the_library())\n"
    suite.fail(source).assert_outcomes(passed=1, errors=1)
    began = time.monotonic()
    suite.fail(None, f"--socket-leaks-ignore={pattern}", "--socket-leaks-grace=20").assert_outcomes(
        passed=1
    )
    assert time.monotonic() - began < 15


def test_patterns_of_all_sources_add_up(suite, monkeypatch):
    suite.pytester.makeini("[pytest]\nsocket_leaks_ignore =\n    of_ini\n    of_line\n")
    monkeypatch.setenv("CLOSEWAIT_GUARD_SOCKET_LEAKS_IGNORE", "of_environment,nothing")
    names = [
        "of_ini",
        "of_line",
        "of_environment",
        "of_option",
        "of_second",
        "of_marker",
        "of_none",
    ]
    source = "".join(
        f"def {name}(): keep(socket.socket())\n"
        "@pytest.mark.socket_leaks(ignore='of_marker')\n"
        f"def test_{name}(): {name}()\n"
        for name in names
    )
    result = suite.fail(
        source, "--socket-leaks-ignore=of_option", "--socket-leaks-ignore=of_second"
    )
    result.assert_outcomes(passed=7, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_of_none _*", "leaked 1 socket *"])
