"""`scan`: from outside, what lsof, netstat and ss show, and what is to be thought of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import closewait_guard as cwg
from command_line import ANSWERS_KEEPALIVES, COMMAND, LEAKY, WAIT, call, documents, program

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root may become another user")
needs_linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks the kernel")

HEALTHY = "import socket, sys\nserver = socket.create_server(('127.0.0.1', 0))" + WAIT
# Nobody has to wait until a leak is one.
AT_ONCE = {"CLOSEWAIT_GUARD_GRACE": "0"}


@pytest.fixture(scope="module")
def leaky():
    """A program that has been leaking for longer than the grace time."""
    with program() as running:
        time.sleep(1.2)
        yield running


def unfolded(text):
    return " ".join(text.split())


def shown_by_lsof(pid):
    found = subprocess.run(
        ["lsof", "-nP", "-a", "-p", str(pid), "-iTCP"], capture_output=True, text=True, check=True
    )
    return [line.split() for line in found.stdout.splitlines()[1:]]


@needs_linux
def test_it_reports_verdict_peer_age_unread_bytes_and_descriptors(leaky):
    text = call("scan", leaky.pid, code=1).stdout
    port = leaky.first_line
    assert f"  (pid {leaky.pid})\n" in text
    assert "5 leaked of 8 open sockets: CLOSE_WAIT 5, ESTABLISHED 2, LISTEN 1" in text
    assert f"3 LEAKED  TCP to 127.0.0.1:{port} " in text
    assert "CLOSE_WAIT for " in text
    assert "6 bytes unread" in text
    assert "2 LEAKED  TCP from 127.0.0.1 " in text
    assert re.search(r"\nFile descriptors: \d+ of [\d,]+\n", text)
    assert "without a restart: `closewait-guard attach PID`; find its line: " in unfolded(text)
    assert "restart it with `closewait-guard run --interval 60 -- COMMAND`" in unfolded(text)
    assert "close the connection when recv() returns b''" in unfolded(text)
    assert all(len(line) <= 80 for line in text.splitlines())


@needs_linux
def test_shares_of_the_limit_are_shown_from_a_percent_on():
    limited = ["sh", "-c", 'ulimit -n 100; exec "$@"', "sh"]
    with program(prefix=limited) as running:
        text = call("scan", running.pid, code=1, **AT_ONCE).stdout
    assert re.search(r"\nFile descriptors: \d+ of 100 \(\d+%\), CLOSE_WAIT: 5 \(5%\)\n", text)


@needs_linux
@pytest.mark.skipif(not shutil.which("lsof"), reason="lsof is not installed")
def test_it_counts_the_states_as_lsof_does(leaky):
    theirs = shown_by_lsof(leaky.pid)
    (report,) = documents(call("scan", leaky.pid, "--json", "--all", code=1).stdout)
    seen = [leak.observation for leak in report.findings] + list(report.observations)
    ours = {(each.fd, each.state) for each in seen if each.family == "AF_INET" and each.local}
    assert ours == {(int(line[3].rstrip("u")), line[-1].strip("()")) for line in theirs}


@needs_linux
def test_the_kernel_dates_the_end_from_before_the_look():
    with program() as running:
        time.sleep(2.0)
        (report,) = documents(call("scan", running.pid, "--json", code=1).stdout)
    ages = [leak.observation.peer_closed_for for leak in report.findings]
    assert len(ages) == 5
    assert all(1.9 < age < 10 for age in ages)
    assert {leak.observation.evidence for leak in report.findings} == {cwg.Evidence.TCP_INFO}


@needs_linux
def test_unread_bytes_are_counted_without_the_fin(leaky):
    (report,) = documents(call("scan", leaky.pid, "--json", code=1).stdout)
    unread = sorted(leak.observation.unread for leak in report.findings)
    assert unread == [0, 0, 2, 2, 2]


@needs_linux
def test_an_end_within_the_grace_time_is_no_leak():
    with program() as running:
        (report,) = documents(
            call("scan", running.pid, "--json", code=0, CLOSEWAIT_GUARD_GRACE="30").stdout
        )
        calm = call("scan", running.pid, code=0, CLOSEWAIT_GUARD_GRACE="30").stdout
        whole = call("scan", "--all", running.pid, code=0, CLOSEWAIT_GUARD_GRACE="30").stdout
        everyone = call("scan", code=None, CLOSEWAIT_GUARD_GRACE="30").stdout
    assert {leak.verdict for leak in report.findings} == {cwg.Verdict.CLOSING}
    assert "no leaks, 5 closing of 8 open sockets: " in calm
    assert "CLOSING" not in calm
    assert "3 CLOSING  TCP to " in whole
    assert f"pid {running.pid}" not in everyone


@needs_linux
def test_the_thresholds_are_those_of_the_settings(leaky):
    text = call(
        "scan",
        leaky.pid,
        code=1,
        CLOSEWAIT_GUARD_AGE_WARNING="0.5",
        CLOSEWAIT_GUARD_AGE_CRITICAL="1",
    ).stdout
    assert "3 LEAKED" in text
    assert re.search(r"CWG10\d  critical\n", text)
    assert "\nAGE  5 sockets" in text
    text = call("scan", leaky.pid, code=1, CLOSEWAIT_GUARD_COUNT_WARNING="4").stdout
    assert "\nCOUNT  5 sockets in CLOSE_WAIT, more than 4  (CWG801, warning)\n" in text


@needs_linux
def test_without_a_number_it_reports_who_leaks_and_counts_the_rest(leaky):
    with program(HEALTHY) as healthy:
        text = call("scan", code=1).stdout
    assert str(leaky.pid) in text
    assert str(healthy.pid) not in text
    assert "No leaks in " in text


@needs_linux
def test_a_healthy_process_is_reported_when_it_is_asked_for():
    with program(HEALTHY) as running:
        text = call("scan", running.pid, code=0).stdout
    assert "no leaks of 1 open socket: LISTEN 1" in text


@needs_linux
def test_of_a_process_without_sockets_no_states_are_counted():
    with program("import sys\nprint(1, flush=True)\nsys.stdin.read()\n") as running:
        text = call("scan", running.pid, code=0).stdout
    assert "\nno open sockets\nFile descriptors: " in text


@needs_linux
@pytest.mark.parametrize("spelling", ["ESTABLISHED", "established", "estab"])
def test_only_sockets_of_a_state_are_reported(leaky, spelling):
    (report,) = documents(call("scan", leaky.pid, "--json", "--state", spelling, code=0).stdout)
    assert not report.findings
    assert {seen.state for seen in report.observations} == {cwg.State.ESTABLISHED}
    text = call("scan", leaky.pid, "--state", spelling, code=0).stdout
    assert "ESTABLISHED       1 x TCP to 127.0.0.1:" in text
    assert "LEAKED" not in text


@needs_linux
def test_a_state_as_ss_spells_it_finds_the_leaks(leaky):
    (report,) = documents(call("scan", "--state", "close-wait", "--json", leaky.pid, code=1).stdout)
    assert len(report.leaks) == 5
    assert not report.observations


# As many idle connections as it is asked for, in a healthy client's pool; the server ends them.
POOLED = """
import socket, sys, threading
import urllib3

many = int(sys.argv[1])
server = socket.create_server(("127.0.0.1", 0))
pool = urllib3.HTTPConnectionPool(*server.getsockname(), maxsize=many)
all_are_open = threading.Barrier(many)

def answer():
    connection, _ = server.accept()
    connection.recv(1000)
    all_are_open.wait()
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
    all_are_idle.wait()
    connection.close()

all_are_idle = threading.Event()
serving = [threading.Thread(target=answer) for _ in range(many)]
asking = [threading.Thread(target=pool.request, args=("GET", "/")) for _ in range(many)]
for thread in serving + asking:
    thread.start()
for thread in asking:
    thread.join()
all_are_idle.set()
for thread in serving:
    thread.join()
"""


@needs_linux
@pytest.mark.parametrize("many", [1, 10])
def test_an_idle_pool_of_a_healthy_client_is_not_called_a_leak(many):
    with program(POOLED + WAIT, many) as running:
        text = call("scan", running.pid, code=0, **AT_ONCE).stdout
        everyone = call("scan", code=None, **AT_ONCE).stdout
        (report,) = documents(call("scan", running.pid, "--json", code=0, **AT_ONCE).stdout)
    assert f"\n{many} idle or leaked of {many + 1} open sockets: " in text
    assert "no leaks" not in text
    assert f"{many} IDLE OR LEAKED  TCP to 127.0.0.1:{running.first_line} " in text
    assert "from outside, an idle pool looks the same as a leak" in unfolded(text)
    assert "`closewait-guard attach PID` (Linux) or install() in the program shows" in unfolded(
        text
    )
    assert ", nothing unread\n" in text
    assert str(running.pid) in everyone
    assert {each.verdict for each in report.findings} == {cwg.Verdict.IDLE_OR_LEAKED}
    assert {each.code for each in report.findings} == {"CWG708"}
    assert not report.leaks
    shown = cwg.render_text(report)
    assert "idle or leaked." in shown
    assert "No leaks" not in shown


@needs_linux
def test_more_than_a_pool_keeps_for_one_address_are_leaks():
    with program(POOLED + WAIT, 11) as running:
        assert "11 LEAKED  TCP to " in call("scan", running.pid, code=1, **AT_ONCE).stdout


@needs_linux
def test_above_the_limit_for_a_process_nothing_is_left_to_idle_pools():
    with program(POOLED + WAIT, 3) as running:
        limit = {"CLOSEWAIT_GUARD_COUNT_WARNING": "2", **AT_ONCE}
        assert "3 LEAKED  TCP to " in call("scan", running.pid, code=1, **limit).stdout


@needs_linux
def test_sockets_with_unread_bytes_are_shown_apart_from_those_without():
    source = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
kept = []
for data in (b"", b"12", b"345"):
    client = socket.create_connection(server.getsockname())
    kept.append(server.accept()[0])
    client.sendall(data)
    client.close()
"""
    with program(source + WAIT) as running:
        text = call("scan", running.pid, code=1, **AT_ONCE).stdout
    stuck, _, other = text.partition("1 LEAKED  TCP from 127.0.0.1 ")
    assert "2 LEAKED  TCP from 127.0.0.1 " in stuck
    assert ", 5 bytes unread\n" in stuck
    assert ", nothing unread\n" in other


# Two children that leak, and are started as multiprocessing's are: under another name.
MASTER = f"""
import subprocess, sys
child = {LEAKY + WAIT!r}
children = [
    subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for _ in range(2)
]
print(*(each.stdout.readline() and each.pid for each in children), flush=True)
sys.stdin.read()
for each in children:
    each.communicate()
"""


@needs_linux
def test_processes_of_one_name_are_shown_together_where_one_process_has_started_them(tmp_path):
    script = tmp_path / "master.py"
    script.write_text(MASTER)
    starter = f"import runpy; runpy.run_path({str(script)!r})"
    with program(starter) as first, program(starter) as second:
        groups = [running.first_line.split() for running in (first, second)]
        pids = [pid for group in groups for pid in group]
        text = unfolded(call("scan", *pids, code=1, **AT_ONCE).stdout)
    for group in groups:
        assert f"python -c (2 processes: {', '.join(group)})" in text.replace("python3", "python")
    assert " (4 processes: " not in text


@needs_linux
def test_what_has_no_name_of_its_own_is_shown_with_what_has_started_it(tmp_path):
    script = tmp_path / "master.py"
    script.write_text(MASTER)
    command = [sys.executable, str(script)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as master:
        children = ", ".join(master.stdout.readline().split())
        text = unfolded(call("scan", master.pid, "--tree", code=1, **AT_ONCE).stdout)
        master.stdin.close()
    started = f"(2 processes: {children}), started by python master.py (pid {master.pid})"
    assert started in text.replace("python3", "python")


@needs_linux
def test_a_process_and_the_children_of_its_name_are_shown_together():
    source = LEAKY + "if not os.fork():\n    sys.stdin.read()\n    os._exit(0)\n" + WAIT
    with program(source) as running:
        text = call("scan", running.pid, "--tree", code=1, **AT_ONCE).stdout
    assert f"  (2 processes: {running.pid}, " in text


@needs_linux
def test_it_says_that_the_children_of_a_process_were_not_scanned():
    with program(MASTER) as running:
        done = call("scan", running.pid, code=0)
        assert done.stdout.endswith("\nNot scanned: 2 child processes (add --tree).\n")
        as_json = call("scan", running.pid, "--json", code=0)
        assert as_json.stderr == "Not scanned: 2 child processes (add --tree).\n"
        assert len(documents(as_json.stdout)) == 1
        assert "Not scanned" not in call("scan", running.pid, "--tree", code=1, **AT_ONCE).stdout
        alone = running.first_line.split()[0]
        assert "Not scanned" not in call("scan", alone, code=1, **AT_ONCE).stdout


@needs_linux
@needs_root
@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is not installed")
def test_root_without_the_right_learns_which_it_is():
    weak = ["setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace", *COMMAND]
    with program(HEALTHY) as running:
        one = call("scan", running.pid, command=weak, code=2)
        everything = call("scan", command=weak, code=None)
        doctor = call("doctor", command=weak, code=0)
    need = (
        "root needs CAP_SYS_PTRACE here (docker run --cap-add SYS_PTRACE, docker exec "
        "--privileged, kubectl debug --profile=sysadmin)"
    )
    assert one.stderr.endswith(f" of user root: {need}\n")
    # Beside those of other users.
    assert re.search(
        rf"Not permitted to look into .*: {re.escape(need)}\.", unfolded(everything.stdout)
    )
    assert f"you cannot inspect every process: {need}" in unfolded(doctor.stdout)


@needs_linux
def test_a_copy_over_fork_is_reported_with_who_else_holds_it():
    source = LEAKY + "if not os.fork():\n    sys.stdin.read()\n    os._exit(0)\n" + WAIT
    with program(source) as running:
        reports = documents(call("scan", running.pid, "--tree", "--json", code=1, **AT_ONCE).stdout)
        parent, child = sorted(reports, key=lambda report: report.pid != running.pid)
        assert parent.pid == running.pid
        assert {leak.verdict for leak in parent.findings} == {cwg.Verdict.LEAKED}
        assert {leak.verdict for leak in child.findings} == {cwg.Verdict.INHERITED}
        for leak in parent.findings:
            assert leak.holders == (f"process {child.pid} ({child.command}) too",)
        assert child.findings[0].observation.record.parent.pid == parent.pid
        # Of one process alone, the copies are shown as well.
        text = call("scan", running.pid, code=1, **AT_ONCE).stdout
        assert f"held by  process {child.pid} (" in text
        assert (
            f"inherited over fork() from process {parent.pid}"
            in call("scan", child.pid, code=1, **AT_ONCE).stdout
        )


# A connection that parent and child have used before the fork, and that the parent has closed; its
# own end. Then the child does as it is told.
FORKED = """
import ctypes, os, select, socket, sys, time
server = socket.create_server(("127.0.0.1", 0))
ours = socket.create_connection(server.getsockname())
theirs, _ = server.accept()
ours.sendall(b"x"); theirs.recv(1); theirs.sendall(b"y"); ours.recv(1)
time.sleep(0.2)
child = os.fork()
if child == 0:
    theirs.close()
    server.close()
    {child}
    signal = __import__("signal")
    signal.pause()
ours.close()
print(child, flush=True)
sys.stdin.read()
os.kill(child, 9)
os.waitpid(child, 0)
"""
UNUSED = {
    "asleep": "",
    "another program": "ours.set_inheritable(True); os.execvp('sleep', ['sleep', '60'])",
    "another network": "assert ctypes.CDLL(None).unshare(0x40000000) == 0",
}
IN_USE = {
    "has sent": "ours.sendall(b'z')",
    "receives": "ours.recv(1)",
    "receives within a time": "ours.settimeout(60); ours.recv(1)",
    "waits by epoll": "e = select.epoll(); e.register(ours, 1); e.poll()",
    "works": "while True: pass",
}


@needs_linux
@pytest.mark.parametrize(
    "child",
    [
        pytest.param(code, id=name, marks=needs_root if "unshare" in code else ())
        for name, code in UNUSED.items()
    ],
)
def test_a_connection_that_only_a_child_keeps_open_is_reported_with_parent_and_child(child):
    with program(FORKED.format(child=child)) as running:
        time.sleep(0.2)
        done = call("scan", running.pid, "--tree", "--json", code=1, **AT_ONCE)
        text = " ".join(call("scan", running.pid, "--tree", code=1, **AT_ONCE).stdout.split())
    [leak] = [leak for report in documents(done.stdout) for leak in report.leaks]
    assert leak.verdict is cwg.Verdict.INHERITED
    assert leak.observation.state is cwg.State.ESTABLISHED
    assert leak.observation.record.pid == int(running.first_line)
    assert leak.observation.record.parent.pid == running.pid
    assert f"process {running.first_line} has it open unused, and its parent has closed it" in text
    assert f"inherited over fork() from process {running.pid}" in text


@needs_linux
@pytest.mark.parametrize("child", IN_USE.values(), ids=IN_USE)
def test_a_connection_that_a_child_may_use_is_not_reported(child):
    with program(FORKED.format(child=child)) as running:
        time.sleep(0.2)
        assert "no leaks of " in call("scan", running.pid, "--tree", code=0, **AT_ONCE).stdout


FORKING_SERVER = """
import os, socket, socketserver, sys, threading, time

class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        time.sleep(60)

server = socketserver.ForkingTCPServer(("127.0.0.1", 0), Handler)
client = socket.create_connection(server.server_address)
client.sendall(b"request")
time.sleep(0.2)
server.handle_request()
print("handled", flush=True)
sys.stdin.read()
for child in server.active_children:
    os.kill(child, 9)
"""


@needs_linux
def test_a_child_that_is_to_serve_what_its_parent_has_accepted_is_reported_when_it_never_does():
    with program(FORKING_SERVER) as running:
        time.sleep(0.2)
        assert "no leaks of " in call("scan", running.pid, "--tree", code=0, **AT_ONCE).stdout
        late = {"CLOSEWAIT_GUARD_AGE_WARNING": "0.1", **AT_ONCE}
        shown = call("scan", running.pid, "--tree", code=1, **late).stdout
        assert "1 inherited of " in shown


@needs_linux
def test_a_duplicate_in_the_same_process_is_reported():
    with program(LEAKY + "again = kept[0].dup()\n" + WAIT) as running:
        (report,) = documents(call("scan", running.pid, "--json", code=1, **AT_ONCE).stdout)
    held = [leak.holders for leak in report.findings if leak.holders]
    assert len(held) == 2
    assert all(text.endswith("of the same process too") for (text,) in held)


@needs_linux
def test_connections_that_are_never_accepted_are_reported_and_are_no_leak():
    source = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
"""
    with program(source + WAIT) as running:
        text = call("scan", running.pid, code=0).stdout
        assert (
            f"1 connection in CLOSE_WAIT in the backlog of 127.0.0.1:{running.first_line}" in text
        )


@needs_linux
def test_a_socket_without_a_connection_is_counted_and_not_reported_at_first_sight():
    source = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
never = socket.socket()
"""
    with program(source + WAIT) as running:
        done = call("scan", running.pid, "--all", code=0).stdout
        assert "CLOSE 1" in done
        assert "for how long 1 TCP socket had no connection" in unfolded(done)


@needs_linux
def test_ipv6_and_other_protocols_are_reported():
    source = """
import socket, sys
server = socket.create_server(("::1", 0), family=socket.AF_INET6)
client = socket.create_connection(server.getsockname()[:2])
accepted, _ = server.accept()
accepted.sendall(b"42")
accepted.close()
datagrams = socket.socket(type=socket.SOCK_DGRAM)
datagrams.bind(("127.0.0.1", 0))
named = socket.socket(socket.AF_UNIX)
named.bind(sys.argv[1])
"""
    path = f"/tmp/closewait-guard-test-{os.getpid()}"
    try:
        with program(source + WAIT, path) as running:
            (report,) = documents(
                call("scan", running.pid, "--json", "--all", code=1, **AT_ONCE).stdout
            )
    finally:
        os.unlink(path)
    (leak,) = report.leaks
    assert leak.observation.peer == f"[::1]:{running.first_line}"
    assert leak.observation.family == "AF_INET6"
    others = {(seen.family, seen.type): seen for seen in report.observations}
    assert others["AF_INET", "SOCK_DGRAM"].local.startswith("127.0.0.1:")
    assert others["AF_UNIX", "SOCK_STREAM"].local == path


@needs_linux
@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")
def test_a_program_in_c_is_reported_like_any_other():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            clients = [connected(port) for _ in range(4)]
            for client in clients:
                client.sendall(b"PING\r\n")
                client.recv(10)
            # It hangs, and does not see that they leave.
            server.send_signal(signal.SIGSTOP)
            for client in clients:
                client.close()
            done = call("scan", server.pid, code=1, **AT_ONCE).stdout
            (report,) = documents(call("scan", server.pid, "--json", code=1, **AT_ONCE).stdout)
        finally:
            server.send_signal(signal.SIGCONT)
            server.terminate()
    assert done.startswith(f"redis-server 127.0.0.1:{port}  (pid {server.pid})\n")
    assert "4 LEAKED  TCP from 127.0.0.1 " in done
    assert "call the library's own close method" in done
    assert "closewait-guard run" not in done
    assert report.python == ""
    assert report.command == f"redis-server 127.0.0.1:{port}"


def connected(port):
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@needs_linux
@needs_root
@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
def test_the_network_of_a_container_is_entered_to_date_the_ends():
    source = "import os; os.system('ip link set lo up')\n" + LEAKY + WAIT
    with program(source, prefix=["unshare", "--net"]) as running:
        (report,) = documents(call("scan", running.pid, "--json", code=1, **AT_ONCE).stdout)
    assert len(report.leaks) == 5
    assert all(leak.observation.peer_closed_for > 0 for leak in report.findings)


@needs_linux
@needs_root
@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is not installed")
def test_where_the_network_may_not_be_entered_its_table_is_read(tmp_path):
    """A process of ours in a network of its own, and no right to enter that."""
    source = "import os; os.system('ip link set lo up')\n" + LEAKY + WAIT
    weak = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    with program(source, prefix=["unshare", "--net"]) as running:
        done = call("scan", running.pid, "--json", command=[*weak, *COMMAND], code=1, **AT_ONCE)
        (report,) = documents(done.stdout)
        text = call("scan", running.pid, command=[*weak, *COMMAND], code=1, **AT_ONCE).stdout
    assert len(report.leaks) == 5
    assert {leak.observation.peer_closed_for for leak in report.findings} == {None}
    assert {leak.observation.evidence for leak in report.findings} == {cwg.Evidence.TABLE}
    assert "since when the peers have closed" in " ".join(text.split())


# As nobody, who may not even read where Python is installed: what is needed is imported before.
AS_NOBODY = """
import contextlib, heapq, io, os, sys, pwd
from closewait_guard.commands import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["scan", sys.argv[1], "--state", "listen"])
    main(["scan", sys.argv[1], "--json"])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(main(sys.argv[2:]))
"""


@needs_linux
@needs_root
def test_without_rights_it_shows_what_it_may_and_says_what_is_missing(leaky):
    nobody = [sys.executable, "-c", AS_NOBODY, str(leaky.pid)]
    done = call("scan", leaky.pid, command=nobody, code=2)
    assert done.stderr == (
        f"closewait-guard: not permitted to inspect process {leaky.pid} "
        f"({Path(sys.executable).name} -c) of user root: run as root, or as that user\n"
    )
    shown = " ".join(call("scan", leaky.pid, command=nobody).stdout.split())
    assert "sockets in CLOSE_WAIT of user root, whose processes may not be looked into" in shown
    assert f"3 x TCP to 127.0.0.1:{leaky.first_line}: CLOSE_WAIT" in shown
    shown = call("scan", command=nobody).stdout
    assert "Not permitted to look into " in shown
    assert ": run as root to see them." in " ".join(shown.split())


@needs_linux
def test_an_answer_to_a_keepalive_excuses_no_leak():
    with program(ANSWERS_KEEPALIVES) as running:
        done = call("scan", running.pid, code=1, CLOSEWAIT_GUARD_GRACE="1.5")
        assert "1 leaked of " in done.stdout
        assert "CLOSE_WAIT for at least " in done.stdout


@needs_linux
@needs_root
def test_of_a_family_it_says_who_may_not_be_looked_into():
    """A program that has become another user, and whose child has not."""
    source = """
import ctypes, os, socket, sys
child = os.fork()
if child:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    assert ctypes.CDLL(None).prctl(4, 1) == 0
server = socket.create_server(("127.0.0.1", 0))
if child:
    print(child, flush=True)
sys.stdin.read()
"""
    with program(source) as running:
        nobody = [sys.executable, "-c", AS_NOBODY, str(os.getpid())]
        done = call("scan", running.pid, "--tree", command=nobody, code=0)
    assert "Not permitted to look into 1 process of root" in done.stdout
