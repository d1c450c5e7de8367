"""Each verdict, cause and alert has a code that is explained on a page, and no other is."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

import closewait_guard as cwg
from closewait_guard._format import page_of
from closewait_guard._judge import ALERT_CODES, CODES
from closewait_guard._judge.codes import cause_code
from closewait_guard._libraries import LOOP_WAKER

PAGE = (Path(__file__).parents[2] / "docs" / "codes.md").read_text(encoding="utf-8")
KNOWN = {row.name for row in CODES} | {*ALERT_CODES.values()}


def test_the_page_explains_each_code_once_and_no_other():
    sections = re.findall(r"^\((cwg\d+)\)=\n## (CWG\d+): ", PAGE, re.MULTILINE)
    assert [anchor.upper() for anchor, _ in sections] == [name for _, name in sections]
    assert sorted(name for _, name in sections) == sorted(KNOWN)
    assert set(re.findall(r"^\| \[(CWG\d+)\]", PAGE, re.MULTILINE)) == KNOWN
    assert set(re.findall(r"CWG\d+", PAGE)) == KNOWN


def test_a_code_leads_to_its_section():
    assert page_of("CWG104").endswith("/codes/#cwg104")
    assert page_of().endswith("/codes/")


def test_no_code_is_used_for_two_causes():
    names = [row.name for row in CODES]
    assert len(names) == len(set(names))
    assert not set(names) & {*ALERT_CODES.values()}
    assert set(ALERT_CODES) == set(cwg.AlertKind)


def test_every_finding_has_a_code_of_its_verdict():
    verdict_by_code = {row.name: row.verdict for row in CODES}
    for facts in product(cwg.Verdict, cwg.Origin, cwg.Evidence, cwg.Connection):
        for is_replaced in (False, True):
            assert verdict_by_code[cause_code(*facts, is_replaced=is_replaced)] is facts[0]


@pytest.mark.parametrize(
    ("owners", "code"),
    [
        (("requests.sessions.Session", "requests.models.Response"), "CWG104"),
        (("urllib3 for each call", "urllib3.poolmanager.PoolManager"), "CWG103"),
        (("traceback",), "CWG105"),
        (("running call", "httpx.AsyncClient"), "CWG111"),
        (("httpx.AsyncClient",), "CWG102"),
        ((), "CWG101"),
    ],
)
def test_what_holds_a_socket_chooses_the_code(owners, code):
    facts = cwg.Verdict.LEAKED, cwg.Origin.CREATED, cwg.Evidence.TCP_INFO
    assert cause_code(*facts, cwg.Connection.PEER_CLOSED, owners=owners) == code


@pytest.mark.parametrize(
    ("owners", "code"),
    [
        (("requests.sessions.Session", "requests.models.Response"), "CWG707"),
        (("httpx.AsyncClient", "httpcore"), "CWG706"),
        (("httpcore for each call", "httpx.AsyncClient"), "CWG706"),
        ((LOOP_WAKER,), "CWG704"),
        ((), "CWG704"),
    ],
)
def test_a_client_that_a_test_or_block_has_forgotten_has_a_code_of_its_own(owners, code):
    facts = cwg.Verdict.OPEN, cwg.Origin.CREATED, cwg.Evidence.TCP_INFO, cwg.Connection.LIVE
    assert cause_code(*facts, owners=owners) == code
