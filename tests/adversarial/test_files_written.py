"""Output files: no other user can choose them, none blocks, the program's own files stay intact."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import threading

import pytest

import closewait_guard as cwg
from closewait_guard import reporters
from closewait_guard._files import OutputFile
from leaking import report_leaks, run

OTHER_USER = 54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def shared(tmp_path):
    """A folder like /tmp, where all users may write."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture(params=["json_lines", "pytest"])
def refusal(request, suite):
    """The sentence in which each writer refuses a file."""

    def by_json_lines(path):
        with pytest.raises(cwg.ConfigurationError) as caught:
            reporters.json_lines(path)
        return str(caught.value)

    def by_pytest(path):
        result = suite.fail("def test_it(): pass\n", f"--socket-leaks-json={path}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        [line] = [line for line in result.errlines if line]
        return line

    return by_json_lines if request.param == "json_lines" else by_pytest


def test_a_link_is_not_followed_and_what_it_leads_to_stays(shared, tmp_path, refusal):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    link = shared / "leaks.jsonl"
    link.symlink_to(victim)
    sentence = refusal(link)
    assert "it is a symbolic link: name the file itself" in sentence
    assert "\n" not in sentence
    assert victim.read_text() == "mine"
    link.unlink()
    link.symlink_to(shared / "not there yet")
    assert "symbolic link" in refusal(link)
    assert not (shared / "not there yet").exists()


def test_a_hard_link_in_a_folder_where_others_may_write_is_refused(shared, tmp_path, refusal):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    os.link(victim, shared / "leaks.jsonl")
    assert "hard link, and others may write to its directory" in refusal(shared / "leaks.jsonl")
    assert victim.read_text() == "mine"


def test_a_file_that_all_users_may_write_is_refused_in_such_a_folder(shared, refusal):
    path = shared / "leaks.jsonl"
    path.touch()
    path.chmod(0o666)
    assert "it is world-writable, and others may write to its directory" in refusal(path)


@needs_root
def test_a_file_of_another_user_is_refused_in_such_a_folder(shared, refusal):
    path = shared / "leaks.jsonl"
    path.write_text("theirs")
    os.chown(path, OTHER_USER, OTHER_USER)
    reason = f"it belongs to user {OTHER_USER}, and others may write to its directory"
    assert reason in refusal(path)
    assert path.read_text() == "theirs"


@needs_root
def test_a_link_of_another_user_on_the_way_is_refused(shared, tmp_path, refusal):
    own = tmp_path / "own"
    own.mkdir()
    victim = own / "app.conf"
    victim.write_text("precious")
    (shared / "app").symlink_to(own)
    os.chown(shared / "app", OTHER_USER, OTHER_USER, follow_symlinks=False)
    sentence = refusal(shared / "app" / "app.conf")
    assert f"is a link of user {OTHER_USER}, who can change its target" in sentence
    assert victim.read_text() == "precious"
    refusal(shared / "app" / "new.jsonl")
    assert [path.name for path in own.iterdir()] == ["app.conf"]


def test_a_link_of_the_same_user_on_the_way_is_followed(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "link").symlink_to("logs")
    file = OutputFile(tmp_path / "link" / "leaks.jsonl")
    file.append(b"{}\n")
    assert file.is_current()
    file.close()
    assert (tmp_path / "logs" / "leaks.jsonl").read_bytes() == b"{}\n"


def test_a_folder_that_is_replaced_while_its_file_is_opened_is_noticed(tmp_path, monkeypatch):
    for name in ("logs", "secret"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret" / "leaks.jsonl").write_text("precious")
    true_open = os.open

    def open_another(path, *arguments):
        return true_open(str(path).replace("logs", "secret"), *arguments)

    (tmp_path / "logs" / "leaks.jsonl").touch()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_another)
        with pytest.raises(PermissionError, match="the file at this path is being replaced"):
            OutputFile(tmp_path / "logs" / "leaks.jsonl")
    assert (tmp_path / "secret" / "leaks.jsonl").read_text() == "precious"


@needs_root
def test_another_user_s_folder_is_one_that_others_may_write(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    path = folder / "leaks.jsonl"
    path.touch()
    os.chown(path, OTHER_USER, OTHER_USER)
    os.chown(folder, OTHER_USER + 1, OTHER_USER)
    with pytest.raises(PermissionError, match="it belongs to user"):
        OutputFile(path)
    # The owner of the folder may read what is written there in any case.
    os.chown(folder, OTHER_USER, OTHER_USER)
    OutputFile(path).close()
    os.link(path, folder / "other name")
    with pytest.raises(PermissionError, match="hard link"):
        OutputFile(path)


def test_in_a_folder_of_the_same_user_every_file_is_accepted(tmp_path):
    path = tmp_path / "leaks.jsonl"
    path.touch()
    path.chmod(0o666)
    os.link(path, tmp_path / "other name")
    report_leaks(reporters.json_lines(path))
    assert len(lines(path)) == 1


def test_a_file_of_the_same_user_in_a_shared_folder_is_appended_to(shared):
    path = shared / "leaks.jsonl"
    for _ in range(2):
        report_leaks(reporters.json_lines(path))
    assert len(lines(path)) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_that_is_put_there_later_is_not_followed_when_the_file_is_reopened(shared, tmp_path):
    path, victim = shared / "leaks.jsonl", tmp_path / "victim"
    victim.write_text("mine")
    reporter = reporters.json_lines(path)
    report = report_leaks(reporter)
    path.rename(shared / "moved")
    path.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        reporter(report)
    assert victim.read_text() == "mine"
    path.unlink()
    reporter(report)
    assert len(lines(path)) == 1


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_what_is_no_file_is_refused_at_once(tmp_path, refusal, kind):
    path = tmp_path / "odd"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    else:
        path = "/dev/full"
    assert "it is not a regular file" in refusal(path)


def test_a_reader_that_waits_for_a_pipe_s_writer_is_not_woken_by_a_refusal(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    woken = threading.Event()

    def read():
        with path.open():
            woken.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with pytest.raises(OSError, match="not a regular file"):
            OutputFile(path)
        assert not woken.wait(0.1)
    finally:
        os.close(os.open(path, os.O_WRONLY))
        reader.join(10)


WRITE_TO = """
report = cwg.scan()
reporter = reporters.json_lines(sys.argv[1])
reporter(report)
print("mine", flush=True)
reporter(report)
"""


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_can_be_named_where_it_is_a_pipe(path):
    out, _ = run(WRITE_TO, path)
    first, mine, last = out.splitlines()
    assert json.loads(first)["schema"] == json.loads(last)["schema"] == "closewait-guard/1"
    assert mine == "mine"


def test_standard_error_can_be_named():
    _, err = run(WRITE_TO, "/dev/stderr")
    assert [json.loads(line)["schema"] for line in err.splitlines()] == ["closewait-guard/1"] * 2


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_WRONLY | os.O_APPEND, os.O_RDWR])
def test_standard_output_can_be_named_where_it_is_a_file_and_nothing_is_cut_off(tmp_path, flags):
    path = tmp_path / "out"
    path.write_text("before\n" if flags & os.O_APPEND else "")
    fd = os.open(path, flags | os.O_CREAT)
    code = "import sys\nimport closewait_guard as cwg\nfrom closewait_guard import reporters\n"
    done = subprocess.run(
        [sys.executable, "-c", code + WRITE_TO, "/dev/stdout"], stdout=fd, timeout=60
    )
    os.close(fd)
    assert done.returncode == 0
    found = [line for line in path.read_text().splitlines() if line != "before"]
    assert found[1] == "mine"
    assert [json.loads(found[place])["pid"] for place in (0, 2)]


def test_a_pipe_that_does_not_block_takes_a_line_of_any_length():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    got = []

    def read():
        while data := os.read(reading, 65536):
            got.append(data)

    reader = threading.Thread(target=read)
    file = OutputFile(f"/dev/fd/{writing}")
    reader.start()
    try:
        file.append(b"x" * 1_000_000 + b"\n")
    finally:
        file.close()
        os.close(writing)
        reader.join(10)
        os.close(reading)
    assert b"".join(got) == b"x" * 1_000_000 + b"\n"


def test_a_pipe_whose_reader_has_gone_or_sleeps_costs_a_report_and_no_more(monkeypatch):
    from closewait_guard import _files

    monkeypatch.setattr(_files, "_READER_TIMEOUT", 0.05)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    file = OutputFile(f"/dev/fd/{writing}")
    try:
        with pytest.raises(TimeoutError, match="the other end does not read"):
            file.append(b"x" * 1_000_000 + b"\n")
        os.set_blocking(reading, False)
        with pytest.raises(BlockingIOError):
            while os.read(reading, 65536):
                pass
        file.append(b"next\n")
        assert os.read(reading, 100) == b"\nnext\n", "a line of its own"
        os.close(reading)
        with pytest.raises(BrokenPipeError):
            file.append(b"last\n")
    finally:
        file.close()
        os.close(writing)


def test_a_number_that_has_become_another_file_gets_no_bytes(tmp_path):
    reading, writing = os.pipe()
    file = OutputFile(f"/dev/fd/{writing}")
    number = file.fileno()
    os.close(number)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    try:
        os.dup2(other, writing)
        os.dup2(other, number)
        assert not file.is_current()
        with pytest.raises(OSError, match="refers to another file") as caught:
            file.reopen()
        assert caught.value.errno == errno.EBADF
    finally:
        for fd in {other, number, writing}:
            os.close(fd)
        os.close(reading)
    assert (tmp_path / "other").read_bytes() == b""


LEAKING = """
def test_one():
    keep(socket.socket())


def test_two():
    keep(socket.socket())
"""


def test_a_full_disk_costs_lines_of_the_json_file_and_the_run_is_no_success(suite):
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        suite.write(LEAKING)
        result = suite.run(None, "--socket-leaks=warn", f"--socket-leaks-json=/dev/fd/{full}")
    finally:
        os.close(full)
    sentence = f"*/dev/fd/{full} cannot be written: No space left on device; findings *: 2"
    result.stdout.fnmatch_lines([f"ERROR: socket_leaks_json: {sentence}"])
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_names_that_are_not_utf_8_are_in_the_json_file_as_they_are(suite, tmp_path):
    source = """
def test_it():
    code = compile("import socket\\nkept = keep(socket.socket())", "/tmp/\\udcff.py", "exec")
    exec(code, {"keep": keep})
"""
    [line] = suite.findings(source)
    [leak] = line["report"]["findings"]
    assert "/tmp/\udcff.py" in [
        frame["filename"] for frame in leak["observation"]["record"]["stack"]
    ]


def test_the_json_file_survives_a_program_that_closes_what_it_does_not_know(suite):
    source = """
def test_one():
    keep(socket.socket())


def test_two():
    import json, os
    for fd in range(3, 100):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").endswith("leaks.jsonl"):
                os.close(fd)
        except OSError:
            pass
    keep([open("other", "w") for _ in range(20)])
    keep(socket.socket())
"""
    suite.fail(source, "--socket-leaks-json=leaks.jsonl", apart=True)
    assert len(lines(suite.pytester.path / "leaks.jsonl")) == 2
    assert (suite.pytester.path / "other").read_text() == ""
