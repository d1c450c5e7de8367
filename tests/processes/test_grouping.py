"""Findings grouped by peer, as the commands `scan`, `watch` and `show --diff` show them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import strategies
from closewait_guard._render import group_by_peer, peer_phrase


@given(st.lists(strategies.leaks))
def test_every_finding_is_in_exactly_one_group_with_its_own_verdict_and_peer(findings):
    groups = group_by_peer(findings)
    grouped = [finding for group in groups.values() for finding in group]
    assert sorted(map(id, grouped)) == sorted(map(id, findings))
    for key, group in groups.items():
        assert {(each.verdict, peer_phrase(each.observation)) for each in group} == {key}
