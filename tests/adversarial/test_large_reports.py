"""A report of very many leaks is small in a file, and no number is lost."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest

import closewait_guard as cwg
from closewait_guard import reporters
from closewait_guard._render import difference
from leaking import report_leaks
from schema import SCHEMA

MANY = 2_000


@pytest.fixture(scope="module")
def large():
    """Very many leaks of one line, each ended for longer than the one before."""
    report = report_leaks(lambda report: None)
    leak = report.findings[0]
    seen = leak.observation
    leaks = tuple(
        replace(leak, observation=replace(seen, fd=number, suspect_for=float(number)))
        for number in range(MANY)
    )
    closed = tuple(cwg.ClosedLate(leak, leak.observation.ended_for) for leak in leaks)
    return replace(report, findings=leaks, closed_late=closed, open_sockets=MANY)


def one_line(text):
    return " ".join(text.split())


def saved(path, report, **options):
    reporters.json_lines(path, **options)(report)
    line = path.read_text()
    return line, cwg.from_dict(json.loads(line))


def test_a_file_has_some_examples_of_each_site_and_all_the_numbers(tmp_path, large):
    line, found = saved(tmp_path / "leaks.jsonl", large)
    assert len(line) < 100_000
    jsonschema.validate(json.loads(line), SCHEMA)
    [group] = found.by_site()
    assert (len(group.findings), group.count) == (5, MANY)
    assert min(leak.observation.ended_for for leak in group.findings) == MANY - 5
    assert sum(closed.finding.count for closed in found.closed_late) == MANY
    text = cwg.render_text(found)
    assert f"{MANY:,} leaked sockets from 1 place." in text
    assert "2,000 LEAKED" in text
    assert "the facts are those of 5 of them; the others are only counted here" in one_line(text)
    assert "2,000 sockets opened at" in one_line(text)


def test_every_leak_is_written_on_demand_and_by_to_dict(tmp_path, large):
    report = replace(large, findings=large.findings[:100], closed_late=())
    _, found = saved(tmp_path / "leaks.jsonl", report, examples=0)
    assert found == report == cwg.from_dict(cwg.to_dict(report))
    assert "only counted" not in cwg.render_text(found)


def test_a_difference_counts_those_that_were_left_out(tmp_path, large):
    _, found = saved(tmp_path / "leaks.jsonl", large)
    fewer = replace(large, findings=large.findings[:100], closed_late=())
    text = "\n".join(difference(fewer, found))
    assert "GROWING, from 100 to 2,000 (+1,900):" in text


def test_sites_that_only_their_peers_distinguish_are_written_whole(tmp_path, large):
    leaks = tuple(
        replace(
            leak,
            observation=replace(
                leak.observation, record=replace(leak.observation.record, parent=None, stack=())
            ),
        )
        for leak in large.findings[:200]
    )
    _, found = saved(tmp_path / "leaks.jsonl", replace(large, findings=leaks, closed_late=()))
    assert len(found.findings) == 200


def test_what_was_cut_down_once_can_be_cut_down_again(tmp_path, large):
    _, found = saved(tmp_path / "first.jsonl", large)
    _, again = saved(tmp_path / "second.jsonl", found, examples=3)
    [group] = again.by_site()
    assert (len(group.findings), group.count) == (3, MANY)
