"""Standard output and error that are full, closed, without a reader, or of few letters."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest

import closewait_guard as cwg
from command_line import COMMAND, environment
from leaking import report_leaks

SIGPIPE = 128 + 13


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "leaks.jsonl"
    line = json.dumps(cwg.to_dict(report_leaks(lambda report: None)))
    path.write_text(f"{line}\n{line}\n")
    return path


@pytest.fixture
def commands(saved):
    """Every command that prints to standard output by itself."""
    pid = os.getpid()
    return [
        f"show {saved}",
        f"show {saved} --diff 1 2",
        f"scan {pid}",
        f"scan --json {pid}",
        f"watch --count 1 {pid}",
        "doctor",
        "demo --source",
        "completion bash",
        "--help",
        "scan --help",
        "--version",
    ]


def run(lines, **variables):
    """Shell lines at once, `cwg` in them standing for the command: exit codes, output, errors."""
    prefix = f'cwg() {{ {shlex.join(COMMAND)} "$@"; }}\n'
    running = [
        subprocess.Popen(
            ["bash", "-c", prefix + line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(**variables),
        )
        for line in lines
    ]
    for each in running:
        out, err = each.communicate(timeout=60)
        assert b"Traceback" not in err + out, err
        yield each.returncode, out.decode(), err.decode()


FULL = "closewait-guard: standard output cannot be written to: No space left on device\n"


def test_a_full_standard_output_is_reported_in_one_sentence_by_every_command(commands):
    for result in run(f"cwg {command} >/dev/full" for command in commands):
        assert result == (2, "", FULL)


def test_a_full_standard_output_without_a_buffer_is_reported_too():
    for result in run(
        ["cwg scan --help >/dev/full", "cwg --version >/dev/full"], PYTHONUNBUFFERED="1"
    ):
        assert result == (2, "", FULL)


def test_a_closed_standard_output_is_reported_in_one_sentence_by_every_command(commands):
    sentence = "closewait-guard: standard output cannot be written to: Bad file descriptor\n"
    for result in run(f"cwg {command} >&-" for command in commands):
        assert result == (2, "", sentence)


def test_a_reader_that_stops_ends_every_command_as_a_broken_pipe_ends_others(commands):
    lines = [f"cwg {command} | true; exit ${{PIPESTATUS[0]}}" for command in commands]
    for code, _, err in run(lines):
        assert (code, err) == (SIGPIPE, "")


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2> >(true)"])
def test_a_complaint_that_cannot_be_written_changes_neither_exit_code_nor_output(saved, stderr):
    text = saved.read_text()
    saved.write_text(f"{text}no report\n")
    lines = ["show /nowhere", "show --bogus", "scan 2147483647", f"show {saved}"]
    lost, usage, missing, last = run(f"sleep .1; cwg {line} {stderr}" for line in lines)
    assert lost[:2] == usage[:2] == missing[:2] == (2, "")
    assert last[0] == 0
    assert last[1].startswith("Report 2 of 3")


def test_a_program_runs_whatever_our_standard_streams_are(tmp_path):
    script = tmp_path / "app.py"
    script.write_text("import sys\nopen(sys.argv[1], 'w').write('done')\n")
    streams = [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"]
    paths = [tmp_path / str(place) for place in range(len(streams))]
    lines = [f"cwg run {script} {path} {how}" for path, how in zip(paths, streams, strict=True)]
    for path, (code, out, _) in zip(paths, run(lines), strict=True):
        assert (code, out, path.read_text()) == (0, "", "done")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_the_output_has_no_sign_for_are_reported_by_their_numbers(tmp_path, encoding):
    report = report_leaks(lambda report: None)
    data = cwg.to_dict(report) | {"command": "caf\xe9 \u20ac \ud800", "host": "\udcff"}
    path = tmp_path / "leaks.jsonl"
    path.write_text(json.dumps(data))
    done = subprocess.run(
        [*COMMAND, "show", path],
        capture_output=True,
        env=environment(PYTHONIOENCODING=encoding),
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    first = done.stdout.decode(encoding).splitlines()[0]
    known = {"ascii": "caf\\xe9 \\u20ac", "latin-1": "caf\xe9 \\u20ac", "utf-8": "caf\xe9 \u20ac"}
    assert f"{known[encoding]} \\ud800  (pid {report.pid} on \\udcff, " in first


def test_names_that_are_not_utf_8_go_through_every_command(tmp_path, saved):
    """Of the folder, the script, the reports and the process itself."""
    folder = os.fsencode(tmp_path) + b"/f\xff\xe9older"
    os.mkdir(folder)
    script = folder + b"/s\xffcript.py"
    code = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", 0))
kept = socket.create_connection(server.getsockname())
accepted = server.accept()[0]
accepted.sendall(b"never read")
accepted.close()
time.sleep(0.05)
if sys.argv[1:]:
    print("ready", flush=True)
    sys.stdin.read()
"""
    with open(script, "w") as file:
        file.write(code)
    os.rename(saved, folder + b"/l\xffeaks.jsonl")
    arguments = {"cwd": folder, "env": environment(CLOSEWAIT_GUARD_GRACE="0"), "timeout": 60}

    def call(*words):
        done = subprocess.run([*COMMAND, *words], capture_output=True, **arguments)
        assert b"Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    code, _, err = call("run", "--report", b"json_lines:w\xffritten.jsonl", b"s\xffcript.py")
    assert (code, "LEAKED" in err, r"s\udcffcript.py:4" in err) == (0, True, True), err
    for name in (b"l\xffeaks.jsonl", b"w\xffritten.jsonl"):
        code, out, err = call("show", name)
        assert (code, err) == (0, "")
    assert r"s\udcffcript.py" in out
    assert call("show", b"no\xffne")[2].startswith(r"closewait-guard: no\udcffne cannot be read")
    with subprocess.Popen(
        [sys.executable, script, "x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        code, out, err = call("scan", str(process.pid))
        assert (code, err) == (1, "")
        assert r"cript.py  (pid " in out
        code, out, _ = call("scan", "--json", str(process.pid))
        assert json.loads(out)["pid"] == process.pid
        assert call("watch", "--count", "1", str(process.pid))[0] == 0
        process.stdin.close()
    assert call("doctor")[0] == call("demo", "--source")[0] == 0
