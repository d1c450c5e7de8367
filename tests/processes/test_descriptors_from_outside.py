"""From outside, every descriptor of a process is counted by the same kinds as from inside."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

import closewait_guard as cwg
from closewait_guard._format import Layout
from closewait_guard._processes import ProcessScanner, render_processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")

PROGRAM = """
import os, resource, select, socket, sys
log = open(sys.argv[1], "w")
kept = [log, os.open("/", os.O_RDONLY), os.open(sys.argv[1], os.O_RDONLY)]
kept += [os.dup(log.fileno()) for _ in range(36)]
kept += [select.epoll() for _ in range(7)]
kept += [os.pipe() for _ in range(5)]
kept += [socket.socket() for _ in range(3)]
kept += [os.memfd_create("cache"), os.eventfd(0), os.open("/dev/zero", os.O_RDONLY)]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def program(log, limit=1000):
    command = [sys.executable, "-c", PROGRAM, str(log), str(limit)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


def scan(pid, *, everything=False, **settings):
    scanner = ProcessScanner(cwg.Settings(**settings))
    found = scanner.scan([pid], everything=everything)
    [process] = found.processes
    return found, process.report


def test_each_kind_is_counted_and_the_sum_is_that_of_the_kernel(tmp_path):
    with program(tmp_path / "app.log") as pid:
        _, report = scan(pid)
        expected = len(os.listdir(f"/proc/{pid}/fd"))
    found = report.descriptors
    assert found.total == report.fd_used == sum(found.by_kind.values()) == expected
    assert found.by_kind == {
        "file": 38,
        "pipe": 12,
        "epoll": 7,
        "socket": 3,
        "device": 2,
        "directory": 1,
        "memfd": 1,
        "eventfd": 1,
    }


def test_names_are_given_on_request_and_redacted(tmp_path):
    log = tmp_path / "app.log"
    with program(log) as pid:
        assert scan(pid)[1].descriptors.names == {}
        found, report = scan(pid, everything=True)
        redacted = scan(pid, everything=True, redact=lambda text: text.replace("app", "***"))[1]
    assert report.descriptors.names["file"] == {str(log): 38}
    assert redacted.descriptors.names["file"] == {str(tmp_path / "***.log"): 38}
    layout = Layout(width=1000, everything=True)
    text = render_processes(found, only=found.processes, layout=layout)
    assert f" of 1,000 (6%): 38 files ({log}), 12 pipes, 7 epoll, 3 sockets, " in text


def test_at_the_limit_they_are_named_without_being_asked_for(tmp_path):
    log = tmp_path / "app.log"
    with program(log, limit=70) as pid:
        found, report = scan(pid)
    assert [alert.kind for alert in report.alerts] == ["fd_limit"]
    text = render_processes(found, only=found.processes, layout=Layout(width=1000))
    assert f"File descriptors: 65 of 70 (93%): 38 files ({log}), 12 pipes" in text
