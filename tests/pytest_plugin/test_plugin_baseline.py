"""A file of known leaks: they are allowed, new ones fail, and those that are gone are listed."""

from __future__ import annotations

import json

import pytest

from closewait_guard.pytest_plugin._baseline import plain_id
from closewait_guard.pytest_plugin._findings import relative_path

UPDATE = "--socket-leaks-update-baseline"
CLIENT = """
import socket
KEPT = []

def connect():
    KEPT.append(socket.socket())

def connect_twice():
    KEPT.extend(socket.socket() for _ in range(2))
"""
TESTS = """
import client

def test_one(): client.connect()
@pytest.mark.parametrize("number", [1, 2])
def test_two(number): client.connect_twice()
def test_own(): keep(socket.socket())
def test_fine(): pass
"""


class Project:
    """A suite with known leaks, and the file that lists them."""

    def __init__(self, suite):
        self.suite = suite
        self.path = suite.pytester.path / "leaks.json"
        suite.pytester.makepyfile(client=CLIENT)

    def run(self, source, *options, apart=False):
        baseline = "--socket-leaks-baseline=leaks.json"
        return self.suite.fail(source, baseline, *options, apart=apart)

    def leaks(self):
        return json.loads(self.path.read_text(encoding="utf-8"))["leaks"]

    def places(self):
        return [(each["file"], each["in"], each.get("count")) for each in self.leaks()]


@pytest.fixture
def project(suite):
    return Project(suite)


KNOWN = [
    ("client.py", "connect()", 1),
    ("client.py", "connect_twice()", 2),
    ("test_it.py", "test_own()", 1),
]
FILE = {
    "schema": "closewait-guard-baseline/1",
    "leaks": [
        {
            "file": file,
            "in": name,
            "what": "socket",
            "count": count,
            "tests": [f"test_it.py::test_{test}"],
        }
        for (file, name, count), test in zip(KNOWN, ("one", "two", "own"), strict=True)
    ],
}


@pytest.fixture
def known(project):
    """With the file that an update writes for `TESTS`."""
    project.suite.write(TESTS)
    project.path.write_text(json.dumps(FILE), encoding="utf-8")
    return project


def test_an_update_writes_the_leaks_sorted_with_relative_paths_and_no_lines(project):
    result = project.run(TESTS, UPDATE)
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines(["leaks.json written: 3 known leaks, 3 added"])
    text = project.path.read_text(encoding="utf-8")
    assert json.loads(text) == FILE
    assert text.endswith("}\n")
    assert [path.name for path in project.path.parent.glob(".leaks*")] == []


def test_known_leaks_are_allowed_and_a_new_one_fails_its_test_only(known):
    # Other lines, another test that calls the same function, and one that calls another.
    source = (
        "\n\n" + TESTS + "def test_more(): client.connect()\ndef test_new(): keep(listener())\n"
    )
    result = known.run(source, "--socket-leaks-json=found.jsonl")
    result.assert_outcomes(passed=7, errors=2)
    assert "3 known leaks allowed by leaks.json, 2 new" in result.outlines
    assert "  leaks.json allows this of 1 other test: of connect()" in result.outlines
    assert not any("test_one" in line for line in result.outlines)
    lines = (known.path.parent / "found.jsonl").read_text(encoding="utf-8").splitlines()
    outcomes = [json.loads(line)["outcome"] for line in lines]
    assert sorted(outcomes) == ["failed"] * 2 + ["known"] * 4


def test_a_test_that_leaks_more_than_is_known_there_fails(known):
    more = CLIENT.replace("range(2)", "range(3)")
    known.suite.pytester.makepyfile(client=more)
    result = known.run(None)
    result.assert_outcomes(passed=5, errors=2)
    result.stdout.fnmatch_lines(["*leaks.json allows 2 of these in connect_twice()*"])


def test_renamed_tests_and_files_are_the_same_leaks(known):
    source = TESTS.replace("test_own", "test_mine").replace("test_one", "test_first")
    known.suite.pytester.makepyfile(net=CLIENT)
    (known.path.parent / "client.py").unlink()
    result = known.run(source.replace("client", "net"))
    result.assert_outcomes(passed=5)
    assert (
        f"3 known leaks allowed by leaks.json (3 renamed): update with {UPDATE}" in result.outlines
    )
    known.run(None, UPDATE).assert_outcomes(passed=5)
    assert known.places() == [
        ("net.py", "connect()", 1),
        ("net.py", "connect_twice()", 2),
        ("test_it.py", "test_mine()", 1),
    ]


def test_what_is_no_longer_there_is_listed_and_removed_by_an_update(known):
    source = TESTS.replace("client.connect()", "pass").replace("test_own", "test_gone")
    result = known.run(source.replace("keep(socket.socket())", "pass"))
    result.assert_outcomes(passed=5)
    begun = result.outlines.index(
        f"1 known leak allowed by leaks.json, 2 no longer there: update with {UPDATE}"
    )
    assert result.outlines[begun + 1 : begun + 3] == [
        "    no longer there: client.py: socket of connect()",
        "    no longer there: test_it.py: socket of test_own()",
    ]
    assert "leaks.json written: 1 known leak, 2 removed" in known.run(None, UPDATE).outlines
    assert known.places() == KNOWN[1:2]
    assert "leaks.json is up to date: 1 known leak" in known.run(None, UPDATE).outlines


FIXED = """
def connect(): pass
def connect_twice(): pass
"""


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (["-k", "fine"], []),
        (["-k", "one or 2"], ["connect()"]),
        (["test_it.py::test_two[1]", "test_it.py::test_fine"], []),
        (["test_other.py"], []),
        (["-x", "test_other.py", "test_it.py"], []),
        (["-p", "cacheprovider", "--lf"], []),
    ],
    ids=lambda value: " ".join(value) or "none",
)
def test_what_was_not_run_is_neither_gone_nor_removed(known, options, gone):
    known.suite.pytester.makepyfile(client=FIXED, test_other="def test_fails(): assert 0")
    source = TESTS.replace("keep(socket.socket())", "pass")
    if "--lf" in options:
        known.run(source, "-p", "cacheprovider", "test_other.py")
    result = known.run(source, *options)
    shown = [line.split(" of ")[-1] for line in result.outlines if "    no longer there" in line]
    assert shown == gone
    known.run(None, UPDATE, *options)
    assert known.places() == [each for each in KNOWN if each[1] not in gone]


def test_a_run_that_was_stopped_writes_nothing(known):
    before = known.path.read_bytes()
    result = known.run("def test_it(): raise KeyboardInterrupt\n", UPDATE, apart=True)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["ERROR: leaks.json was not written: *"])
    assert known.path.read_bytes() == before


WIDER = """
@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.server.close()

@pytest.fixture(scope="module")
def left():
    keep(listener())
"""


@pytest.mark.parametrize("mode", ["fail", "warn"])
def test_of_a_wider_fixture_what_tests_open_in_it_is_one_leak_however_many_do(project, mode):
    test = (
        "def test_{0}(pool, left):\n"
        "    pool.free.append(socket.create_connection(pool.server.getsockname()))\n"
    )
    options = (f"--socket-leaks={mode}", "--socket-leaks-as=fail")
    project.run(WIDER + test.format("a"), *options, UPDATE)
    assert project.places() == [
        ("test_it.py", "fixture pool", None),
        ("test_it.py", "listener() for fixture left", 1),
    ]
    result = project.run(WIDER + test.format("a") + test.format("b"), *options)
    result.assert_outcomes(passed=2)
    assert "2 known leaks allowed by leaks.json" in result.outlines
    # Another run of the same updates nothing, whichever test is the last to use the fixture.
    updated = project.run(WIDER + test.format("b") + test.format("a"), *options, UPDATE)
    assert "leaks.json is up to date: 2 known leaks" in updated.outlines


def test_of_a_wider_fixture_only_the_run_of_a_test_that_uses_it_tells_that_it_is_gone(project):
    source = WIDER + "def test_user(left): pass\ndef test_last_of_the_module(): pass\n"
    options = ("--socket-leaks=fail", "--socket-leaks-as=fail")
    project.run(source, *options, UPDATE)
    before = project.places()
    result = project.run(None, *options, "-k", "last")
    assert "no longer there" not in result.stdout.str()
    project.run(None, *options, UPDATE, "-k", "last")
    assert project.places() == before != []
    result = project.run(source.replace("keep(listener())", "pass"), *options, "-k", "user")
    assert (
        "    no longer there: test_it.py: socket of listener() for fixture left" in result.outlines
    )


def test_workers_of_xdist_allow_what_the_controller_has_read_and_only_that_writes(known):
    workers = ("-p", "xdist", "-n2", "--socket-leaks-as=fail")
    source = TESTS.replace("client.connect()", "pass") + "def test_new(): keep(listener())\n"
    result = known.run(source, *workers)
    result.assert_outcomes(passed=5, failed=1)
    assert (
        f"2 known leaks allowed by leaks.json, 1 new, 1 no longer there: update with {UPDATE}"
        in result.outlines
    )
    result = known.run(None, *workers, UPDATE)
    result.assert_outcomes(passed=6)
    assert "leaks.json written: 3 known leaks, 1 added, 1 removed" in result.outlines
    assert known.places() == [*KNOWN[1:2], ("test_it.py", "listener()", 1), KNOWN[2]]


DATACLASS = """
from dataclasses import dataclass, field

@dataclass
class Client:
    sock: socket.socket = field(default_factory=socket.socket)

def test_it(): keep(Client().sock)
"""


def test_code_made_at_runtime_is_no_library_however_pytest_is_started(project, monkeypatch):
    for options in ((UPDATE,), ("-p", "xdist", "-n1")):
        result = project.run(DATACLASS, *options, "--socket-leaks-as=fail", apart=True)
        result.assert_outcomes(passed=1)
    # Nor is it a file of the folder that pytest is started in.
    root = project.path.parent
    monkeypatch.chdir(project.suite.pytester.mkdir("below"))
    assert relative_path("<string>", root) == "<string>"


def test_a_folder_with_brackets_is_no_parameter_of_its_tests():
    assert (
        plain_id("tests/[v1]/test_a.py::Test::test_a[2-x]") == "tests/[v1]/test_a.py::Test::test_a"
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "* does not exist: --socket-leaks-update-baseline writes it"),
        ("<<<<<<< HEAD", "*leaks.json: it is not JSON: Expecting value: line 1 column 1*"),
        ("[]", "*leaks.json: it is not a list of known leaks"),
        (
            '{"schema": "closewait-guard-baseline/9"}',
            "*its format closewait-guard-baseline/9 is unknown to this version of closewait-guard",
        ),
        (
            '{"schema": "closewait-guard-baseline/1", "leaks": [{"file": "a.py"}]}',
            "*leaks.json: entry 1 of its leaks needs names as in and what, and may have *",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_a_usage_error(project, content, sentence):
    if content is not None:
        project.path.write_text(content, encoding="utf-8")
    result = project.run(TESTS)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: socket_leaks_baseline: {sentence}"])
    if content is not None:
        assert project.run(None, UPDATE).ret == pytest.ExitCode.USAGE_ERROR
        assert project.path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([UPDATE], "--socket-leaks-update-baseline needs --socket-leaks-baseline=FILE"),
        (["--socket-leaks-baseline=x"], "socket_leaks_baseline needs socket_leaks=warn or fail"),
    ],
)
def test_a_baseline_that_nothing_is_compared_with_is_a_usage_error(suite, options, sentence):
    result = suite.run("def test_it(): pass\n", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {sentence}"])


def test_the_path_in_an_ini_file_is_relative_to_that_file(known, monkeypatch):
    known.suite.pytester.makeini("[pytest]\nsocket_leaks_baseline = leaks.json\n")
    monkeypatch.chdir(known.suite.pytester.mkdir("deep"))
    known.suite.fail(None, "../test_it.py").assert_outcomes(passed=5)


def test_what_could_not_be_looked_at_is_never_known(project):
    source = """
from closewait_guard._capture import registry

def test_it():
    socket.socket().close()
    [each] = list(registry._subscribed)
    each.on_error()
"""
    for options in ([UPDATE], []):
        result = project.run(source, *options, apart=True)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines(["test_it.py::test_it: leaks unknown: *"])
