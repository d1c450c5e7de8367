"""A page in a real browser: sorted, filtered, unfolded; hostile names are text."""

from __future__ import annotations

import socket
from dataclasses import replace
from html import escape

import pytest

import closewait_guard as cwg
from browser import CHROMIUM, browser
from closewait_guard._render import LastReport, Part, render_page
from closewait_guard.testing import half_closed_pair

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium: apt-get install chromium"
)

MANY = 1000
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=http://127.0.0.1:1/x onerror=\""
    "document.title='owned'\">\" onfocus=\"document.title='owned'\" autofocus ' \u2028\u202e\udc80"
)
VERDICTS = (cwg.Verdict.LEAKED, cwg.Verdict.DEAD, cwg.Verdict.DROPPED)
ROWS = "[...document.querySelectorAll('#table tbody tr')].filter(row => row.checkVisibility())"
AS_AT_FIRST = """
document.getElementById("text").value = document.getElementById("verdict").value = "";
document.getElementById("text").dispatchEvent(new Event("input"));
for (const [place, each] of document.querySelectorAll(".finding").entries()) each.open = !place;
document.getElementById("reset").click();
document.activeElement.blur();
"""
FINDINGS = "[...document.querySelectorAll('.finding')].filter(each => each.checkVisibility())"


@pytest.fixture(scope="module")
def report():
    """A thousand sites of one to seven sockets, in three verdicts; one is of a hostile program."""
    with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair():
        socket.socket().close()
        [finding] = guard.scan().leaks
    findings = tuple(changed(finding, number) for number in range(MANY))
    return replace(guard.scan(), findings=findings)


def changed(finding, number):
    record = finding.observation.record
    text = HOSTILE if number == 7 else ""
    site = replace(
        record.site, filename=f"/srv/{text}mod{number % 40}.py", lineno=number, function=f"f{text}"
    )
    stack = tuple(site if frame is record.site else frame for frame in record.stack)
    record = replace(record, stack=stack, labels=(f"label-{number}{text}",))
    return replace(
        finding,
        verdict=VERDICTS[number % 3],
        observation=replace(finding.observation, record=record, peer=f"10.0.0.{number % 200}:80"),
        holders=(f"app.kept{number}{text}",),
        count=1 + number % 7,
    )


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def file(report, tmp_path_factory):
    return written(report, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def small(report, tmp_path_factory):
    """A page of few sites, that of the hostile program among them."""
    few = replace(report, findings=report.findings[5:10])
    return written(few, tmp_path_factory.mktemp("small"))


def written(report, folder):
    path = folder / "page.html"
    page = render_page([Part([LastReport(report)])], notes=[HOSTILE])
    path.write_text(page, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def opened(chromium, file):
    return chromium.open(file.as_uri())


@pytest.fixture
def page(opened, file):
    """The page as at first, which must have complained of nothing, and fetched nothing."""
    opened.evaluate(AS_AT_FIRST)
    yield opened
    assert opened.errors() == []
    assert set(opened.requests()) <= {file.as_uri(), "data:,"}
    assert "owned" not in opened.evaluate("document.title")


def column(page, name):
    return page.evaluate(f"{ROWS}.map(row => row.querySelector('td.{name}').textContent)")


def test_all_sites_are_in_the_table_and_unfold_below(page):
    assert page.texts("#shown") == [f"{MANY} sites"]
    assert len(column(page, "opened")) == page.evaluate(f"{FINDINGS}.length") == MANY
    assert page.evaluate(f"{FINDINGS}.map(each => each.open).indexOf(true)") == 0
    page.click("#unfold")
    assert page.evaluate(f"{FINDINGS}.every(each => each.open)")
    page.click("#fold")
    assert not page.evaluate(f"{FINDINGS}.some(each => each.open)")
    page.click("#table tbody tr:nth-child(5) .opened a")
    page.until(f"{FINDINGS}[4].open")
    assert page.evaluate(f"{FINDINGS}[4].getBoundingClientRect().top") < 200


def test_in_the_frame_of_a_notebook_the_table_leads_to_the_finding_and_not_elsewhere(
    chromium, small, tmp_path
):
    # A notebook does not allow the same origin; the test looks into the frame by it.
    content = escape(small.read_text(encoding="utf-8"))
    notebook = tmp_path / "notebook.html"
    notebook.write_text(
        f'<iframe sandbox="allow-scripts allow-same-origin" srcdoc="{content}"></iframe>',
        encoding="utf-8",
    )
    opened = chromium.open(notebook.as_uri())
    frame = "document.querySelector('iframe').contentDocument"
    for name in ("#fold", "#table tbody tr:nth-child(3) .opened a"):
        opened.evaluate(f"{frame}.querySelector({name!r}).click()")
    assert opened.evaluate(f"[...{frame}.querySelectorAll('.finding')].map(each => each.open)") == [
        place == 2 for place in range(5)
    ]
    # What leads out of the page opens beside it.
    assert opened.evaluate(
        f"[...{frame}.querySelectorAll('a[href^=http]')].every(each => each.target === '_blank')"
    )


def test_a_column_sorts_the_table_and_the_findings_and_says_so(page):
    for direction in ("descending", "ascending"):
        page.click("th.count button")
        counts = [int(text) for text in column(page, "count")]
        assert counts == sorted(counts, reverse=direction == "descending")
        assert page.evaluate("document.querySelector('th.count').ariaSort") == direction
        shown = page.evaluate(
            f"{FINDINGS}.map(each => Number(each.querySelector('.count').textContent))"
        )
        assert shown == counts
    page.click("th.verdict button")
    verdicts = column(page, "verdict")
    assert verdicts == sorted(verdicts)
    assert page.evaluate("document.querySelectorAll('[aria-sort]').length") == 1


def test_a_text_and_a_verdict_filter_by_all_that_the_finding_says(page):
    page.fill("#text", "label-77")
    # And 770 to 779.
    assert page.texts("#shown") == [f"11 of {MANY} sites"]
    assert len(column(page, "opened")) == page.evaluate(f"{FINDINGS}.length") == 11
    page.evaluate(
        "{ const s = document.getElementById('verdict'); s.value = 'dead';"
        " s.dispatchEvent(new Event('change')); }"
    )
    assert set(column(page, "verdict")) == {"dead"}
    assert page.evaluate("[...document.getElementById('verdict').options].length") == 4


def test_the_keyboard_reaches_the_filter_the_columns_the_findings_and_the_calls(page):
    assert page.evaluate("document.querySelectorAll('.box[tabindex=\"0\"]').length") == 1
    reached = []
    page.evaluate("document.querySelector('.box[tabindex=\"0\"]').focus()")
    for _ in range(11):
        page.press("Tab")
        reached.append(
            page.evaluate(
                "(e => e.id || e.parentElement.getAttribute('class'))(document.activeElement)"
            )
        )
    columns = ["count", "verdict", "code", "opened", "package", "peer", "since"]
    assert reached == ["text", "verdict", "unfold", "fold", *columns]
    page.evaluate("document.querySelectorAll('.finding > summary')[1].focus()")
    page.press("Enter")
    assert page.evaluate("document.querySelectorAll('.finding')[1].open")


def test_the_flame_graph_zooms_by_keys_and_filters_the_sites_of_a_call(page):
    shown = (
        "[...document.querySelectorAll('.box')].filter(b => b.getAttribute('display') !== 'none')"
    )
    many = page.evaluate(f"{shown}.length")
    page.evaluate("document.querySelector('.box[tabindex=\"0\"]').focus()")
    while "mod" not in page.evaluate("document.activeElement.dataset.call"):
        before = page.evaluate("document.activeElement.getAttribute('y')")
        page.press("ArrowDown")
        assert page.evaluate("document.activeElement.getAttribute('y')") != before
    page.press("ArrowRight")
    call = page.evaluate("document.activeElement.dataset.call")
    page.press("Enter")
    assert page.evaluate(f"{shown}.length") < many
    assert page.evaluate("document.activeElement.getAttribute('width')") == "100%"
    assert call in page.texts("#call span")[0]
    page.click("#only")
    sites = column(page, "opened")
    place = call.partition(" (")[2].rstrip(")")
    assert sites
    assert len(sites) < MANY
    assert all(place in site for site in sites)
    page.press("Escape")
    page.click("#reset")
    assert page.evaluate(f"{shown}.length") == many


def test_names_that_are_markup_stay_text(page):
    page.fill("#text", "owned")
    [site] = column(page, "opened")
    assert "<script>document.title='owned'</script>" in site
    assert r"\u2028\u202e\udc80" in site
    page.click("#unfold")
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.images.length") == 0


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (360, False)])
def test_no_part_is_wider_than_the_window_in_light_and_dark(chromium, small, width, dark):
    page = chromium.open(small.as_uri(), width=width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
    text, back = page.evaluate(colours)
    assert (luminance(text) > luminance(back)) is dark
    assert page.errors() == []


def luminance(colour):
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")[:3]))


def test_printed_it_has_every_finding_and_folds_them_again(chromium, small):
    page = chromium.open(small.as_uri())
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(f"{FINDINGS}.every(each => each.open)")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(f"{FINDINGS}.filter(each => each.open).length") == 1
    page.send("Emulation.setEmulatedMedia", media="print")
    assert not page.texts(".controls")
