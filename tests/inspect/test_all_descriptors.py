"""Every descriptor is counted by what it is, and what is open most often is named."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

import closewait_guard as cwg
from closewait_guard._inspect import descriptors
from closewait_guard._inspect.descriptors import DescriptorCounter, count_descriptors

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


def by_kind():
    found = count_descriptors(named=False)
    assert found is not None
    assert found.total == sum(found.by_kind.values())
    return found.by_kind


def epoll():
    with select.epoll() as poller:
        return os.dup(poller.fileno())


def inotify():
    return ctypes.CDLL(None).inotify_init1(0)


def timerfd():
    return ctypes.CDLL(None).timerfd_create(1, 0)


def signalfd():
    return ctypes.CDLL(None).signalfd(-1, ctypes.create_string_buffer(128), 0)


OPENERS = {
    "socket": lambda: socket.socket().detach(),
    "file": lambda: os.open(__file__, os.O_RDONLY),
    "directory": lambda: os.open(".", os.O_RDONLY),
    "device": lambda: os.open(os.devnull, os.O_RDONLY),
    "epoll": epoll,
    "eventfd": lambda: os.eventfd(0),
    "pidfd": lambda: os.pidfd_open(os.getpid()),
    "memfd": lambda: os.memfd_create("cache"),
    "inotify": inotify,
    "timerfd": timerfd,
    "signalfd": signalfd,
}


@linux_only
@pytest.mark.parametrize("kind", OPENERS)
def test_each_kind_is_counted_as_what_it_is(kind):
    before = by_kind()
    fds = [OPENERS[kind]() for _ in range(3)]
    try:
        during = by_kind()
    finally:
        for fd in fds:
            os.close(fd)
    assert {**before, kind: before.get(kind, 0) + 3} == during
    assert by_kind() == before


def test_both_ends_of_a_pipe_count():
    before = by_kind().get("pipe", 0)
    fds = os.pipe()
    assert by_kind()["pipe"] == before + 2
    for fd in fds:
        os.close(fd)


@linux_only
def test_a_deleted_file_is_a_file():
    before = by_kind()
    with tempfile.TemporaryFile():
        assert by_kind()["file"] == before.get("file", 0) + 1


@linux_only
def test_the_sum_is_that_of_the_kernel():
    with ExitStack() as stack:
        for number in range(50):
            stack.enter_context(socket.socket() if number % 2 else Path(__file__).open())
        report = cwg.scan(full=True)
        # Without the listing's own.
        assert report.descriptors.total == len(os.listdir("/proc/self/fd")) - 1 == report.fd_used


@linux_only
def test_a_full_scan_names_what_is_open_most_often(tmp_path):
    log = tmp_path / "app.log"
    with ExitStack() as stack:
        for _ in range(38):
            stack.enter_context(log.open("a"))
        uploads = tmp_path / "uploads"
        uploads.mkdir()
        for number in range(44):
            stack.enter_context((uploads / str(number)).open("w"))
        names = cwg.scan(full=True).descriptors.names["file"]
        assert names[str(log)] == 38
        assert names[f"{uploads}/*"] == 44
        assert cwg.scan().descriptors.names == {}


def test_names_are_redacted(tmp_path):
    guard = cwg.Guard(cwg.Settings(redact=lambda text: text.replace("patient", "***")))
    with (tmp_path / "patient-17").open("w") as file:
        with ExitStack() as stack:
            for _ in range(30):
                stack.callback(os.close, os.dup(file.fileno()))
            report = guard.scan(full=True)
    assert f"{tmp_path}/***-17" in report.descriptors.names["file"]


def test_descriptors_that_cannot_be_listed_are_not_covered(monkeypatch):
    def refuse():
        raise OSError(errno.EACCES, "no")

    monkeypatch.setattr(descriptors, "numbers_to_try", refuse)
    report = cwg.Guard().scan()
    assert report.descriptors is None
    assert f"what the {report.fd_used:,} descriptors are" in str(report.coverage.notes)


def test_a_count_of_very_many_is_good_for_a_while_and_says_its_age(monkeypatch):
    monkeypatch.setattr(descriptors, "_FEW", 0)
    monkeypatch.setattr(descriptors, "_MAX_SHARE", 1e-9)
    counter, report = DescriptorCounter(cwg.Guard()._registry), cwg.Guard().scan()
    first = counter.add_to(report).descriptors
    with Path(__file__).open():
        second = counter.add_to(report)
        assert second.descriptors.counted_for > 0 == first.counted_for
        assert second.descriptors.by_kind == first.by_kind
        assert second.fd_used == first.total + 1
        # When descriptors run out, the names are not to wait.
        assert counter.add_to(report, named=True).descriptors.total == first.total + 1


@linux_only
def test_a_kind_that_keeps_growing_is_reported_with_what_is_open_most_often(tmp_path):
    reports, times = [], iter(range(0, 10_000, 60))
    settings = cwg.Settings(growth_window=10)
    guard = cwg.Guard(settings, [reports.append], clock=lambda: next(times))
    log = tmp_path / "app.log"
    with ExitStack() as stack:
        for _ in range(25):
            for _ in range(2):
                stack.enter_context(log.open("a"))
            guard.report()
    [(report, alert)] = [
        (report, alert)
        for report in reports
        for alert in report.alerts
        if alert.kind == "growth" and alert.status == "raised"
    ]
    assert alert.data["descriptor_kind"] == "file"
    assert report.descriptors.names["file"][str(log)] >= 10
    text = cwg.render_text(report)
    assert f"x {log}" in " ".join(text.split())


ABOVE_THE_LIMIT = """
import os, resource, sys
import closewait_guard as cwg

guard = cwg.Guard()
guard.scan()
high = [os.dup2(0, number, inheritable=False) for number in (300, 4000)]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 4096))
try:
    while True:
        os.dup(0)
except OSError:
    pass
report = guard.scan()
assert report.descriptors.total == report.fd_used == 102, report.descriptors
print("all found")
"""


@linux_only
def test_without_a_descriptor_left_those_above_the_limit_are_found_too():
    done = subprocess.run(
        [sys.executable, "-c", ABOVE_THE_LIMIT], capture_output=True, text=True, timeout=60
    )
    assert "all found" in done.stdout, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_counts_its_own():
    guard = cwg.Guard()
    guard.scan()
    child = os.fork()
    if not child:
        # What is forked may close pipes of its own.
        before = guard.scan().descriptors.by_kind
        os.pipe()
        seen = guard.scan().descriptors.by_kind
        os._exit(seen["pipe"] != before.get("pipe", 0) + 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
