"""Real servers with workers, and a real Prometheus, see what leaks and when it is over."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from command_line import COMMAND, LEAKY, WAIT, call, environment, program
from servers import DEADLINE, free_port, get

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"

# `/leak` leaks a connection, and `/metrics` is what the documentation of prometheus_client has for
# servers with workers.
APP = """
import os, socket
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from closewait_guard.integrations import prometheus

if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    prometheus.register()
kept = []

def app(environ, start_response):
    path, body = environ["PATH_INFO"], str(os.getpid()).encode()
    if path == "/leak":
        with socket.create_server(("127.0.0.1", 0)) as server:
            kept.append(socket.create_connection(server.getsockname()))
            server.accept()[0].close()
    elif path == "/metrics":
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        body = generate_latest(registry)
    start_response("200 OK", [("Content-Length", str(len(body))), ("Connection", "close")])
    return [body]
"""
GUNICORN_CONF = """
from prometheus_client import multiprocess

from closewait_guard.integrations import gunicorn as guarded
from closewait_guard.integrations.gunicorn import *


def child_exit(server, worker):
    guarded.child_exit(server, worker)
    multiprocess.mark_process_dead(worker.pid)
"""


@contextmanager
def running(*command, cwd, **variables):
    """A program that is ended in the end."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(PYTHONPATH=str(cwd), **variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE)


def scrape(port):
    """The samples at an address: pairs of name, and labels with their values."""
    text = get(port, "/metrics").decode()
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def by_pid(port, name, **labels):
    return {
        int(found["pid"]): value
        for sample, found, value in scrape(port)
        if sample == name and labels.items() <= found.items()
    }


def until(read, wanted):
    """Wait until something reads as wanted."""
    end = time.monotonic() + DEADLINE
    while not wanted(found := read()):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def leak_in_two_workers(port):
    """Have each worker leak; how many connections each has leaked."""
    counts = {}
    while len(counts) < 2 or sum(counts.values()) < 5:
        pid = int(get(port, "/leak"))
        counts[pid] = counts.get(pid, 0) + 1
    return counts


def test_any_worker_of_a_gunicorn_shows_what_all_of_them_have_leaked(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "gunicorn.conf.py").write_text(GUNICORN_CONF)
    (tmp_path / "shared").mkdir()
    port = free_port()
    command = [sys.executable, "-P", "-m", "gunicorn", "-w", "2", "-b", f"127.0.0.1:{port}"]
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "shared")}
    variables |= {"CLOSEWAIT_GUARD_INTERVAL": "0.1", "CLOSEWAIT_GUARD_GRACE": "0"}
    with running(*command, "app:app", cwd=tmp_path, **variables) as master:
        counts = leak_in_two_workers(port)

        def leaked():
            return by_pid(port, "closewait_guard_sockets", state="CLOSE_WAIT")

        until(leaked, lambda found: found == counts)
        sites = by_pid(port, "closewait_guard_leaked_sockets", code="CWG101")
        assert sites == counts
        opened = [value for name, _, value in scrape(port) if name.endswith("opened_total")]
        assert len(opened) == 1
        assert opened[0] >= 3 * sum(counts.values())
        # A worker that has ended has leaked nothing any more.
        ended = next(iter(counts))
        os.kill(ended, signal.SIGKILL)
        until(leaked, lambda found: ended not in found and len(found) == 2)
        assert master.poll() is None


def test_run_serves_the_numbers_of_all_workers_of_a_program_that_knows_nothing_of_it(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    port, metrics = free_port(), free_port()
    command = [*COMMAND, "run", "--metrics", f"127.0.0.1:{metrics}", "--grace", "0"]
    server = ["gunicorn", "-w", "2", "-b", f"127.0.0.1:{port}", "app:app"]
    with running(*command, *server, cwd=tmp_path, CLOSEWAIT_GUARD_INTERVAL="0.2"):
        counts = leak_in_two_workers(port)

        def leaked():
            found = by_pid(metrics, "closewait_guard_sockets", state="CLOSE_WAIT")
            return {pid: value for pid, value in found.items() if value}

        until(leaked, lambda found: found == counts)
        # The master too, which has leaked nothing.
        up = by_pid(metrics, "closewait_guard_up")
        assert len(up) == 3
        assert set(up.values()) == {1}
        sites = [
            labels["site"]
            for name, labels, _ in scrape(metrics)
            if "leaked" in name and "site" in labels
        ]
        line = APP[: APP.index("kept.append")].count("\n") + 1
        assert sites == [f"app.py:{line}"] * 2
    # It ends with the program.
    until(lambda: is_listening(metrics), lambda listens: not listens)


def is_listening(port):
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def test_run_leaves_program_and_exit_status_alone_and_watch_serves_what_it_sees(tmp_path):
    port = free_port()
    with program(LEAKY + WAIT) as leaky:
        command = [*COMMAND, "watch", str(leaky.pid), "--interval", "0.2"]
        with running(*command, "--metrics", f"127.0.0.1:{port}", cwd=tmp_path):
            found = by_pid(port, "closewait_guard_sockets", state="CLOSE_WAIT")
            assert found == {leaky.pid: 5}
            assert by_pid(port, "closewait_guard_sockets", state="ESTABLISHED") == {leaky.pid: 2}
            # From outside no report is known to be part of a series.
            assert not by_pid(port, "closewait_guard_scan_cpu_seconds")
            taken = f"127.0.0.1:{port}"
            done = call("watch", "--metrics", taken, "--count", "1", code=2)
            assert f"--metrics: cannot listen at {taken}: Address already in use" in done.stderr
            for address, why in ((taken, "cannot listen"), ("9464", "expected HOST:PORT")):
                done = call("run", "--metrics", address, *ENDS_WITH_7, code=2)
                assert why in done.stderr
                assert not done.stdout
    done = call("run", "--metrics", f"127.0.0.1:{port}", *ENDS_WITH_7, code=7)
    assert done.stdout == "started\n"
    done = call("run", "--metrics", f"127.0.0.1:{port}", "--control", "0", *ENDS_WITH_7, code=2)
    assert "`control` turns off" in done.stderr


ENDS_WITH_7 = ("--", sys.executable, "-c", "import sys; print('started'); sys.exit(7)")


# Leaks 101 connections, and closes them when it is given a line.
LEAKS = """
from prometheus_client import start_http_server
import closewait_guard as cwg
from closewait_guard.integrations import prometheus
from closewait_guard.testing import half_closed_pair
from contextlib import ExitStack
import sys

prometheus.register()
cwg.watch(interval=0.2, grace=0, reporters=[lambda report: None], at_exit=False)
start_http_server(int(sys.argv[1]), "127.0.0.1")
with ExitStack() as stack:
    for _ in range(101):
        stack.enter_context(half_closed_pair())
    print("leaks", flush=True)
    input()
sys.stdin.read()
"""


def alerts(port):
    """The names of those that fire."""
    found = json.loads(get(port, "/api/v1/alerts"))["data"]["alerts"]
    return {each["labels"]["alertname"] for each in found if each["state"] == "firing"}


def test_a_prometheus_sees_an_alert_fire_and_resolve(tmp_path):
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("prometheus is not installed")
    rules = (MONITORING / "alerts.yml").read_text()
    (tmp_path / "alerts.yml").write_text(re.sub(r"for: \d+m", "for: 0s", rules))
    metrics, port = free_port(), free_port()
    config = (MONITORING / "prometheus.yml").read_text()
    config = config.replace("15s", "300ms").replace("127.0.0.1:9464", f"127.0.0.1:{metrics}")
    (tmp_path / "prometheus.yml").write_text(config)
    command = [prometheus, "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with program(LEAKS, metrics) as leaky, running(*command, cwd=tmp_path):
        until(lambda: alerts(port), lambda found: found == {"ManySocketsInCloseWait"})
        leaky.stdin.write("\n")
        leaky.stdin.flush()
        until(lambda: alerts(port), lambda found: not found)
