"""A report as a page, and as collapsed stacks: the words of the text, and nothing that can run."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import closewait_guard as cwg
from closewait_guard._format import Layout
from closewait_guard._render import (
    LastReport,
    Part,
    collapsed_lines,
    count_stacks_of,
    render_family,
    render_page,
)
from closewait_guard.testing import half_closed_pair

HOSTILE = "</script><script>x</script>\"'`<img src=x onerror=x>;\u2028\u202e\udc80\x1b[31m\n]]>"


class Reader(HTMLParser):
    """The text of a page without its script and styles, its elements, and what they refer to."""

    def __init__(self, page):
        super().__init__()
        self.parts, self.tags, self.links, self.handlers = [], Counter(), [], []
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.parts.append("" if tag in ("code", "span") else " ")
        self._hidden = tag in ("script", "style")
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "xlink:href"):
                self.links.append(value)
            if name.startswith("on") or name == "style":
                self.handlers.append(name)

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.parts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.parts).split())


@pytest.fixture(scope="module")
def report():
    """Of a leak of three with unread bytes and a label, one that was dropped, healthy ones."""
    with ExitStack() as stack, cwg.Guard(cwg.Settings(grace=0)) as guard:
        with cwg.label("nightly"):
            for _ in range(3):
                stack.enter_context(half_closed_pair(b"unread"))
        with pytest.warns(ResourceWarning):
            socket.socket()
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.enter_context(socket.create_connection(server.getsockname()))
        time.sleep(0.05)
        return guard.scan(full=True)


def page_of(*members, **options):
    return render_page([Part([LastReport(each) for each in members], **options)])


def with_text(report, text):
    """The same, with a text wherever a program may have put one."""

    def changed(finding):
        record = finding.observation.record
        stack = tuple(replace(f, filename=text, function=text, source=text) for f in record.stack)
        record = replace(record, stack=stack, labels=(text,), thread=text, context={text: text})
        seen = replace(finding.observation, record=record, peer=text, local=text, fd=3)
        return replace(
            finding, observation=seen, holders=(text,), hint=text, package=text, via=text, code=text
        )

    coverage = replace(report.coverage, notes=(text,))
    findings = tuple(map(changed, report.findings))
    return replace(report, command=text, host=text, findings=findings, coverage=coverage)


def test_a_page_has_all_that_the_text_says_in_the_same_words(report):
    found = Reader(page_of(report)).text
    layout = Layout(width=1 << 20, everything=True, verbose=True)
    text = render_family([LastReport(report)], layout)
    assert len(text.splitlines()) > 15
    for line in text.splitlines():
        if line.startswith(("[", "Not covered", "closewait-guard")):
            continue
        key, words = line[4:13].strip(), line[13:].strip() if line.startswith("    ") else line
        for sentence in words.replace("`", "").split("  "):
            assert sentence.strip() in found, line
        assert key in found
    assert re.search(r"3 LEAKED TCP (to|from) 127", found)
    assert all(finding.code in found for finding in report.findings)


def test_what_is_not_covered_is_an_item_each(report):
    notes = ("where `x` opens sockets", "what holds 3 sockets")
    page = page_of(replace(report, coverage=replace(report.coverage, notes=notes)))
    assert "<strong>Not covered:</strong>" in page
    assert "<li>where <code>x</code> opens sockets</li><li>what holds 3 sockets</li>" in page


def test_a_page_refers_to_nothing_but_its_own_parts_and_the_page_of_codes(report):
    reader = Reader(page_of(report))
    outside = {link for link in reader.links if not link.startswith("#")}
    assert {link.partition("#")[0] for link in outside} == {
        "data:,",
        "https://closewait-guard.readthedocs.io/en/latest/codes/",
    }
    assert reader.tags["script"] == reader.tags["style"] == 1
    assert not reader.tags["img"]


def test_the_policy_allows_the_script_and_the_styles_that_are_there_only(report):
    page = page_of(report)
    [policy] = re.findall(r'"Content-Security-Policy" content="([^"]+)"', page)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["connect-src"] == "'none'"
    for name in ("script", "style"):
        [content] = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    assert Reader(page).handlers == []


def test_what_comes_from_a_program_is_no_markup(report):
    usual, hostile = Reader(page_of(report)), Reader(page_of(with_text(report, HOSTILE)))
    assert hostile.tags["script"] == 1
    assert not hostile.tags["img"]
    assert hostile.handlers == []
    assert set(hostile.tags) - set(usual.tags) <= {"strong", "ul"}
    page = page_of(with_text(report, HOSTILE))
    assert not set("\u2028\u202e\udc80\x1b") & set(page)
    assert "</script><script>x" not in page
    assert r"&lt;img src=x onerror=x&gt;;\u2028\u202e\udc80\x1b[31m\n" in page
    page.encode()


def test_several_processes_are_merged_with_the_numbers_of_each(report):
    first = replace(report, pid=4711)
    shifted = tuple(
        replace(each, observation=replace(each.observation, inode=None))
        for each in report.findings[:2]
    )
    second = replace(report, pid=4712, findings=shifted)
    text = Reader(page_of(first, second, is_complete=False)).text
    assert "in 2 of 2 processes." in text
    assert re.search(r"process 4711 \(\d\), 4712 \(\d\)", text)


def test_a_page_of_two_programs_says_which_site_is_whose(report):
    parts = [
        Part([LastReport(replace(report, command=name))], title)
        for name, title in (("/srv/a.py", ""), ("/srv/b.py", "Report 2 of 2"))
    ]
    page = render_page(parts)
    assert '<td class="program">/srv/a.py</td>' in page
    assert '<td class="program">Report 2 of 2: /srv/b.py</td>' in page
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_collapsed_stacks_have_a_root_calls_and_a_count_on_each_line(report):
    lines = list(collapsed_lines(count_stacks_of([Part([LastReport(report)])], Layout())))
    total = 0
    for line in lines:
        stack, count = re.fullmatch(r"(\S.*) (\d+)", line).groups()
        root, *calls = stack.split(";")
        assert root in ("leaked", "open")
        assert all(re.fullmatch(r".+ \(.+:\d+\)|\(.+\)", call) for call in calls)
        total += int(count)
    assert total == len(report.findings) + len(report.observations)
    leaked = [line for line in lines if line.startswith("leaked;")]
    assert any(line.endswith(" 3") for line in leaked)


def test_a_hostile_name_ends_neither_a_call_nor_a_line(report):
    hostile = with_text(report, HOSTILE)
    counts = count_stacks_of([Part([LastReport(hostile)])], Layout())
    for line in collapsed_lines(counts):
        assert line.isprintable()
        assert len(line.split(";")) == 1 + max(1, line.count(" ("))


def test_the_calls_of_a_flame_graph_lie_within_their_callers(report):
    page = page_of(report)
    found = [
        tuple(map(float, each))
        for each in re.findall(r'x="([\d.]+)%" y="(\d+)" width="([\d.]+)%"', page)
    ]
    assert len(found) > 8
    roots = [(start, width) for start, y, width in found if y == 0]
    assert sum(width for _, width in roots) == pytest.approx(100, abs=0.01)
    for start, y, width in found:
        callers = [each for each in found if each[1] == y - 18]
        assert not y or any(
            low - 0.001 <= start and start + width <= low + wide + 0.001 for low, _, wide in callers
        )
