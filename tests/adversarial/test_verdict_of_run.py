"""`run --fail-on-leak` knows how each process ends, whatever it does, or says that it does not."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from closewait_guard.commands._verdicts import Verdicts
from command_line import COMMAND, call, environment

LEAK = """
import os, signal, socket, subprocess, sys, time

def leak():
    global server, kept
    server = socket.create_server(("127.0.0.1", 0))
    kept = socket.create_connection(server.getsockname())
    server.accept()[0].close()
"""
LEAKED, UNKNOWN = 86, 87
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may")
# The launcher, but not as patient.
HASTY = """
import sys
from closewait_guard.commands import _verdicts, main
_verdicts._MAX_SECONDS = 0.5
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def run(tmp_path):
    """Run a program that can leak under `run --fail-on-leak`."""

    def run(source, *options, code, prefix=(), command=COMMAND, **variables):
        path = tmp_path / "program.py"
        path.write_text(LEAK + source)
        target = [*prefix, path]
        options = ("--no-at-exit", *options)
        return call(
            "run",
            "--fail-on-leak",
            *options,
            "--",
            *target,
            command=command,
            code=code,
            **variables,
        )

    return run


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("leak(); os.setgid(65534); os.setuid(65534)", marks=as_root, id="other user"),
        pytest.param("leak(); os.chroot(folder)", marks=as_root, id="other root"),
        pytest.param("leak(); os.chdir('/')", id="other directory"),
        pytest.param("os.closerange(3, 4096); leak()", id="no descriptor it knows"),
        pytest.param("leak(); os.environ.clear()", id="no environment"),
        pytest.param("leak(); signal.signal(signal.SIGPIPE, signal.SIG_DFL)", id="deadly pipes"),
        pytest.param("leak(); socket.setdefaulttimeout(5)", id="timeout"),
        pytest.param(
            "os.dup2(0, 1); os.dup2(0, 2); os.closerange(0, 3); leak()", id="no standard streams"
        ),
    ],
)
def test_a_leak_is_known_wherever_the_program_goes(run, source):
    run(f"folder = os.path.dirname(__file__)\n{source}", code=LEAKED)


UNDESCRIBABLE = """
import closewait_guard._inspect.scanner as observe
real, odd = observe.endpoint_of, socket.socket()

def fails(sock, fd):
    if sock is odd:
        raise RuntimeError("not this one")
    return real(sock, fd)

observe.endpoint_of = fails
"""


def test_whether_a_socket_that_cannot_be_looked_at_has_leaked_is_unknown(run):
    done = run(UNDESCRIBABLE, code=UNKNOWN)
    assert done.stderr.count("leaks unknown: ") == 1
    assert done.stderr.endswith(" could not report: looking at 1 socket has failed\n")
    run(UNDESCRIBABLE + "odd.close()", code=0)
    run(UNDESCRIBABLE + "leak()", code=LEAKED)


FAILS = """
def fails(*_, **__):
    raise RuntimeError("broken")
"""
# A copy that a child keeps open, so that there is something to look for in it.
COPY = """
server = socket.create_server(("127.0.0.1", 0))
kept = socket.create_connection(server.getsockname())
child = os.fork()
if child == 0:
    time.sleep(0.3)
    os._exit(0)
kept.close()
"""


@pytest.mark.parametrize(
    ("source", "why"),
    [
        pytest.param(
            "import closewait_guard._processes as p; p.find_copies_in_children = fails" + COPY,
            "what child processes keep open: the search failed (broken)",
            id="children",
            marks=linux,
        ),
        pytest.param(
            "import closewait_guard._descriptors as d; d.sockets_besides = lambda _: None",
            "the open descriptors could not be listed",
            id="descriptors",
        ),
        pytest.param(
            "import closewait_guard._holders.libraries as l; l.Pools._uses = fails",
            "what waits in pools: asking them has failed",
            id="pools",
        ),
        pytest.param(
            "from closewait_guard import _api; _api._launched._registry.on_error()",
            "recording sockets has failed (1 time)",
            id="records",
        ),
        pytest.param(
            "import closewait_guard._signal.early_looks as l; l.EarlyLooks.before_exit_functions = "
            "fails",
            "what the end of the program has closed: a scan failed (RuntimeError: broken)",
            id="early looks",
        ),
    ],
)
def test_what_could_not_be_looked_at_may_have_leaked(run, source, why):
    program = f"{FAILS}{source}"
    done = run(program, code=UNKNOWN)
    assert f"could not report: {why}\n" in done.stderr
    run(f"{program}\nleak()", code=LEAKED)


def test_dropped_sockets_of_which_no_record_is_kept_have_leaked(run):
    run("socket.socket()", code=LEAKED)
    run("socket.socket()", "--dropped-kept", "0", code=LEAKED)


@pytest.mark.parametrize(
    "start",
    [
        "subprocess.run([sys.executable, '-c', child], check=True)",
        "subprocess.run([sys.executable, '-c', child], check=True, close_fds=False)",
        "subprocess.run([sys.executable, '-c', child], check=True, start_new_session=True)",
        "os.waitpid(os.posix_spawn(sys.executable, [sys.executable, '-c', child], os.environ), 0)",
        "os.waitpid(os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, '-c', child]), 0)",
        "os.closerange(3, 4096); subprocess.run([sys.executable, '-c', child], check=True)",
    ],
)
def test_a_leak_of_a_program_that_the_program_starts_is_known(run, start):
    child = LEAK + "leak()"
    run(f"child = {child!r}\n{start}", code=LEAKED)
    run(f"child = 'import socket; socket.socket().close()'\n{start}", code=0)


def test_what_a_program_has_left_open_before_it_becomes_another_is_known(run):
    leak, clean = LEAK + "leak()", "import socket; socket.socket().close()"
    for before, after, code in ((clean, leak, LEAKED), (leak, clean, LEAKED), (clean, clean, 0)):
        become = f"os.execv(sys.executable, [sys.executable, '-c', {after!r}])"
        done = run(f"{before}\nimport os, sys\n{become}", code=code)
        assert "unknown" not in done.stderr
    unguarded = f"os.execv(sys.executable, [sys.executable, '-I', '-c', {clean!r}])"
    done = run(f"{clean}\nimport os, sys\n{unguarded}", code=UNKNOWN)
    assert "was not guarded: it has -I" in done.stderr


NATIVE = '__import__("ctypes").CDLL(None)'

FORK = """
def fork(work):
    pid = os.fork()
    if pid:
        return pid
    work()
    sys.exit()
"""


def test_a_leak_of_a_forked_worker_is_known_also_of_its_child(run):
    run(FORK + "os.waitpid(fork(leak), 0)", code=LEAKED)
    run(FORK + "os.waitpid(fork(lambda: os.waitpid(fork(leak), 0)), 0)", code=LEAKED)
    run(FORK + "os.waitpid(fork(lambda: socket.socket().close()), 0)", code=0)


@pytest.mark.parametrize(
    "end",
    [
        "leak(); os._exit(0)",
        "leak(); os.execvp('true', ['true'])",
        "leak(); os.execv(sys.executable, [sys.executable, '-c', 'pass'])",
        FORK + "os.waitpid(fork(lambda: (leak(), os._exit(0))), 0)",
        FORK + "os.waitpid(fork(lambda: (leak(), os.execvp('true', ['true']))), 0)",
    ],
)
def test_a_leak_is_known_of_a_process_that_ends_without_exit_functions(run, end):
    run(end, code=LEAKED)
    done = run(end.replace("leak()", "socket.socket().close()"), code=0)
    assert "unknown" not in done.stderr


@pytest.mark.parametrize(
    "end",
    [
        f"leak(); {NATIVE}._exit(0)",
        f"leak(); {NATIVE}.execl(b'/bin/true', b'true', None)",
        f"{NATIVE}.execl(b'/bin/true', b'true', None)",
        FORK + f"os.waitpid(fork(lambda: (leak(), {NATIVE}._exit(0))), 0)",
        FORK + "os.waitpid(fork(lambda: (leak(), os.kill(os.getpid(), signal.SIGKILL))), 0)",
        f"child = 'import os, socket; socket.socket(); {NATIVE}._exit(0)'\n"
        "subprocess.run([sys.executable, '-c', child])",
    ],
)
def test_a_process_with_sockets_that_ends_in_silence_is_reported(run, end):
    done = run(end, code=UNKNOWN)
    [sentence] = done.stderr.splitlines()
    assert sentence.startswith("closewait-guard: leaks unknown: process ")
    assert sentence.endswith(" ended without a last report (by a signal, or in native code)")


@pytest.mark.parametrize(
    "start",
    [
        "subprocess.run(['true'], preexec_fn=lambda: None)",
        "os.waitpid(os.spawnvp(os.P_NOWAIT, 'true', ['true']), 0)",
        FORK + "os.waitpid(fork(lambda: os._exit(0)), 0)",
        "subprocess.run([sys.executable, '-c', 'import os; os._exit(0)'])",
        "import multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(2) as pool:\n"
        "        pool.map(abs, range(10))",
    ],
)
def test_a_child_that_never_opens_a_socket_has_nothing_to_say(run, start):
    assert run(start, code=0).stderr == ""


UNGUARDED = {
    "-I": "subprocess.run([sys.executable, '-I', '-c', 'pass'])",
    "-E": "subprocess.run([sys.executable, '-W', 'error', '-Ec', 'pass'])",
    "-S": "subprocess.run(['sh', '-c', f'{sys.executable} -S -c pass; true'])",
    "exec": "os.execv(sys.executable, [sys.executable, '-I', '-c', 'pass'])",
    "empty": "subprocess.run([sys.executable, '-c', 'pass'], env={})",
    "env -i": "subprocess.run(['env', '-i', sys.executable, '-c', 'pass'])",
    "PYTHONPATH": "os.environ['PYTHONPATH'] = ''; subprocess.run([sys.executable, '-c', 'pass'])",
}


@linux
@pytest.mark.parametrize("how", UNGUARDED)
def test_a_python_that_the_program_starts_without_the_guard_is_reported(run, how):
    done = run(UNGUARDED[how], code=UNKNOWN)
    [sentence] = done.stderr.splitlines()
    flag = {"exec": "-I"}.get(how, how)
    why = f"it has {flag}" if flag.startswith("-") else "its environment does not have the PYTHON"
    assert re.match(
        rf"closewait-guard: leaks unknown: process \d+ was not guarded: {why}", sentence
    )
    assert f"({sys.executable} " in sentence
    # A leak that is known comes first.
    run(f"leak(); {UNGUARDED[how]}" if how != "exec" else "leak()", code=LEAKED)


DAEMON = """
import time

if not os.fork():
    if not os.fork():
        work = "import time; time.sleep({seconds})"
        os.execv(sys.executable, [sys.executable, "-I", "-c", work])
    os._exit(0)
os.wait()
time.sleep({wait})
"""


@linux
@pytest.mark.parametrize(("seconds", "wait"), [(1, 3), (3, 0)], ids=["before", "after"])
def test_a_daemon_without_the_guard_is_reported_whether_it_ends_before_the_program_or_after_it(
    run, seconds, wait
):
    done = run(DAEMON.format(seconds=seconds, wait=wait), code=UNKNOWN)
    assert "was not guarded: it has -I" in done.stderr


@linux
@pytest.mark.parametrize("prefix", [(sys.executable, "-I"), ("env", "-i", sys.executable)])
def test_a_program_that_is_not_guarded_is_reported_beside_a_child_that_is(run, prefix):
    source = "subprocess.run([sys.executable, '-c', 'pass'])"
    done = run(source, code=UNKNOWN, prefix=prefix)
    assert "was not guarded: it" in done.stderr


@linux
def test_an_interpreter_that_lacks_the_package_is_reported(run, tmp_path):
    (tmp_path / "closewait_guard").mkdir()
    (tmp_path / "closewait_guard" / "__init__.py").write_text("raise SyntaxError('broken')")
    path = f"os.environ['PYTHONPATH'] + os.pathsep + {str(tmp_path)!r}"
    source = (
        f"subprocess.run([sys.executable, '-c', 'pass'], env=os.environ | {{'PYTHONPATH': {path}}})"
    )
    done = run(source, code=UNKNOWN)
    assert "was not guarded: closewait_guard cannot be imported: broken" in done.stderr


def test_settings_that_a_child_refuses_are_reported(run):
    start = "subprocess.run([sys.executable, '-c', 'pass'])"
    source = f"os.environ['CLOSEWAIT_GUARD_GRACE'] = 'x'; {start}"
    done = run(source, code=UNKNOWN)
    assert re.search(r"was not guarded: .*GRACE: expected a non-negative number", done.stderr)
    done = run("print('started')", code=2, CLOSEWAIT_GUARD_GRACE="x")
    assert done.stdout == ""


def test_a_command_that_is_no_python_is_not_held_against_the_program(run):
    run("subprocess.run(['env', '-i', 'sh', '-c', 'ls; true'])", code=0)
    done = run("pass", code=UNKNOWN, prefix=("sh", "-c", "exit 0"))
    assert "no process has reported: TARGET is not Python" in done.stderr
    run("leak()", code=LEAKED, prefix=("sh", "-c", '"$@"; exit 0', "sh", sys.executable))
    run("pass", code=0, prefix=("sh", "-c", '"$@"; exit 0', "sh", sys.executable))


# A thread sees after a while that its peer has closed, just as the program ends.
READS_IN_A_THREAD = """
import threading, weakref

def read(sock):
    sock.recv(1)
    time.sleep(seconds)
    sock.close()

ours, theirs = socket.socketpair()
threading.Thread(target=read, args=(ours,), daemon=True).start()
ends_with_finalizers = weakref.finalize(ours, print)
"""


@pytest.mark.parametrize("end", ["", "os._exit(0)"])
def test_what_a_thread_is_about_to_close_as_the_program_ends_has_not_leaked(run, end):
    run(f"seconds = 0.1{READS_IN_A_THREAD}theirs.close(); {end}", code=0)


@pytest.mark.parametrize("end", ["", "os._exit(0)"])
def test_what_a_thread_keeps_open_until_the_program_ends_has_leaked(run, end):
    run(f"seconds = 60{READS_IN_A_THREAD}theirs.close(); {end}", code=LEAKED)


def test_a_failure_of_the_program_comes_first(run):
    assert "without a last report" in run(f"leak(); {NATIVE}._exit(3)", code=3).stderr
    assert run("sys.exit(4)", code=4).stderr == ""


def test_a_report_that_fails_is_reported(run):
    source = """
from closewait_guard._pipeline import Pipeline
def check(self, since, *, is_last):
    raise ValueError("no idea\\n::error::")
Pipeline.check = check
"""
    done = run(source, code=UNKNOWN)
    first, second = done.stderr.splitlines()
    assert "cannot report: ValueError: no idea" in first
    assert "could not report: ValueError: no idea" in second


def test_a_child_that_outlives_the_launcher_is_reported(run):
    source = FORK + "print(fork(lambda: (leak(), os.close(1), os.close(2), time.sleep(60))))"
    begun = time.monotonic()
    done = run(source, code=UNKNOWN, command=[sys.executable, "-c", HASTY])
    assert time.monotonic() - begun < 5
    pid = int(done.stdout)
    os.kill(pid, signal.SIGKILL)
    assert done.stderr == f"closewait-guard: leaks unknown: process {pid} still running\n"


def test_a_child_that_ends_soon_after_the_program_is_waited_for(run):
    source = FORK + "fork(lambda: (time.sleep(0.5), leak()))"
    run(source, code=LEAKED)


def test_a_child_that_has_only_just_been_started_is_waited_for(run):
    child = LEAK + "leak()"
    run(f"subprocess.Popen([sys.executable, '-c', {child!r}])", code=LEAKED)
    streams = "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"
    slow = "import time; time.sleep(60)"
    source = f"""
folder = os.path.dirname(__file__)
open(os.path.join(folder, "json.py"), "w").write({slow!r})
path = os.environ["PYTHONPATH"] + os.pathsep + folder
command = [sys.executable, "-c", "pass"]
print(subprocess.Popen(command, {streams}, env=os.environ | {{"PYTHONPATH": path}}).pid)
"""
    done = run(source, code=UNKNOWN, command=[sys.executable, "-c", HASTY])
    os.kill(int(done.stdout), signal.SIGKILL)
    assert done.stderr.endswith("still running\n")


def test_a_signal_ends_the_wait_for_children(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(LEAK + FORK + "print(fork(lambda: (os.close(1), os.close(2), time.sleep(60))))")
    command = [*COMMAND, "run", "--fail-on-leak", "--no-at-exit", path]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()
    ) as running:
        child = int(running.stdout.readline())
        # Until it has noticed that the program has ended, what it is sent goes to that.
        time.sleep(0.5)
        begun = time.monotonic()
        running.terminate()
        assert running.wait(60) == UNKNOWN
        assert time.monotonic() - begun < 5
        os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
@as_root
def test_in_another_network_the_inherited_line_serves(run):
    shell = ("sh", "-c", 'unshare -n "$@"; exit 0', "sh", sys.executable)
    alone = "import ctypes; ctypes.CDLL(None).unshare(0x40000000); kept = socket.socketpair()[0]; "
    run(alone + "kept", code=LEAKED, prefix=shell)
    run("pass", code=0, prefix=shell)
    # There it cannot be reached by name, and the parent's line is shared.
    run(FORK + alone + "os.waitpid(fork(lambda: os._exit(0)), 0)", code=LEAKED)


def test_nothing_is_written_into_a_file_that_has_got_the_number_of_the_line(run, tmp_path):
    source = f"""
os.chdir({str(tmp_path)!r})
lines = [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2]
os.closerange(3, 4096)
for fd in range(3, max(lines) + 2):
    assert os.open(f"file{{fd}}", os.O_RDWR | os.O_CREAT) == fd
if os.fork() == 0:
    sys.exit()
os.wait()
leak()
"""
    run(source, code=LEAKED)
    files = list(tmp_path.glob("file*"))
    assert len(files) > 10
    assert not any(file.stat().st_size for file in files)


def test_the_line_is_no_socket_of_the_program(run):
    source = """
import ctypes  # libffi may keep a descriptor of its own open from here on.
before = os.listdir("/proc/self/fd")
import closewait_guard
guard = closewait_guard.install()
assert guard.scan().coverage.native == 0, guard.scan()
with closewait_guard.no_leaks(0):
    pid = os.fork()
    if pid == 0:
        assert guard.scan(full=True).coverage.native == 0
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
assert os.listdir("/proc/self/fd") == before, before
"""
    run(source, code=0)


def test_the_program_outlives_a_launcher_that_is_killed(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        "import os, signal, socket, sys\n"
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
        "socket.socketpair()\n"
        "print('on it goes', flush=True)\n"
        "import atexit; atexit._run_exitfuncs(); print('ended well')\n"
    )
    command = [*COMMAND, "run", "--fail-on-leak", "--no-at-exit", path]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment(), text=True, **streams) as running:
        assert running.stdout.readline() == "up\n"
        running.kill()
        running.wait(60)
        out, error = running.communicate(timeout=60)
    assert out == "on it goes\nended well\n"
    assert "cannot report to `closewait-guard run` whether it has leaked" in error


@pytest.mark.parametrize(
    "message", [b"", b"1 leaked\n", b"x" * 100_000, b"0" * 32 + b" 1 leaked\n"]
)
def test_a_process_without_the_token_is_not_believed(message):
    with Verdicts(["true"]) as verdicts:
        strangers = [socket.socket(socket.AF_UNIX) for _ in range(500)]
        verdicts.listen(os.getpid())
        for stranger in strangers:
            stranger.connect(verdicts._address)
            stranger.settimeout(0)
            with suppress(OSError):
                stranger.send(message)
        verdicts.stop_listening(lambda: False)
        assert not verdicts.leaked
        assert not verdicts.has_messages
        for stranger in strangers:
            stranger.close()


def test_no_file_is_needed(run):
    run("leak()", code=LEAKED, TMPDIR="/nowhere")


def test_many_processes_may_report(run):
    source = FORK + "for _ in range(60):\n    os.waitpid(fork(lambda: None), 0)\n"
    run(source, code=0)


TAKE_ALL = """
import resource
leak()
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
taken = []
try:
    while True:
        taken.append(socket.socket())
except OSError:
    pass
"""


def test_without_a_descriptor_left_the_verdict_is_known_and_reported(run, tmp_path):
    done = run(TAKE_ALL, "--at-exit", code=LEAKED)
    assert "1 LEAKED" in done.stderr


def test_a_worker_that_was_forked_without_a_descriptor_left_reports(run):
    source = f"""
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
{FORK}
def work():
    os.closerange(taken[0], taken[9])
    leak()

os.waitpid(fork(work), 0)
"""
    run(source, code=LEAKED, prefix=("sh", "-c", 'ulimit -n 40; exec "$@"', "sh", sys.executable))


def test_without_a_descriptor_left_reports_come_at_intervals_and_upon_a_signal(run):
    options = ("--interval", "0.3", "--signal", "SIGUSR1", "--grace", "0")
    source = TAKE_ALL + "time.sleep(0.5)\nos.kill(os.getpid(), signal.SIGUSR1)\ntime.sleep(0.4)\n"
    done = run(source, *options, code=LEAKED)
    # One when there was none left, two at their time, one upon the signal.
    assert done.stderr.count("1 LEAKED") >= 3
    assert "Traceback" not in done.stderr


def test_no_thread_of_the_guard_is_left_when_the_interpreter_ends(run):
    source = """
import threading

class Last:
    def __del__(self, threads=threading.enumerate, write=os.write):
        write(1, repr([thread.name for thread in threads()]).encode())

last = Last()
"""
    done = run(source, "--interval", "60", "--signal", "SIGUSR1", code=0)
    assert done.stdout == "['MainThread']"


def test_a_supervisor_whose_workers_end_without_a_report_says_so(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        LEAK
        + FORK
        + """
pids = [fork(lambda: (leak(), os.kill(os.getpid(), signal.SIGKILL))) for _ in range(2)]
pids += [fork(lambda: os._exit(0)), fork(lambda: socket.socket().close())]
for pid in pids:
    os.waitpid(pid, 0)
"""
    )
    done = call("run", path, code=0)
    assert re.search(r"unknown: 2 processes \(\d+, \d+\) ended without a last report", done.stderr)


@linux
def test_an_unguarded_python_is_noticed_however_many_interpreters_there_are(run, tmp_path):
    many, beside = tmp_path / "many", tmp_path / "beside"
    many.mkdir()
    for number in range(100):
        (many / f"python{number}").touch(0o755)
    subprocess.run([sys.executable, "-m", "venv", "--copies", "--without-pip", beside], check=True)
    path = os.pathsep.join([str(many), str(beside / "bin"), os.environ["PATH"]])
    start = f"subprocess.run([{str(beside / 'bin/python')!r}, '-I', '-c', 'pass'], check=True)"
    done = run(start, code=UNKNOWN, PATH=path)
    assert "was not guarded: it has -I" in done.stderr
