"""Reporters by name; an unknown name gives one sentence."""

from __future__ import annotations

import io
import json
import sys

import pytest

import closewait_guard as cwg
from closewait_guard import reporters
from leaking import leaking_guard, run

KNOWN = (
    "Available: text[:all], console[:all], structlog, logging[:LOGGER], "
    "json_lines:[examples=N:]PATH, warn, sentry, webhook:URL, slack:URL, changes:REPORTER, "
    "at_least:SEVERITY:REPORTER, every:SECONDS:REPORTER"
)
SEVERITIES = "Severities: info, warning, critical"


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("text", "text()"),
        ("text:", "text()"),
        (" text ", "text()"),
        ("console", "console()"),
        ("structlog", "structlog.<locals>.structlog_reporter"),
        ("logging", "logging.<locals>.logging_reporter"),
        ("logging:shop.sockets", "logging.<locals>.logging_reporter"),
        ("warn", "warn()"),
        ("changes:text", "changes(text())"),
        ("at_least:warning:text", "at_least(text())"),
        ("every:3600:text", "every(text())"),
        ("every:.5:at_least:critical:changes:warn", "every(at_least(changes(warn())))"),
    ],
)
def test_a_name_makes_a_reporter(name, made):
    from closewait_guard._stream import reporter_name

    assert reporter_name(reporters.named(name)) == made


def test_a_path_is_all_that_follows_the_first_colon(tmp_path):
    path = tmp_path / "a:b,c.jsonl"
    with leaking_guard(f"changes:json_lines:{path}") as guard:
        guard.report()
    assert json.loads(path.read_text())["findings"]


def test_the_number_of_examples_stands_before_the_path(tmp_path):
    path = tmp_path / "a:b.jsonl"
    with leaking_guard(f"changes:json_lines:examples=2:{path}", count=7) as guard:
        guard.report()
    findings = json.loads(path.read_text())["findings"]
    assert sorted(each["count"] for each in findings) == [1, 6]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nobody", f"unknown reporter 'nobody'. {KNOWN}"),
        ("", f"unknown reporter ''. {KNOWN}"),
        ("TEXT", f"unknown reporter 'TEXT'. Did you mean 'text'? {KNOWN}"),
        (":text", f"unknown reporter ''. {KNOWN}"),
        ("changes:nobody", f"unknown reporter 'nobody'. {KNOWN}"),
        ("text:stdout", "text takes no argument except all, got 'stdout'"),
        ("json_lines", "json_lines needs a path, as in json_lines:leaks.jsonl"),
        ("json_lines:", "json_lines needs a path, as in json_lines:leaks.jsonl"),
        ("json_lines:examples=2", "json_lines needs a path, as in json_lines:leaks.jsonl"),
        (
            "json_lines:examples=x:y",
            "json_lines: examples: expected a non-negative integer, got 'x'",
        ),
        ("changes", "changes needs another reporter, as in changes:text"),
        ("every", "every: expected a non-negative number of seconds, got ''"),
        ("every:soon:text", "every: expected a non-negative number of seconds, got 'soon'"),
        ("every:60", "every:60 needs another reporter, as in every:60:text"),
        ("at_least", f"at_least: unknown severity ''. {SEVERITIES}"),
        ("at_least:text", f"at_least: unknown severity 'text'. {SEVERITIES}"),
        (
            "at_least:warn:text",
            f"at_least: unknown severity 'warn'. Did you mean 'warning'? {SEVERITIES}",
        ),
        ("at_least:info", "at_least:info needs another reporter, as in at_least:info:text"),
    ],
)
def test_an_unknown_name_or_a_bad_argument_gives_one_sentence_with_what_would_do(name, sentence):
    with pytest.raises(cwg.ConfigurationError) as caught:
        reporters.named(name)
    assert str(caught.value) == sentence
    with pytest.raises(cwg.ConfigurationError) as caught:
        cwg.install(reporters=[name])
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("every:-1:text", "every: expected a non-negative number of seconds, got '-1'"),
        ("every:nan:text", "every: expected a non-negative number of seconds, got 'nan'"),
        ("json_lines:/no/such/x", "json_lines: '/no/such/x' cannot be opened: .*No such file"),
    ],
)
def test_an_argument_that_is_not_valid_is_refused_by_the_reporter_itself(name, sentence):
    with pytest.raises(cwg.ConfigurationError, match=sentence):
        reporters.named(name)


def test_names_of_the_environment_and_of_pyproject_count_if_the_program_names_none(tmp_path):
    code = """
with cwg.Guard() as guard, half_closed_pair():
    time.sleep(0.03)
    guard.report()
    print(guard.settings.reporters)
"""
    path = tmp_path / "leaks.jsonl"
    environment = {
        "CLOSEWAIT_GUARD_REPORTERS": f"text, json_lines:{path}",
        "CLOSEWAIT_GUARD_GRACE": "0",
    }
    stdout, stderr = run(code, **environment)
    assert stdout == f"('text', 'json_lines:{path}')\n"
    assert "1 LEAKED" in stderr
    assert path.read_text().count("\n") == 1

    (tmp_path / "pyproject.toml").write_text(
        "[tool.closewait_guard]\ngrace = 0\nreporters = ['text']\n"
    )
    stdout, stderr = run("os.chdir(sys.argv[1])" + code, tmp_path)
    assert "1 LEAKED" in stderr


def test_reporters_that_the_program_names_win_over_those_of_its_settings():
    stream = io.StringIO()
    with leaking_guard(reporters.text(stream), reporters=("nobody",)) as guard:
        guard.report()
    assert "1 LEAKED" in stream.getvalue()


def test_a_name_that_is_not_valid_is_refused_with_where_it_came_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = "unknown reporter 'nobody'. Available: text[:all], "
    with pytest.raises(cwg.ConfigurationError) as caught:
        cwg.Guard(cwg.Settings(reporters=("nobody",)))
    assert str(caught.value).startswith(f"Settings(reporters=...): {refused}")
    (tmp_path / "pyproject.toml").write_text("[tool\n")
    with pytest.raises(cwg.ConfigurationError) as caught:
        cwg.Guard(cwg.Settings(reporters=("nobody",)))
    assert str(caught.value).startswith(f"Settings(reporters=...): {refused}")
    (tmp_path / "pyproject.toml").write_text("[tool.closewait_guard]\nreporters = ['nobody']\n")
    with pytest.raises(cwg.ConfigurationError) as caught:
        cwg.Guard()
    source = f"reporters in [tool.closewait_guard] of {tmp_path / 'pyproject.toml'}"
    assert str(caught.value).startswith(f"{source}: {refused}")
    monkeypatch.setenv("CLOSEWAIT_GUARD_REPORTERS", "text,nobody")
    with pytest.raises(cwg.ConfigurationError) as caught:
        cwg.Guard()
    source = "environment variable CLOSEWAIT_GUARD_REPORTERS"
    assert str(caught.value).startswith(f"{source}: {refused}")
    with pytest.raises(cwg.ConfigurationError) as caught:
        cwg.Guard(reporters=["nobody"])
    assert str(caught.value).startswith(refused)


# Reporters of installed packages.

PLUGIN = '''
"""A package with reporters."""

from closewait_guard.exceptions import ConfigurationError

REPORTED = []

def pager(number="112"):
    if not number.isdigit():
        raise ConfigurationError(f"pager: {number!r} is no number")
    return lambda report: REPORTED.append((number, len(report.leaks)))

def broken():
    raise OSError("no route to pager")

def returns_nothing():
    pass
'''
POINTS = """[closewait_guard.reporters]
pager = shop_pager:pager
broken = shop_pager:broken
nothing = shop_pager:returns_nothing
missing = shop_pager:no_such_thing
text = shop_pager:broken
"""


@pytest.fixture
def shop_pager(tmp_path, monkeypatch):
    """An installed package with entry points."""
    (tmp_path / "shop_pager.py").write_text(PLUGIN)
    info = tmp_path / "shop_pager-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop_pager\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("shop_pager")
    del sys.modules["shop_pager"]


def test_an_installed_reporter_has_a_name_and_an_argument(shop_pager):
    with leaking_guard("pager", "changes:pager:911", count=2) as guard:
        guard.report()
        guard.report()
    assert shop_pager.REPORTED == [("112", 2), ("911", 2), ("112", 2)]


def test_installed_names_are_known_and_hide_none_of_ours(shop_pager):
    assert reporters.known_names()[-4:] == ["broken", "missing", "nothing", "pager"]
    assert reporters.known_names().count("text") == 1
    assert reporters.named("text").__module__.startswith("closewait_guard.reporters.")
    with pytest.raises(cwg.ConfigurationError, match=r"broken, missing, nothing, pager$"):
        reporters.named("nobody")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pager:x", "pager: 'x' is no number"),
        (
            "broken",
            r"reporter 'broken' \(shop_pager:broken\) cannot be created: OSError: no route",
        ),
        ("broken:now", r"cannot be created: TypeError: broken\(\) takes 0 positional arguments"),
        ("missing", "cannot be created: AttributeError: .*no_such_thing"),
        ("nothing", r"reporter 'nothing' \(shop_pager:returns_nothing\) is not callable: None"),
    ],
)
def test_an_installed_reporter_that_cannot_be_made_is_refused_in_one_sentence(
    shop_pager, name, sentence
):
    with pytest.raises(cwg.ConfigurationError, match=sentence) as caught:
        reporters.named(name)
    assert "\n" not in str(caught.value)
