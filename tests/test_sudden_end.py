"""SIGTERM with its default action: a report first, and then the end that it brings without us."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import closewait_guard as cwg
from closewait_guard._cpython import native_handler
from closewait_guard._signal import check_at_end
from command_line import COMMAND, environment
from findings import reports_in

HAS_DEADLINE = importlib.util.find_spec("closewait_guard._signal._deadline") is not None
LEAK = """
import multiprocessing, os, signal, socket, sys, threading, time

def leak():
    server = socket.create_server(("127.0.0.1", 0))
    kept = socket.create_connection(server.getsockname())
    server.accept()[0].close()
    time.sleep(0.1)
    return server, kept
"""
WATCH = "import closewait_guard as cwg\nmonitor = cwg.watch(reporters=['text'], grace=0.01)\n"
KILL = "os.kill(os.getpid(), signal.SIGTERM)\n"
KILL_IN_A_ROW = """
import subprocess
again = "for n in $(seq 300); do kill -TERM $0; done 2>/dev/null"
subprocess.Popen(["sh", "-c", again, str(os.getpid())])
"""


@pytest.fixture
def ended(tmp_path):
    """Runs a program to its end, with the guard of `run` or its own; returns its standard error."""

    def end(source, *, run=False, prefix=(), options=(), code=-signal.SIGTERM):
        path = tmp_path / "program.py"
        path.write_text(LEAK + source)
        start = [*COMMAND, "run", "--grace", "0.01", *options] if run else [sys.executable]
        done = subprocess.run(
            [*prefix, *start, path],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment(),
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done.stderr

    return end


def test_run_reports_and_the_signal_ends_the_program(ended):
    assert "1 leaked socket from" in ended(f"kept = leak()\n{KILL}time.sleep(20)", run=True)


def test_a_watching_program_reports_and_the_signal_ends_it(ended):
    assert "1 leaked socket from" in ended(f"{WATCH}kept = leak()\n{KILL}time.sleep(20)")


@pytest.mark.parametrize("run", [False, True])
def test_the_default_is_what_the_program_sees_and_can_restore(ended, run):
    told = ended(
        f"{'' if run else WATCH}kept = leak()\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "before = signal.signal(signal.SIGTERM, lambda *_: print('mine', file=sys.stderr))\n"
        "assert before is signal.SIG_DFL\n"
        f"{KILL}"
        "assert signal.signal(signal.SIGTERM, before) is not before\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        f"{KILL}time.sleep(20)",
        run=run,
    )
    assert told.count("mine") == 1
    assert told.index("mine") < told.index("1 leaked socket from")


def test_a_server_that_restores_the_default_of_before_the_guard_reports(ended):
    told = ended(
        "before = signal.signal(signal.SIGTERM, lambda *_: None)\n"
        f"{WATCH}kept = leak()\n{KILL}signal.signal(signal.SIGTERM, before)\n{KILL}time.sleep(20)"
    )
    assert told.count("1 leaked socket from") == 1


def test_an_ignored_signal_stays_ignored(ended):
    told = ended(
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{WATCH}"
        f"assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN\n{KILL}monitor.stop()",
        code=0,
    )
    assert told == ""


def test_a_worker_that_its_pool_terminates_reports(ended):
    told = ended(
        "def work():\n    kept = leak()\n    up.set()\n    time.sleep(20)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('fork')\n"
        "    up = context.Event()\n"
        "    worker = context.Process(target=work)\n"
        "    worker.start()\n    up.wait()\n    worker.terminate()\n    worker.join()\n"
        "    assert worker.exitcode == -signal.SIGTERM, worker.exitcode\n",
        run=True,
        code=0,
    )
    assert "in leak()" in told


def test_a_second_signal_ends_the_program_during_a_report_that_blocks(ended):
    began = time.monotonic()
    ended(
        "import closewait_guard as cwg\n"
        "from closewait_guard._signal import sudden_end\n"
        "sudden_end._MAX_SECONDS = 300\n"
        "cwg.watch(reporters=[lambda report: (started.set(), time.sleep(60))])\n"
        "started = threading.Event()\n"
        "def again():\n"
        "    started.wait()\n    time.sleep(1.1)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"threading.Thread(target=again, daemon=True).start()\n{KILL}time.sleep(60)"
    )
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("run", [False, True])
def test_two_signals_in_a_row_are_one(ended, run):
    """A server and then the exit function of multiprocessing terminate a worker."""
    source = f"kept = leak()\n{KILL_IN_A_ROW}time.sleep(20)"
    assert "1 leaked socket from" in ended(source if run else WATCH + source, run=run)


def test_two_signals_in_a_row_do_not_interrupt_the_report_of_a_process_that_ends(ended):
    told = ended(
        f"{WATCH}from closewait_guard._signal import delayed_sigterm\n"
        f"with delayed_sigterm():\n    {KILL}    {KILL}    print('reported', file=sys.stderr)\n"
        "print('on', file=sys.stderr)"
    )
    assert told == "reported\n"


def test_a_report_that_blocks_delays_the_end_by_seconds_only(ended):
    began = time.monotonic()
    ended(
        "import closewait_guard as cwg\n"
        "from closewait_guard._signal import sudden_end\n"
        "sudden_end._MAX_SECONDS = 0.2\n"
        "cwg.watch(reporters=[lambda report: time.sleep(300)], reporter_timeout=300)\n"
        f"{KILL}time.sleep(60)"
    )
    assert time.monotonic() - began < 50


def test_a_handler_that_raises_during_the_report_does_not_keep_the_program_alive(ended):
    ended(
        "import closewait_guard as cwg\n"
        "def interrupt(report):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
        f"cwg.watch(reporters=[interrupt])\ntry:\n    {KILL}    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(60)"
    )


@pytest.mark.skipif(shutil.which("unshare") is None, reason="it needs unshare")
def test_the_first_process_of_a_container_continues_as_the_kernel_ignores_the_signal(ended):
    namespace = ["unshare", "--pid", "--fork"]
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("it may not make a namespace")
    told = ended(
        f"kept = leak()\n{KILL}{KILL}print('on', file=sys.stderr)",
        run=True,
        code=0,
        prefix=namespace,
    )
    assert told.index("1 leaked socket from") < told.index("on\n")


# Sends the signal when the last lines are in the middle of a call of C code, which would go on for
# minutes: with the lock of the interpreter, and without it. `notify` is in C too.
STUCK = """
import functools, hashlib, itertools, subprocess
reading, writing = os.pipe()
notify = functools.partial(os.write, writing)
def hold():
    sum(itertools.chain(map(notify, [b"\\n"]), range(10 ** 11)))
def release():
    notify(b"\\n")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10 ** 9)
"""
KILL_SOON = """
subprocess.Popen(["sh", "-c", f"read line; kill -TERM {os.getpid()}"], stdin=reading)
"""
needs_extension = pytest.mark.skipif(
    not HAS_DEADLINE, reason="the package has no extension for signals"
)


@needs_extension
@pytest.mark.parametrize("call", ["hold()", "release()"])
def test_a_main_thread_that_is_stuck_in_a_call_of_c_code_does_not_keep_the_process_alive(
    ended, call
):
    ended(f"{STUCK}{WATCH}{KILL_SOON}{call}")


@needs_extension
def test_two_signals_in_a_row_end_a_main_thread_that_is_stuck_too(ended):
    ended(f"{STUCK}{WATCH}{KILL_SOON.replace('kill', 'kill -TERM {os.getpid()}; kill')}hold()")


@needs_extension
def test_run_says_that_a_program_that_was_stuck_has_not_reported(ended):
    said = ended(f"{STUCK}kept = leak()\n{KILL_SOON}hold()", run=True)
    assert "ended without a last report" in said


@needs_extension
def test_a_worker_that_is_stuck_is_ended_by_its_pool(ended):
    said = ended(
        f"{STUCK}def work():\n    kept = leak()\n    hold()\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('fork').Process(target=work)\n"
        "    worker.start()\n    os.read(reading, 1)\n    worker.terminate()\n    worker.join()\n"
        "    assert worker.exitcode == -signal.SIGTERM, worker.exitcode\n",
        run=True,
        options=["--fail-on-leak"],
        code=87,
    )
    assert "ended without a last report" in said


WRITE_STACK = (
    "import faulthandler\nfaulthandler.register(signal.SIGTERM, all_threads=False, chain={})\n"
)
WRITE_STACK_FIRST = WRITE_STACK.format(True)
STACK = "most recent call first"


def test_what_c_code_of_the_program_does_upon_the_signal_before_the_guard_is_left_alone(ended):
    said = ended(f"{WRITE_STACK.format(False)}{WATCH}{KILL}monitor.stop()\n{KILL}", code=0)
    assert said.count(STACK) == 2
    assert "open socket" not in said


@pytest.mark.parametrize("unregister", ["", "faulthandler.unregister(signal.SIGTERM)\n"])
def test_c_code_that_comes_before_our_handler_calls_it(ended, unregister):
    said = ended(f"{WATCH}{WRITE_STACK_FIRST}{unregister}kept = leak()\n{KILL}time.sleep(20)")
    assert said.count(STACK) == (not unregister)
    assert said.count("1 leaked socket from") == 1


@needs_extension
def test_c_code_that_comes_before_our_handler_does_not_keep_a_stuck_process_alive(ended):
    said = ended(f"{STUCK}{WATCH}{WRITE_STACK_FIRST}{KILL_SOON}hold()")
    assert said.count(STACK) == 2


def test_after_stopping_c_code_that_came_before_our_handler_still_does(ended):
    said = ended(f"{WATCH}{WRITE_STACK_FIRST}monitor.stop()\n{KILL}time.sleep(20)")
    assert said.count(STACK) == 1


def test_stopping_restores_the_functions_and_the_default_exactly():
    before = signal.signal, signal.getsignal, signal.getsignal(signal.SIGTERM)
    monitor = cwg.watch(interval=60)
    assert signal.signal is not before[0]
    monitor.stop()
    assert (signal.signal, signal.getsignal, signal.getsignal(signal.SIGTERM)) == before
    assert native_handler(signal.SIGTERM) == 0
    cwg.uninstall()


def test_a_monitor_without_a_last_report_leaves_signals_alone():
    before = signal.signal
    with cwg.Guard() as guard, cwg.watch(interval=60, at_exit=False):
        assert signal.signal is before
        assert guard.installed
    cwg.uninstall()


@pytest.mark.parametrize("run", [False, True])
def test_os_exit_reports_first_and_ends_with_its_status(ended, run):
    watch = "" if run else WATCH
    told = ended(f"{watch}kept = leak()\nos._exit(3)", run=run, code=3)
    assert "1 leaked socket from" in told
    assert "unknown" not in told


def test_what_leaves_the_program_by_os_exit_from_a_signal_handler_reports(ended):
    told = ended(
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(3))\n"
        f"kept = leak()\n{KILL}time.sleep(20)",
        run=True,
        code=3,
    )
    assert "1 leaked socket from" in told


@pytest.mark.parametrize("run", [False, True])
def test_a_watchdog_ends_a_program_that_holds_the_lock_of_the_guard(ended, run):
    began = time.monotonic()
    ended(
        f"{'' if run else WATCH}"
        "from closewait_guard._capture import patch\n"
        "def hang():\n    with patch.install_lock():\n        time.sleep(60)\n"
        "threading.Timer(0.5, os._exit, [3]).start()\nkept = leak()\nhang()",
        run=run,
        code=3,
    )
    assert time.monotonic() - began < 40


def test_what_comes_while_os_exit_reports_has_come_too_late(ended):
    told = ended(
        "import closewait_guard as cwg\n"
        "def interrupt(report):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('reported', file=sys.stderr)\n"
        "cwg.watch(reporters=[interrupt])\n"
        "signal.signal(signal.SIGINT, lambda *_: print('handled', file=sys.stderr))\nos._exit(3)",
        code=3,
    )
    assert told == "reported\n"


def test_the_functions_that_end_a_process_are_what_they_were_but_for_the_report(ended):
    told = ended(
        "import inspect, pickle\n"
        "before = {name: getattr(os, name) for name in ('_exit', 'execv', 'execve')}\n"
        f"{WATCH}"
        "for name, found in before.items():\n"
        "    ours = getattr(os, name)\n"
        "    assert ours is not found\n"
        "    assert inspect.signature(ours) == inspect.signature(found)\n"
        "    assert (ours.__name__, ours.__module__) == (found.__name__, found.__module__)\n"
        "    assert pickle.loads(pickle.dumps(ours)) is ours\n"
        "    assert (ours in os.supports_fd) == (found in os.supports_fd)\n"
        "    for arguments in ((), ('no number',), (1, 2, 3, 4)):\n"
        "        for function in (ours, found):\n"
        "            try:\n                function(*arguments)\n"
        "            except (TypeError, OSError) as error:\n"
        "                print(error, file=sys.stderr)\n"
        "print('stop', file=sys.stderr)\n"
        "monitor.stop()\n"
        "for name, found in before.items():\n"
        "    assert getattr(os, name) is found is getattr(sys.modules['posix'], name)\n"
        "assert len([each for each in os.supports_fd if each.__name__ == 'execve']) == 1",
        code=0,
    )
    messages = [
        line
        for line in told.partition("stop\n")[0].splitlines()
        if "arg" in line or "integer" in line or "directory" in line
    ]
    assert len(messages) >= 12
    assert messages[::2] == messages[1::2]


def test_a_child_that_is_forked_without_the_monitor_ends_in_silence(ended):
    told = ended(
        f"{WATCH}kept = leak()\nbefore = os._exit\n"
        "if not os.fork():\n    os._exit(0 if os._exit is not before else 4)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))",
        code=0,
    )
    assert len(reports_in(told)) == 1


@pytest.mark.parametrize("target", ["/bin/true", "sys.executable"])
def test_what_exec_replaces_has_reported_before(ended, target):
    target = repr(target) if target.startswith("/") else target
    told = ended(
        "if sys.argv[1:]:\n    kept = leak()\n    sys.exit()\n"
        f"kept = leak()\nos.execv({target}, [{target}, __file__, 'again'])",
        run=True,
        code=0,
    )
    shown = " ".join(told.split())
    assert len(reports_in(told)) == 1
    number = 2 if "python" in target or "sys" in target else 1
    assert f" {number} leaked socket" in shown
    assert shown.count("became another program by exec") == 1
    assert "unknown" not in shown


def test_exec_that_fails_leaves_the_program_as_it_was(ended):
    told = ended(
        "for _ in range(2):\n"
        "    try:\n        os.execvp('no-such-program-anywhere', ['x'])\n"
        "    except FileNotFoundError:\n        print('not found', file=sys.stderr)\n"
        "    try:\n        os.execv('/', ['x'])\n"
        "    except PermissionError:\n        print('refused', file=sys.stderr)\n"
        "kept = leak()\ntry:\n    os.execv('/', ['x'])\nexcept PermissionError:\n    pass\n"
        "for each in kept:\n    each.close()\n",
        run=True,
        code=0,
    )
    assert told.count("not found") == told.count("refused") == 2
    assert len(reports_in(told)) == 1
    assert "closewait-guard: no leaks (0 sockets" in told


def test_a_child_that_becomes_another_program_at_once_says_nothing(ended):
    told = ended(
        "kept = leak()\n"
        "if not os.fork():\n    os.execlp('true', 'true')\nos.wait()\n"
        "import pty\npty.spawn(['true'])\nos.spawnlp(os.P_WAIT, 'true', 'true')",
        run=True,
        code=0,
    )
    assert "\n1 leaked socket from 1 place." in told
    assert "unknown" not in told


def test_os_exit_in_an_exit_function_reports(ended):
    told = ended("import atexit\natexit.register(os._exit, 3)\nkept = leak()", run=True, code=3)
    assert "\n1 leaked socket from 1 place." in told
    assert "unknown" not in told


def test_what_ended_long_ago_has_leaked_though_a_thread_closes_it_at_the_end():
    with cwg.Guard() as guard, socket.create_server(("127.0.0.1", 0)) as server:
        pairs = [(socket.create_connection(server.getsockname()), server.accept()[0]) for _ in "12"]
        pairs[0][1].close()
        time.sleep(0.6)
        pairs[1][1].close()
        numbers = [ours.fileno() for ours, _ in pairs]
        closer = threading.Timer(0.1, lambda: [ours.close() for ours, _ in pairs])
        closer.start()
        report = check_at_end(lambda: guard.check(0))
        closer.join()
    leaks = {leak.observation.fd for leak in report.leaks}
    assert leaks & set(numbers) == {numbers[0]}
