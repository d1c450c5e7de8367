"""One report is one line that reads back, even if other processes write to the file."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

import closewait_guard as cwg
from closewait_guard import reporters
from leaking import PRELUDE, report_leaks
from schema import SCHEMA


def written(path):
    return [cwg.from_dict(json.loads(line)) for line in path.read_text().splitlines()]


def test_one_report_is_one_line_that_reads_back_and_fits_the_schema(tmp_path):
    path = tmp_path / "leaks.jsonl"
    reporter = reporters.json_lines(path)
    reports = [report_leaks(reporter), report_leaks(reporter, count=2)]
    assert written(path) == reports
    for line in path.read_text().splitlines():
        jsonschema.validate(json.loads(line), SCHEMA)
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_no_other_user_may_read_the_file_or_those_after_it(tmp_path, umask):
    path = tmp_path / "leaks.jsonl"
    before = os.umask(umask)
    try:
        reporter = reporters.json_lines(path, max_bytes=1, backups=1)
        report = report_leaks(reporter)
        reporter(report)
    finally:
        os.umask(before)
    for each in (path, tmp_path / "leaks.jsonl.1"):
        assert stat.S_IMODE(each.stat().st_mode) == 0o600


def test_a_mode_that_was_changed_stays(tmp_path):
    path = tmp_path / "leaks.jsonl"
    path.touch(mode=0o640)
    report_leaks(reporters.json_lines(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
def test_a_path_may_be_of_any_kind_and_rotates(tmp_path, kind):
    reporter = reporters.json_lines(kind(tmp_path / "leaks.jsonl"), max_bytes=1)
    report = report_leaks(reporter)
    reporter(report)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["leaks.jsonl", "leaks.jsonl.1"]


def test_the_file_stays_the_same_when_the_program_changes_its_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reporter = reporters.json_lines("leaks.jsonl", max_bytes=1)
    monkeypatch.chdir("/")
    report = report_leaks(reporter)
    reporter(report)
    assert len(written(tmp_path / "leaks.jsonl")) == 1


@pytest.mark.parametrize(("backups", "expected"), [(0, [5]), (1, [5, 4]), (3, [5, 4, 3, 2])])
def test_full_files_are_kept_as_many_as_configured_the_newest_first(tmp_path, backups, expected):
    path = tmp_path / "leaks.jsonl"
    reporter = reporters.json_lines(path, max_bytes=1, backups=backups)
    report = report_leaks(lambda report: None)
    for number in range(6):
        reporter(replace(report, open_sockets=number))
    files = [path, *(tmp_path / f"leaks.jsonl.{number}" for number in range(1, backups + 1))]
    assert [each.open_sockets for file in files for each in written(file)] == expected
    assert len(list(tmp_path.iterdir())) == len(files)


def test_a_file_never_grows_beyond_its_limit_unless_one_report_does(tmp_path):
    path = tmp_path / "leaks.jsonl"
    report = report_leaks(lambda report: None)
    length = len(json.dumps(cwg.to_dict(report), separators=(",", ":"))) + 1
    reporter = reporters.json_lines(path, max_bytes=3 * length, backups=9)
    for _ in range(8):
        reporter(report)
    assert [len(written(tmp_path / f"leaks.jsonl{end}")) for end in ("", ".1", ".2")] == [2, 3, 3]


def test_zero_bytes_mean_no_limit(tmp_path):
    reporter = reporters.json_lines(tmp_path / "leaks.jsonl", max_bytes=0)
    report = report_leaks(reporter)
    for _ in range(5):
        reporter(report)
    assert [each.name for each in tmp_path.iterdir()] == ["leaks.jsonl"]


def test_a_file_that_another_process_renames_while_it_is_opened_is_opened_again(
    tmp_path, monkeypatch
):
    path = tmp_path / "leaks.jsonl"
    report = report_leaks(lambda report: None)
    true_open = os.open

    def open_and_lose(name, *arguments):
        fd = true_open(name, *arguments)
        if os.fspath(name) == str(path) and not (tmp_path / "leaks.jsonl.1").exists():
            path.rename(tmp_path / "leaks.jsonl.1")
        return fd

    monkeypatch.setattr(os, "open", open_and_lose)
    reporters.json_lines(path)(report)
    assert written(path) == [report]


WRITER = """
path, name, rounds, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair():
    from dataclasses import replace
    time.sleep(0.03)
    report = guard.scan()
    report = replace(report, findings=report.findings * 20)
    reporter = reporters.json_lines(path, max_bytes=limit, backups=1000)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(rounds):
        reporter(replace(report, command=name, open_sockets=number))
"""


@pytest.mark.parametrize("limit", [0, 100_000])
def test_four_processes_write_without_tearing_or_losing_a_line(tmp_path, limit):
    path, rounds = tmp_path / "leaks.jsonl", 20
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + WRITER, str(path), name, str(rounds), str(limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abcd"
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=30)
        assert writer.returncode == 0
    files = list(tmp_path.iterdir())
    assert (len(files) > 1) is bool(limit)
    got = [(each["command"], each["open_sockets"]) for file in files for each in lines(file)]
    assert sorted(got) == [(name, number) for name in "abcd" for number in range(rounds)]
    if limit:
        assert max(file.stat().st_size for file in files) <= limit


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_threads_share_a_reporter_without_tearing_or_losing_a_line(tmp_path):
    path, rounds = tmp_path / "leaks.jsonl", 20
    report = report_leaks(lambda report: None, count=5)
    reporter = reporters.json_lines(path, max_bytes=50_000, backups=1000)

    def write(name):
        for number in range(rounds):
            reporter(replace(report, command=name, open_sockets=number))

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    got = [
        (each["command"], each["open_sockets"])
        for file in tmp_path.iterdir()
        for each in lines(file)
    ]
    assert sorted(got) == [(name, number) for name in "abcd" for number in range(rounds)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"max_bytes": -1}, "max_bytes: expected a non-negative integer, got -1"),
        ({"max_bytes": 1.5}, "max_bytes: expected a non-negative integer, got 1.5"),
        ({"max_bytes": True}, "max_bytes: expected a non-negative integer, got True"),
        ({"backups": "3"}, "backups: expected a non-negative integer, got '3'"),
        ({"path": "/no/such/folder/x"}, r"'/no/such/folder/x' cannot be opened: .*No such file"),
        ({"path": "/"}, "'/' cannot be opened: .*Is a directory"),
        ({"path": "/dev/null"}, "'/dev/null' cannot be opened: .*not a regular file"),
        ({"path": None}, "None cannot be opened: "),
        ({"path": "a\0b"}, "cannot be opened: .*null"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, arguments, sentence):
    with pytest.raises(cwg.ConfigurationError, match=f"json_lines: .*{sentence}") as caught:
        reporters.json_lines(**({"path": tmp_path / "x"} | arguments))
    assert "\n" not in str(caught.value)


def test_a_guard_that_ends_gives_the_descriptor_back(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    report_leaks(f"json_lines:{tmp_path / 'leaks.jsonl'}")
    assert len(os.listdir("/proc/self/fd")) == before
    reporter = reporters.json_lines(tmp_path / "leaks.jsonl")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert repr(reporter) == f"json_lines({str(tmp_path / 'leaks.jsonl')!r})"
    del reporter
    assert len(os.listdir("/proc/self/fd")) == before
