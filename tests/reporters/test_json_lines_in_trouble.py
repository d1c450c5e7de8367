"""A failure of a disk, folder, descriptor or fork costs at most some reports, and is logged."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess

import pytest
import structlog

import closewait_guard as cwg
from closewait_guard import reporters
from leaking import fork, leaking_guard, report_leaks, run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_report():
    return report_leaks(lambda report: None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "leaks.jsonl"


def test_after_a_torn_line_of_another_writer_a_line_is_a_line(path):
    reporter = reporters.json_lines(path)
    report = one_report()
    reporter(report)
    with path.open("a") as other:
        other.write('{"schema": "closewait-gu')
    reporter(report)
    first, torn, last = path.read_text().splitlines()
    assert first == last
    assert torn == '{"schema": "closewait-gu'


def test_a_size_limit_of_the_process_costs_one_report_and_no_other_byte(path):
    reporter = reporters.json_lines(path)
    report = one_report()
    reporter(report)
    size = path.stat().st_size
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            reporter(report)
        assert path.stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    reporter(report)
    assert len(lines(path)) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, if this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_the_reports_of_that_time_and_is_logged_once(small_disk):
    path = small_disk / "leaks.jsonl"
    with leaking_guard(reporters.json_lines(path)) as guard:
        guard.report()
        ballast = small_disk / "ballast"
        with ballast.open("wb") as full, pytest.raises(OSError, match="No space left"):
            while True:
                os.write(full.fileno(), b"x" * 1000)
        with path.open("ab") as page:
            # The rest of the file's last page can be written to even on a full disk.
            room = -path.stat().st_size % resource.getpagesize()
            page.write(b" " * (room - 101) + b"\n")
        before = path.read_bytes()
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                guard.report()
        assert path.read_bytes() == before
        [log] = logs
        assert log["event"] == "a reporter failed"
        assert log["reporter"] == f"json_lines({str(path)!r})"
        assert "No space left on device" in str(log["error"])
        assert guard.failed_reports == 3
        ballast.unlink()
        guard.report()
    first, _, last = path.read_text().splitlines()
    assert json.loads(first)["pid"] == json.loads(last)["pid"] == os.getpid()


def test_a_removed_folder_costs_the_reports_until_it_is_there_again(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    path = folder / "leaks.jsonl"
    with leaking_guard(reporters.json_lines(path)) as guard:
        guard.report()
        shutil.rmtree(folder)
        with structlog.testing.capture_logs() as logs:
            guard.report()
            guard.report()
        assert [log["event"] for log in logs] == ["a reporter failed"]
        assert "No such file or directory" in str(logs[0]["error"])
        folder.mkdir()
        with structlog.testing.capture_logs() as logs:
            guard.report()
            assert len(lines(path)) == 1
            shutil.rmtree(folder)
            guard.report()
        assert len(logs) == 1, "the first of consecutive failures is logged"


def test_a_file_that_logrotate_has_moved_away_is_created_again(path, tmp_path):
    reporter = reporters.json_lines(path)
    report = one_report()
    reporter(report)
    path.rename(tmp_path / "leaks.jsonl-yesterday")
    reporter(report)
    assert len(lines(path)) == len(lines(tmp_path / "leaks.jsonl-yesterday")) == 1


def test_a_file_that_logrotate_has_truncated_goes_on_at_its_beginning(path):
    reporter = reporters.json_lines(path)
    report = one_report()
    reporter(report)
    os.truncate(path, 0)
    reporter(report)
    assert len(lines(path)) == 1


def test_a_rotation_that_fails_is_logged_and_loses_no_report(path, tmp_path):
    reporter = reporters.json_lines(path, max_bytes=1, backups=1)
    report = one_report()
    reporter(report)
    (tmp_path / "leaks.jsonl.1").mkdir()
    with pytest.raises(IsADirectoryError):
        reporter(report)
    assert len(lines(path)) == 2
    (tmp_path / "leaks.jsonl.1").rmdir()
    reporter(report)
    assert len(lines(path)) == 1


def test_a_forked_child_writes_lines_of_its_own_and_leaves_its_parent_s_lock(path):
    """The child keeps the full file open, which its parent had locked."""
    reporter = reporters.json_lines(path, max_bytes=1, backups=9)
    report = one_report()
    reporter(report)
    hold, release = os.pipe()
    silent = fork()
    if silent == 0:
        os.close(release)
        os.read(hold, 1)
        os._exit(0)
    other = reporters.json_lines(path, max_bytes=1, backups=9)
    try:
        reporter(report)
        other(report)
        reporter(report)
        child = fork()
        if child == 0:
            status = 1
            try:
                reporter(report)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        os.close(release)
        os.close(hold)
        os.waitpid(silent, 0)
    assert len(list(path.parent.iterdir())) == 5


def test_a_program_that_makes_itself_a_daemon_keeps_its_file_and_those_of_others(tmp_path):
    code = """
path, other = sys.argv[1:]
guard = cwg.Guard(cwg.Settings(grace=0), [f"json_lines:{path}"]).install()
leak = half_closed_pair()
leak.__enter__()
time.sleep(0.03)
guard.report()
os.closerange(3, 256)
files = [open(other, "w") for _ in range(20)]
guard.report()
guard.uninstall()
for file in files:
    file.write("")
    os.fstat(file.fileno())
os._exit(0)
"""
    path, other = tmp_path / "leaks.jsonl", tmp_path / "other"
    run(code, path, other)
    assert len(lines(path)) == 2
    assert other.read_text() == ""


@pytest.mark.parametrize("moved", ["", "moved away", "full"])
def test_a_report_is_written_when_no_descriptor_is_left(tmp_path, moved):
    code = """
path, moved = sys.argv[1:]
limit = 1 if moved == "full" else 0
guard = cwg.Guard(
    cwg.Settings(grace=0), [reporters.json_lines(path, max_bytes=limit)]
).install()
leak = half_closed_pair()
leak.__enter__()
time.sleep(0.03)
guard.report()
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
if moved == "moved away":
    os.rename(path, path + ".yesterday")
report = guard.report()
assert report.fd_used == 40
assert guard.failed_reports == 0
os._exit(0)
"""
    path = tmp_path / "leaks.jsonl"
    run(code, path, moved)
    assert lines(path)[-1]["fd_used"] == 40
    assert len(lines(path)) == (1 if moved else 2)


def test_a_guard_that_ends_does_not_close_the_file_under_a_report(path):
    """Otherwise the number could belong to another file when the line is written."""
    import threading

    inner = reporters.json_lines(path)
    started, go_on = threading.Event(), threading.Event()

    class Slow:
        closed = 0

        def __call__(self, report):
            started.set()
            assert go_on.wait(10)
            inner(report)

        def close(self):
            self.closed += 1

    slow = Slow()
    guard = cwg.Guard(cwg.Settings(reporter_timeout=5), [slow]).install()
    teller = threading.Thread(target=guard.report)
    teller.start()
    assert started.wait(10)
    ender = threading.Thread(target=guard.uninstall)
    ender.start()
    ender.join(0.1)
    assert slow.closed == 0
    go_on.set()
    teller.join(10)
    ender.join(10)
    assert slow.closed == 1
    assert len(lines(path)) == 1


def test_the_process_that_a_program_becomes_does_not_inherit_the_file(path):
    reporters_file = reporters.json_lines(path)
    fds = [int(name) for name in os.listdir("/proc/self/fd")]
    ours = [fd for fd in fds if is_file(fd, path)]
    assert [os.get_inheritable(fd) for fd in ours] == [False]
    reporters_file.close()


def is_file(fd, path):
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False
