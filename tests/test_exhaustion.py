"""When no descriptor is left, a report is made at once, and the program sees its own error only."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("resource")

EXHAUSTED = """
import errno, json, os, resource, socket, sys, time, traceback
import closewait_guard as cwg

reports = []
how, path = sys.argv[1:3]
reporters = [reports.append, f"json_lines:{path}", "logging", "structlog", "text"]
cwg.install(grace=0, reporters=reporters)
server = socket.create_server(("127.0.0.1", 0))
kept = [socket.create_connection(server.getsockname()) for _ in range(5)]
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
files = []
try:
    while True:
        files.append(os.dup(0))
except OSError:
    pass
errors = []
for _ in range(50):
    try:
        server.accept() if how == "accept" else socket.socket()
    except OSError as error:
        errors.append(error)
assert [error.errno for error in errors] == [errno.EMFILE] * 50
assert "closewait_guard" not in str(errors[0])
end = time.monotonic() + 30
while not reports and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.5)
for fd in files:
    os.close(fd)
[report] = reports
[alert] = [each for each in report.alerts if each.kind == "fd_exhausted"]
assert alert.severity == "critical" and alert.status == "raised"
assert report.fd_used >= 199 and report.fd_limit == 200, report
found = report.descriptors
assert found.total == report.fd_used == sum(found.by_kind.values()), found
assert found.by_kind["socket"] >= 6 and sum(found.names["device"].values()) > 100, found
cwg.report()
cwg.uninstall()
with open(path) as lines:
    kinds = [[alert["kind"] for alert in json.loads(line)["alerts"]] for line in lines]
assert kinds[0][0] == "fd_exhausted", kinds
# Only the program itself holds its sockets.
for sock in [*kept, server]:
    sock.close()
print("as it should be", len(kinds), reports[-1].alerts)
"""


@pytest.mark.parametrize("how", ["create", "accept"])
def test_a_report_is_made_at_once_without_a_descriptor_and_once_a_minute(how, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EXHAUSTED, how, str(tmp_path / "leaks.jsonl")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "as it should be 2" in done.stdout, done.stderr[-3000:]
    assert "socket_alert" in done.stdout
    assert "FD EXHAUSTED" in done.stderr
    kinds = re.search(r"File descriptors: 200 of 200 \(100%\): \d+ .*?\.\n", done.stderr, re.DOTALL)
    assert kinds is not None, done.stderr
    assert re.search(r"devices \(.*/dev/null.*\), \d+ sockets", kinds[0], re.DOTALL), kinds[0]
    assert re.search(r"descriptors='\d+ devices \(.*/dev/null", done.stdout), done.stdout
    assert "a reporter failed" not in done.stderr
