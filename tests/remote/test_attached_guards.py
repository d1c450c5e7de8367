"""A guard is put into a running program: for a while, or until it is taken out again."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

import closewait_guard as cwg
from closewait_guard._threads import descendants_of
from command_line import call, can_attach, documents
from remote.attached import (
    NOW,
    STATE,
    folders_for,
    interrupt,
    running,
    wait_until,
    watching,
    what_changed,
)
from servers import DEADLINE

pytestmark = pytest.mark.skipif(not can_attach(), reason="no gdb, or no right to use it")
IMPORTABLE = f"import sys; sys.path.append({str(Path(cwg.__file__).parents[1])!r})\n"


def test_a_watch_has_the_line_of_what_leaks_meanwhile_and_leaves_the_program_as_it_was(tmp_path):
    with running(STATE, "-W", "error", cwd=tmp_path, stderr=subprocess.PIPE) as program:
        with watching(program) as watch:
            assert "class" in what_changed(program, "+")
            # No thread of a child would take it out there.
            assert what_changed(program, "f").keys() <= {"fds", "modules"}
            text, _, status = interrupt(watch)
        assert status == 0
        assert "in leak()\n" in text
        assert "opened   before install(): no stack was recorded" in text
        assert "held by  __main__.late[0] (module global)" in text
        assert "\nSites: 1 new, 3 unchanged; 8 open sockets then, 9 now" in text
        assert text.endswith("The guard is out again.\n")
        assert what_changed(program, "-") == {}
        assert not folders_for(program)
        program.kill()
        assert program.stderr.read() == ""


def test_a_watch_makes_way_for_forks_and_ends_all_the_same(tmp_path):
    with running(STATE, "-W", "error", cwd=tmp_path, stderr=subprocess.PIPE) as program:
        with watching(program, seconds=1) as watch:
            what_changed(program, "*")
            assert "class" in what_changed(program, "+")
            text, errors = watch.communicate(timeout=DEADLINE)
        assert watch.returncode == 0, errors
        assert "in leak()\n" in text
        assert text.endswith("The guard is out again.\n")
        assert what_changed(program, "-") == {}
        assert not folders_for(program)
        program.kill()
        assert program.stderr.read() == ""


def test_a_guard_whose_command_was_killed_takes_itself_out_and_says_nothing(tmp_path):
    with running(STATE, cwd=tmp_path, stderr=subprocess.PIPE) as program:
        with watching(program, seconds=0.5) as watch:
            watch.kill()
        assert folders_for(program)
        wait_until(lambda: not folders_for(program))
        wait_until(lambda: what_changed(program) == {})
        program.kill()
        assert program.stderr.read() == ""


def test_of_a_program_that_ends_during_a_watch_the_first_scan_is_printed():
    with running(STATE) as program, watching(program, "--json", "--fail-on-leak") as watch:
        program.kill()
        # Nothing is left of it then that could be asked for its limits.
        program.wait()
        output, errors = watch.communicate(timeout=DEADLINE)
    assert "has ended meanwhile" in errors
    assert watch.returncode == 1
    assert documents(output)[0].leaks


def test_a_program_that_has_a_guard_is_asked_twice_and_gets_no_other():
    code = f"{IMPORTABLE}import closewait_guard; guard = closewait_guard.install()\n{STATE}"
    with running(code + "assert guard.installed") as program:
        text = call("attach", program.pid, "--watch", "0.1", code=0).stdout
        assert f"Process {program.pid} has a guard already: it was asked twice" in text
        changed = what_changed(program).keys()
        text = call("attach", program.pid, "--install", code=0).stdout
        assert text == f"Process {program.pid} has a guard already, which stays as it is.\n"
        done = call("attach", program.pid, "--uninstall", code=2)
        assert "it has no guard that `attach --install` has left there" in done.stderr
        assert what_changed(program).keys() == changed <= {"modules", "caches", "fds"}


def test_a_guard_that_is_left_in_answers_and_reports_until_it_is_taken_out(tmp_path):
    tmp_path.chmod(0o700)
    reports, folder = tmp_path / "leaks.jsonl", tmp_path / "empty"
    folder.mkdir()
    variables = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    with running(STATE, cwd=folder, env=variables, stderr=subprocess.PIPE) as program:
        options = "--interval", "0.1", "--report", "text", "--report", f"json_lines:{reports}"
        text = call("attach", program.pid, "--install", *options, code=0, **NOW).stdout
        assert "Reports every 0.1 s to the program's stderr.\n" in text
        assert f"Ask for a report:  closewait-guard report {program.pid}\n" in text
        what_changed(program, "+")
        assert "in leak()\n" in call("report", program.pid, code=0).stdout
        assert program.stderr.readline().startswith("closewait-guard  ")
        wait_until(lambda: "leak" in reports.read_text())
        again = call("attach", program.pid, "--install", code=0).stdout
        assert again == f"Process {program.pid} has a guard already, which stays as it is.\n"
        done = call("attach", program.pid, "--uninstall", code=0)
        assert f"Process {program.pid} was " in done.stdout
        assert what_changed(program, "-") == {}
        assert os.listdir(tmp_path / "closewait_guard") == []
        call("report", program.pid, code=2)
        # It can be had again.
        call("attach", program.pid, "--install", code=0)
        call("attach", program.pid, "--uninstall", code=0)
        assert what_changed(program) == {}


def test_a_program_may_install_its_own_guard_beside_one_that_is_left_in(tmp_path):
    tmp_path.chmod(0o700)
    own = f"""
{IMPORTABLE}
class Signals:
    def __call__(self, *_):
        import closewait_guard
        self.guard = closewait_guard.install(grace=3)
        self.installed = True
import signal
signals = Signals()
signal.signal(signal.SIGUSR1, signals)
"""
    checked = STATE.replace('"main":', '"installed": getattr(signals, "installed", False), "main":')
    variables = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    with running(own + checked, cwd=tmp_path, env=variables) as program:
        call("attach", program.pid, "--install", code=0)
        program.send_signal(signal.SIGUSR1)
        wait_until(lambda: "installed" in what_changed(program))
        call("attach", program.pid, "--uninstall", code=0)
        # What the program has installed stays, with what was loaded for it.
        assert {"class", "modules"} <= what_changed(program).keys()
        assert "not installed" not in call("attach", program.pid, code=0).stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--install", "--report", "nonsense"), "attach --report: unknown reporter 'nonsense'"),
        (("--install", "--interval", "0"), "interval"),
        (("--interval", "5"), "--interval and --report need --install"),
        (("--watch", "5", "--install"), "not allowed with argument"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_program_is_looked_for(options, sentence):
    done = call("attach", 2000000000, *options, code=2)
    assert sentence in done.stderr
    assert "no such process" not in done.stderr


def test_a_guard_that_cannot_report_there_is_not_left_in(tmp_path):
    with running(STATE, cwd=tmp_path) as program:
        options = "--install", "--report", "json_lines:/no/such/folder/leaks.jsonl"
        done = call("attach", program.pid, *options, code=2)
        assert "json_lines: '/no/such/folder/leaks.jsonl' cannot be opened" in done.stderr
        assert what_changed(program) == {}


TREE = """
import os, sys, time
for _ in range(2):
    if os.fork() == 0:
        break
else:
    print(os.getpid(), flush=True)
while True:
    time.sleep(0.01)
"""


def test_a_tree_gets_guards_and_what_began_meanwhile_is_said(tmp_path):
    tmp_path.chmod(0o700)
    variables = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    with running(TREE, env=variables) as program:
        try:
            children = descendants_of(program.pid, 10)
            call("attach", program.pid, "--tree", "--install", code=0)
            answers = documents(call("report", program.pid, "--tree", "--json", code=0).stdout)
            assert {each.pid for each in answers} == {program.pid, *children}
            call("attach", program.pid, "--tree", "--uninstall", code=0)
            call("report", program.pid, "--tree", code=2)
        finally:
            for child in descendants_of(program.pid, 10):
                os.kill(child, signal.SIGKILL)


def test_processes_that_began_during_a_watch_are_named():
    code = STATE.replace("os.wait()", "pass").replace("os._exit(0)", "signal.pause()")
    with running(code) as program:
        with watching(program, "--tree") as watch:
            what_changed(program, "f")
            [child] = descendants_of(program.pid, 10)
            _, errors, status = interrupt(watch)
        os.kill(child, signal.SIGKILL)
    assert f"not watched: 1 process that began meanwhile ({child})" in errors
    assert status == 2
