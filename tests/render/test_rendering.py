"""A report as text fits the terminal; as JSON it reads back unchanged."""

from __future__ import annotations

import json
import pickle
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings

import closewait_guard as cwg
import strategies
from closewait_guard._format import page_of
from closewait_guard._render import (
    LastReport,
    difference,
    native_note,
    render_family,
    sum_reports,
)
from closewait_guard.testing import half_closed_pair
from schema import SCHEMA

many = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)


def leaky_report(**changes):
    """A report of three leaks from one line and one from another."""

    def fetch(stack):
        stack.enter_context(half_closed_pair(b"12345"))

    from contextlib import ExitStack

    options = cwg.Settings(grace=0, context=lambda: {"request": "r7"}, **changes)
    with ExitStack() as stack, cwg.Guard(options) as guard, cwg.label("prices"):
        for _ in range(3):
            fetch(stack)
        stack.enter_context(half_closed_pair())
        time.sleep(0.05)
        return guard.scan()


def test_the_first_line_has_counts_and_share():
    report = replace(leaky_report(), fd_used=10_000, fd_limit=20_000, open_sockets=1234)
    head, totals, *_ = cwg.render_text(report).splitlines()
    assert head.startswith("closewait-guard  ")
    assert f"(pid {report.pid} on " in head
    descriptors = "File descriptors: 10,000 of 20,000 (50%)."
    assert totals == f"4 leaked sockets from 2 places.  {descriptors}"
    assert "descriptors: unknown." in cwg.render_text(replace(report, fd_used=None))


def test_a_report_prints_as_its_text_wherever_it_comes_from():
    report = leaky_report()
    saved = cwg.from_dict(json.loads(json.dumps(cwg.to_dict(report))))
    for each in (report, saved, replace(report, findings=())):
        assert f"{each}\n" == cwg.render_text(each)
    assert repr(report).startswith("Report(schema=")


def test_a_report_that_came_by_pickle_loads_what_prints_it():
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer))"
    report = replace(leaky_report(), taken_at=0.0)
    command, data = [sys.executable, "-c", program], pickle.dumps(report)
    done = subprocess.run(command, input=data, capture_output=True, timeout=60, check=True)
    assert done.stdout.decode() == cwg.render_text(report)


def test_without_a_leak_a_report_is_one_line():
    report = replace(leaky_report(), fd_used=10, fd_limit=20_000, open_sockets=1234, findings=())
    [line] = cwg.render_text(replace(report, command="app.py"), width=120).splitlines()
    assert line.startswith("closewait-guard: no leaks (1,234 sockets, fds 10 of 20,000)  pid ")


def test_what_is_no_leak_is_one_line_for_all_unless_it_is_asked_for():
    report = leaky_report()
    kind = {"verdict": cwg.Verdict.STALE_POOL, "severity": cwg.Severity.INFO}
    idle = replace(report.findings[3], **kind)
    text = cwg.render_text(replace(report, findings=(*report.findings[:3], idle)))
    assert "STALE POOL" not in text
    assert "\n1 idle pooled connection closed by the server (not a leak).\n" in text
    assert "[1]" in text
    assert "[2]" not in text
    two = cwg.render_text(replace(report, findings=(*report.findings[:3], idle, idle)))
    assert "\n2 idle pooled connections closed by the server (not leaks).\n" in two
    only = replace(report, findings=(idle,))
    assert "no leaks\n  (" in cwg.render_text(only)
    assert "1 idle pooled connection closed by" in cwg.render_text(only)
    assert "[1] 1 STALE POOL  TCP" in cwg.render_text(only, everything=True)
    severe = replace(idle, severity=cwg.Severity.WARNING)
    assert "STALE POOL" in cwg.render_text(replace(report, findings=(severe,)))


def test_the_totals_name_sockets_and_places_whatever_the_verdicts():
    report = leaky_report()
    native = replace(report, findings=(), coverage=replace(report.coverage, native=4))
    assert f"({report.open_sockets + 4} sockets, " in cwg.render_text(native)
    dropped = replace(report.findings[0], verdict=cwg.Verdict.DROPPED)
    text = cwg.render_text(replace(report, findings=(*report.findings[1:], dropped)))
    assert "\n4 leaked sockets from 2 places." in text


def test_places_that_are_not_known_are_not_counted_as_places():
    guard = cwg.Guard(cwg.Settings(grace=0))
    with half_closed_pair(), half_closed_pair():
        with guard:
            time.sleep(0.05)
            report = guard.scan()
            with half_closed_pair():
                time.sleep(0.05)
                more = guard.scan()
    assert "\n2 leaked sockets from unknown places.\n" in cwg.render_text(report)
    one = replace(report, findings=report.findings[:1])
    assert "\n1 leaked socket from an unknown place.\n" in cwg.render_text(one)
    assert "\n3 leaked sockets from 1 place and unknown ones.\n" in cwg.render_text(more)


def test_holders_that_are_known_of_some_sockets_only_say_of_how_many():
    report = leaky_report()
    first, second, third, *_ = report.by_site()[0].findings
    known = [replace(first, holders=("app.kept[0]",)), replace(second, holders=("app.kept[1]",))]
    shown = cwg.render_text(replace(report, findings=(*known, replace(third, holders=()))))
    assert "held by  app.kept[0], and 1 more like it (2 of the 3 sockets)\n" in shown
    assert "(not known of 1: not found, or no time to search)\n" in shown
    shown = cwg.render_text(replace(report, findings=(*known, replace(third, holders=("app.x",)))))
    assert "app.x (1 of the 3 sockets)\n" in shown
    assert "not known of" not in shown
    shown = cwg.render_text(replace(report, findings=tuple(known)))
    assert "held by  app.kept[0], and 1 more like it\n" in shown


def test_what_an_unknown_place_has_opened_gets_the_fix_of_each_cause():
    guard = cwg.Guard(cwg.Settings(grace=0))
    with half_closed_pair(), half_closed_pair(), half_closed_pair(), guard:
        time.sleep(0.05)
        report = guard.scan()
    first, second, third = report.leaks
    kept = [replace(each, holders=("app.kept[0]",)) for each in (first, second)]
    kept[0] = replace(kept[0], code="CWG104", hint="read it to the end")
    kept[1] = replace(kept[1], code="CWG103", hint="reuse one client")
    text = cwg.render_text(replace(report, findings=(*kept, replace(third, holders=()))))
    assert "CWG104, CWG103\n    opened   before install()" in text
    assert "    fix      read it to the end (1 of the 3 sockets)\n" in text
    assert "             reuse one client (1 of the 3 sockets)\n" in text
    assert text.endswith("/codes/\n")


def test_one_block_for_each_site_worst_first():
    report = leaky_report()
    text = cwg.render_text(report)
    blocks = text.split("\n\n")
    assert len(blocks) == 4
    first, second = blocks[1].splitlines(), blocks[2].splitlines()
    assert re.fullmatch(r"\[1\] 3 LEAKED  TCP to 127\.0\.0\.1:\d+, 127.* CWG10\d", first[0])
    assert len(first[0]) == 80
    assert re.fullmatch(r"\[2\] 1 LEAKED  TCP to 127\.0\.0\.1:\d+ .* CWG10\d", second[0])
    keys = [line[4:13].strip() for line in first[1:] if line[4] != " "]
    assert keys == ["opened", "fix", "held by", "state", "context"]
    assert re.search(r"test_rendering\.py:\d+ in leaky_report\.<locals>\.fetch\(\)$", first[1])
    assert first[2].strip() == 'stack.enter_context(half_closed_pair(b"12345"))'
    assert re.search(r"\n    state    CLOSE_WAIT for .*0\.\d s, ", blocks[1])
    assert "15 bytes unread" in blocks[1]
    assert "    context  label prices, request=r7" in blocks[1]
    assert "unread" not in blocks[2]
    assert blocks[3].splitlines()[-1].startswith("Codes: https://")


def leaks_of(report, *packages):
    """A report with a leak at a line for each of some packages: library, via, caller, how many."""
    leak, site = report.leaks[0], report.leaks[0].observation.record.site
    found = []
    for line, (package, via, caller, count) in enumerate(packages):
        record = replace(leak.observation.record, stack=(replace(site, lineno=line),))
        seen = replace(leak.observation, record=record)
        names = {"package": package, "via": via, "caller": caller}
        found.append(replace(leak, observation=seen, count=count, **names))
    return replace(report, findings=tuple(found))


HTTPX, REDIS = "httpx 0.28.1", "redis 5.0.1"
FOXESS, SOLAX = "custom_components.foxess", "custom_components.solax"


def totals(text):
    """All between the header and the first block."""
    return text.partition("\n\n")[0].partition("leaked sockets from ")[2]


@pytest.mark.parametrize(
    ("packages", "line"),
    [
        # By the parts of the program that have called the libraries.
        (
            [(HTTPX, "", FOXESS, 500), (REDIS, "", FOXESS, 60), (HTTPX, "", SOLAX, 52)],
            f"By package: {FOXESS} 560, {SOLAX} 52.",
        ),
        # All of one part: by what it has called, and by itself.
        (
            [(HTTPX, "litellm 1.80", "app", 40), (REDIS, "", "app", 3), ("app", "", "app", 2)],
            "By package: litellm 40, redis 3, app 2.",
        ),
        # Not known of all.
        ([("", "", "", 9), ("app", "", "app", 1), ("app", "", "app", 1)], "unknown 9, app 2."),
        # Too many to name them all.
        (
            [("app", "", f"app.p{number}", 20 - number) for number in range(7)],
            "app.p4 16, others 29.",
        ),
    ],
)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_leaks_of_several_packages_at_many_places_are_added_up_by_package(packages, line, width):
    text = cwg.render_text(leaks_of(leaky_report(), *packages), width=width)
    assert line in " ".join(totals(text).split())
    assert max(map(len, totals(text).splitlines())) <= width
    # A name stays beside its number.
    assert not re.search(r"[a-z]\n", totals(text).partition("By package:")[2])


@pytest.mark.parametrize(
    "packages",
    [
        [(HTTPX, "", FOXESS, 500)],
        [(HTTPX, "", FOXESS, 500), (HTTPX, "", SOLAX, 52)],
        [(HTTPX, "", "app", 5), (HTTPX, "", "app", 4), (HTTPX, "", "app", 3)],
        [("", "", "", 5), ("", "", "", 4), ("", "", "", 3)],
    ],
)
def test_leaks_of_one_package_or_at_few_places_are_not_added_up(packages):
    assert "By package" not in cwg.render_text(leaks_of(leaky_report(), *packages))


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ((HTTPX, "litellm 1.80", "app"), "by httpx 0.28.1 via litellm 1.80"),
        ((HTTPX, "", "app"), "by httpx 0.28.1"),
        (("app", "", "app"), None),
        (("", "", ""), None),
    ],
)
def test_a_library_that_opened_it_is_named_beneath_the_line_that_called_it(package, line):
    text = cwg.render_text(leaks_of(leaky_report(), (*package, 1)))
    found = re.findall(r"^ {13}(by .*)$", text, re.MULTILINE)
    assert found == ([] if line is None else [line])


def test_a_line_of_a_library_that_is_shown_names_it_and_no_second_line_does():
    report = leaks_of(leaky_report(), ("urllib3 2.8.0", "", "", 1), ("urllib3 2.8.0", "x 1", "", 1))
    ours, called = report.findings
    frame = cwg.Frame("/site-packages/urllib3/a.py", 1, "f", "urllib3.a", cwg.FrameKind.LIBRARY)

    def text_of(leak):
        record = replace(leak.observation.record, stack=(frame,))
        seen = replace(leak.observation, record=record)
        return cwg.render_text(replace(report, findings=(replace(leak, observation=seen),)))

    assert "by urllib3" not in text_of(ours)
    assert "by urllib3 2.8.0 via x 1\n" in text_of(called)


def test_library_calls_are_folded_with_a_count():
    def frame(kind, name):
        return cwg.Frame(f"/app/{name}.py", 1, name, name, kind, f"{name}()")

    user, library, stdlib = cwg.FrameKind.USER, cwg.FrameKind.LIBRARY, cwg.FrameKind.STDLIB
    stack = (
        frame(stdlib, "socket"),
        frame(library, "urllib3"),
        frame(user, "inner"),
        frame(library, "click"),
        frame(stdlib, "runpy"),
        *(frame(user, f"outer{number}") for number in range(12)),
    )
    report = leaky_report()
    leak = report.findings[0]
    record = replace(leak.observation.record, stack=stack)
    leak = replace(leak, observation=replace(leak.observation, record=record))
    text = cwg.render_text(replace(report, findings=(leak,)))
    lines = [line[13:] for line in text.splitlines()]
    start = lines.index("/app/inner.py:1 in inner()")
    assert lines[start + 1 : start + 4] == [
        "    inner()",
        "(2 library calls)",
        "from /app/outer0.py:1 in outer0()",
    ]
    assert "(9 more calls)" in lines
    everything = cwg.render_text(replace(report, findings=(leak,)), verbose=True)
    assert "from /app/outer11.py:1 in outer11()" in everything
    assert "socket.py" not in text


def test_by_site_groups_the_same_verdict_and_stack_worst_first():
    report = leaky_report()
    critical = replace(report.findings[3], severity=cwg.Severity.CRITICAL)
    explained = replace(report.findings[0], verdict=cwg.Verdict.CLOSING)
    report = replace(report, findings=(explained, *report.findings[1:3], critical))
    groups = report.by_site()
    assert [len(group.findings) for group in groups] == [1, 2, 1]
    assert groups[0].severity is cwg.Severity.CRITICAL
    assert groups[1].site.function == "leaky_report.<locals>.fetch"
    assert groups[2].verdict is cwg.Verdict.CLOSING
    assert report.leaks == report.findings[1:]


def test_alerts_come_after_the_counts():
    alert = cwg.Alert(cwg.AlertKind.GROWTH, cwg.Severity.CRITICAL, "grows by 3 a minute", {})
    text = cwg.render_text(replace(leaky_report(), alerts=(alert,)))
    assert text.split("\n\n")[0].endswith("\nGROWTH  grows by 3 a minute  (critical)")


def test_every_origin_is_described():
    report = leaky_report()
    leak = report.findings[0]
    stack = (
        cwg.Frame("/lib/socket.py", 1, "accept", "socket", cwg.FrameKind.STDLIB),
        cwg.Frame("/app/server.py", 2, "serve", "server"),
    )
    parent = replace(leak.observation.record, pid=77, stack=stack)
    texts = {}
    for origin in cwg.Origin:
        record = replace(parent, origin=origin, parent=parent)
        if origin is cwg.Origin.ADOPTED:
            record = replace(record, stack=(), parent=None)
        changed = replace(leak, observation=replace(leak.observation, record=record))
        texts[origin] = " ".join(cwg.render_text(replace(report, findings=(changed,))).split())
    assert "accepted by the listener opened at" in texts["accepted"]
    assert "duplicated from the socket opened at" in texts["duplicated"]
    assert "gave the descriptor away by detach()" in texts["detached"]
    assert "inherited over fork() from process 77" in texts["inherited"]
    assert "before install(): no stack was recorded" in texts["adopted"]


@many
@given(strategies.reports)
def test_any_report_fits_its_width_without_control_characters(report):
    for width in (60, 80, 120):
        text = cwg.render_text(report, width=width)
        for line in text.split("\n"):
            # An identifier or code that is longer is not cut.
            words = re.sub(r"`[^`]+`|\['[^'\]]*'\]", "code", line).split()
            assert len(line) <= width or len(words) <= 3, line
    assert all(character.isprintable() or character == "\n" for character in text)


@many
@given(strategies.reports)
def test_reports_survive_json_and_pickle_exactly(report):
    data = cwg.to_dict(report)
    jsonschema.validate(data, SCHEMA)
    assert cwg.from_dict(json.loads(json.dumps(data))) == report
    assert pickle.loads(pickle.dumps(report)) == report


def test_a_real_report_fits_the_schema_and_survives():
    with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair(b"x"), socket.socket():
        report = guard.scan(full=True)
    data = cwg.to_dict(report)
    jsonschema.validate(data, SCHEMA)
    assert data["findings"][0]["is_leak"] is True
    assert cwg.from_dict(json.loads(json.dumps(data))) == report
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data.update(schema="other/1"), "unsupported report format: expected schema"),
        (lambda data: data.clear(), "unsupported report format: expected schema"),
        (lambda data: data.pop("findings"), "report: missing fields findings"),
        (lambda data: data.update(pid="seven"), r"report\.pid: expected int, got 'seven'"),
        (lambda data: data.update(pid=True), r"report\.pid: expected int, got True"),
        (lambda data: data.update(findings={}), r"report\.findings: expected list, got \{\}"),
        (
            lambda data: data["findings"][0].update(verdict="guilty"),
            r"report\.findings\[0\]\.verdict: expected one of leaked, dead",
        ),
        (
            lambda data: data["findings"][0]["observation"]["record"]["context"].update(a=[]),
            r"record\.context\.a: expected str or int or float or bool, got \[\]",
        ),
    ],
)
def test_what_is_no_report_is_refused_in_one_sentence(change, sentence):
    data = cwg.to_dict(leaky_report())
    change(data)
    with pytest.raises(cwg.ReportFormatError, match=sentence):
        cwg.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "text", 7])
def test_what_is_not_even_an_object_is_refused(data):
    with pytest.raises(cwg.ReportFormatError, match="unsupported report format"):
        cwg.from_dict(data)


def test_redaction_reaches_everything_that_may_hold_a_secret():
    def redact(text):
        return "hidden"

    text = cwg.render_text(leaky_report(redact=redact))
    data = json.dumps(cwg.to_dict(leaky_report(redact=redact)))
    for secret in ("127.0.0.1", "prices", "r7", "half_closed_pair(b"):
        assert secret not in text
        assert secret not in data
    assert "hidden" in text


@pytest.mark.parametrize("redact", [lambda text: 1 / 0, lambda text: None])
def test_a_redactor_that_fails_reveals_nothing_of_the_original(redact):
    text = cwg.render_text(leaky_report(redact=redact))
    assert "127.0.0.1" not in text
    assert "prices" not in text
    assert "[withheld" in text


def test_local_variables_are_never_captured():
    secret = "s3cr3t-" + "value"
    with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair():
        text = json.dumps(cwg.to_dict(guard.scan(full=True)))
    assert secret not in text


@pytest.mark.parametrize(
    ("source", "function", "is_shown"),
    [
        ("conn, _ = library.accept(listener)", "accept", True),
        ("conn, _ = await listener.accept()", "_nonblocking_helper", True),
        (None, "Listener.accept_connection", True),
        ("server.serve_forever()", "serve_forever", False),
        (None, "serve_forever", False),
    ],
)
def test_the_line_that_accepts_through_a_wrapper_is_shown_and_one_that_runs_a_server_is_not(
    source, function, is_shown
):
    library, stdlib = cwg.FrameKind.LIBRARY, cwg.FrameKind.STDLIB
    stack = (
        cwg.Frame("/lib/socket.py", 1, "accept", "socket", stdlib),
        cwg.Frame("/site-packages/library.py", 2, function, "library", library),
        cwg.Frame("/app/handler.py", 3, "handler", "handler", source=source),
    )
    record = leaky_report().findings[0].observation.record
    accepted = replace(record, origin=cwg.Origin.ACCEPTED, parent=record, stack=stack)
    assert (accepted.site is stack[2]) == is_shown
    assert accepted.blamed is (accepted if is_shown else record)


def test_a_directory_that_is_too_long_goes_and_the_line_of_the_file_stays():
    folders = "/a-long-directory" * 10
    record = leaky_report().findings[0].observation.record
    for name, function in [("app.py", "f"), ("app.py", "g" * 70), ("n" * 90 + ".py", "f")]:
        frame = cwg.Frame(f"{folders}/{name}", 1234, function, "app")
        report = leaky_report()
        leak = report.findings[0]
        changed = replace(
            leak, observation=replace(leak.observation, record=replace(record, stack=(frame,)))
        )
        held = replace(changed, holders=(f"thread T, now at {folders}/{name}:1234, in f()",))
        text = cwg.render_text(replace(report, findings=(held,)))
        [line] = [line for line in text.splitlines() if line.startswith("    opened   ")]
        assert f"{name[-40:]}:1234" in line
        assert len(line) <= 80
        if len(name) < 60:
            assert f"/{name}:1234, in f()" in " ".join(text.split())


def member(pid, *, native=0, **options):
    """The last report of a process of a family, without a leak."""
    with cwg.Guard() as guard:
        report = guard.scan()
    coverage = replace(report.coverage, opened=1, native=native, earlier=0)
    coverage = replace(coverage, notes=(native_note(coverage),))
    return LastReport(replace(report, pid=pid, findings=(), coverage=coverage), **options)


def test_where_a_process_is_unknown_the_first_line_of_a_family_is_no_all_clear():
    members = [member(1), member(2)]
    assert render_family(members).startswith("closewait-guard: no leaks in 2 processes (")
    for some in (members, members[:1]):
        text = render_family(some, is_complete=False)
        assert text.startswith("closewait-guard: leaks unknown in some processes")
        assert "no leak" not in text
    leaking = render_family([LastReport(leaky_report())], is_complete=False)
    assert "\n4 leaked sockets from 2 places." in leaking


def test_the_sum_of_native_sockets_names_the_process_of_which_they_are_unknown():
    text = " ".join(render_family([member(1, native=2), member(2, native=None)]).split())
    assert "where 2 sockets without a socket object were opened (by C extensions," in text
    assert "or in another process), and sockets that C extensions" in text
    assert "could not be listed in process 2." in text
    text = " ".join(render_family([member(1, native=2), member(2, native=3)]).split())
    assert "where 5 sockets without a socket object were opened (by C extensions, see " in text
    text = " ".join(render_family([member(1, native=None), member(2, native=None)]).split())
    assert "Not covered: sockets that C extensions" in text


def test_the_sockets_without_known_holders_are_added_up_over_all_processes():
    members = []
    for pid, note in enumerate(("what holds 1,200 sockets (why)", "what holds 1 socket (why)"), 1):
        report = member(pid).report
        coverage = replace(report.coverage, notes=(note, "something else"))
        members.append(LastReport(replace(report, coverage=coverage)))
    text = " ".join(render_family(members).split())
    assert "Not covered: something else; what holds 1,201 sockets (why)." in text


@pytest.mark.parametrize(("used", "shown"), [(20, "35"), (None, "an unknown number of")])
def test_what_changed_in_several_processes_has_the_descriptors_of_all(used, shown):
    first = [replace(member(pid).report, fd_used=10) for pid in (1, 2)]
    second = [replace(first[0], fd_used=15), replace(first[1], fd_used=used)]
    text = " ".join(difference(sum_reports(first), sum_reports(second)))
    assert f"20 descriptors then, {shown}" in " ".join(text.split())


def test_two_reports_of_one_process_are_of_one_process():
    before = [member(1, is_before_exec=True), member(1, is_before_exec=True)]
    text = " ".join(render_family([*before, member(1), member(2)]).split())
    assert " in 2 processes (" in text
    assert text.count("Process 1 became another program by exec") == 1


def test_what_is_no_code_is_part_of_no_address():
    assert page_of("CWG104").endswith("/codes/#cwg104")
    assert page_of("a b\n") == page_of("é") == page_of()


def test_a_socket_that_several_processes_report_is_counted_once_with_all_of_them():
    finding = leaky_report().findings[0]
    seen = replace(finding.observation, inode=77, local="127.0.0.1:80")
    copy = replace(seen, record=replace(seen.record, origin=cwg.Origin.INHERITED))
    inherited = replace(finding, verdict=cwg.Verdict.INHERITED, observation=copy)
    other = replace(inherited, observation=replace(copy, inode=78))

    def reporting(pid, *findings):
        each = member(pid)
        return each._replace(report=replace(each.report, findings=findings))

    members = [reporting(1, replace(finding, observation=seen)), reporting(2, inherited, other)]
    text = " ".join(render_family(members).split())
    assert "2 leaked sockets from 1 place in 2 of 2 processes." in text
    assert text.count("1 LEAKED") == text.count("1 INHERITED") == 1
    assert " process 1 and 2 " in text
    assert " process 2 " in text
