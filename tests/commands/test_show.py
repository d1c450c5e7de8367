"""`show`: saved reports are shown again, and compared."""

from __future__ import annotations

import json
import re
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest

import closewait_guard as cwg
from closewait_guard.testing import half_closed_pair
from command_line import call, program


@pytest.fixture
def reports(guard):
    """Three real reports: of no leak, of one, and of three."""
    found = [guard.scan()]
    with half_closed_pair(b"ab"):
        wait_for_grace()
        found.append(guard.scan())
        with half_closed_pair(), half_closed_pair():
            wait_for_grace()
            found.append(guard.scan())
    assert [len(report.leaks) for report in found] == [0, 1, 3]
    return found


def wait_for_grace():
    time.sleep(0.1)


@pytest.fixture
def saved(tmp_path, reports):
    path = tmp_path / "leaks.jsonl"
    lines = [json.dumps(cwg.to_dict(report)) for report in reports]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_the_last_of_several_is_reported_as_it_was(saved, reports):
    done = call("show", saved, code=0)
    assert done.stdout.endswith(cwg.render_text(reports[-1]))
    assert done.stdout.startswith("Report 3 of 3\nclosewait-guard  ")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--range", "1"], [1]),
        (["--range", "1:2"], [1, 2]),
        (["--range", "2:"], [2, 3]),
        (["--range", "2:99"], [2, 3]),
        (["--range=-2:-1"], [2, 3]),
        (["--last", "2"], [2, 3]),
        (["--last", "99"], [1, 2, 3]),
        (["--all"], [1, 2, 3]),
    ],
)
def test_one_the_last_or_a_range_is_reported(saved, reports, option, expected):
    done = call("show", saved, *option, code=0)
    for number in (1, 2, 3):
        assert (f"Report {number} of 3\n" in done.stdout) is (number in expected)
        assert (cwg.render_text(reports[number - 1]) in done.stdout) is (number in expected)


def test_a_document_of_many_lines_is_reported(tmp_path, reports):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(cwg.to_dict(reports[1]), indent=2))
    done = call("show", path, code=0)
    assert done.stdout.endswith(cwg.render_text(reports[1]))
    assert done.stdout.startswith("closewait-guard  ")


def test_stdin_is_read(saved, reports):
    done = call("show", "-", stdin=saved.read_text(), code=0)
    assert done.stdout.endswith(cwg.render_text(reports[-1]))


def test_leaks_fail_only_when_that_is_asked_for(saved):
    assert call("show", saved, "--fail-on-leak").returncode == 1
    assert call("show", saved, "--range", "1", "--fail-on-leak").returncode == 0


def test_only_more_leaks_at_a_site_fail_a_difference(saved):
    def status(before, after):
        return call("show", saved, "--diff", before, after, "--fail-on-leak").returncode

    assert [status("1", "2"), status("2", "3")] == [1, 1]
    assert [status("3", "3"), status("3", "2"), status("2", "1")] == [0, 0, 0]
    call("show", saved, "--diff", "1", "2", code=0)


@pytest.mark.parametrize("option", [["--last", "1"], ["--all"], []])
def test_a_gate_does_not_pass_over_what_cannot_be_read(tmp_path, reports, option):
    path = tmp_path / "leaks.jsonl"
    path.write_text(json.dumps(cwg.to_dict(reports[0])) + '\n{"schema": "closewait-guard/1", "ta')
    call("show", path, *option, code=0)
    assert "line 2: not JSON" in call("show", path, *option, "--fail-on-leak", code=2).stderr
    assert call("show", "--diff", path, path, "--fail-on-leak").returncode == 2


def test_a_gate_does_not_pass_over_leaks_that_a_reporter_has_left_out(tmp_path, reports):
    path = tmp_path / "leaks.jsonl"
    filtered = replace(reports[0], findings=(), omitted=3)
    path.write_text(f"{json.dumps(cwg.to_dict(filtered))}\n" * 2)
    call("show", path, "--fail-on-leak", code=1)
    done = call("show", path, "--diff", "1", "2", "--fail-on-leak", code=87)
    assert "leaks unknown: " in done.stderr
    assert "3 leaks left out of its report" in done.stderr


def test_a_difference_reports_what_is_new_and_what_is_gone(saved):
    text = call("show", saved, "--diff", "1", "2", code=0).stdout
    assert "Sites: 1 new; " in text
    assert "NEW:\n1 LEAKED  TCP to 127.0.0.1:" in text
    assert "test_show.py:" in text
    back = call("show", saved, "--diff", "-1", "1", code=0).stdout
    assert "GONE:" in back
    assert "NEW" not in back
    # Two more were opened at another line of the same test, as one site.
    text = call("show", saved, "--diff", "2", "3", code=0).stdout
    assert "Sites: 1 new, 1 unchanged; " in text
    same = call("show", saved, "--diff", "2", "2", code=0).stdout
    assert "Sites: 1 unchanged; " in same
    assert "NEW" not in same


def test_a_difference_between_two_files_is_that_of_their_last_reports(tmp_path, guard):
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    with ExitStack() as kept:
        for path in paths:
            for _ in range(2):
                kept.enter_context(half_closed_pair())
            wait_for_grace()
            path.write_text(json.dumps(cwg.to_dict(guard.scan())))
    text = call("show", "--diff", *paths, code=0).stdout
    assert "Sites: 1 growing; " in text
    assert "GROWING, from 2 to 4 (+2):\n4 LEAKED" in text
    text = call("show", "--diff", *reversed(paths), code=0).stdout
    assert "SHRINKING, from 4 to 2 (-2):\n2 LEAKED" in text


def test_what_was_cut_off_in_the_last_line_loses_nothing_else(saved, reports):
    with saved.open("a") as file:
        file.write('{"schema": "closewait-guard/1", "taken')
    done = call("show", saved, code=0)
    assert done.stdout.endswith(cwg.render_text(reports[-1]))
    assert done.stderr.startswith(f"closewait-guard: {saved}, line 4: not JSON")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"hello\n", "not JSON"),
        (b"\x00\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "unsupported report format: expected schema"),
        (b'{"schema": "closewait-guard/2"}', "unsupported report format: expected schema"),
        (b'{"schema": "closewait-guard/1"}', "report: missing fields taken_at"),
        (b"[1, 2]", "unsupported report format: expected schema"),
        (b"3", "unsupported report format: expected schema"),
    ],
)
def test_what_is_no_report_gets_one_sentence_that_names_the_file(tmp_path, content, sentence):
    path = tmp_path / "file"
    path.write_bytes(content)
    done = call("show", path, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith(f"closewait-guard: {path}")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["/nowhere"], "/nowhere cannot be read: No such file or directory"),
        (["/"], "/ cannot be read: Is a directory"),
        (["FILE", "--range", "9"], "has 3 reports, and none at 9"),
        (
            ["FILE", "--range", "0"],
            "expected the number of a report, from 1, or from -1 backwards, got '0'",
        ),
        (
            ["FILE", "--range", "1:x"],
            "expected the number of a report, from 1, or from -1 backwards, got 'x'",
        ),
        (
            ["FILE", "--last", "x"],
            "expected the number of a report, from 1, or from -1 backwards, got 'x'",
        ),
        (
            ["FILE", "--diff", "1", "x"],
            "expected the number of a report, from 1, or from -1 backwards, got 'x'",
        ),
        (["--diff", "FILE", "/nowhere"], "/nowhere cannot be read"),
        ([], "missing FILE (or use --diff A B)"),
    ],
)
def test_bad_arguments_get_one_sentence(saved, arguments, sentence):
    done = call("show", *(saved if each == "FILE" else each for each in arguments), code=2)
    assert sentence in done.stderr
    assert done.stdout == ""


def test_what_scan_has_saved_is_reported():
    with program() as running:
        wait_for_grace()
        lines = call("scan", running.pid, "--json", CLOSEWAIT_GUARD_GRACE="0").stdout
    text = call("show", "-", stdin=lines, code=0).stdout
    assert f"(pid {running.pid} on " in text
    assert "5 leaked sockets from unknown places." in text


def of_process(report, pid):
    """The same of another process, with sockets of its own."""
    findings = [
        replace(each, observation=replace(each.observation, inode=1000 * pid + place))
        for place, each in enumerate(report.findings)
    ]
    return replace(report, pid=pid, findings=tuple(findings))


@pytest.fixture
def family(tmp_path, reports):
    """Three processes of one program, and one that has no sockets and reports last."""
    calm, one, three = reports
    tracker = replace(calm, command="-c", pid=9, open_sockets=0, coverage=NOTHING_COVERED)
    of_each = [
        of_process(calm, 5),
        of_process(three, 5),
        of_process(one, 6),
        of_process(calm, 7),
        tracker,
    ]
    path = tmp_path / "leaks.jsonl"
    now = time.time()
    lines = [json.dumps(cwg.to_dict(replace(each, taken_at=now))) for each in of_each]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


NOTHING_COVERED = cwg.Coverage(0, 0, 0, 0, 0, ())


def test_of_a_file_of_several_processes_the_last_report_of_each_is_shown_as_one(family):
    text = call("show", family, code=0).stdout
    head, *_ = text.splitlines()
    assert head == "Last report of each of 4 processes, of 5 reports (--all prints each)"
    assert "4 leaked sockets from 2 places in 2 of 2 processes." in text
    assert re.search(r"\b5 \(1\), 6 \(1\)", text), text
    assert text.count("closewait-guard  ") == 1
    assert "as of" not in text
    call("show", family, "--fail-on-leak", code=1)
    # Those who ask for the last line get that.
    assert call("show", family, "--last", "1", code=0).stdout.startswith("Report 5 of 5\n")


def test_what_processes_reported_long_before_the_last_is_dated(tmp_path, reports):
    lines = [
        cwg.to_dict(
            replace(of_process(reports[1], pid), taken_at=1_700_000_000 + 1000 * (pid == 9))
        )
        for pid in range(1, 10)
    ]
    some, many = lines[5:], lines
    text = call("show", "-", stdin="\n".join(map(json.dumps, some)), code=0).stdout
    assert text.count("is shown as of 2023-11-14 22:13:20") == 3
    text = call("show", "-", stdin="\n".join(map(json.dumps, many)), code=0).stdout
    assert "8 processes are shown as of when they last reported, between 2023" in text


def test_each_program_of_a_file_is_shown_by_itself(tmp_path, reports):
    lines = [
        cwg.to_dict(replace(of_process(reports[1], pid), command=f"{name}.py"))
        for pid, name in enumerate(["web", "web", "worker"], 1)
    ]
    text = call("show", "-", stdin="\n".join(map(json.dumps, lines)), code=0).stdout
    assert "closewait-guard  web.py  (2 processes" in text
    assert "closewait-guard  worker.py  (pid 3" in text


def test_a_difference_between_files_is_that_of_all_processes(family, tmp_path, reports):
    before = tmp_path / "before.jsonl"
    before.write_text(json.dumps(cwg.to_dict(reports[1])))
    done = call("show", "--diff", before, family, code=0)
    assert re.search(r"^to .* 4 processes on ", done.stdout, re.MULTILINE)
    assert "GROWING, from 1 to 2 (+1):" in done.stdout


def test_a_difference_between_two_programs_comes_with_a_warning(tmp_path, reports):
    paths = []
    for command in ("/one/web.py", "python web.py", "/one/worker.py"):
        paths.append(tmp_path / f"{len(paths)}.json")
        paths[-1].write_text(json.dumps(cwg.to_dict(replace(reports[1], command=command))))
    warning = (
        "closewait-guard: warning: the reports are of different programs, web.py and worker.py\n"
    )
    assert call("show", "--diff", paths[0], paths[2], code=0).stderr == warning
    assert call("show", "--diff", *paths[:2], code=0).stderr == ""


@pytest.fixture
def of_tests(tmp_path, reports):
    """What the pytest plugin writes, of two leaking owners and one that is allowed to."""
    path = tmp_path / "tests.jsonl"
    owners = [("test_a.py::test_one", "failed"), ("fixture 'x'", "warned"), ("b", "allowed")]
    found = zip(owners, (reports[1], reports[2], reports[1]), strict=True)
    lines = [line_of_test(*owner, report) for owner, report in found]
    path.write_text("".join(lines))
    return path


def line_of_test(owner, outcome, report):
    data = {
        "schema": "closewait-guard-pytest/1",
        "owner": owner,
        "kind": "fixture" if "fixture" in owner else "test",
        "outcome": outcome,
        "waited": 0.5,
        "report": cwg.to_dict(report),
    }
    return f"{json.dumps(data)}\n"


def test_of_tests_every_report_is_printed_with_its_owner(of_tests, reports):
    done = call("show", of_tests, code=0)
    assert done.stdout.startswith("3 of 3 reports of a test run: 1 failed, 1 warned, 1 allowed\n")
    assert "(failed)\nleaked 1 socket (still open 0.5 s after the test)\n\nLEAKED  " in done.stdout
    assert "fixture 'x' leaked 3 sockets (still open 0.5 s after its teardown)\n" in done.stdout
    headings = [line for line in done.stdout.splitlines() if line.endswith("ed)")]
    assert headings == ["test_a.py::test_one (failed)", "fixture 'x' (warned)", "b (allowed)"]


def test_of_tests_some_can_be_chosen(of_tests):
    assert "fixture 'x' (warned)" not in call("show", of_tests, "--last", "1", code=0).stdout
    assert "b (allowed)" not in call("show", of_tests, "--range", "1:2", code=0).stdout


def test_a_test_that_is_allowed_to_leak_does_not_fail(of_tests):
    call("show", of_tests, "--fail-on-leak", code=1)
    call("show", of_tests, "--last", "1", "--fail-on-leak", code=0)


@pytest.mark.parametrize("outcome", ["allowed", "library_default", "still_running"])
def test_what_pytest_does_not_fail_for_is_no_new_leak(of_tests, tmp_path, reports, outcome):
    after = tmp_path / "after.jsonl"
    after.write_text(of_tests.read_text() + line_of_test("c", outcome, reports[2]))
    call("show", "--diff", of_tests, after, "--fail-on-leak", code=0)
    after.write_text(of_tests.read_text() + line_of_test("c", "failed", reports[2]))
    call("show", "--diff", of_tests, after, "--fail-on-leak", code=1)


def test_a_leak_of_a_test_is_the_same_whether_or_not_its_peer_has_closed_by_then(tmp_path, reports):
    paths = [tmp_path / "before.jsonl", tmp_path / "after.jsonl"]
    [leak] = reports[1].findings
    still_open = replace(leak, verdict=cwg.Verdict.OPEN)
    for path, finding in zip(paths, (leak, still_open), strict=True):
        path.write_text(line_of_test("a", "failed", replace(reports[1], findings=(finding,))))
    done = call("show", "--diff", *paths, "--fail-on-leak", code=0)
    assert "Sites: 1 unchanged" in done.stdout


def test_a_difference_between_two_runs_of_tests_is_that_of_all_their_reports(of_tests, tmp_path):
    first, *_ = of_tests.read_text().splitlines()
    before = tmp_path / "before.jsonl"
    before.write_text(first + "\n")
    out = call("show", "--diff", before, of_tests, code=0).stdout
    assert "GROWING, from 1 to" in out
    assert "unchanged" in call("show", "--diff", of_tests, of_tests, code=0).stdout


@pytest.mark.parametrize("report", ["null", "{}", "7"])
def test_a_line_of_tests_without_a_report_gets_a_sentence(tmp_path, report):
    path = tmp_path / "tests.jsonl"
    path.write_text(f'{{"schema": "closewait-guard-pytest/1", "report": {report}}}\n')
    assert (
        "tests.jsonl: unsupported report format: expected schema"
        in call("show", path, code=2).stderr
    )
