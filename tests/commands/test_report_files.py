"""`--html` and `--collapsed`: files beside what a command prints, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess

import pytest

import closewait_guard as cwg
from closewait_guard._files import ReplacedFile
from closewait_guard.testing import half_closed_pair
from command_line import COMMAND, LEAKY, WAIT, call, can_attach, program
from remote.programs import INSTALL, LEAK, STUCK, line_of, running


@pytest.fixture(scope="module")
def report():
    with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair(), half_closed_pair():
        return guard.scan()


@pytest.fixture
def saved(report, tmp_path):
    """Reports of two processes of a program."""
    path = tmp_path / "leaks.jsonl"
    reports = [cwg.to_dict(report) | {"pid": pid} for pid in (4711, 4712)]
    for place, each in enumerate(reports):
        for finding in each["findings"]:
            finding["observation"]["inode"] += place
    path.write_text("".join(f"{json.dumps(each)}\n" for each in reports))
    return path


def test_show_prints_the_same_and_writes_both_files_for_their_owner_only(saved, tmp_path):
    page, stacks = tmp_path / "page.html", tmp_path / "stacks.txt"
    page.write_text("of before")
    page.chmod(0o644)
    done = call("show", saved, "--html", page, "--collapsed", stacks, "--fail-on-leak", code=1)
    assert done.stdout == call("show", saved).stdout
    assert done.stderr.splitlines() == [
        f"closewait-guard: written to {path}" for path in (page, stacks)
    ]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (page, stacks)] == [0o600, 0o600]
    assert "in 2 of 2 processes." in page.read_text(encoding="utf-8")
    [line] = stacks.read_text(encoding="utf-8").splitlines()
    assert line.startswith("leaked;")
    assert line.endswith(" 4")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "leaks.jsonl",
        "page.html",
        "stacks.txt",
    ]


def test_each_report_that_is_shown_by_itself_is_a_part_of_the_page(saved, tmp_path):
    page = tmp_path / "page.html"
    call("show", saved, "--all", "--html", page, code=0)
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"<h2>(Report \d of 2): ", text) == ["Report 1 of 2", "Report 2 of 2"]


def test_a_file_that_cannot_be_written_is_one_sentence_before_anything_is_done(saved, tmp_path):
    link = tmp_path / "link.html"
    link.symlink_to(saved)
    before = saved.read_bytes()
    reasons = {
        link: "it is a symbolic link: name the file itself",
        tmp_path / "missing" / "page.html": "No such file or directory",
        tmp_path: "Is a directory",
    }
    for path, reason in reasons.items():
        done = call("show", saved, "--html", path, code=2)
        assert done.stdout == ""
        assert done.stderr == f"closewait-guard: cannot write {path}: {reason}\n"
    assert saved.read_bytes() == before
    done = call("run", "--html", link, "-m", "this", code=2)
    assert done.stdout == ""
    assert "--diff" in call("show", saved, "--diff", 1, 2, "--html", link, code=2).stderr


def test_what_cannot_be_written_to_the_end_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("of before")
    file = ReplacedFile(path)

    def fail(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        file.write(b"half of it")
    assert path.read_text() == "of before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_that_is_put_there_meanwhile_is_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "page.html"
    victim.write_text("mine")
    file = ReplacedFile(path)
    path.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        file.write(b"page")
    assert victim.read_text() == "mine"


def test_standard_output_is_written_to_as_it_is(saved):
    done = call("show", saved, "--collapsed", "/dev/stdout", code=0)
    assert re.search(r"^leaked;.* 4$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--fail-on-leak",), 86)])
def test_run_writes_the_page_of_all_processes(tmp_path, options, code):
    child, parent, page = (tmp_path / name for name in ("child.py", "parent.py", "page.html"))
    child.write_text(LEAK)
    parent.write_text(
        "import subprocess, sys\n"
        f"for _ in range(2): subprocess.run([sys.executable, {str(child)!r}])\n"
    )
    done = subprocess.run(
        [*COMMAND, "run", "--grace", "0", *options, "--html", page, parent],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert f"closewait-guard: written to {page}\n" in done.stderr
    text = page.read_text(encoding="utf-8")
    assert "2 leaked sockets from 1 place" in text
    assert re.search(r"<dt>process</dt><dd[^>]*>\d+ \(1\), \d+ \(1\)</dd>", text)


def test_run_says_where_there_is_nothing_to_write(tmp_path):
    page = tmp_path / "page.html"
    done = call("run", "--html", page, "--fail-on-leak", "true")
    assert "closewait-guard: no report to write: no process has reported\n" in done.stderr
    assert not page.exists()
    call("run", "--html", page, "--no-at-exit", "-m", "this", code=2)


def test_report_writes_what_the_process_answers_and_names_who_does_not(tmp_path):
    page = tmp_path / "page.html"
    with running(INSTALL + LEAK + STUCK, tmp_path) as started:
        pid = int(line_of(started))
        arguments = (pid, os.getpid(), "--json", "--html", page)
        done = call("report", *arguments, code=2, XDG_RUNTIME_DIR=str(tmp_path))
    assert json.loads(done.stdout)["pid"] == pid
    text = page.read_text(encoding="utf-8")
    assert "1 leaked socket from 1 place" in text
    assert "__main__.kept (module global)" in text
    assert f"<p>process {os.getpid()} has no control socket: start it by <code>" in text


@pytest.mark.skipif(not can_attach(), reason="no gdb, or no right to use it")
def test_attach_writes_what_it_has_got(tmp_path):
    page, stacks = tmp_path / "page.html", tmp_path / "stacks.txt"
    # Past the grace time; attach has no option for that.
    age = "import time\ntime.sleep(1.2)"
    with program(
        LEAKY + age + WAIT.replace("sys.stdin.read()", "while True: time.sleep(0.05)")
    ) as started:
        call("attach", started.pid, "--html", page, "--collapsed", stacks, code=0)
        started.kill()
    text = page.read_text(encoding="utf-8")
    assert "5 leaked sockets" in text
    assert "<strong>Not covered:</strong>" in text
    lines = stacks.read_text(encoding="utf-8").splitlines()
    assert "leaked;(before install(): no stack was recorded) 5" in lines
