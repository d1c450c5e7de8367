"""A test that takes all descriptors is reported like any other that leaks."""

from __future__ import annotations

import json
import os

import pytest

from closewait_guard._descriptors import SpareDescriptors

pytest.importorskip("resource")

TAKE_ALL = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

def take_all():
    with pytest.raises(OSError):
        while True:
            keep(socket.socket())
"""
IN_TESTS = """
def test_first(): take_all()
def test_second():
    KEPT.clear()
    gc.collect()
def test_third(): take_all()
"""
IN_A_FIXTURE = """
@pytest.fixture(scope="module")
def wide(): take_all()
def test_first(wide): pass
"""


@pytest.mark.parametrize(
    ("source", "owners"),
    [
        (IN_TESTS, ["test_it.py::test_first", "test_it.py::test_third"]),
        (IN_A_FIXTURE, ["module fixture 'wide' of test_it.py"]),
    ],
)
def test_what_takes_all_descriptors_is_reported_everywhere(suite, source, owners):
    options = ("--socket-leaks-json=leaks.jsonl", "-p", "no:faulthandler")
    result = suite.fail(TAKE_ALL + source, *options, apart=True)
    assert result.parseoutcomes()["errors"] == len(owners)
    result.stdout.fnmatch_lines(
        [
            line
            for owner in owners
            for line in (f"*teardown of {owner.split('::')[-1]} _*", "*leaked * sockets *")
        ]
    )
    result.stdout.fnmatch_lines(["*keep(socket.socket())", "*= socket leaks =*"])
    lines = (suite.pytester.path / "leaks.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["owner"] for line in lines] == owners


def test_a_thread_that_takes_all_descriptors_later_is_reported_at_the_end(suite):
    source = """
timer = threading.Timer(0.1, take_all)
def test_first():
    timer.start()
def test_second():
    timer.join(20)
"""
    result = suite.fail(TAKE_ALL + source, apart=True)
    result.stdout.fnmatch_lines(["*ERROR at teardown of *test_first _*", "leaked * sockets *"])


def test_a_test_that_closes_its_sockets_finds_as_many_descriptors_free_as_before(suite):
    result = suite.fail(
        TAKE_ALL
        + """
def count():
    socks = []
    with pytest.raises(OSError):
        while True:
            socks.append(socket.socket())
    for sock in socks:
        sock.close()
    return len(socks)

COUNTS = []
@pytest.mark.parametrize("run", range(3))
def test_it(run):
    COUNTS.append(count())
    assert COUNTS == [COUNTS[0]] * len(COUNTS)
""",
        apart=True,
    )
    result.assert_outcomes(passed=3)


def test_two_descriptors_are_spared_and_both_are_released():
    before = set(os.listdir("/dev/fd"))
    spare_descriptors = SpareDescriptors()
    spare_descriptors.acquire()
    assert len(set(os.listdir("/dev/fd")) - before) == 2
    spare_descriptors.release()
    spare_descriptors.release()
    assert set(os.listdir("/dev/fd")) == before


def test_spare_descriptors_that_the_program_has_closed_close_nothing_of_its_own(tmp_path):
    spare_descriptors = SpareDescriptors()
    spare_descriptors.acquire()
    ends = [end.fileno() for end in spare_descriptors._ends]
    for end in ends:
        other = os.open(tmp_path, os.O_RDONLY)
        os.dup2(other, end)
        os.close(other)
    spare_descriptors.release()
    for fd in ends:
        os.close(fd)


@pytest.mark.parametrize(
    "use",
    [
        "thread = threading.Thread(target=int); thread.start(); thread.join()",
        "keep(socket.socket(fileno=fds.pop()))",
    ],
)
def test_the_first_thread_and_socket_of_a_run_need_no_descriptor_of_the_program(suite, use):
    source = f"""
import os
import resource

def test_it():
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    socketpair = __import__("_socket").socketpair()
    fds = [each.detach() for each in socketpair]
    with pytest.raises(OSError):
        while True:
            fds.insert(0, os.dup(0))
    {use}
    for fd in fds:
        os.close(fd)
"""
    result = suite.fail(source, "-p", "no:faulthandler", apart=True)
    result.assert_outcomes(passed=1, errors=int("keep" in use))
