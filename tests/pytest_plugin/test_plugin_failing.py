"""`socket_leaks_as = fail`: a test that leaks has failed, instead of an error at its teardown."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from _pytest import runner

AS_FAIL = "--socket-leaks-as=fail"
LEAKY = "def test_leaks(): keep(socket.socket())\ndef test_fine(): pass\n"


def lines_of_summary(result):
    begun = next(n for n, line in enumerate(result.outlines) if "= short test summary" in line)
    return [line.partition(" - ")[0] for line in result.outlines[begun + 1 : -1]]


@pytest.mark.parametrize("source", ["option", "environment", "ini"])
@pytest.mark.parametrize(
    ("value", "outcomes"),
    [("error", {"passed": 2, "errors": 1}), ("fail", {"passed": 1, "failed": 1})],
)
def test_every_source_can_say_as_what_a_leak_is_reported(
    suite, monkeypatch, source, value, outcomes
):
    options = [f"--socket-leaks-as={value}"] if source == "option" else []
    if source == "environment":
        monkeypatch.setenv("CLOSEWAIT_GUARD_SOCKET_LEAKS_AS", value)
    elif source == "ini":
        suite.pytester.makeini(f"[pytest]\nsocket_leaks_as = {value}\n")
    suite.fail(LEAKY, *options).assert_outcomes(**outcomes)


@pytest.mark.parametrize("mode", ["off", "fail"])
@pytest.mark.parametrize("source", ["environment", "ini", "option"])
def test_another_value_is_refused_in_one_sentence(suite, monkeypatch, source, mode):
    options, where = [f"--socket-leaks={mode}"], "ini value socket_leaks_as in *tox.ini"
    if source == "environment":
        monkeypatch.setenv("CLOSEWAIT_GUARD_SOCKET_LEAKS_AS", "failure")
        where = "environment variable CLOSEWAIT_GUARD_SOCKET_LEAKS_AS"
    elif source == "ini":
        suite.pytester.makeini("[pytest]\nsocket_leaks_as = failure\n")
    else:
        options.append("--socket-leaks-as=failure")
    result = suite.run(LEAKY, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    wanted = f"ERROR: {where}: expected error or fail, got 'failure'"
    if source == "option":
        wanted = "*argument --socket-leaks-as: invalid choice: 'failure'*"
    result.stderr.fnmatch_lines([wanted])


def test_the_test_is_counted_once_with_one_letter_and_one_line(suite):
    result = suite.fail(LEAKY, AS_FAIL)
    result.assert_outcomes(passed=1, failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["test_it.py F. *", "*= FAILURES =*", "*_ test_leaks _*"])
    assert lines_of_summary(result) == ["FAILED test_it.py::test_leaks"]
    result.stdout.no_fnmatch_line("*ERROR*")


# By how a test, or what it uses, is written: the outcomes of a run.
KINDS = {
    "parametrized": (
        "@pytest.mark.parametrize('leaks', [True, False])\n"
        "def test_it(leaks): leaks and keep(socket.socket()) and None\n",
        {"passed": 1, "failed": 1},
    ),
    "own fixture": (
        "@pytest.fixture\ndef own():\n    yield keep(socket.socket())\ndef test_it(own): pass\n",
        {"failed": 1},
    ),
    "set-up in vain": (
        "@pytest.fixture\ndef own():\n    keep(socket.socket())\n    assert False\n"
        "def test_it(own): pass\n",
        # A section of the report of the set-up would come too late.
        {"errors": 2},
    ),
    "teardown in vain": (
        "@pytest.fixture\ndef own():\n    yield keep(socket.socket())\n    assert False\n"
        "def test_it(own): pass\n",
        {"failed": 1, "errors": 1},
    ),
    "failed already": (
        "def test_it():\n    keep(socket.socket())\n    assert False\n",
        {"failed": 1, "errors": 1},
    ),
    "skipped": (
        "def test_it():\n    keep(socket.socket())\n    pytest.skip('no')\n",
        {"skipped": 1, "errors": 1},
    ),
    "skipped from the start": (
        "@pytest.mark.skip\ndef test_it(): socket.socket()\n",
        {"skipped": 1},
    ),
    "wider fixture": (
        "@pytest.fixture(scope='module')\ndef wide(): return keep(socket.socket())\n"
        "def test_it(wide): pass\ndef test_other(wide): pass\n",
        {"passed": 2, "errors": 1},
    ),
    "expected to fail": (
        "@pytest.mark.xfail\ndef test_it(): keep(socket.socket())\n",
        {"xfailed": 1},
    ),
    "strictly expected to fail": (
        "@pytest.mark.xfail(strict=True)\ndef test_it(): keep(socket.socket())\n",
        {"xfailed": 1},
    ),
    "passed against a strict expectation": (
        "@pytest.mark.xfail(strict=True)\ndef test_it(): pass\n",
        {"failed": 1},
    ),
    "expected to raise something else": (
        "@pytest.mark.xfail(raises=ValueError)\ndef test_it(): keep(socket.socket())\n",
        {"failed": 1},
    ),
    "unexpectedly passed": ("@pytest.mark.xfail\ndef test_it(): pass\n", {"xpassed": 1}),
    "TestCase": (
        "import unittest\nclass TestIt(unittest.TestCase):\n"
        "    def setUp(self): self.kept = keep(socket.socket())\n"
        "    def test_one(self): pass\n"
        "    def test_two(self): KEPT.pop().close()\n",
        {"passed": 1, "failed": 1},
    ),
    "allowed": (
        "@pytest.mark.allow_socket_leaks(reason='old')\ndef test_it(): keep(socket.socket())\n",
        {"passed": 1},
    ),
    "marked": (
        "@pytest.mark.socket_leaks('warn')\ndef test_it(): keep(socket.socket())\n",
        {"passed": 1},
    ),
    "asyncio.run": (
        "async def leak(): keep(socket.socket())\ndef test_it(): asyncio.run(leak())\n",
        {"failed": 1},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_test_that_has_passed_fails_and_others_keep_their_own_outcome(suite, kind):
    source, outcomes = KINDS[kind]
    suite.fail(source, AS_FAIL).assert_outcomes(**outcomes)


@pytest.mark.parametrize("plugin", ["pytest_asyncio.plugin", "anyio.pytest_plugin"])
def test_an_async_test_fails(suite, plugin):
    mark = "asyncio" if "asyncio" in plugin else "anyio"
    source = f"""
@pytest.fixture
def anyio_backend(): return "asyncio"

@pytest.mark.{mark}
async def test_leaks(): keep(socket.socket())

@pytest.mark.{mark}
async def test_fine(): pass
"""
    result = suite.fail(source, AS_FAIL, "-p", plugin, apart=True)
    result.assert_outcomes(passed=1, failed=1)


MANY = "".join(f"def test_{n}(): keep(socket.socket())\n" for n in range(4))


@pytest.mark.parametrize(("option", "failed"), [("-x", 1), ("--maxfail=2", 2), ("--maxfail=9", 4)])
@pytest.mark.parametrize("workers", [(), ("-n1", "-p", "xdist")], ids=["alone", "xdist"])
def test_a_run_stops_at_the_failures_that_it_was_given(suite, option, failed, workers):
    result = suite.fail(MANY, AS_FAIL, option, *workers, apart=bool(workers))
    outcomes = result.parseoutcomes()
    # A worker is not stopped at once.
    assert outcomes["failed"] >= failed
    assert workers or outcomes == {"failed": failed}


@pytest.mark.parametrize("workers", [(), ("-n2", "-p", "xdist")], ids=["alone", "xdist"])
def test_the_last_failed_are_run_again(suite, workers):
    cache = ("-p", "cacheprovider", AS_FAIL, *workers)
    suite.write(LEAKY)
    ours = ("-p", "closewait_guard.pytest_plugin", "--socket-leaks=fail")
    suite.run_apart(*ours, *cache).assert_outcomes(passed=1, failed=1)
    again = suite.run_apart(*ours, "--lf", *cache)
    again.assert_outcomes(failed=1)


def test_junit_xml_has_a_failure_and_the_properties(suite):
    suite.fail(LEAKY, AS_FAIL, "--junitxml=junit.xml")
    root = ET.parse(suite.pytester.path / "junit.xml").getroot()
    [whole] = root.iter("testsuite")
    assert [whole.get(name) for name in ("tests", "failures", "errors")] == ["2", "1", "0"]
    leaky, fine = root.iter("testcase")
    [failure] = leaky.findall("failure")
    assert failure.get("message").strip('"').endswith(": leaked 1 socket")
    assert "socket_leaks" in {each.get("name") for each in leaky.iter("property")}
    assert not fine.findall("failure")


@pytest.mark.parametrize("leaks", ["always", "once"])
def test_a_plugin_that_runs_tests_again_sees_the_failure(suite, leaks):
    condition = "True" if leaks == "always" else "not KEPT"
    result = suite.fail(
        f"def test_it():\n    if {condition}: keep(socket.socket())\n",
        AS_FAIL,
        *("-p", "pytest_rerunfailures", "--reruns=2"),
    )
    outcomes = result.parseoutcomes()
    wanted = {"rerun": 2, "failed": 1} if leaks == "always" else {"rerun": 1, "passed": 1}
    assert outcomes == wanted


def test_setup_and_body_keep_their_time_and_what_they_have_printed(suite):
    result = suite.fail(
        "def test_it():\n    print('from the body')\n"
        "    time.sleep(0.2)\n    keep(socket.socket())\n",
        AS_FAIL,
        "--durations=3",
    )
    result.stdout.fnmatch_lines(["*Captured stdout call*", "from the body"])
    result.stdout.re_match_lines([r"0\.[2-9]\d?s call +test_it.py::test_it"])


def test_what_stops_the_run_in_a_teardown_does_not_swallow_the_report_of_the_body(suite):
    source = """
@pytest.fixture
def stops():
    yield
    pytest.exit("enough")

def test_it(stops): pass
"""
    result = suite.fail(source, AS_FAIL)
    assert result.parseoutcomes() == {"passed": 1}


@pytest.mark.parametrize("value", ["error", "fail"])
def test_pytest_is_left_as_it_was_found(suite, value):
    before = runner.call_and_report
    suite.fail(LEAKY, f"--socket-leaks-as={value}")
    assert runner.call_and_report is before


DROPPED = """
class Cycle:
    def __init__(self):
        self.me, self.sock = self, socket.create_server(("127.0.0.1", 0))

def test_drops(): socket.create_server(("127.0.0.1", 0))
def test_cycle(): Cycle()
def test_last(): pass
"""


@pytest.mark.skipif(
    pytest.version_tuple < (8, 4), reason="pytest raises what finalizers warn of within each phase"
)
@pytest.mark.parametrize(
    ("options", "outcomes"),
    [
        (["--socket-leaks=warn"], {"passed": 2, "failed": 1, "errors": 1}),
        ([], {"passed": 2, "failed": 1, "errors": 1}),
        (AS_FAIL.split(), {"passed": 1, "failed": 2}),
    ],
    ids=["warn", "error", "fail"],
)
def test_where_warnings_are_errors_a_leak_counts_once_and_shows_no_call_of_ours(
    suite, options, outcomes
):
    result = suite.fail(DROPPED, *options, "-W", "error", "-v", apart=True)
    result.assert_outcomes(**outcomes)
    text = result.stdout.str()
    assert "closewait_guard/pytest_plugin/_" not in text, text
    assert text.count("Captured unraisable exceptions") <= 1
    if options != ["--socket-leaks=warn"]:
        result.stdout.fnmatch_lines(["*test_drops (failed by its ResourceWarning)"])


FAILING = """
@pytest.fixture(scope="module")
def ended():
    yield
    raise ExceptionGroup("no", [ValueError("end")])

@pytest.fixture(scope="module")
def begun(): raise ValueError("begin")

def test_first(): socket.socket().close()
def test_begun(begun): pass
def test_ended(ended): pass
"""


def test_a_fixture_that_raises_shows_no_call_of_ours(suite):
    result = suite.fail(FAILING)
    result.assert_outcomes(passed=2, errors=2)
    assert "closewait_guard/pytest_plugin/_" not in result.stdout.str()
