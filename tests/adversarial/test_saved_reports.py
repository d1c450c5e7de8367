"""Any content of a file gives the report or one sentence, in bounded time and memory."""

from __future__ import annotations

import copy
import io
import json
import math
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import closewait_guard as cwg
import strategies
from closewait_guard import reporters
from closewait_guard._format import escape_control, fit_path, truncate, wrap_text
from closewait_guard._render import difference
from closewait_guard._render.site import _without_keys
from closewait_guard.commands._saved import Saved, SavedReport
from closewait_guard.commands.show import _heading
from command_line import call
from leaking import report_leaks

numbers = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63), 10**400, 1e308, -0.0])
texts = st.text(st.characters(), max_size=20)
scalars = st.none() | st.booleans() | numbers | texts
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


def places(value, path=()):
    """All places in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def change(document, path, draw):
    """Replace or remove the value at a place."""
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if draw(st.booleans()):
        inner[path[-1]] = draw(documents)
    else:
        del inner[path[-1]]


@st.composite
def mutated(draw):
    """A report in which some value is wrong or unusual."""
    data = json.loads(json.dumps(cwg.to_dict(draw(strategies.reports))))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(data))
        if found:
            change(data, draw(st.sampled_from(found)), draw)
    return data


def report_or_sentence(read):
    try:
        return read()
    except cwg.ReportFormatError as error:
        return str(error)


def assert_one_sentence_or_a_report(data):
    report = report_or_sentence(lambda: cwg.from_dict(data))
    if isinstance(report, str):
        assert len(report) < 1000
        return None
    heading = _heading(SavedReport(1, report, report.leaks))
    for text in (cwg.render_text(report), heading, *difference(report, report)):
        text.encode()
        assert len(text) < 1_000_000
    assert cwg.from_dict(json.loads(json.dumps(cwg.to_dict(report)))) == report
    return report


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(documents | st.fixed_dictionaries({"schema": st.just("closewait-guard/1")}))
def test_arbitrary_data_is_refused_in_one_sentence(data):
    assert assert_one_sentence_or_a_report(data) is None


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_a_mutated_report_is_rendered_or_refused_in_one_sentence(data):
    assert_one_sentence_or_a_report(data)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_bytes_that_were_changed_anywhere_are_rendered_or_refused_in_one_sentence(
    valid_lines, data
):
    raw = bytearray(valid_lines)
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 50))] = data.draw(st.binary(max_size=20))
    path = PATHS / "fuzzed.jsonl"
    path.write_bytes(raw)
    found = report_or_sentence(lambda: Saved(str(path)).latest(9))
    if isinstance(found, str):
        assert len(found) < 1000
        return
    for saved in found:
        cwg.render_text(saved.report)


@pytest.mark.long
def test_no_mutation_breaks_anything_for_long(attack_seconds):
    """Few at a time, with a look at the clock between: making one takes longer than reading it."""
    deadline = time.monotonic() + attack_seconds

    @settings(
        max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(mutated())
    def attack(data):
        assert_one_sentence_or_a_report(data)

    while time.monotonic() < deadline:
        attack()


@pytest.fixture(scope="module")
def valid_lines(tmp_path_factory):
    global PATHS
    PATHS = tmp_path_factory.mktemp("fuzz")
    line = json.dumps(cwg.to_dict(report_leaks(lambda report: None)))
    return f"{line}\n{line}\n".encode()


@pytest.fixture
def data():
    return cwg.to_dict(report_leaks(lambda report: None))


def in_report(data, path, value):
    inner = copied = copy.deepcopy(data)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copied


OBSERVATION = ("findings", 0, "observation")


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("taken_at",), math.nan, "report.taken_at: expected a finite number, got nan"),
        (("taken_at",), -math.inf, "report.taken_at: expected a finite number, got -inf"),
        (("taken_at",), 10**400, "report.taken_at: expected a number of at most 64 bits, got 1000"),
        (("pid",), 2**63, "report.pid: expected a number of at most 64 bits"),
        (("pid",), True, "report.pid: expected int, got True"),
        (("pid",), "x" * 10**6, "report.pid: expected int, got 'xxx"),
        ((*OBSERVATION, "unread"), 10**4000, "unread: expected a number of at most 64 bits"),
        ((*OBSERVATION, "peer_closed_for"), math.inf, "peer_closed_for: expected a finite number"),
        ((*OBSERVATION, "state"), [1], "state: expected one of ESTABLISHED"),
        (
            (*OBSERVATION, "record", "context"),
            {"a" * 10**6: [1]},
            "expected str or int or float or bool",
        ),
        (
            (*OBSERVATION, "record", "context"),
            {"a": math.nan},
            "context.a: expected a finite number",
        ),
    ],
)
def test_what_no_report_can_hold_is_refused_with_its_place(data, path, value, sentence):
    with pytest.raises(cwg.ReportFormatError) as caught:
        cwg.from_dict(in_report(data, path, value))
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("taken_at", [1e300, -1e300, -1e15, 1e15, -1, 0, 253402300800])
def test_a_time_beyond_the_calendar_costs_no_report(tmp_path, data, taken_at):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(in_report(data, ("taken_at",), taken_at)))
    out = call("show", path, code=0).stdout
    assert "1 leaked socket from" in out
    assert "1 unchanged" in call("show", path, "--diff", "1", "1", code=0).stdout
    stream = io.StringIO()
    reporters.text(stream)(cwg.from_dict(json.loads(path.read_text())))
    assert stream.getvalue().startswith("closewait-guard  ")


def test_a_report_nested_too_deeply_is_refused_in_one_sentence(data):
    record = data["findings"][0]["observation"]["record"]
    plain = dict(record)
    for _ in range(5000):
        record["parent"] = record = dict(plain)
    with pytest.raises(cwg.ReportFormatError, match="report is nested too deeply"):
        cwg.from_dict(data)


def test_a_writer_that_knows_no_newer_fields_is_understood(data):
    for name in ("alerts", "observations", "closed_late", "omitted"):
        del data[name]
    assert cwg.from_dict(data).alerts == ()


def test_a_file_that_never_ends_is_refused_within_bounds(monkeypatch):
    from closewait_guard.commands import _saved

    monkeypatch.setattr(_saved, "_MAX_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(cwg.ReportFormatError, match="/dev/zero is larger than 1,048,576 bytes"):
            Saved("/dev/zero")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_a_closed_standard_input_is_refused_in_one_sentence():
    done = call(command=["bash", "-c", "python -m closewait_guard show - <&-"], code=None)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_the_context_of_a_creation_becomes_what_json_can_write(tmp_path):
    odd = {"nan": math.nan, "inf": -math.inf, "huge": 10**5000, "half": "\udcff", "well": 2.5}
    path = tmp_path / "leaks.jsonl"
    report = report_leaks(reporters.json_lines(path), context=lambda: odd)
    [line] = path.read_text().splitlines()

    def refuse(word):
        raise AssertionError(word)

    assert cwg.from_dict(json.loads(line, parse_constant=refuse)) == report
    [context] = [leak.observation.record.context for leak in report.findings]
    assert context["nan"], context["inf"] == ("nan", "-inf")
    assert context["huge"].startswith("0x")
    assert len(context["huge"]) == 80
    assert context["well"] == 2.5
    assert "huge=0x" in cwg.render_text(report)


UNITS = ["[", "]", "[]", "[[]", " ", "-", "a-", "\n", "\x1b", "\u2014", "(", "a", "\ud800", "--a "]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    "function",
    [
        _without_keys,
        escape_control,
        truncate,
        lambda text: wrap_text(text, "  "),
        lambda text: fit_path("opened at ", text, " in f()"),
    ],
    ids=["keys", "printable", "cut", "folded", "fitted"],
)
def test_no_text_takes_more_than_linear_time(function, unit):
    """Sixteen times the length takes at most forty times the work; quadratic would be 256 times."""
    short, long = (seconds_for(function, (unit * length)[:length]) for length in (20_000, 320_000))
    assert long < 0.05 + 40 * short


def seconds_for(function, text):
    spent = []
    for _ in range(3):
        before = time.thread_time()
        function(text)
        spent.append(time.thread_time() - before)
    return min(spent)


def test_what_is_left_out_of_a_very_long_text_is_said():
    text = " ".join(wrap_text("x" * 1_000_000, "  "))
    assert "(990,000 more characters)" in text
    assert len(text) < 11_000
