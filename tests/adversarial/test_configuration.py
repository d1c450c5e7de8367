"""A project file of another user changes nothing and runs nothing, and that is said."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import closewait_guard as cwg
from closewait_guard.settings import Settings
from command_line import environment

pytest.importorskip("pwd")

SECTION = "[tool.closewait_guard]\n"
# Imports a module that leaves a trace; `os:system` would run what a report says.
TRAP = SECTION + 'redact = "trap:redact"\ncontext = "trap:context"\ngrace = 7\n'
TRAP_MODULE = (
    "open('sprung', 'w').close()\ndef redact(text): return text\ndef context(): return {}\n"
)


@pytest.fixture
def project(tmp_path):
    """A folder with a project file of this user's."""
    tmp_path.chmod(0o755)
    (tmp_path / "pyproject.toml").write_text(SECTION + "grace = 7\n")
    (tmp_path / "pyproject.toml").chmod(0o644)
    return tmp_path


def load(folder, **environ):
    return Settings.load(environ=environ, directory=folder)


def is_left_out(folder, reason):
    settings = load(folder)
    [note] = settings.notes
    assert note.startswith("settings in /")
    assert "pyproject.toml are ignored: " in note
    assert reason in note, note
    return settings.grace == Settings().grace


def test_a_project_file_of_this_user_is_read(project):
    assert load(project).grace == 7
    assert load(project).notes == ()
    assert load(project).source_of("grace").endswith("pyproject.toml")


def test_a_project_file_of_another_user_is_left_out(project, monkeypatch):
    owner = os.geteuid()
    os.chown(project, 0, 0) if owner == 0 else None
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    if owner == 0:
        # What root has written is read by everybody.
        assert load(project).grace == 7
        os.chown(project / "pyproject.toml", 12345, 12345)
        owner = 12345
    assert is_left_out(project, f" belongs to user {owner}, and this is user 54321")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder away")
def test_a_project_file_in_a_folder_of_another_user_is_left_out(project):
    os.chown(project, 12345, 12345)
    assert is_left_out(project, f"{project} belongs to user 12345, and this is user 0")


@pytest.mark.parametrize("mode", [0o646, 0o666])
def test_a_project_file_that_others_may_write_is_left_out(project, mode):
    (project / "pyproject.toml").chmod(mode)
    assert is_left_out(project, f"other users may write to {project / 'pyproject.toml'}")


def test_a_project_file_below_a_folder_that_others_may_write_is_left_out(project):
    inner = project / "inner"
    inner.mkdir(mode=0o755)
    (project / "pyproject.toml").rename(inner / "pyproject.toml")
    project.chmod(0o777)
    assert is_left_out(inner, f"other users may write to {project}")
    # As in /tmp: there nobody can take away what belongs to another.
    project.chmod(0o1777)
    assert load(inner).grace == 7


@pytest.fixture
def of_daemon(project, monkeypatch):
    """A project file of a user whose group is nobody else's, and who is this user now."""
    path = project / "pyproject.toml"
    path.chmod(0o664)
    os.chown(path, 1, 1)
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    return path


gives_away = pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")


@gives_away
def test_a_group_may_write_only_if_it_is_the_user_s_own(project, of_daemon):
    assert load(project).grace == 7
    os.chown(of_daemon, 1, 12345)
    assert is_left_out(project, f"other users may write to {of_daemon}")


@gives_away
def test_group_0_may_not_write_for_others_than_root_are_in_it(project):
    path = project / "pyproject.toml"
    path.chmod(0o664)
    os.chown(path, 0, 0)
    # As a container's users and daemons that have given up their user only.
    other = ["import os, sys", "os.setgid(0); os.setuid(54321)", f"open({str(path)!r}, 'a')"]
    project.parent.chmod(0o755)
    subprocess.run([sys.executable, "-Sc", "; ".join(other)], check=False, timeout=60)
    assert is_left_out(project, f"other users may write to {path}")


@gives_away
def test_an_access_list_is_no_private_group(project, of_daemon):
    # Version 2; then tag, rights and number: the owner, user 12345, the group, the mask, others.
    entries = [(1, 6, 0), (2, 6, 12345), (4, 4, 0), (16, 6, 0), (32, 4, 0)]
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries)
    try:
        os.setxattr(of_daemon, "system.posix_acl_access", packed)
    except OSError as error:
        pytest.skip(f"no access lists here: {error}")
    assert of_daemon.stat().st_mode & 0o020
    assert is_left_out(project, f"other users may write to {of_daemon}")


@gives_away
def test_a_link_on_the_way_that_another_user_may_turn_is_not_followed(project, tmp_path_factory):
    start, middle = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("middle")
    start.chmod(0o755)
    (middle / "link").symlink_to(project / "pyproject.toml")
    (start / "pyproject.toml").symlink_to(middle / "link")
    assert load(start).grace == 7
    os.chown(middle, 12345, 12345)
    assert is_left_out(start, f"{middle} belongs to user 12345, and this is user 0")


@pytest.mark.parametrize(
    "content",
    ["[project]\nname = 'theirs'\n", "[project]\ndependencies = ['closewait_guard[cli]']\n"],
)
def test_a_file_of_others_that_sets_nothing_for_the_guard_is_not_worth_a_word(project, content):
    (project / "pyproject.toml").write_text(content)
    (project / "pyproject.toml").chmod(0o666)
    assert load(project).notes == ()


def test_a_file_of_others_that_cannot_be_read_as_one_is_said(project):
    (project / "pyproject.toml").write_text("closewait_guard = [")
    (project / "pyproject.toml").chmod(0o666)
    assert is_left_out(project, "other users may write to")


def test_what_is_left_out_is_warned_of_and_stops_nothing(project, monkeypatch):
    (project / "pyproject.toml").chmod(0o666)
    monkeypatch.chdir(project)
    with pytest.warns(RuntimeWarning, match=r"^closewait_guard: settings in .* are ignored: "):
        cwg.Guard()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cwg.Guard().settings.grace == Settings().grace


def test_a_link_counts_as_the_file_that_it_leads_to(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    elsewhere.chmod(0o755)
    (elsewhere / "pyproject.toml").symlink_to(project / "pyproject.toml")
    assert load(elsewhere).grace == 7
    project.chmod(0o777)
    assert is_left_out(elsewhere, f"other users may write to {project}")


def test_what_is_left_out_is_said_in_the_report(project, monkeypatch):
    (project / "pyproject.toml").chmod(0o666)
    monkeypatch.chdir(project)
    with cwg.Guard() as guard:
        [note] = guard.settings.notes
        assert note in guard.scan().coverage.notes
        assert "other users may write to " in cwg.render_text(guard.scan()).replace("\n  ", " ")


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"a = " + b"[" * 100_000, b"\x00", b"x = 'x'\nx = 1\n"],
    ids=["not-utf-8", "nested", "binary", "twice"],
)
def test_a_project_file_that_makes_no_sense_gets_one_short_sentence(project, content):
    (project / "pyproject.toml").write_bytes(b"# closewait_guard\n" + content)
    with pytest.raises(cwg.ConfigurationError, match=r"pyproject\.toml cannot be read: ") as caught:
        load(project)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_what_is_no_file_is_left_out(project, make):
    (project / "pyproject.toml").unlink()
    make(project / "pyproject.toml")
    (project / "pyproject.toml").chmod(0o755)
    assert is_left_out(project, "is not a regular file")


def test_a_project_file_is_not_read_without_bound(project):
    (project / "pyproject.toml").write_bytes(b"#" * 3_000_000)
    assert is_left_out(project, "is larger than 1,048,576 bytes")


def test_the_environment_can_keep_project_files_out(project):
    assert load(project, CLOSEWAIT_GUARD_NO_CONFIG="1").grace == Settings().grace
    assert load(project, CLOSEWAIT_GUARD_NO_CONFIG="0").grace == 7
    with pytest.raises(cwg.ConfigurationError) as caught:
        load(project, CLOSEWAIT_GUARD_NO_CONFIG="maybe")
    assert str(caught.value) == (
        "environment variable CLOSEWAIT_GUARD_NO_CONFIG: expected true or false, got 'maybe'"
    )


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "closewait_guard", *map(str, arguments)],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def trap(project):
    """A project file that names code, which leaves a trace where it is run."""
    (project / "pyproject.toml").write_text(TRAP)
    (project / "trap.py").write_text(TRAP_MODULE)
    return project


COMMANDS = [("scan", os.getpid()), ("doctor",), ("watch", os.getpid(), "--count", 1)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_commands_run_no_code_that_a_file_names_and_say_so(trap, command):
    done = run(trap, *command)
    text = "".join((done.stdout + done.stderr).split())
    for name in ("redact", "context"):
        assert f"{name}in[tool.closewait_guard]of{trap}/pyproject.tomlisignored" in text
    assert not (trap / "sprung").exists()
    assert run(trap, *command, "--no-config").stderr == ""
    assert "ignored" not in run(trap, *command, "--no-config").stdout


def test_the_library_in_a_program_runs_the_code_that_its_project_names(trap):
    program = "import closewait_guard as cwg; assert cwg.install().settings.redact"
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=trap,
        env=environment() | {"PYTHONPATH": str(trap)},
        check=True,
        timeout=60,
    )
    assert (trap / "sprung").exists()


def test_run_hands_no_config_on_to_the_program_and_its_children(trap):
    program = trap / "program.py"
    program.write_text(
        "import subprocess, sys\n"
        "import closewait_guard as cwg\n"
        "print(cwg.Settings.load().grace)\n"
        "if len(sys.argv) < 2: subprocess.run([sys.executable, __file__, 'child'], check=True)\n"
    )
    assert run(trap, "run", program).stdout.split() == ["7.0", "7.0"]
    (trap / "sprung").unlink()
    assert run(trap, "run", "--no-config", program).stdout.split() == ["1.0", "1.0"]
    assert not (trap / "sprung").exists()


def test_a_command_imports_nothing_from_the_working_directory(tmp_path):
    for name in ("json", "tomllib", "wrapt", "rich", "psutil", "argcomplete", "closewait_traps"):
        (tmp_path / f"{name}.py").write_text("open('sprung', 'w').close()\n")
    subprocess.run(
        [sys.executable, "-m", "closewait_guard", "scan", "--json", str(os.getpid())],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        timeout=60,
    )
    assert not (tmp_path / "sprung").exists()


def test_pytest_says_that_a_project_file_is_left_out(suite):
    (suite.pytester.path / "pyproject.toml").write_text(SECTION + "grace = 7\n")
    (suite.pytester.path / "pyproject.toml").chmod(0o666)
    result = suite.run("def test_it(): socket.socket().close()", "--socket-leaks=fail")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["closewait-guard: settings in */pyproject.toml are ignored: *"])


@pytest.mark.parametrize(
    "text",
    ["\N{FULLWIDTH DIGIT ONE}2", "1_000", "0x10", "nan", "inf", "1e400", "", " ", "-1", "1,5"],
)
def test_a_number_of_the_environment_is_plain_or_is_refused_by_name(tmp_path, text):
    with pytest.raises(cwg.ConfigurationError) as caught:
        load(tmp_path, CLOSEWAIT_GUARD_GRACE=text)
    assert str(caught.value).startswith(
        "environment variable CLOSEWAIT_GUARD_GRACE: expected a non-negative number"
    )


@pytest.mark.parametrize(
    "text", ["1e400", "-1e400", "10.5", "nan", "\N{FULLWIDTH DIGIT ONE}0", "0"]
)
def test_a_signal_that_is_none_gets_one_sentence(tmp_path, text):
    with pytest.raises(cwg.ConfigurationError, match="SIGNAL: expected the name or number of a"):
        load(tmp_path, CLOSEWAIT_GUARD_SIGNAL=text)


def test_minus_zero_is_zero(tmp_path):
    assert str(load(tmp_path, CLOSEWAIT_GUARD_GRACE="-0").grace) == "0.0"


def test_a_module_that_exits_when_it_is_imported_gets_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "exits_at_once.py").write_text("raise SystemExit('two\\nlines')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(cwg.ConfigurationError, match="SystemExit: two lines"):
        load(tmp_path, CLOSEWAIT_GUARD_REDACT="exits_at_once:redact")


def test_a_value_without_end_is_cut_in_the_sentence_that_refuses_it(tmp_path):
    with pytest.raises(cwg.ConfigurationError) as caught:
        load(tmp_path, CLOSEWAIT_GUARD_GRACE="9" * 100_000 + "x")
    assert len(str(caught.value)) < 400


@pytest.fixture
def traps(tmp_path):
    """A folder that has a module of every name that Python or the guard may import."""
    others = {"closewait_guard", "wrapt", "rich", "psutil", "argcomplete", "sitecustomize"}
    for name in sys.stdlib_module_names | others:
        (tmp_path / f"{name}.py").write_text(f"open('sprung-{name}', 'w').close()\n")
    return tmp_path


@pytest.mark.parametrize("command", [*COMMANDS, ("run",)], ids=lambda command: command[0])
def test_the_installed_command_imports_nothing_at_all_from_the_working_directory(
    traps, command, tmp_path_factory
):
    script = Path(sys.executable).with_name("closewait-guard")
    if not script.exists():
        pytest.skip("the command is not installed beside this Python")
    program = tmp_path_factory.mktemp("elsewhere") / "program.py"
    program.write_text("import closewait_guard, json, socket\nprint(closewait_guard.__file__)\n")
    target = [program] if command == ("run",) else []
    done = subprocess.run(
        [script, *map(str, (*command, *target))],
        cwd=traps,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (0, 1), done.stderr
    assert not list(traps.glob("sprung-*"))
