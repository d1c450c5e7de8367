"""With not one descriptor left, leaks are reported all the same: what that needs is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from command_line import environment

pytest.importorskip("resource")

# Makes three connections that their peer closes; `take_all` then leaves no descriptor.
LEAKY = """
import resource, socket, sys
import closewait_guard as cwg

def leak():
    return [socket.create_connection(server.getsockname()) for _ in range(3)]

def take_all():
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
    taken = []
    try:
        while True:
            taken.append(socket.socket())
    except OSError:
        return taken

server = socket.create_server(("127.0.0.1", 0))
"""
WAYS = {
    "text": "guard.report()",
    "console": "guard.report()",
    "structlog": "guard.report()",
    "logging": "guard.report()",
    "json_lines:leaks.jsonl": "guard.report()",
    "warn": "guard.report()",
    "changes:at_least:info:every:1:text": "guard.report()",
    "scan": "guard.scan(full=True)",
    "fingerprint": "[leak.fingerprint for leak in guard.scan().findings]",
    "text of it": "cwg.render_text(guard.scan())",
    "printed": "print(guard.scan())",
    "dict of it": "cwg.from_dict(cwg.to_dict(guard.scan()))",
    "context": "guard.scan()",
    "not installed": "guard.scan()",
    "no_leaks": "in_a_block()",
}


def python(*arguments, cwd=None, stdin=None):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        input=stdin,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_imported_once_the_guard_is_made(way, tmp_path):
    source = f"""
def in_a_block():
    try:
        with guard.no_leaks(0):
            socket.socket(), leak()
    except cwg.SocketLeakError:
        pass

leak()  # What the program itself imports with its first connection.
way = sys.argv[1]
names = [way] if {WAYS[way]!r} == "guard.report()" else []
context = "structlog" if way == "context" else None
guard = cwg.Guard(cwg.Settings(grace=0, context=context), names)
if way != "not installed":
    guard.install()
present = set(sys.modules)
kept = leak()
for _ in range(6):
    server.accept()[0].close()
{WAYS[way]}
late = set(sys.modules) - present
assert not late, late
assert not guard.failed_reports
"""
    python("-c", LEAKY + source, way, cwd=tmp_path)


@pytest.mark.parametrize("settings", ["", "grace=0"])
@pytest.mark.parametrize("way", ["cwg.scan()", "in_a_block()"])
def test_what_the_first_scan_loads_can_be_loaded_without_a_descriptor(way, settings):
    source = f"""
def in_a_block():
    with cwg.no_leaks(0):
        pass
    return cwg.scan()

cwg.install({settings})
kept = leak()
for _ in kept:
    server.accept()[0].close()
assert "closewait_guard._pipeline" not in sys.modules
taken = take_all()
report = {way}
text, data = str(report), cwg.to_dict(report)
for sock in taken:
    sock.close()
assert len(report.findings) >= 3 and text.startswith("closewait-guard") and data
"""
    python("-c", LEAKY + source)


@pytest.mark.parametrize(
    "before", ["cwg.install()", "cwg.install(reporters=['text'])", "cwg.scan()"]
)
def test_a_report_counts_the_sockets_of_c_extensions_and_says_nothing_of_none(before):
    source = f"""
import _socket, os

def fill():
    try:
        while True:
            files.append(open(os.devnull))
    except OSError:
        return

server.close()
{before}
files = []
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
fill()
text = str(cwg.scan(full=True))
fill()
print(text, cwg.scan(full=True), sep="\\n")
files.pop().close()
number = _socket.socket().detach()
resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
report = cwg.scan(full=True)
assert report.coverage.native == 1, report
os.close(number)
"""
    text = python("-c", LEAKY + source).stdout
    # How it is folded depends on how many the interpreter itself has open.
    assert " ".join(text.split()).count("No leaks. File descriptors: 6") == 2
    assert "C extensions" not in text
    assert before == "cwg.scan()" or "Not covered" not in text


def test_a_leak_without_a_socket_object_is_found_without_a_descriptor():
    source = """
import _socket, time

def detached(kind):
    sock = kind(socket.AF_INET, socket.SOCK_STREAM)
    sock.connect(server.getsockname())
    server.accept()[0].close()
    return sock.detach()

guard = cwg.install(grace=0)
native, left = detached(_socket.socket), detached(socket.socket)
time.sleep(0.05)
mark = guard.mark()
opened = detached(_socket.socket)
assert os.get_blocking(native)
taken = take_all()
try:
    os.dup(0)
except OSError:
    reports = cwg.scan(full=True), guard.check(mark)
found, checked = (
    {leak.observation.fd for leak in report.leaks if leak.verdict is cwg.Verdict.LEAKED}
    for report in reports
)
assert (found, checked) == ({native, left, opened}, {opened}), (found, checked)
assert os.get_blocking(native)
socket.setdefaulttimeout(1)
cwg.scan()
assert os.get_blocking(native)
"""
    python("-c", "import os\n" + LEAKY + source)


REPORTED_EVERYWHERE = """
import io, logging, time, warnings
from closewait_guard import reporters

class Terminal(io.StringIO):
    def isatty(self):
        return True

plain, colour, logged, reported, warned = io.StringIO(), Terminal(), io.StringIO(), [], []
filtered = io.StringIO()
logging.basicConfig(stream=logged, level=logging.INFO)
warnings.showwarning = lambda *warning: warned.append(str(warning[0]))
warnings.simplefilter("always")

def gauges(report):
    sites = [group for group in report.by_site() if group.fingerprint]
    reported.append({(group.verdict, len(group.findings)) for group in sites})

guard = cwg.install(grace=0, reporters=[
    reporters.text(plain), reporters.console(colour), "structlog", "logging",
    "json_lines:leaks.jsonl", "warn",
    reporters.every(0.001, reporters.changes(reporters.at_least("info", reporters.text(filtered)))),
    gauges,
])
kept = leak()
for _ in kept:
    server.accept()[0].close()
taken = take_all()
# The first refusal has it reported by itself.
end = time.monotonic() + 20
while not reported and time.monotonic() < end:
    time.sleep(0.01)
guard.report()
report = guard.scan()
found = len(report.leaks), cwg.render_text(report), cwg.to_dict(report)
for sock in taken:
    sock.close()
assert guard.failed_reports == 0, guard.failed_reports
for stream in (plain, colour, filtered):
    assert "3 LEAKED" in stream.getvalue(), stream.getvalue()
assert "3 sockets leaked" in logged.getvalue(), logged.getvalue()
assert any(warning.startswith("leaked socket") for warning in warned), warned
assert len(reported) == 2 and all(("leaked", 3) in each for each in reported), reported
assert "3 LEAKED" in found[1] and len(found[2]["findings"]) == found[0] == 3 + len(taken)
"""


def test_every_reporter_reports_all_leaks_without_a_descriptor(tmp_path):
    done = python("-c", LEAKY + REPORTED_EVERYWHERE, cwd=tmp_path)
    events = [line for line in done.stdout.splitlines() if "socket_leak" in line]
    assert any("count=3" in event and "leaked" in event for event in events), done.stdout
    reports = [json.loads(line) for line in (tmp_path / "leaks.jsonl").read_text().splitlines()]
    assert len(reports) == 2
    verdicts = [leak["verdict"] for leak in reports[-1]["findings"]]
    assert verdicts.count("leaked") == 3
    assert "closewait-guard: " not in done.stderr


def test_a_source_line_that_could_not_be_read_is_read_for_the_next_socket_of_the_line(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        LEAKY
        + """
def make():
    return socket.socket()

def source_of(sock):
    leaks = [leak for leak in guard.scan().findings if leak.observation.fd == sock.fileno()]
    return leaks[0].observation.record.site.source

guard = cwg.Guard(cwg.Settings(grace=0)).install()
taken, seen = take_all(), []
for _ in range(2):
    taken.pop().close()
    sock = make()
    seen.append(source_of(sock))
    sock.close()
    while len(taken) > 1:
        taken.pop().close()
assert seen == [None, "return socket.socket()"], seen
"""
    )
    python(program)


def test_a_reporter_that_fails_is_reported_of_where_structlog_cannot_be_imported():
    source = """
def failing(report):
    raise ValueError("no place")

# Not installed, or the first refusal would be reported by another thread, at some time.
guard = cwg.Guard(cwg.Settings(grace=0), [failing])
taken = take_all()
guard.report()
for sock in taken:
    sock.close()
assert "structlog" not in sys.modules
"""
    done = python("-c", LEAKY + source)
    assert "closewait-guard: a reporter failed: reporter='failing'" in done.stderr
    assert "error='ValueError: no place'" in done.stderr


@pytest.mark.parametrize("name", ["leaks.jsonl", "-"])
def test_show_needs_one_descriptor_at_a_time(name, tmp_path):
    source = """
guard = cwg.Guard(cwg.Settings(grace=0), ["json_lines:leaks.jsonl"]).install()
kept = leak()
for _ in kept:
    server.accept()[0].close()
guard.report()
"""
    python("-c", LEAKY + source, cwd=tmp_path)
    saved = (tmp_path / "leaks.jsonl").read_text()
    main = """
import ctypes, os, resource, sys
# libffi may keep a descriptor open from the first import of ctypes on.
one_more = max(map(int, os.listdir("/proc/self/fd"))) + 1
resource.setrlimit(resource.RLIMIT_NOFILE, (one_more, one_more))
from closewait_guard.commands import main
sys.exit(main(sys.argv[1:]))
"""
    done = python("-c", main, "show", name, cwd=tmp_path, stdin=saved)
    assert "3 LEAKED" in done.stdout


@pytest.mark.parametrize("mode", ["fail", "warn"])
def test_pytest_reports_what_takes_all_descriptors(suite, mode):
    source = """
import resource

def test_it():
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
    with pytest.raises(OSError):
        while True:
            keep(socket.socket())
"""
    options = (f"--socket-leaks={mode}", "--socket-leaks-json=leaks.jsonl", "-p", "no:faulthandler")
    result = suite.run(source, *options, apart=True)
    result.stdout.fnmatch_lines(["*= socket leaks =*"])
    [line] = (suite.pytester.path / "leaks.jsonl").read_text(encoding="utf-8").splitlines()
    finding = json.loads(line)
    assert finding["owner"] == "test_it.py::test_it"
    assert len(finding["report"]["findings"]) > 50
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()


def test_a_program_that_ends_for_want_of_a_descriptor_ends_as_it_does_without_us():
    program = """
import resource, socket
import closewait_guard as cwg
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
cwg.install(reporters=["logging"])
kept = []
while True:
    kept.append(socket.socket())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert done.returncode == 1, done.stderr[-500:]
    assert "Too many open files" in done.stderr
