"""Servers and pools that the program itself watches, by a line in its configuration."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

import closewait_guard as cwg
from command_line import call, environment
from findings import reports_in
from leaking import ASGI, LEAK, WSGI, run
from servers import DEADLINE, end, free_port, get, redis_server, wait_for_workers

pytestmark = pytest.mark.whole_program

# With a hook of the user's own beside those of the guard, and one in the place of one of them.
CONFIGURATION = """
import os
from closewait_guard.integrations import gunicorn as guarded
from closewait_guard.integrations.gunicorn import *

def post_worker_init(worker):
    guarded.post_worker_init(worker)
    open(f"started-{os.getpid()}", "w").close()

def worker_exit(server, worker):
    open(f"ended-{os.getpid()}", "w").close()
"""
WORKERS = {
    "sync": ("-k", "sync"),
    "sync, preloaded": ("-k", "sync", "--preload"),
    "gthread": ("-k", "gthread", "--threads", "2"),
    "gevent": ("-k", "gevent"),
    "uvicorn": ("-k", "uvicorn_worker.UvicornWorker"),
    "no leak": ("-k", "sync"),
}


@pytest.mark.parametrize("worker", WORKERS)
def test_what_workers_of_gunicorn_leak_is_in_one_report_with_the_endpoint(tmp_path, worker):
    pytest.importorskip("gunicorn")
    options = WORKERS[worker]
    pytest.importorskip(options[1].partition(".")[0] if "." in options[1] else "gunicorn")
    (tmp_path / "conf.py").write_text(CONFIGURATION)
    (tmp_path / "app.py").write_text(ASGI if worker == "uvicorn" else WSGI)
    port, path = free_port(), "/" if worker == "no leak" else "/leak"
    command = ["-m", "gunicorn", "-c", "conf.py", "-w", "2", "-b", f"127.0.0.1:{port}"]
    with subprocess.Popen(
        [sys.executable, *command, "--log-level", "error", *options, "app:app"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path), CLOSEWAIT_GUARD_GRACE="0.1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        wait_for_workers(tmp_path, 2)
        for _ in range(2):
            assert get(port, path) == b"done"
        time.sleep(0.3)
        if worker == "gthread":
            asked = call("report", running.pid, "--tree", code=0).stdout
            assert "2 leaked sockets from 1 place in " in " ".join(asked.split()), asked
        # As before: the workers are replaced, and what the old ones have leaked is not lost.
        running.send_signal(signal.SIGHUP)
        wait_for_workers(tmp_path, 4)
        for _ in range(2):
            assert get(port, path) == b"done"
        time.sleep(0.3)
        errors = end(running, signal.SIGTERM)
    assert running.returncode == 0, errors
    shown = " ".join(errors.split())
    assert len(reports_in(errors)) == 1, errors
    assert "unknown" not in shown, errors
    if worker == "no leak":
        assert "closewait-guard: no leaks" in shown, errors
        assert len(list(tmp_path.glob("ended-*"))) == 4
        return
    assert "4 leaked sockets from 1 place in " in shown, errors
    assert "in leak()" in shown, errors
    assert "label GET /leak" in shown, errors


def test_a_configuration_without_a_file_has_the_hooks_and_no_other_setting(tmp_path):
    config = pytest.importorskip("gunicorn.config")
    (tmp_path / "app.py").write_text(WSGI)
    option = "python:closewait_guard.integrations.gunicorn"
    check = ("-m", "gunicorn", "-c", option, "--check-config", "app:app")
    call(*check, cwd=tmp_path, code=0, command=[sys.executable])
    names = "import closewait_guard.integrations.gunicorn as hooks; print(*vars(hooks))"
    found = {*call("-c", names, command=[sys.executable]).stdout.split()}
    hooks = {"child_exit", "on_exit", "post_fork", "post_worker_init"}
    assert found & {*config.make_settings()} == hooks


def test_workers_that_ended_without_a_report_are_named_at_the_end():
    code = """
from types import SimpleNamespace
from closewait_guard.integrations import gunicorn
for pid in ENDED:
    gunicorn.child_exit(None, SimpleNamespace(pid=pid))
gunicorn.on_exit(None)
"""
    for ended, named in (("7,", "1 worker ended"), ("7, 8", "2 workers ended")):
        _, errors = run(code.replace("ENDED", f"({ended})"))
        assert f"leaks unknown: {named} without a report (" in errors


TASKS = (
    LEAK
    + """
from celery import Celery
from closewait_guard.integrations.celery import watch_workers

app = Celery("tasks", broker=os.environ["BROKER"])
watch_workers(interval=0.2, grace=0.1, reporters=["json_lines:" + os.environ["REPORTS"]])

@app.task
def work(has_leaked):
    if has_leaked:
        leak()
"""
)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_leak_of_celery_has_its_task_and_is_in_the_last_report_of_its_process(tmp_path, pool):
    pytest.importorskip("celery")
    (tmp_path / "tasks.py").write_text(TASKS)
    reports = tmp_path / "reports"

    def newest():
        """Of each process, the latest report."""
        text = reports.read_text() if reports.exists() else ""
        return {each.pid: each for each in map(cwg.from_dict, map(json.loads, text.splitlines()))}

    def leaks():
        return [leak for each in newest().values() for leak in each.leaks]

    with redis_server() as port:
        variables = environment(
            PYTHONPATH=str(tmp_path),
            BROKER=f"redis://127.0.0.1:{port}/0",
            REPORTS=str(reports),
        )
        options = ["-A", "tasks", "worker", "-P", pool, "-c", "2", "--without-mingle"]
        with subprocess.Popen(
            [sys.executable, "-m", "celery", *options],
            cwd=tmp_path,
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as running:
            send = "from tasks import work\nfor place in range(8): work.delay(place < 3)"
            subprocess.run([sys.executable, "-c", send], env=variables, check=True)
            deadline = time.monotonic() + DEADLINE
            while len(leaks()) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            before = {pid: each.taken_at for pid, each in newest().items()}
            end(running, signal.SIGTERM)
    assert len(leaks()) == 3
    assert {leak.observation.record.labels for leak in leaks()} == {("tasks.work",)}
    last = newest()
    assert all(last[pid].taken_at > taken for pid, taken in before.items())
