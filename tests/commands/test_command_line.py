"""What the commands have in common: help, errors, pipes, extras, completion; demo and doctor."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from command_line import COMMAND, Terminal, call, environment, program

COMMANDS = ["run", "scan", "watch", "attach", "report", "show", "demo", "doctor", "completion"]
HEAVY = ["rich", "psutil", "wrapt", "structlog", "dataclasses", "closewait_guard.model", "shutil"]
NEEDED_BY_COMMANDS = ["argparse", "re", "typing", "collections"]


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_fits_a_screen_and_ends_with_a_command_to_type(arguments):
    text = call(*arguments, code=0, COLUMNS="200").stdout
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "exit status" in text.lower()
    assert "closewait-guard" in lines[-1]


def test_the_top_help_names_every_command_and_exit_status():
    text = call("--help", code=0).stdout
    for name in COMMANDS:
        assert f"\n  {name} " in text
    for status in ("0 no leaks", "1 leaks found", "2 usage error", "86 if it leaked", "87 if"):
        assert status in text


def test_without_a_command_it_prints_its_help_and_exits_with_2():
    done = call(code=2)
    assert done.stdout == ""
    assert done.stderr == call("--help", code=0).stdout


@pytest.mark.parametrize(
    ("arguments", "unused"), [(["--help"], [*HEAVY, *NEEDED_BY_COMMANDS]), (["scan", "-h"], HEAVY)]
)
def test_help_imports_nothing_that_it_can_do_without(arguments, unused):
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom closewait_guard.commands import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        f"print([name for name in {unused} if name in set(sys.modules) - before])"
    )
    assert call("-c", code, command=[sys.executable], code=0).stdout.endswith("[]\n")


def test_the_top_help_lists_the_options_that_there_are():
    text = call("--help", code=0).stdout
    usage = call("nonsense", code=2).stderr.splitlines()[0]
    assert text.splitlines()[0] == usage == "usage: closewait-guard [-h] [-V] COMMAND ..."
    assert re.findall(r"^  (-\w), (--\w+)  ", text, re.MULTILINE) == [
        ("-h", "--help"),
        ("-V", "--version"),
    ]
    assert call("-h", code=0).stdout == text
    assert call("-V", code=0).stdout == call("--version", code=0).stdout


def test_the_installed_command_is_the_same():
    beside = os.path.join(os.path.dirname(sys.executable), "closewait-guard")
    shown = call("--version", command=[beside], code=0).stdout
    assert (
        shown
        == call("--version", code=0).stdout
        == f"closewait-guard {version('closewait_guard')}\n"
    )


@pytest.mark.parametrize("arguments", [["nonsense"], ["scan", "--nonsense"], ["scan", "-1"]])
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(arguments):
    done = call(*arguments, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("usage: closewait-guard")
    assert ": error: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("scann", "unknown command 'scann'. Did you mean 'scan'? Commands: run, scan, "),
        ("--vesion", "unknown option '--vesion'. Did you mean '--version'?"),
        ("-x", "unknown option '-x'"),
        ("scan --tre 4242", "unknown option '--tre'. Did you mean '--tree'?"),
        ("run --grase=2 app.py", "unknown option '--grase'. Did you mean '--grace'?"),
        ("run --count_warning 2 app.py", "Did you mean '--count-warning'?"),
        ("show a.json b.json", "unexpected argument 'b.json'"),
        ("completion bsh", "unknown shell 'bsh'. Did you mean 'bash'? Shells: bash, zsh, fish"),
        ("scan --state CLOSEWAIT", "unknown TCP state 'CLOSEWAIT'. Did you mean 'CLOSE_WAIT'?"),
        ("run --report txt app.py", "unknown reporter 'txt'. Did you mean 'text'? Available: "),
        (
            "run --report at_least:warn:text app.py",
            "unknown severity 'warn'. Did you mean 'warning'?",
        ),
        ("run --attribute psycop app.py", "got 'psycop'. Did you mean 'psycopg'? Libraries: "),
        ("run --signal USR1X app.py", "a signal, got 'USR1X'. Did you mean 'SIGUSR1'?"),
        ("run --probe linx app.py", "run --probe: unknown probe 'linx'. Did you mean 'linux'?"),
        ("run --no-config", "run: missing TARGET (a script, -m MODULE, or a command)"),
        ("show", "missing FILE (or use --diff A B)"),
    ],
)
def test_an_error_names_the_value_the_place_and_the_nearest_right_one(line, sentence):
    done = call(*line.split(), code=2)
    assert sentence in done.stderr.splitlines()[-1]
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["scan", "999999999"], "no such process: 999999999"),
        (["scan", "--tree"], "--tree needs a PID"),
        (["scan", "--state", "OPEN"], "unknown TCP state 'OPEN'. States: "),
        (["doctor", "999999999"], "no such process"),
    ],
)
def test_what_is_not_there_gets_one_sentence(arguments, sentence):
    done = call(*arguments, code=2)
    assert sentence in done.stderr
    assert done.stdout == ""


def test_one_process_that_is_not_there_does_not_hide_another():
    with program() as running:
        done = call("scan", running.pid, 999999999, code=1, CLOSEWAIT_GUARD_GRACE="0")
    assert "5 leaked" in done.stdout
    assert done.stderr == "closewait-guard: no such process: 999999999\n"


def test_a_bad_setting_gets_one_sentence_that_says_where_it_comes_from():
    done = call("scan", code=2, CLOSEWAIT_GUARD_GRACE="soon")
    assert done.stderr.startswith("closewait-guard: environment variable CLOSEWAIT_GUARD_GRACE: ")


@pytest.mark.parametrize("arguments", ["scan --all", "--help", "doctor", "demo --source"])
def test_a_broken_pipe_is_silent_and_ends_as_by_its_signal(arguments):
    command = [*COMMAND, *arguments.split()]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment())
    finally:
        os.close(writing)
    assert done.stderr == b""
    assert done.returncode == -signal.SIGPIPE


def wait_for_a_socket(running):
    fds, deadline = Path(f"/proc/{running.pid}/fd"), time.monotonic() + 20
    while not any("socket:" in os.path.realpath(fd) for fd in fds.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_a_line(running):
    running.stdout.readline()


@pytest.mark.parametrize(
    ("arguments", "wait_until_under_way"),
    [(["demo"], wait_for_a_socket), (["watch", "--interval", "60"], wait_for_a_line)],
)
def test_ctrl_c_is_silent_and_ends_as_by_its_signal(arguments, wait_until_under_way):
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as running:
        wait_until_under_way(running)
        running.send_signal(signal.SIGINT)
        _, shown = running.communicate(timeout=60)
    assert shown == b""
    assert running.returncode == -signal.SIGINT


@pytest.fixture
def without_extras(tmp_path):
    for name in ("rich", "psutil", "argcomplete"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    return {"PYTHONPATH": str(tmp_path)}


def test_without_the_extra_what_can_work_does(without_extras, tmp_path):
    assert "5 leaked" in call("demo", code=0, **without_extras).stdout
    assert "not installed" not in call("run", "--", "true", code=0, **without_extras).stderr
    assert "Python:" in call("doctor", code=0, **without_extras).stdout
    if sys.platform == "linux":
        call("scan", os.getpid(), "--json", **without_extras)


@pytest.mark.parametrize(
    "arguments", [["completion", "bash"], ["run", "--report", "console", "true"]]
)
def test_without_the_extra_the_rest_says_what_to_install(without_extras, arguments):
    done = call(*arguments, code=2, **without_extras)
    assert "pip install 'closewait-guard[cli]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_psutil_looks_where_the_kernel_cannot_be_asked(without_extras):
    portable = {"CLOSEWAIT_GUARD_PROBE": "portable", "CLOSEWAIT_GUARD_GRACE": "0.2"}
    with program() as running:
        text = call("scan", running.pid, code=1, **portable).stdout
        # psutil does not know what is unread.
        counts = "2 leaked, 3 idle or leaked of 8 open sockets: CLOSE_WAIT 5, ESTABLISHED 2,"
        assert counts in text
        assert f"3 IDLE OR LEAKED  TCP to 127.0.0.1:{running.first_line}" in text
        assert "2 LEAKED  TCP from 127.0.0.1 " in text
        assert ", since an unknown time" in text
        done = call("scan", running.pid, code=2, **portable, **without_extras)
        assert "pip install 'closewait-guard[cli]'" in done.stderr
    assert "no such process" in call("scan", "999999999", code=2, **portable).stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_completion_script(shell):
    text = call("completion", shell, code=0).stdout
    assert "closewait-guard" in text
    assert "_ARGCOMPLETE" in text


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("closewait-guard ", COMMANDS),
        ("closewait-guard sc", ["scan"]),
        ("closewait-guard scan --", ["--all", "--tree", "--state", "--json"]),
        ("closewait-guard completion ", ["bash", "zsh", "fish"]),
        ("closewait-guard run --stack", ["--stack-depth"]),
        ("closewait-guard scan ", [str(os.getpid())]),
    ],
)
def test_bash_completes_commands_options_and_process_numbers(line, wanted, tmp_path):
    script = (
        'eval "$(closewait-guard completion bash)"\n'
        f"COMP_LINE={line!r} COMP_POINT={len(line)} COMP_TYPE=9\n"
        f"COMP_WORDS=({line}) COMP_CWORD={len(line.split(' ')) - 1}\n"
        f"_python_argcomplete closewait-guard\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    done = call("-c", script, command=["bash"], PATH=path)
    found = {word.strip() for word in done.stdout.splitlines()}
    assert set(wanted) <= found


def test_the_demonstration_shows_a_pool_in_forty_lines_and_what_to_type_next():
    done = call("demo", code=0)
    report, _, farewell = done.stdout.rpartition("\n\n")
    assert "5 leaked sockets from 3 places." in report
    assert "in dropped()" in report
    assert "in place_order()" in report
    assert "in response_not_read()" in report
    assert "session.get(url, stream=True)" in report
    assert "urllib3 pool of http://127.0.0.1:" in " ".join(report.split())
    assert " checked out" in " ".join(report.split())
    assert "1 idle pooled connection closed by the server (not a leak)." in report
    assert len(report.splitlines()) <= 40
    for command in ("demo --source", "scan", "run -- python app.py"):
        assert f"closewait-guard {command}\n" in f"{farewell}\n"
    assert done.stderr == ""
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_the_demonstration_without_requests_has_no_pool_to_show(tmp_path):
    (tmp_path / "requests.py").write_text("raise ImportError('no requests here')")
    done = call("demo", code=0, PYTHONPATH=str(tmp_path))
    assert "5 leaked sockets from 3 places." in done.stdout
    assert "pool" not in done.stdout
    assert "shop.kept[0]" in done.stdout
    assert done.stderr == ""


def test_the_demonstration_takes_five_seconds_at_most():
    started = time.monotonic()
    call("demo", code=0)
    assert time.monotonic() - started < 5


def test_the_demonstration_shows_its_progress_on_a_terminal_and_takes_it_away():
    with Terminal(*COMMAND, "demo", lines=200) as terminal:
        terminal.until("leaking: dropped")
        text = terminal.until("leaking: idle in the pool")
        assert "━" in text
        assert terminal.wait() == 0
        assert "leaking:" not in terminal.text()
        assert "5 leaked" in terminal.text()


def test_the_demonstration_without_rich_names_each_way_on_a_terminal(without_extras):
    with Terminal(*COMMAND, "demo", lines=200, **without_extras) as terminal:
        assert terminal.wait() == 0
        assert "leaking: response not read\n" in terminal.text()


def test_the_demonstration_shows_its_source():
    assert "Never read to its end." in call("demo", "--source", code=0).stdout


def test_the_doctor_reports_every_topic_in_plain_words():
    text = call("doctor", code=0).stdout
    for topic in (
        "Python",
        "Platform",
        "Settings",
        "Probe",
        "Descriptors",
        "Keepalive",
        "From outside",
        "C extensions",
        "Socket class",
        "Extras",
    ):
        assert f"\n{topic}:" in f"\n{text}"
    assert "It does not end CLOSE_WAIT for the program" in " ".join(text.split())
    assert "tcp_keepalive_time=" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_doctor_finds_who_has_replaced_the_socket_class(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "def connect(self, address): ...\n"
        "socket.socket.connect = connect\n"
        "class Fake(socket.socket): ...\n"
        "socket.socket = Fake\n"
    )
    text = "".join(call("doctor", code=0, PYTHONPATH=str(tmp_path)).stdout.split())
    file = f"{tmp_path}/sitecustomize.py"
    assert f"socket.socketissitecustomize.Fake({file})" in text
    assert "socket.socket.connectissitecustomize.connect(" in text
    assert "/sitecustomize.py:2)" in text


def test_the_doctor_finds_native_libraries_installed_and_loaded(tmp_path):
    package = tmp_path / "uvloop"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it must not be imported')")
    text = call("doctor", os.getpid(), code=0, PYTHONPATH=str(tmp_path)).stdout
    # The version that is shown is that of an installed uvloop, if there is one.
    shown = " ".join(text.split())
    assert re.search(r"uvloop( [\d.]+)? \(an event loop on libuv\)", shown), shown
    assert f"Process {os.getpid()}:" in text


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("GRACE", "soon", "environment variable CLOSEWAIT_GUARD_GRACE"),
        ("GRCE", "1", "Did you mean"),
        ("SIGNAL", "TERM", "SIGTERM ends programs"),
        ("REPORTERS", "changes:strutlog", "unknown reporter 'strutlog'"),
        ("REPORTERS", "text,json_lines:/nonexistent/file", "/nonexistent"),
    ],
)
def test_the_doctor_shows_settings_that_cannot_be_used_and_ends_with_2(name, value, sentence):
    text = call("doctor", code=2, **{f"CLOSEWAIT_GUARD_{name}": value}).stdout
    assert "cannot be used: " in text
    assert sentence in " ".join(text.split())
    assert "Socket" in text
