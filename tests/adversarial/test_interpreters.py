"""Several interpreters in one process: each has sockets of its own, and a guard of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from closewait_guard._live.frames import shows_other_threads
from command_line import environment

pytest.importorskip("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")

# `apart` runs a program in another interpreter; `new(shared=True)` makes one as mod_wsgi does.
TWO_INTERPRETERS = """
import socket, sys, threading, time
# Which reading a pyproject.toml imports too: Python 3.12 and 3.13 abort at the end of a process
# where an isolated interpreter has imported it before the main one.
import datetime
import closewait_guard as cwg
if sys.version_info >= (3, 13):
    import _interpreters as interpreters
    def new(shared=False):
        return interpreters.create("legacy" if shared else "isolated")
else:
    import _xxsubinterpreters as interpreters
    def new(shared=False):
        return interpreters.create(isolated=not shared)

def apart(interpreter, code):
    code = f"import sys; sys.path[:] = {sys.path!r}\\n" + code
    failure = interpreters.run_string(interpreter, code)
    assert failure is None, failure

OPENS = '''
import socket, closewait_guard as cwg
guard = cwg.install(grace=0)
socket.socket().close()
ours, theirs = socket.socketpair()
theirs.close()
report = guard.scan(full=True)
assert report.coverage.opened == 3, report.coverage
assert [leak.observation.fd for leak in report.findings] == [ours.fileno()], report.findings
assert not any("taken the place" in note for note in report.coverage.notes), report.coverage.notes
'''
"""

# Of those that are left Python 3.14 and later warn.
ENDS = """
if sys.version_info >= (3, 14):
    for each, _ in interpreters.list_all():
        if each != interpreters.get_main()[0]:
            interpreters.destroy(each)
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", TWO_INTERPRETERS + textwrap.dedent(code) + ENDS],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("is_uninstalled", [True, False])
def test_an_interpreter_that_begins_and_ends_later_leaves_the_guard_of_the_first_alone(
    shared, is_uninstalled
):
    run(
        f"""
        def rest():
            assert socket.socket.__init__ is ours
            assert guard.scan().coverage.opened == 1

        guard = cwg.install()
        ours = socket.socket.__init__
        socket.socket().close()
        other = new({shared})
        apart(other, OPENS + "ours.close()" + {is_uninstalled} * "; cwg.uninstall()")
        rest()
        interpreters.destroy(other)
        rest()
        cwg.uninstall()
        socket.socket().close()
        """
    )


@pytest.mark.parametrize("shared", [True, False])
def test_an_interpreter_that_has_a_guard_before_the_first_has_one_keeps_it(shared):
    run(
        f"""
        other = new({shared})
        apart(other, OPENS)
        with cwg.Guard() as guard:
            socket.socket().close()
            assert guard.scan().coverage.opened == 1
            apart(other, "socket.socket().close(); assert guard.scan().coverage.opened == 4")
        apart(other, "socket.socket().close(); assert guard.scan().coverage.opened == 5")
        apart(other, "ours.close()")
        interpreters.destroy(other)
        socket.socket().close()
        """
    )


@pytest.mark.parametrize("shared", [True, False])
def test_the_class_of_an_interpreter_is_found_behind_a_mock(shared):
    run(
        f"""
        other = new({shared})
        apart(other, '''
        import socket
        real, socket.socket = socket.socket, None
        from closewait_guard._capture.hooks import SOCKET
        assert SOCKET is real
        '''.replace(" " * 8, ""))
        interpreters.destroy(other)
        """
    )


@pytest.mark.parametrize("shared", [True, False])
def test_an_interpreter_that_looks_at_the_sockets_of_another_lets_the_process_end(shared):
    """Those are nobody's in its eyes: it looks through a copy of the descriptor."""
    run(
        f"""
        ours, theirs = socket.socketpair()
        theirs.close()
        ends = time.monotonic() + 20

        def looks():
            other = new({shared})
            apart(other, '''
        import closewait_guard as cwg
        with cwg.Guard() as guard:
            assert guard.scan(full=True).coverage.native > 0
        '''.replace(" " * 8, ""))
            interpreters.destroy(other)

        looking = threading.Thread(target=looks)
        looking.start()
        while looking.is_alive() and time.monotonic() < ends:
            time.sleep(0.002)
        looking.join()
        ours.close()
        """
    )


RUNS = """
import time
def works(until):
    while time.monotonic() < until:
        for _ in range(1000):
            (lambda: [1])()
        # Until Python 3.11 an interpreter does not notice that one of another waits for its turn.
        time.sleep(0)
works(time.monotonic() + 0.4)
"""


def test_a_scan_beside_an_interpreter_that_runs_says_what_it_leaves_out():
    done = run(
        f"""
        def waits(sock, ended):
            ended.wait()

        guard = cwg.install(grace=0)
        ours, theirs = socket.socketpair()
        theirs.close()
        ended = threading.Event()
        waiting = threading.Thread(target=waits, args=(ours, ended), daemon=True)
        waiting.start()
        del ours
        time.sleep(0.01)
        with cwg.Guard() as before:
            report = before.check(-10)
            assert ("waits()" in str(report.findings)) is {shows_other_threads()}
            assert "several interpreters" not in str(report.coverage.notes)
        other = new()
        running = threading.Thread(target=apart, args=(other, {RUNS!r}))
        running.start()
        time.sleep(0.05)
        scans = 0
        while running.is_alive():
            report = guard.check(0)
            assert len(report.findings) == 1
            assert "several interpreters" in str(report.coverage.notes)
            assert "waits()" not in str(report.findings)
            scans += 1
        print(scans)
        ended.set()
        waiting.join()
        """
    )
    assert int(done.stdout) > 0


def test_a_scan_beside_another_interpreter_sees_the_locals_of_its_caller_and_keeps_none():
    run(
        """
        import gc, weakref
        other = new()
        guard = cwg.install(grace=0)
        gc.disable()

        def scans():
            ours, theirs = socket.socketpair()
            theirs.close()
            assert "'ours'" in str(guard.scan().findings)
            ours.close()
            return weakref.ref(ours)

        assert scans()() is None
        """
    )


@pytest.mark.parametrize("shared", [True, False])
def test_another_interpreter_reports_without_a_thread_and_says_that_it_cannot_watch(shared):
    done = run(
        f"""
        other = new({shared})
        apart(other, OPENS + '''
        cwg.uninstall()
        try:
            cwg.watch(interval=0.01, at_exit=False)
        except cwg.ConfigurationError as error:
            print(error)
        guard = cwg.install(grace=0, reporters=[lambda report: print(len(report.findings))])
        cwg.report()
        import threading
        assert threading.enumerate() == [threading.main_thread()]
        ours.close()
        '''.replace(" " * 8, ""))
        interpreters.destroy(other)
        """
    )
    said, counted = done.stdout.splitlines()
    assert said.startswith("watch(): only the main interpreter can have a monitor")
    assert counted == "1"
