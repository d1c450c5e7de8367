"""A number that was closed under a socket object is reported as such; its next owner is no leak."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

import closewait_guard as cwg
from closewait_guard._descriptors import inode_of
from closewait_guard.testing import connected_pair, half_closed_pair

GRACE = 0.05


def verdicts_in(report):
    return {leak.observation.record.serial: leak.verdict for leak in report.findings}


def serial_of(guard, sock):
    [seen] = [seen for seen in guard.scan(full=True).observations if seen.fd == sock.fileno()]
    return seen.record.serial


@pytest.fixture
def pair():
    with connected_pair() as (ours, theirs):
        inode = os.fstat(ours.fileno()).st_ino
        yield ours, theirs
        if ours.fileno() >= 0 and inode_of(ours.fileno()) != inode:
            ours.detach()


def test_a_number_that_is_free_is_reported(guard, pair):
    victim, theirs = pair
    serial, fd = serial_of(guard, victim), victim.fileno()
    theirs.close()
    os.close(fd)
    report = guard.scan()
    [leak] = report.findings
    assert verdicts_in(report) == {serial: cwg.Verdict.CLOSED_ELSEWHERE}
    assert not leak.is_leak
    assert leak.severity is cwg.Severity.WARNING
    assert leak.holders == (f"nothing: descriptor {fd} is closed",)
    assert "os.close()" in leak.hint
    assert "CLOSED ELSEWHERE" in cwg.render_text(report)
    assert verdicts_in(guard.scan()) == {serial: cwg.Verdict.CLOSED_ELSEWHERE}
    victim.detach()
    assert guard.scan().findings == ()


def test_another_socket_object_on_the_number_is_judged_by_its_own_creation(guard, pair):
    victim, theirs = pair
    serial, fd = serial_of(guard, victim), victim.fileno()
    theirs.close()
    os.close(fd)
    with half_closed_pair() as (ours, _):
        # The pair takes the lowest free numbers, of which this is one.
        guard.scan()
        time.sleep(GRACE * 2.5)
        verdicts = verdicts_in(guard.scan())
        assert verdicts.pop(serial) is cwg.Verdict.CLOSED_ELSEWHERE
        assert list(verdicts.values()) == [cwg.Verdict.LEAKED]
        assert serial not in verdicts


@pytest.mark.parametrize("full", [False, True])
def test_a_file_that_has_the_number_is_no_leak(guard, pair, tmp_path, full):
    victim, theirs = pair
    serial, fd = serial_of(guard, victim), victim.fileno()
    theirs.close()
    with (tmp_path / "file").open("w") as file:
        os.dup2(file.fileno(), fd)
        report = guard.scan(full=full)
        assert report.leaks == ()
        if full:
            assert verdicts_in(report) == {serial: cwg.Verdict.CLOSED_ELSEWHERE}
            assert report.findings[0].holders[0].endswith("/file")
        os.close(victim.detach())


def test_a_native_socket_that_has_the_number_and_leaks_is_not_the_objects(guard, pair):
    victim, _ = pair
    serial, fd = serial_of(guard, victim), victim.fileno()
    other, end = socket.socketpair()
    number = other.detach()
    os.dup2(number, fd)
    os.close(number)
    end.close()
    time.sleep(GRACE * 2.5)
    report = guard.scan()
    assert verdicts_in(report)[serial] is cwg.Verdict.CLOSED_ELSEWHERE
    assert all(leak.observation.record.serial != serial for leak in report.leaks)
    victim.close()


def test_closing_detaching_and_wrapping_are_no_thefts(guard, pair):
    victim, _ = pair
    for sock in (socket.socket(), socket.socket()):
        guard.scan()
        fd = sock.detach()
        guard.scan()
        again = socket.socket(fileno=fd)
        guard.scan(full=True)
        again.close()
        guard.scan()
    copy = socket.socket(fileno=victim.fileno())
    guard.scan(full=True)
    copy.detach()
    file = victim.makefile()
    victim.close()
    guard.scan(full=True)
    file.close()
    assert not [
        leak for leak in guard.scan(full=True).findings if leak.verdict == "closed_elsewhere"
    ]


def test_sockets_that_come_and_go_in_another_thread_are_no_thefts(guard):
    stop = threading.Event()

    def work():
        while not stop.is_set():
            for sock in [*socket.socketpair(), *socket.socketpair()]:
                sock.close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        verdicts = {leak.verdict for leak in guard.scan().findings}
        assert cwg.Verdict.CLOSED_ELSEWHERE not in verdicts
    stop.set()
    for thread in threads:
        thread.join()
