"""A running program is asked for one report from inside, and goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import closewait_guard as cwg
from closewait_guard._remote import (
    MessageSocket,
    RemoteError,
    attach,
    injected,
    injection,
    request,
    symbols,
)
from closewait_guard._remote.injection import choose_method, only_request
from closewait_guard._remote.request import Request
from closewait_guard._remote.target import Target, inspect_target, may_leak
from command_line import COMMAND, HAS_REMOTE_EXEC, LEAKY, call, can_attach, environment
from remote.attached import SERVER, STATE, folders_for, running, wait_until, what_changed
from servers import DEADLINE

pytestmark = pytest.mark.skipif(not can_attach(), reason="no gdb, or no right to use it")
PYTHON_OF_ALL = "/usr/bin/python3"
as_root = pytest.mark.skipif(
    getattr(os, "geteuid", int)() != 0 or not Path(PYTHON_OF_ALL).exists(),
    reason="there is no other user to be",
)


def test_an_unguarded_program_is_reported_with_what_holds_its_sockets_and_stays_as_it_was(tmp_path):
    with running(STATE, cwd=tmp_path) as program:
        time.sleep(1.1)  # The grace time.
        done = call("attach", program.pid, "--verbose", code=0)
        assert "5 leaked sockets from" in done.stdout
        assert "held by  __main__.kept[0] (module global)" in done.stdout
        assert f"Process {program.pid} was " in done.stdout
        assert what_changed(program) == {}
    assert not folders_for(program)


@pytest.mark.skipif(not HAS_REMOTE_EXEC or not shutil.which("gdb"), reason="there is one way only")
def test_gdb_does_the_same_where_the_interpreter_can_run_a_script(tmp_path):
    refusing = os.environ | {"PYTHON_DISABLE_REMOTE_DEBUG": "1"}
    with running(STATE, cwd=tmp_path, env=refusing) as program:
        done = call("attach", program.pid, "--method", "gdb", code=0, CLOSEWAIT_GUARD_GRACE="0")
        assert "held by  __main__.kept[0] (module global)" in done.stdout
        assert re.search("was stopped for \\d+ ms by gdb", done.stdout)
        assert what_changed(program) == {}


def test_asking_again_leaves_no_more_behind(tmp_path):
    with running(STATE, cwd=tmp_path) as program:
        for _ in range(3):
            call("attach", program.pid, code=0)
        assert what_changed(program) == {}


def test_json_is_the_report_and_leaks_can_be_the_exit_status():
    with running(STATE) as program:
        time.sleep(1.1)
        done = call("attach", program.pid, "--json", "--fail-on-leak", code=1)
        report = cwg.from_dict(json.loads(done.stdout))
        assert (report.pid, len(report.leaks)) == (program.pid, 5)
        assert all(leak.holders for leak in report.leaks)
        assert f"Process {program.pid} was " in done.stderr


def test_a_guard_that_is_there_answers_with_its_lines_and_stays():
    guarded = f"import sys; sys.path.append({str(Path(cwg.__file__).parents[1])!r})\n"
    guarded += "import closewait_guard; guard = closewait_guard.install(grace=0.1)\n"
    code = guarded + STATE + "assert guard.installed"
    with running(code) as program:
        time.sleep(0.2)
        text = call("attach", program.pid, code=0).stdout
        assert "opened   <string>:" in text
        assert "not installed" not in text
        changed = what_changed(program)
        # What scans is loaded with the first scan, whoever asks for it.
        assert changed.keys() <= {"modules", "caches", "fds"}


def test_a_control_socket_is_asked_instead_also_while_the_main_thread_is_stuck(tmp_path):
    guarded = f"import sys; sys.path.append({str(Path(cwg.__file__).parents[1])!r})\n"
    guarded += "import closewait_guard; closewait_guard.install(control=True)\n"
    variables = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    tmp_path.chmod(0o700)
    with running(guarded + SERVER, env=variables) as program:
        text = call("attach", program.pid, "--timeout", "5", code=0).stdout
        assert f"Process {program.pid} has answered through its control socket." in text
        assert "not installed" not in text


def test_a_main_thread_in_a_call_is_named_and_the_request_taken_back():
    with running(SERVER, stderr=subprocess.PIPE) as program:
        done = call("attach", program.pid, "--timeout", "0.5", code=2)
        assert "ran no Python code for 0.5 s (it waits in accept4(), descriptor 3)" in done.stderr
        assert "the request is taken back" in done.stderr
        assert not folders_for(program)
        # What runs late finds nothing, says nothing, and the program goes on.
        connect_to(program)
        is_done = threading.Event()
        connecting = threading.Thread(target=connect_until, args=(is_done, program))
        connecting.start()
        try:
            done = call("attach", program.pid, code=0)
        finally:
            is_done.set()
            connecting.join()
        assert f"Process {program.pid} was " in done.stdout
        program.kill()
        assert program.stderr.read() == ""


def connect_until(is_done, program):
    while not is_done.wait(0.2):
        connect_to(program)


def connect_to(program):
    socket.create_connection(("127.0.0.1", int(program.ready))).close()


def test_a_program_that_ends_meanwhile_is_no_longer_waited_for():
    with running(SERVER) as program:
        killing = threading.Thread(target=kill_when_asked, args=(program,))
        killing.start()
        done = call("attach", program.pid, "--timeout", "50", code=2)
        killing.join()
        assert f"process {program.pid}" in done.stderr
        assert "has ended meanwhile" in done.stderr
        assert not folders_for(program)


def test_ctrl_c_takes_the_request_back():
    with running(SERVER) as program:
        command = subprocess.Popen([*COMMAND, "attach", str(program.pid)], env=environment())
        wait_until(lambda: folders_for(program))
        command.send_signal(signal.SIGINT)
        assert command.wait(DEADLINE) == -signal.SIGINT
        assert not folders_for(program)
        connect_to(program)
        assert program.poll() is None


def test_two_commands_at_once_do_not_take_each_others_guard_for_the_programs(tmp_path):
    with running(STATE, cwd=tmp_path) as program:
        command = [*COMMAND, "attach", str(program.pid)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        commands = [subprocess.Popen(command, env=environment(), **pipes) for _ in range(3)]
        outputs = [each.communicate(timeout=DEADLINE) for each in commands]
        for each, (_, stderr) in zip(commands, outputs, strict=True):
            assert each.returncode == 0 or is_being_asked(stderr), stderr
        assert what_changed(program) == {}


@pytest.mark.skipif(not HAS_REMOTE_EXEC, reason="came with 3.14")
def test_a_script_that_has_not_run_yet_is_not_replaced():
    with running(SERVER) as program:
        with only_request(inspect_target(program.pid)):
            refused = call("attach", program.pid, code=2).stderr
        assert "is being asked already, by another command: try again" in refused


def test_a_guard_that_another_command_has_loaded_is_not_asked(monkeypatch):
    monkeypatch.setattr(cwg, injected._VISITED, os.getpid(), raising=False)
    with pytest.raises(RuntimeError, match="it is being asked already, by another command"):
        injected._obey("/nowhere", {}, print, print)


def is_being_asked(text):
    """By gdb, or by what scans."""
    return re.search("being asked already|is traced by|could not attach", text)


def kill_when_asked(program):
    wait_until(lambda: folders_for(program))
    program.kill()


@pytest.mark.skipif(HAS_REMOTE_EXEC, reason="calls nothing")
def test_a_call_that_does_not_return_is_given_up_and_the_program_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(symbols, "_WANTED", symbols._WANTED | {"pause"})
    monkeypatch.setattr(injection, "_MAX_SECONDS", 1.0)
    with running(STATE, cwd=tmp_path) as program:
        target = inspect_target(program.pid)
        never = {symbols.PYTHON[0]: target.addresses["pause"]}
        with pytest.raises(RemoteError, match="gdb could not attach to process"):
            injection.inject_by_gdb(
                target._replace(addresses={**target.addresses, **never}), "/none", "#"
            )
        assert what_changed(program).keys() <= {"files"}


@pytest.mark.skipif(HAS_REMOTE_EXEC, reason="stops nothing")
def test_signals_that_come_while_a_program_is_stopped_reach_it():
    code = """
import signal, sys, time
count = 0
def handle(*_):
    global count
    count += 1
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
print("ready", flush=True)
while True:
    time.sleep(0.01)
    assert count
"""
    with running(code) as program:
        for _ in range(3):
            call("attach", program.pid, code=0)
        assert program.poll() is None


def test_a_program_at_its_limit_of_descriptors_is_reported_and_the_limit_is_as_before():
    code = """
import resource, socket, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
server = socket.create_server(("127.0.0.1", 0))
kept = []
try:
    while True:
        kept.append(socket.create_connection(server.getsockname()))
        server.accept()[0].close()
except OSError:
    print("full", flush=True)
while True:
    time.sleep(0.01)
"""
    import resource

    with running(code) as program:
        before = resource.prlimit(program.pid, resource.RLIMIT_NOFILE)
        done = call("attach", program.pid, code=0)
        assert "FD LIMIT" in done.stdout
        assert "Its limit is 64 descriptors; it had more for the scan." in done.stdout
        assert resource.prlimit(program.pid, resource.RLIMIT_NOFILE) == before


def limit_of(monkeypatch, soft, hard):
    """A process whose limit is lower than what it has, and what is set when no right is there."""
    import resource

    changes = []

    def prlimit(_pid, _kind, limits=None):
        if limits is not None and limits[1] > hard:
            raise PermissionError
        changes.extend([] if limits is None else [limits])
        return soft, hard

    monkeypatch.setattr(resource, "prlimit", prlimit)
    return changes


def test_a_program_that_may_have_no_descriptor_more_is_refused_before_it_is_touched(monkeypatch):
    changes = limit_of(monkeypatch, 3, 3)
    message = "of 3 descriptors, and needs one more to answer: raise it by `prlimit --pid "
    with pytest.raises(RemoteError, match=message), request.room_for_descriptors(os.getpid()):
        pytest.fail("it was touched")
    assert set(changes) == {(3, 3)}


def test_a_limit_is_raised_as_far_as_no_right_is_needed_for_it(monkeypatch):
    changes = limit_of(monkeypatch, 3, 34)
    with request.room_for_descriptors(os.getpid()) as reached:
        assert reached == 3
    assert changes == [(34, 34), (3, 34)]


def test_a_tree_is_one_report_of_its_python_processes():
    code = (
        LEAKY
        + """
import subprocess, time
code = "import time; print(flush=True)\\nwhile True: time.sleep(0.01)"
if "child" not in sys.argv:
    sleeping = subprocess.Popen(["sleep", "60"])
    pid = os.fork()
    print("ready", flush=True)
while True:
    time.sleep(0.01)
"""
    )
    with running(code) as program:
        time.sleep(1.1)
        try:
            done = call("attach", program.pid, "--tree", code=0)
            assert "5 leaked sockets from" in done.stdout
            assert "Asked 2 Python processes." in done.stdout
            assert "Not asked" not in done.stdout
            done = call("attach", program.pid, code=0)
            assert done.stdout.endswith("Not asked: 1 child process (add --tree).\n")
        finally:
            for child in attach.descendants_of(program.pid, 10):
                os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("command", ["attach", "report"])
@pytest.mark.parametrize("is_forking", [True, False])
def test_a_gate_does_not_pass_over_the_python_processes_that_it_has_not_asked(command, is_forking):
    code = f"""
import os, subprocess, time
import closewait_guard as cwg
cwg.install(control=True)
sleeping = subprocess.Popen(["sleep", "60"])
if {is_forking}:
    os.fork()
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""
    said = "leaks unknown: not asked: 1 child process (add --tree)\n"
    with running(code) as program:
        try:
            for json_ in ([], ["--json"]):
                done = call(
                    command, program.pid, "--fail-on-leak", *json_, code=87 if is_forking else 0
                )
                assert (said in done.stderr) == is_forking
            assert ("Not asked" in call(command, program.pid, code=0).stdout) == is_forking
            assert said not in call(command, program.pid, "--fail-on-leak", "--tree", code=0).stderr
        finally:
            for child in attach.descendants_of(program.pid, 10):
                os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("command", ["attach", "report"])
def test_neither_the_command_itself_nor_a_helper_of_multiprocessing_is_asked_for_leaks(command):
    code = f"""
import subprocess, os
from multiprocessing import forkserver, resource_tracker
import closewait_guard as cwg
cwg.install(control=True)
resource_tracker.ensure_running()
forkserver.ensure_running()
for options in [], ["--tree"]:
    ask = [*{COMMAND!r}, {command!r}, str(os.getpid()), "--fail-on-leak", *options]
    print(subprocess.run(ask, capture_output=True, text=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("returncode=0, stdout='closewait-guard: no leaks (") == 2, done
    assert "Not asked" not in done.stdout


def test_python_is_known_under_another_name_too(tmp_path):
    renamed = shutil.copy(sys._base_executable, tmp_path / "service")
    variables = os.environ | {"PYTHONHOME": sys.base_prefix}
    with running("print(1, flush=True); input()", command=[renamed], env=variables) as program:
        assert may_leak(program.pid)
    with running("echo 1; read line", command=["sh"]) as program:
        assert not may_leak(program.pid)


def test_what_cannot_be_attached_to_is_said_before_anything_is_touched(tmp_path):
    assert "no such process: 2000000000" in call("attach", 2000000000, code=2).stderr
    with subprocess.Popen(["sleep", "60"]) as program:
        errors = call("attach", program.pid, code=2).stderr
        assert "(sleep) is not Python" in errors
        assert "--tree" not in errors
        program.kill()
    with running(SERVER) as program:
        os.kill(program.pid, signal.SIGSTOP)
        assert f"kill -CONT {program.pid}" in call("attach", program.pid, code=2).stderr
        os.kill(program.pid, signal.SIGCONT)
        thread = next(iter(os.listdir(f"/proc/{program.pid}/task")))
        assert int(thread) == program.pid
    with pytest.raises(RemoteError, match="is this command itself"):
        inspect_target(os.getpid())


def test_below_what_is_not_python_the_option_that_finds_it_is_named():
    command = f"exec 3<&0; {sys.executable} -c 'print(1, flush=True); input()' <&3; true"
    pipe = subprocess.PIPE
    with subprocess.Popen(["sh", "-c", command], stdin=pipe, stdout=pipe) as shell:
        assert shell.stdout.readline() == b"1\n"
        errors = call("attach", shell.pid, code=2).stderr
        assert "(sh) is not Python" in errors
        assert errors.endswith(". Add --tree to ask the 1 Python process below it\n")
        shell.communicate(b"\n", timeout=DEADLINE)


@as_root
def test_another_user_is_refused():
    with running(SERVER) as program:
        done = subprocess.run(
            [PYTHON_OF_ALL, "-m", "closewait_guard", "attach", str(program.pid)],
            user=65534,
            group=65534,
            capture_output=True,
            text=True,
            cwd="/",
            env=environment(PYTHONPATH=str(Path(cwg.__file__).parents[1])),
            check=False,
        )
        if "No module" in done.stderr:
            pytest.skip("another user cannot read the package")
        assert done.returncode == 2, done.stderr
        assert "it is of user root; run as root, or as that user" in done.stderr


@as_root
def test_root_asks_a_program_of_another_user():
    code = STATE.replace("print(os.getpid()", "print(os.getuid()")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        command = [PYTHON_OF_ALL, "-I", "-c", code]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, user=65534, group=65534, cwd=folder
        ) as program:
            assert program.stdout.readline() == "65534\n"
            time.sleep(1.1)
            target = inspect_target(program.pid)
            wanted = "remote-exec" if target.has_remote_exec else "gdb"
            done = call("attach", program.pid, "--method", wanted, code=0)
            assert "held by  __main__.kept[0] (module global)" in done.stdout
            assert what_changed(program) == {}
            # What is left in needs no file: the copy that the other user may read is gone.
            call("attach", program.pid, "--install", code=0, CLOSEWAIT_GUARD_GRACE="0")
            assert not folders_for(program)
            what_changed(program, "+")
            assert "in leak()\n" in call("report", program.pid, code=0).stdout
            call("attach", program.pid, "--uninstall", code=0)
            assert what_changed(program, "-") == {}
            program.kill()
    assert not folders_for(program)


@as_root
def test_what_another_user_puts_into_the_folder_is_neither_written_to_nor_given_away(
    tmp_path, monkeypatch
):
    theirs = tmp_path / "theirs"
    theirs.write_text("as it was")
    given, chown = [], os.chown
    monkeypatch.setattr(os, "chown", lambda path, *ids: (given.append(path), chown(path, *ids)))
    nobody = {"user": 65534, "group": 65534, "cwd": "/"}
    loop = "import time\nprint('ready', flush=True)\nwhile True: time.sleep(0.01)"
    with running(loop, command=(PYTHON_OF_ALL, "-I"), **nobody) as program:
        order = {"what": "scan", "settings": {}}
        target = inspect_target(program.pid)
        with Request(target, order, threading.Event()) as request:
            # With the folder its owner can replace every file: each is given before.
            assert given.index(request._folder) == len(given) - 1 > 0
            (request._folder / "gdb").symlink_to(theirs)
            request.make(choose_method(target, "auto"))
            assert request.receive(30)["event"] == "begun"
            assert "report" in request.receive(30)
        mkdir = Path.mkdir

        def mkdir_with_a_link(path, **options):
            mkdir(path, **options)
            (path / "script.py").symlink_to(theirs)

        monkeypatch.setattr(Path, "mkdir", mkdir_with_a_link)
        with pytest.raises(RemoteError, match="another process has replaced"):
            Request(target, order, threading.Event()).__enter__()
    assert theirs.read_text() == "as it was"


def target_of(**changes):
    target = Target(
        pid=os.getpid(),
        uid=os.geteuid(),
        program="app",
        version=(3, 12),
        addresses={"mmap": 1},
        interpreter=sys.executable,
        refuses_remote_exec="",
        is_helper=False,
        is_apart=False,
    )
    return target._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "wanted", "sentence"),
    [
        ({}, "remote-exec", "3.12, and sys.remote_exec came with 3.14: use --method gdb"),
        (
            {"version": (3, 14), "refuses_remote_exec": "PYTHON_DISABLE_REMOTE_DEBUG"},
            "auto",
            "was started with PYTHON_DISABLE_REMOTE_DEBUG: use --method gdb",
        ),
        ({"version": (3, 14), "interpreter": ""}, "remote-exec", "cannot be started from here"),
        ({}, "auto", r"gdb is needed: install it \(apt-get install gdb\)"),
    ],
)
def test_a_method_that_cannot_be_used_is_refused_with_what_to_do(
    monkeypatch, changes, wanted, sentence
):
    monkeypatch.setattr(injection.shutil, "which", lambda _: None)
    with pytest.raises(RemoteError, match=sentence):
        injection.choose_method(target_of(**changes), wanted)


@as_root
def test_root_starts_no_interpreter_that_another_user_may_have_made(tmp_path, monkeypatch):
    monkeypatch.setattr(injection.shutil, "which", lambda _: "gdb")
    theirs = tmp_path / "python3.14"
    theirs.touch()
    os.chown(theirs, 65534, -1)
    target = target_of(version=(3, 14), uid=65534, interpreter=str(theirs))
    assert injection.choose_method(target, "auto") == "gdb"
    with pytest.raises(RemoteError, match=r"not started as root .*belongs to user 65534"):
        injection.choose_method(target, "remote-exec")
    systems = target._replace(interpreter=str(Path(PYTHON_OF_ALL).resolve()))
    assert injection.choose_method(systems, "auto") == "remote-exec"


@pytest.mark.parametrize(
    ("variables", "options", "how"),
    [
        ({"PYTHON_DISABLE_REMOTE_DEBUG": "1"}, [], "PYTHON_DISABLE_REMOTE_DEBUG"),
        ({}, ["-X", "disable_remote_debug"], "-X disable-remote-debug"),
        ({"PYTHON_DISABLE_REMOTE_DEBUG": ""}, [], ""),
    ],
)
def test_it_is_seen_that_a_program_refuses_remote_exec(variables, options, how):
    with running(SERVER, *options, env=os.environ | variables) as program:
        assert inspect_target(program.pid).refuses_remote_exec == how


REPORT = {"report": {"schema": "closewait-guard/1"}, "seconds": 0.1}


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([[1]], "something other than a JSON object"),
        ([{}, {"error": "ImportError: no room"}], "the scan .* has failed: ImportError: no room"),
        ([{}, REPORT], "no host|'host'|host"),
    ],
)
def test_what_is_no_report_is_one_sentence(monkeypatch, messages, sentence):
    def answer(target, script, token):
        def send():
            for message in messages:
                with MessageSocket.to(str(Path(script).with_name("socket")), 1) as sock:
                    sock.send(message, 1)

        threading.Thread(target=send).start()
        return 0.001

    monkeypatch.setattr(request, "inject_by_gdb", answer)
    monkeypatch.setattr(attach, "choose_method", lambda *_: "gdb")
    answers, [failure] = attach.ask([target_of()], "auto", 1, {})
    assert answers == []
    assert "\n" not in failure
    assert re.search(sentence, failure), failure


def test_another_process_than_the_one_asked_is_not_listened_to(monkeypatch):
    def answer(target, script, token):
        with MessageSocket.to(str(Path(script).with_name("socket")), 1) as sock:
            sock.send({}, 1)
        return 0.001

    monkeypatch.setattr(request, "inject_by_gdb", answer)
    monkeypatch.setattr(attach, "choose_method", lambda *_: "gdb")
    with running(SERVER) as program:
        _, [failure] = attach.ask([target_of(pid=program.pid)], "auto", 1, {})
    assert f"process {os.getpid()} is connected, instead of process {program.pid}" in failure


MAKE = "__import__('os').mkdir('{folder}')"


@pytest.mark.parametrize("content", ["", f"#another\n{MAKE}", None, f"#token\n{MAKE}"])
def test_a_script_that_another_has_put_in_place_of_ours_is_not_run(tmp_path, content):
    script = tmp_path / "script.py"
    if content is not None:
        script.write_text(content.format(folder=tmp_path / "ran"))
    code = injection._code_that_runs(str(script), "#token")
    names = {}
    exec(code, names)
    assert names.keys() <= {"__builtins__"}
    assert (tmp_path / "ran").exists() == (content is not None and "#token" in content)


def test_a_child_that_is_forked_in_the_middle_of_an_import_can_import_the_same():
    code = """
import _thread, os, signal, time
from importlib.machinery import SourceFileLoader

def get_code(loader, name):
    if _thread.get_ident() != main and not name.startswith("closewait"):
        imported.append(name)
        while not forked:
            time.sleep(0.01)
    return without(loader, name)

imported, forked, main = [], [], _thread.get_ident()
without, SourceFileLoader.get_code = SourceFileLoader.get_code, get_code
print("ready", flush=True)
while not imported:
    time.sleep(0.01)
child = os.fork()
if child == 0:
    signal.alarm(10)
    forked.append(0)
    __import__(imported[0])
    os._exit(0)
forked.append(child)
print(os.waitpid(child, 0)[1], imported, flush=True)
while True:
    time.sleep(0.01)
"""
    with running(code) as program:
        call("attach", program.pid, code=0)
        assert program.stdout.readline().startswith("0 ")
