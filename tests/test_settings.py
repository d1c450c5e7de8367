"""Every source of a setting, and one sentence for each bad value."""

from __future__ import annotations

import os
from dataclasses import fields

import pytest

import closewait_guard as cwg
from closewait_guard._config import project_file
from closewait_guard._descriptors import fd_limit, fd_used
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.settings import Settings
from conftest import run_apart


def load(tmp_path, overrides=None, environ=None, toml=None):
    if toml is not None:
        (tmp_path / "pyproject.toml").write_text(toml)
    return Settings.load(overrides, environ=environ or {}, directory=tmp_path)


def test_keywords_win_over_the_environment_over_pyproject_over_defaults(tmp_path):
    toml = "[tool.closewait_guard]\ngrace = 5\nstack_depth = 7\nprobe = 'portable'\n"
    environ = {"CLOSEWAIT_GUARD_GRACE": "3", "CLOSEWAIT_GUARD_STACK_DEPTH": "9", "OTHER": "x"}
    settings = load(tmp_path, {"grace": 2}, environ, toml)
    assert (settings.grace, settings.stack_depth, settings.probe) == (2.0, 9, "portable")
    assert settings.age_warning == Settings().age_warning


@pytest.mark.parametrize("table", ["closewait-guard", '"closewait-guard"', "closewait-guard.x"])
def test_a_table_with_a_hyphen_is_refused_with_the_right_name(tmp_path, table):
    path = tmp_path / "pyproject.toml"
    path.write_text(f"[project]\nname = 'x'\n[tool.{table}]\ngrace = 5\n")
    with pytest.raises(ConfigurationError) as error:
        Settings.load(environ={}, directory=tmp_path)
    meant = "unknown table [tool.closewait-guard]. Did you mean [tool.closewait_guard]?"
    assert str(error.value) == f"{path}: {meant}"


def test_a_project_that_only_installs_the_package_has_no_settings(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text("[project]\nname = 'x'\ndependencies = ['closewait-guard']\n")
    file = project_file(tmp_path)
    assert not file.may_have_settings
    assert Settings.load(environ={}, directory=tmp_path) == Settings()


def test_an_age_that_is_a_warning_and_critical_before_is_refused_with_both_sources(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text("[tool.closewait_guard]\nage_warning = 500\n")
    environ = {"CLOSEWAIT_GUARD_AGE_CRITICAL": "400"}
    in_file = f"age_warning 500 ([tool.closewait_guard] of {path})"
    in_environment = "age_critical 400 (environment variable CLOSEWAIT_GUARD_AGE_CRITICAL)"
    own = "age_warning 3600 (Settings(age_warning=...))"
    for load, sentence in (
        (
            lambda: Settings.load(environ=environ, directory=tmp_path),
            f"{in_file} is above {in_environment}",
        ),
        (
            lambda: Settings.load(environ={}, directory=tmp_path).with_overrides(age_critical=3),
            f"{in_file} is above age_critical 3 (keyword age_critical)",
        ),
        (
            lambda: Settings(age_warning=3600),
            f"{own} is above age_critical 1800 (the default)",
        ),
    ):
        with pytest.raises(ConfigurationError) as error:
            load()
        assert str(error.value) == sentence
    for settings in (Settings(age_critical=3), Settings(age_warning=7, age_critical=7)):
        assert settings.with_overrides(grace=2).age_critical == settings.age_critical


def test_the_nearest_pyproject_upwards_counts(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.closewait_guard]\ngrace = 5\n")
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert Settings.load(environ={}, directory=below).grace == 5
    (below / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert Settings.load(environ={}, directory=below).grace == Settings().grace


def test_install_reads_the_environment(monkeypatch):
    monkeypatch.setenv("CLOSEWAIT_GUARD_GRACE", "4")
    try:
        assert cwg.install().settings.grace == 4
    finally:
        cwg.uninstall()


def test_every_setting_has_a_default_an_explanation_and_an_environment_variable(tmp_path):
    for item in fields(Settings):
        assert item.metadata["help"].endswith(".")
        value = getattr(Settings(), item.name)
        if value is not None:
            environ = {f"CLOSEWAIT_GUARD_{item.name.upper()}": "" if value == () else str(value)}
            assert getattr(load(tmp_path, environ=environ), item.name) == value


def test_callables_can_be_named(tmp_path):
    environ = {"CLOSEWAIT_GUARD_REDACT": "os.path:basename", "CLOSEWAIT_GUARD_CONTEXT": "structlog"}
    settings = load(tmp_path, environ=environ)
    assert settings.redact is os.path.basename
    assert settings.context == "structlog"
    assert settings.describe()["redact"] == "basename"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("grace", -1, "expected a non-negative number of seconds, got -1"),
        ("grace", "soon", "expected a non-negative number of seconds, got 'soon'"),
        ("grace", True, "expected a non-negative number of seconds, got True"),
        ("grace", float("nan"), "expected a non-negative number of seconds, got nan"),
        ("grace", float("inf"), "expected a non-negative number of seconds, got inf"),
        ("grace", None, "expected a non-negative number of seconds, got None"),
        ("stack_depth", 1.5, "expected a non-negative integer, got 1.5"),
        ("stack_depth", -1, "expected a non-negative integer, got -1"),
        ("stack_depth", 10**400, "expected a non-negative integer"),
        ("fd_share_critical", 0, "expected a number above 0 and at most 1, got 0"),
        ("fd_share_critical", 50, "expected a number above 0 and at most 1, got 50"),
        ("probe", "magic", "unknown probe 'magic'. Probes: auto, linux, portable"),
        ("redact", "no-colon", 'expected a callable or a "module:name", got'),
        ("redact", "os:nonsense", r"cannot import 'os:nonsense' \(AttributeError: .*nonsense"),
        ("redact", "no.such.module:x", r"cannot import 'no.such.module:x' \(ModuleNotFoundError"),
        ("redact", "os:sep", "'os:sep' is not callable"),
        ("signal", "SIGNONE", "expected the name or number of a signal"),
        ("signal", "term", "SIGTERM ends programs, and would not any more; choose another"),
        ("signal", 9, "SIGKILL cannot be handled by any program"),
        ("signal", "SIGCHLD", "SIGCHLD comes from the system in normal work"),
        ("signal", "SEGV", "SIGSEGV means that the program has crashed"),
        ("context", 7, 'expected a callable or a "module:name" or "structlog", got 7'),
    ],
)
def test_a_bad_value_is_named_with_its_source(tmp_path, name, value, sentence):
    with pytest.raises(cwg.ConfigurationError, match=sentence) as direct:
        Settings(**{name: value})
    assert str(direct.value).startswith(f"Settings({name}=...): ")
    with pytest.raises(cwg.ConfigurationError, match=sentence) as keyword:
        load(tmp_path, {name: value})
    assert str(keyword.value).startswith(f"keyword {name}: ")
    assert "\n" not in str(keyword.value)


def test_a_malformed_environment_variable_is_named(tmp_path):
    with pytest.raises(cwg.ConfigurationError) as caught:
        load(tmp_path, environ={"CLOSEWAIT_GUARD_STACK_DEPTH": "deep"})
    assert str(caught.value) == (
        "environment variable CLOSEWAIT_GUARD_STACK_DEPTH: expected a non-negative integer, "
        "got 'deep'"
    )


def test_an_unknown_name_is_reported_with_the_known_ones(tmp_path):
    for given in (
        {"overrides": {"stackdepth": 3}},
        {"environ": {"CLOSEWAIT_GUARD_STACKDEPTH": "3"}},
        {"toml": "[tool.closewait_guard]\nstackdepth = 3\n"},
    ):
        with pytest.raises(
            cwg.ConfigurationError,
            match=r"unknown setting 'stackdepth'\. Did you mean 'stack_depth'",
        ):
            load(tmp_path, **given)
    with pytest.raises(cwg.ConfigurationError, match="keyword stackdepth"):
        cwg.install(stackdepth=3)


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("[tool.closewait_guard\n", "pyproject.toml cannot be read: Expected ']'"),
        ("[tool]\nclosewait_guard = 3\n", r"\[tool.closewait_guard\]: expected a table, got 3"),
        ("tool = 3  # closewait_guard\n", r"\[tool\]: expected a table, got 3"),
        (
            "[tool.closewait_guard]\ngrace = -2\n",
            r"grace in \[tool.closewait_guard\] of .*: expected",
        ),
        ("# closewait_guard\n\udcff", "cannot be read"),
    ],
)
def test_a_bad_pyproject_is_named(tmp_path, toml, sentence):
    (tmp_path / "pyproject.toml").write_bytes(toml.encode(errors="surrogateescape"))
    with pytest.raises(cwg.ConfigurationError, match=sentence) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_unreadable_pyproject_is_ignored_and_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("closewait_guard._files.read_trusted", refuse)
    [note] = load(tmp_path).notes
    assert note.endswith("pyproject.toml are ignored: it cannot be read: Permission denied")


def test_a_bad_setting_leaves_nothing_installed():
    with pytest.raises(cwg.ConfigurationError):
        cwg.install(grace=-1)
    assert cwg.install() is cwg.install()
    cwg.uninstall()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"settings": "x"}, "settings: expected Settings, got 'x'"),
        (
            {"reporters": "text"},
            r"reporters: expected a list, as in reporters=\['text'\], got 'text'",
        ),
        ({"reporters": 3}, r"reporters: expected a list, as in reporters=\['text'\], got 3"),
        ({"reporters": [print, 3]}, "expected a callable or the name of a reporter, got 3"),
    ],
)
def test_what_install_cannot_use_is_refused_and_nothing_is_installed(arguments, sentence):
    with pytest.raises(cwg.ConfigurationError, match=sentence):
        cwg.install(**arguments)
    with pytest.raises(cwg.ConfigurationError, match=sentence):
        cwg.Guard(**arguments)


def test_every_error_has_the_one_base():
    for error in (cwg.ConfigurationError, cwg.ReportFormatError, cwg.SocketLeakError):
        assert issubclass(error, cwg.CloseWaitGuardError)
    assert issubclass(cwg.SocketLeakError, AssertionError)


def test_the_census_counts_this_process(tmp_path):
    before = fd_used()
    with open(tmp_path / "x", "w"), open(tmp_path / "y", "w"):
        assert fd_used() == before + 2
    import resource

    assert fd_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_the_census_needs_no_descriptor():
    code = (
        "import os, resource; from closewait_guard._descriptors import fd_used, fd_limit;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); held = []\n"
        "try:\n"
        "    while True: held.append(os.dup(0))\n"
        "except OSError: pass\n"
        "assert fd_used() == fd_limit() == 64, fd_used()\n"
        "import closewait_guard as cwg\n"
    )
    run_apart(code)


def test_the_census_counts_by_listing_where_the_folder_has_no_size(tmp_path, monkeypatch):
    import errno
    from types import SimpleNamespace

    true = fd_used()
    monkeypatch.setattr(os, "stat", lambda _: SimpleNamespace(st_size=0))
    assert fd_used() == true
    with open(tmp_path / "x", "w"):
        assert fd_used() == true + 1
    for number, expected in ((errno.EMFILE, fd_limit()), (errno.EACCES, None)):

        def refuse(self, number=number):
            raise OSError(number, "no")

        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", refuse)
            used = fd_used()
        assert used == expected


def test_a_census_that_took_long_is_good_for_twenty_times_as_long(monkeypatch):
    from types import SimpleNamespace

    from closewait_guard import _descriptors

    clock, listings = [0.0], []

    def listing(folder):
        listings.append(folder)
        clock[0] += 0.1
        return ["0", "1", "2", "3"]

    without_size = SimpleNamespace(listdir=listing, stat=lambda _: SimpleNamespace(st_size=0))
    monkeypatch.setattr(_descriptors, "os", without_size)
    monkeypatch.setattr(_descriptors, "now", lambda: clock[0])
    used = type(fd_used)()
    for now, expected in ((0.5, 1), (1.5, 1), (2.4, 1), (2.6, 2), (4.5, 2), (4.7, 3)):
        clock[0] = now
        assert used() == 3
        assert len(listings) == expected, now


def test_a_folder_that_may_not_be_listed_is_no_project(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "pyproject.toml").write_text("[tool.closewait_guard]\ngrace = 5\n")
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refused)
        settings = cwg.Settings.load(directory=tmp_path)
    assert settings == cwg.Settings()


def test_a_project_file_that_does_not_name_the_guard_is_not_parsed(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.other\n")
    assert cwg.Settings.load(directory=tmp_path) == cwg.Settings()
