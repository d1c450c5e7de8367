"""`run`: the guard is in the program from before its first import, and changes nothing of it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from itertools import pairwise

import pytest

import closewait_guard as cwg
from command_line import COMMAND, Terminal, call, documents, environment
from findings import reports_in

RUN = [*COMMAND, "run"]

# Ends with one connection that the peer has closed.
LEAK = """
import socket
server = socket.create_server(("127.0.0.1", 0))
kept = socket.create_connection(server.getsockname())
server.accept()[0].close()
"""
SELF = """
import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv, "orig_argv": sys.orig_argv[1:], "name": __name__, "path": sys.path,
    "file": globals().get("__file__"), "spec": str(__spec__ and __spec__.name),
    "flags": str(sys.flags), "stdin": sys.stdin.read(), "executable": sys.executable,
    "sitecustomize": getattr(sys.modules.get("sitecustomize"), "__file__", None),
    "usercustomize": getattr(sys.modules.get("usercustomize"), "__file__", None),
    "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
    # Not SigQ: it counts what is queued for all processes of this user. Without SIGTERM, for which
    # the program has no handler and we have one, and 33, which the C library handles in a
    # process that has had a thread.
    "masks": [
        int(line.split()[1], 16) & ~(1 << signal.SIGTERM - 1) & ~(1 << 33 - 1)
        for line in open("/proc/self/status")
        if line.startswith(("SigBlk", "SigIgn", "SigCgt"))
    ],
    "threads": __import__("threading").active_count(),
    "cwd": os.getcwd(), "warnings": __import__("warnings").filters,
}, default=str))
"""


@pytest.fixture
def script(tmp_path):
    def write(source, name="program.py"):
        path = tmp_path / name
        path.write_text(source)
        return path

    return write


def bare(*command, **options):
    """The same, without us."""
    return call(*command, command=[sys.executable], **options)


@pytest.mark.parametrize("form", ["script", "module", "command", "directory"])
def test_the_program_sees_itself_as_without_us(script, tmp_path, form):
    path = script(SELF, "itself.py")
    script(SELF, "__main__.py")
    target = {
        "script": ["itself.py", "a", "--b"],
        "module": ["-m", "itself", "a", "--b"],
        "command": [sys.executable, "-X", "dev", str(path), "--", "-m"],
        "directory": [".", "a"],
    }[form]
    plain = target[1:] if form == "command" else target
    expected = json.loads(bare(*plain, stdin="typed\n", cwd=tmp_path, code=0).stdout)
    seen = json.loads(call("run", "--", *target, stdin="typed\n", cwd=tmp_path, code=0).stdout)
    assert seen == expected


def test_an_existing_sitecustomize_and_usercustomize_are_imported(script, tmp_path):
    script("import sys\nsys.chained = __file__", "sitecustomize.py")
    path = script("import sys; print(sys.chained, sys.modules['sitecustomize'].__file__)")
    done = call("run", path, code=0, PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == [str(tmp_path / "sitecustomize.py")] * 2


def test_a_broken_sitecustomize_breaks_as_without_us(script, tmp_path):
    script("raise RuntimeError('broken')", "sitecustomize.py")
    path = script("print('on it goes')")
    done = subprocess.run(
        [sys.executable, path],
        env=environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    ours = subprocess.run(
        [*RUN, "--no-at-exit", path],
        env=environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert ours.stdout == done.stdout == "on it goes\n"
    # Once for the launcher, which is a Python program like any other.
    assert ours.stderr == done.stderr * 2


def test_the_guard_is_there_before_the_first_import(script):
    script("import socket\nborn = socket.socket()", "early.py")
    path = script("import early\n" + LEAK)
    done = call("run", path, code=0)
    shown = " ".join(done.stderr.split())
    assert "2 leaked sockets from 2 places." in shown
    assert "early.py:2 in <module>" in shown


def test_the_last_report_goes_to_stderr_and_names_the_line(script):
    done = call("run", script(LEAK), code=0)
    assert done.stdout == ""
    assert "\n1 leaked socket from 1 place." in done.stderr
    assert "program.py:4 in <module>" in " ".join(done.stderr.split())


def test_the_last_report_can_be_left_out(script):
    assert call("run", "--no-at-exit", script(LEAK), code=0).stderr == ""


@pytest.mark.parametrize(
    "how", ["sys.exit(3)", "raise SystemExit('message')", "1 / 0", "os._exit(4)"]
)
@pytest.mark.parametrize("options", [[], ["--fail-on-leak"]])
def test_the_exit_code_is_the_programs_own(script, how, options):
    path = script(f"import os, sys\n{LEAK}\n{how}\n")
    expected = subprocess.run(
        [sys.executable, path], env=environment(), capture_output=True
    ).returncode
    ours = subprocess.run([*RUN, *options, path], env=environment(), capture_output=True)
    assert ours.returncode == expected != 0


def test_a_success_with_leaks_exits_with_86_when_asked_to(script):
    assert call("run", "--fail-on-leak", script(LEAK)).returncode == 86
    assert call("run", "--fail-on-leak", script("import socket")).returncode == 0


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_leak_in_a_worker_process_counts(script, method):
    source = f"""
import multiprocessing

def work():
    global server, kept
    {LEAK.strip().replace(chr(10), chr(10) + "    ")}

if __name__ == "__main__":
    worker = multiprocessing.get_context({method!r}).Process(target=work)
    worker.start()
    worker.join()
"""
    done = call("run", "--fail-on-leak", script(source), code=86)
    # A process without sockets is not shown.
    where = " in 1 of 2 processes" if method == "forkserver" else ""
    assert f"\n1 leaked socket from 1 place{where}." in done.stderr
    assert "program.py:8 in work()" in " ".join(done.stderr.split())


def test_python_children_are_guarded_and_those_without_a_leak_are_silent(script):
    child = script(LEAK, "child.py")
    path = script(
        f"import subprocess, sys\nsubprocess.run([sys.executable, {str(child)!r}])\n"
        "subprocess.run([sys.executable, '-c', 'pass'])\n"
    )
    done = call("run", path, code=0)
    assert len(reports_in(done.stderr)) == 1
    assert "\n1 leaked socket from 1 place." in done.stderr
    assert "child.py:4 in <module>" in " ".join(done.stderr.split())


FAMILY = """
import subprocess, sys
here = sys.argv[1]
for _ in range(2):
    subprocess.run([sys.executable, here + "/child.py"])
subprocess.run([sys.executable, "-c", "import socket; socket.socket().close()"])
subprocess.run([sys.executable, "-c", "pass"])
"""


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--fail-on-leak",), 86)])
def test_the_reports_of_all_processes_are_one_merged_by_site(script, tmp_path, options, code):
    script(LEAK, "child.py")
    done = call("run", *options, script(FAMILY), tmp_path, code=code)
    shown = " ".join(done.stderr.split())
    assert len(reports_in(done.stderr)) == 1
    assert "2 leaked sockets from 1 place in 2 of 3 processes." in shown
    assert shown.count("2 LEAKED TCP") == 1
    assert re.search(r" process \d+ \(1\), \d+ \(1\) ", shown)
    assert shown.count("child.py:4 in <module>") == 1


def test_the_report_comes_before_the_end_of_the_program_and_its_process_is_the_launchers(script):
    path = script(LEAK + "import os\nprint(os.getpid())\n")
    command = [*RUN, path]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True
    ) as running:
        assert int(running.stdout.readline()) == running.pid
        assert running.wait(20) == 0
        assert "1 leaked socket from 1 place" in running.stderr.read()


def test_a_program_that_is_killed_has_no_report_and_leaves_no_process(script):
    path = script("print('up', flush=True)\nimport sys; sys.stdin.read()")
    with subprocess.Popen(
        [*RUN, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as running:
        running.stdout.readline()
        running.kill()
        # The process beside it has the same standard error, and no other stream.
        assert b"ended without a last report" in running.stderr.read()


def test_of_a_worker_that_is_killed_the_last_known_state_is_reported(script, tmp_path):
    script(f"{LEAK}\nimport time; time.sleep(60)", "child.py")
    shown = tmp_path / "shown.jsonl"
    path = script(f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, {str(tmp_path / "child.py")!r}])
end = time.monotonic() + 40
while time.monotonic() < end:
    if os.path.exists({str(shown)!r}) and '"verdict":"leaked"' in open({str(shown)!r}).read():
        break
    time.sleep(0.05)
time.sleep(0.5)
child.kill()
child.wait()
""")
    options = ("--interval", "0.3", "--grace", "0.1", "--report", f"json_lines:{shown}")
    done = call("run", "--fail-on-leak", *options, path, code=86)
    text = " ".join(done.stderr.split())
    assert "1 leaked socket from 1 place." in text
    assert re.search(r"Process \d+ is shown as of \d.* when it last reported\.", text)
    assert "leaks unknown: process " in text


KILLED = {
    "report upon a signal": f"{LEAK}\nimport time\nprint('asked', flush=True)\ntime.sleep(60)",
    "look before finalizers": f"""{LEAK}
import time, weakref

class Client:
    pass

def close():
    kept.close()
    print("asked", flush=True)
    time.sleep(60)

client = Client()
weakref.finalize(client, close)
""",
    "look as a loop closes": """
import asyncio, time

async def main():
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    await asyncio.sleep(0.5)
    server.close()
    return writer

kept = asyncio.run(main())
print("asked", flush=True)
time.sleep(60)
""",
}


@pytest.mark.parametrize("how", KILLED)
def test_what_is_found_before_the_last_report_is_known_of_a_worker_that_is_killed(script, how):
    child = script(KILLED[how], "child.py")
    path = script(f"""
import signal, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, {str(child)!r}], stdout=subprocess.PIPE, stderr=subprocess.PIPE
)
child.stdout.readline()
if {how == "report upon a signal"}:
    time.sleep(0.5)
    child.send_signal(signal.SIGUSR1)
    child.stderr.readline()
child.kill()
child.wait()
""")
    done = call("run", "--fail-on-leak", "--signal", "SIGUSR1", "--grace", "0.1", path, code=86)
    shown = " ".join(done.stderr.split())
    assert "1 leaked socket from 1 place." in shown, done.stderr
    assert re.search(r"Process \d+ is shown as of \d.* when it last reported\.", shown)
    assert "leaks unknown: process " in shown


def test_workers_that_a_pool_terminates_as_they_end_report_their_leaks(script):
    source = f"""
import multiprocessing, time

def work(number):
    global server, kept
    {LEAK.strip().replace(chr(10), chr(10) + "    ")}
    time.sleep(1.5)

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(work, range(2), chunksize=1)
"""
    done = call("run", "--fail-on-leak", script(source), code=86)
    shown = " ".join(done.stderr.split())
    assert "2 leaked sockets from 1 place in 2 of 2 processes" in shown
    assert "unknown" not in shown


@pytest.mark.parametrize("options", [[], ["--fail-on-leak"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_ends_the_program_as_without_us(script, options, number):
    path = script("import sys\nprint('up', flush=True)\nsys.stdin.read()")
    command = [*RUN, "--no-at-exit", *options, path]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
        stderr=subprocess.DEVNULL,
    ) as running:
        assert running.stdout.readline() == "up\n"
        running.send_signal(number)
        assert running.wait(10) == -number


def test_a_handler_of_the_programs_own_is_called(script):
    path = script(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('up', flush=True)\ntime.sleep(20)"
    )
    for options in ([], ["--fail-on-leak"]):
        with subprocess.Popen(
            [*RUN, "--no-at-exit", *options, path], stdout=subprocess.PIPE, env=environment()
        ) as running:
            running.stdout.readline()
            running.terminate()
            assert running.wait(10) == 7


def test_ctrl_c_reaches_the_program_once(script):
    path = script(
        "import signal, sys, time\nseen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\nprint('up', flush=True)\n"
        "deadline = time.monotonic() + 20\n"
        "while not seen and time.monotonic() < deadline:\n    time.sleep(0.01)\n"
        "time.sleep(0.3)\nprint('times', len(seen), flush=True)"
    )
    with Terminal(*RUN, "--no-at-exit", "--fail-on-leak", str(path)) as terminal:
        terminal.until("up")
        terminal.type("\x03")
        assert "times 1" in terminal.until("times")
        assert terminal.wait() == 0


def test_a_command_that_is_no_python_is_run_as_it_is():
    done = call("run", "--", "sh", "-c", "echo $0 $@; exit 5", "a", "--help", code=5)
    assert done.stdout == "a --help\n"
    assert done.stderr == ""


def test_sigpipe_is_not_left_ignored():
    shown = call("run", "--", "sh", "-c", "trap '' USR1; grep SigIgn /proc/self/status", code=0)
    ignored = int(shown.stdout.split()[1], 16)
    assert not ignored >> (signal.SIGPIPE - 1) & 1


# Goes on until there are two reports of the leak, but not for ever; prints when it ended.
WAITS_FOR_TWO = (
    LEAK
    + """
import sys, time
_, path, sign = sys.argv
deadline = time.monotonic() + 40
while time.monotonic() < deadline:
    time.sleep(0.05)
    try:
        with open(path) as file:
            if sum(sign in line and line.endswith("\\n") for line in file) >= 2:
                break
    except FileNotFoundError:
        pass
print(time.time())
"""
)


def test_reports_go_to_the_reporters_at_every_interval_and_in_the_end(script, tmp_path):
    done = call(
        "run",
        "--interval",
        "0.5",
        "--grace",
        "0.1",
        "--report",
        "json_lines:leaks.jsonl",
        script(WAITS_FOR_TWO),
        "leaks.jsonl",
        '"verdict":"leaked"',
        code=0,
        cwd=tmp_path,
    )
    reports = documents((tmp_path / "leaks.jsonl").read_text())
    times = [report.taken_at for report in reports]
    ended = float(done.stdout)
    *leaking, last = [report for report in reports if report.leaks]
    assert len(leaking) >= 2
    # That of the end comes when it comes.
    assert all(later - earlier > 0.4 for earlier, later in pairwise(times[:-1]))
    assert ended < last.taken_at
    for report in (*leaking, last):
        assert report.leaks[0].observation.record.site.lineno == 4
    assert "1 leaked" in done.stderr


# Once on a signal, and once in the end.
REPORTS_TWICE = f"""{LEAK}
import os, signal, sys, time
time.sleep(0.1)
os.kill(os.getpid(), signal.SIGUSR1)
while not os.path.exists("shown") or os.path.getsize("shown") == 0:
    time.sleep(0.01)
"""


def test_json_on_stderr_is_all_of_the_report_on_a_signal_and_of_the_last(script, tmp_path):
    run = ["sh", "-c", 'exec "$@" 2>shown', "sh", *COMMAND, "run"]
    options = ["--signal", "SIGUSR1", "--grace", "0.01"]
    options += ["--report", "json_lines:examples=1:/dev/stderr"]
    call(*options, script(REPORTS_TWICE), command=run, code=0, cwd=tmp_path)
    on_signal, last = documents((tmp_path / "shown").read_text())
    for report in (on_signal, last):
        assert [each.observation.record.site.lineno for each in report.leaks] == [4]


def test_a_reporter_that_writes_elsewhere_gets_both_reports_and_stderr_has_the_text(
    script, tmp_path
):
    options = ["--signal", "SIGUSR1", "--grace", "0.01", "--report", "json_lines:shown"]
    done = call("run", *options, script(REPORTS_TWICE), code=0, cwd=tmp_path)
    assert len(documents((tmp_path / "shown").read_text())) == 2
    assert done.stderr.count("1 leaked socket from 1 place") == 2


def test_with_an_interval_alone_the_reports_go_to_stderr(script, tmp_path):
    run = ["sh", "-c", 'exec "$@" 2>shown', "sh", *COMMAND, "run"]
    sign = "1 leaked socket from"
    arguments = ["--interval", "0.3", "--grace", "0.1", script(WAITS_FOR_TWO), "shown", sign]
    call(*arguments, command=run, code=0, cwd=tmp_path, CLOSEWAIT_GUARD_HEARTBEAT="0")
    # Two at their interval, and one in the end.
    assert (tmp_path / "shown").read_text().count(sign) >= 3


def test_reporters_of_the_settings_are_reported(script, tmp_path):
    path = script(LEAK)
    name = f"json_lines:{tmp_path / 'shown.jsonl'}"
    call("run", path, code=0, CLOSEWAIT_GUARD_REPORTERS=name)
    assert len(documents((tmp_path / "shown.jsonl").read_text())) == 1


def test_settings_reach_the_program(script):
    done = call("run", "--stack-depth", "0", script(LEAK), code=0)
    assert "at an unknown place: no stack is recorded with stack_depth=0" in done.stderr


def test_a_program_with_a_guard_of_its_own_is_not_disturbed(script):
    source = LEAK + "import closewait_guard\nguard = closewait_guard.install(grace=3.0)\n"
    done = call("run", "--grace", "2", script(source), code=0)
    assert "1 leaked" in done.stderr


def test_an_interpreter_without_the_package_runs_unguarded_and_says_so(script, tmp_path):
    hide = "import sys\nsys.modules['closewait_guard'] = None\n"
    site = tmp_path / "hidden"
    site.mkdir()
    (site / "sitecustomize.py").write_text("")
    other = tmp_path / "python-elsewhere"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    other.chmod(0o755)
    # Without site-packages there is no package to be found, but sitecustomize is asked for.
    path = script(hide + "import site; site.execsitecustomize(); print('on it goes')")
    done = call("run", "--", other, path, code=0)
    assert done.stdout == "on it goes\n"
    assert "was not guarded: closewait_guard cannot be imported" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (
            ["--interval", "0", "x.py"],
            2,
            "run --interval: expected a positive number of seconds, got '0'",
        ),
        (
            ["--grace", "soon", "x.py"],
            2,
            "run --grace: expected a non-negative number of seconds, got 'soon'",
        ),
        (
            ["--report", "nobody", "x.py"],
            2,
            "run --report: unknown reporter 'nobody'",
        ),
        (["--report", "json_lines:/nowhere/x", "x.py"], 2, "cannot be opened"),
        (["--signal", "SIGNOTHING", "x.py"], 2, "run --signal: expected the name"),
        ([], 2, "missing TARGET"),
        (["no-such-command"], 127, "command not found: no-such-command"),
        (["--fail-on-leak", "no-such-command"], 127, "command not found: no-such-command"),
        (["/etc"], 126, "/etc: Permission denied"),
    ],
)
def test_a_bad_start_gets_one_sentence(arguments, code, sentence):
    done = call("run", *arguments, code=code)
    assert sentence in done.stderr
    assert done.stderr.startswith("closewait-guard: ")
    assert done.stderr.count("\n") == 1


def test_pytest_is_guarded_with_the_outcome_it_has(script, tmp_path):
    script(
        "import socket\n"
        "def test_leaks():\n"
        "    global server, kept\n"
        "    server = socket.create_server(('127.0.0.1', 0))\n"
        "    kept = socket.create_connection(server.getsockname())\n"
        "    server.accept()[0].close()\n",
        "test_it.py",
    )
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = call("run", "--fail-on-leak", "--", "pytest", *options, cwd=tmp_path, code=86)
    assert "1 passed" in done.stdout
    assert "test_it.py:5 in test_leaks()" in done.stderr


def test_temporary_files_are_removed(script, tmp_path):
    for path in (script(LEAK), script("import os\nos.kill(os.getpid(), 15)", "dies.py")):
        call("run", "--fail-on-leak", path, TMPDIR=str(tmp_path))
    assert not list(tmp_path.glob("closewait-guard-*"))


def test_the_reports_name_the_line_whatever_directory_the_program_goes_to(script, tmp_path):
    path = script("import os\nos.chdir('/')\n" + LEAK)
    call("run", "--report", "json_lines:shown.jsonl", path, cwd=tmp_path, code=0)
    (report,) = documents((tmp_path / "shown.jsonl").read_text())
    assert report.findings[0].verdict in (cwg.Verdict.LEAKED, cwg.Verdict.CLOSING)


SHARING = """
import socket, time
server = socket.create_server(("127.0.0.1", 0))
import closewait_guard as cwg

assert cwg.scan(full=True).coverage.adopted == 0, "before install()"
reports = []
guard = cwg.install(grace=0.01, reporters=[reports.append]{others})
assert guard is cwg.install() and guard.settings.grace == 0.01
kept = socket.create_connection(server.getsockname())
server.accept()[0].close()
time.sleep(0.1)
report = cwg.report()
assert reports == [report] and len(report.leaks) == 1
assert report.coverage.adopted == 0, report
before = [each.record for each in cwg.scan(full=True).observations]
assert "program.py" in str(before[0].site), before
{after}
cwg.uninstall()
assert not guard.installed
assert cwg.scan().coverage.adopted == 0, "after uninstall()"
late = socket.socket()
assert cwg.scan(full=True).open_sockets == 3
"""


@pytest.mark.parametrize("others", ["", ", stack_depth=5", ", context=dict"])
def test_the_program_reads_the_records_of_the_guard_that_run_has_made(tmp_path, others):
    path = tmp_path / "program.py"
    path.write_text(SHARING.format(others=others, after=""))
    done = call("run", "--fail-on-leak", path, code=86)
    shown = " ".join(done.stderr.split())
    assert "2 leaked sockets from 2 places." in shown, done.stderr
    assert "adopted" not in done.stderr
    assert "before install()" not in done.stderr


def test_a_monitor_of_the_program_is_its_own_under_run(tmp_path):
    path = tmp_path / "program.py"
    watch = "cwg.watch(0.05, grace=0.01)\nend = time.monotonic() + 30\n"
    watch += "while len(reports) < 3 and time.monotonic() < end:\n    time.sleep(0.01)\n"
    watch += "assert len(reports) >= 3 and reports[-1].leaks"
    path.write_text(SHARING.format(others="", after=watch))
    done = call("run", "--fail-on-leak", path, code=86)
    shown = " ".join(done.stderr.split())
    assert "2 leaked sockets from 2 places." in shown, done.stderr


@pytest.mark.parametrize(
    ("watch", "count"),
    [
        ("cwg.watch()", 1),
        ("with cwg.watch(grace=1): pass", 2),
        ("cwg.watch(reporters=['text'])", 2),
    ],
)
@pytest.mark.parametrize("end", ["", "import os; os.kill(os.getpid(), 15)", "os._exit(0)"])
def test_a_monitor_that_only_prints_leaves_the_last_report_to_run(script, watch, count, end):
    path = script(f"import os\nimport closewait_guard as cwg\n{watch}\n{LEAK}\n{end}\n")
    done = call("run", "--grace", "0", path)
    assert len(reports_in(done.stderr)) == count, done.stderr
    assert "1 leaked socket from 1 place" in done.stderr


def test_a_monitor_reports_its_last_where_run_does_not(script):
    path = script(f"import closewait_guard as cwg\ncwg.watch(at_exit=True, grace=20)\n{LEAK}")
    done = call("run", "--no-at-exit", path, code=0)
    assert done.stderr.count("1 closing connection") == 1, done.stderr


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("SIGUSR1", ["gunicorn", "app:app"]),
        ("SIGTTIN", ["/usr/bin/uvicorn", "app:app"]),
        ("SIGHUP", ["-m", "hypercorn", "app:app"]),
        ("SIGUSR1", ["python3", "-m", "celery", "-A", "app", "worker"]),
    ],
)
def test_a_signal_that_the_server_uses_itself_is_refused_before_it_starts(name, target):
    done = call("run", "--signal", name, *target, code=2)
    assert f" uses {name} to " in done.stderr
    assert ("; use --interval instead" in done.stderr) == ("celery" in target)
    assert call("run", *target, code=2, CLOSEWAIT_GUARD_SIGNAL=name).stderr.count(name) == 1


def test_all_signals_of_gunicorn_are_known(script):
    pytest.importorskip("gunicorn")
    from gunicorn.arbiter import Arbiter
    from gunicorn.workers.base import Worker

    for each in {*Arbiter.SIGNALS, *Worker.SIGNALS}:
        said = call("run", "--signal", each.name, "gunicorn", code=2).stderr
        assert "choose another, such as SIGPROF" in said
    assert call("run", "--signal", "SIGPROF", script(""), "gunicorn", code=0)


# Refused as a setting, whatever the program is.
EVERY_PROGRAM = ("SIGTERM", "SIGINT", "SIGCHLD", "SIGPIPE", "SIGABRT")


def test_all_signals_that_end_a_process_of_a_celery_pool_are_known():
    common = pytest.importorskip("billiard.common")
    for name in common.TERMSIGS_FULL:
        if hasattr(signal, name):
            done = call("run", "--signal", name, "celery", "worker", code=2)
            assert f"celery uses {name} to " in done.stderr or name in EVERY_PROGRAM, done.stderr


CURL = """
import sys
finders, seen = [*sys.meta_path], set(sys.modules)
import http.server, threading, time
assert not {"pycurl", "wrapt"} & seen
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", 0.05
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *arguments):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
import pycurl
assert "exec_module" not in vars(pycurl.__spec__.loader)
assert sys.meta_path == finders
curl = pycurl.Curl()
curl.setopt(curl.URL, f"http://127.0.0.1:{server.server_port}/")
curl.perform()
time.sleep(0.3)
"""


def test_what_native_code_opens_is_attributed_when_the_program_imports_it(script):
    pytest.importorskip("pycurl")
    done = call("run", "--fail-on-leak", script(CURL), code=86)
    line = CURL.partition("curl = pycurl.Curl()")[0].count("\n") + 1
    assert f":{line} in <module>" in " ".join(done.stderr.split()), done.stderr


def test_what_attribute_names_is_attributed_when_the_program_imports_it(script, tmp_path):
    script(
        "import _socket\nkept = []\n"
        "def connect(address):\n    kept.append(_socket.socket())\n    kept[0].connect(address)\n",
        "native.py",
    )
    path = script(
        "import socket, time\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "import native\nnative.connect(server.getsockname())\nserver.accept()[0].close()\n"
        "time.sleep(0.2)\n"
    )
    done = call("run", "--fail-on-leak", "--attribute", "native:connect", path, code=86)
    assert f"{path.name}:4 in <module>" in " ".join(done.stderr.split()), done.stderr
    done = call("run", "--attribute", "native:conect", path)
    said = "where native:conect opens sockets: attribute('native:conect'): not found (the module"
    assert said in " ".join(done.stderr.split()), done.stderr
    done = call("run", "--attribute", "native", path, code=2)
    assert 'expected "module:callable" or a library' in done.stderr


def test_the_first_line_is_no_all_clear_where_a_process_is_unknown(script):
    path = script(
        "import os, signal, socket\nsocket.socket().close()\n"
        "if not os.fork():\n    socket.socket()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.wait()\n"
    )
    first, *_, last = call("run", path, code=0).stderr.splitlines()
    assert first.startswith("closewait-guard: leaks unknown in some processes")
    assert last.startswith("closewait-guard: leaks unknown: process ")


@pytest.mark.parametrize(
    ("report", "why"), [('{"schema": "other/9"}', "other/9"), ("no JSON", "Expecting value")]
)
def test_a_report_that_cannot_be_read_is_not_called_too_large(script, report, why):
    path = script(
        f"from closewait_guard._preload import start\nstart.as_text = lambda _: {report!r}"
    )
    shown = " ".join(call("run", path, code=0).stderr.split())
    assert re.search(r"The report of process \d+ is left out, because it cannot be read: ", shown)
    assert why in shown
    assert "too large" not in shown
