"""Explain findings: who holds each socket, which newer one replaced it, and the hint that fits.

Searching for holders goes through the whole heap, so it is limited in time, and its results are
remembered from scan to scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from closewait_guard._capture import Registry
from closewait_guard._clock import Allowance, TimeLimit, now, wall
from closewait_guard._cpython import has_gil
from closewait_guard._enums import FOLLOWED, GONE
from closewait_guard._holders.describe import Holders, find_holders, find_holders_forward
from closewait_guard._holders.libraries import (
    all_instances,
    calls_of_libraries,
    hints_of_libraries,
    owners_of_descriptors,
)
from closewait_guard._holders.references import reachable_instances
from closewait_guard._holders.roots import (
    Roots,
    describe_makings,
    describe_reuse,
    find_successors,
    processes_sharing,
)
from closewait_guard._holders.threads import CallUse
from closewait_guard._judge import FindingText, cause_code, hint_for
from closewait_guard._libraries import LOOP_WAKER, PoolUse, for_each_call, made_by, packages_of
from closewait_guard._live import is_too_large
from closewait_guard.model import (
    Finding,
    Frame,
    Observation,
    Origin,
    State,
    Verdict,
)

__all__ = [
    "Explainer",
]


_MAX_AT_ONCE = 20
_MAX_SECONDS = 0.4
# How far a search in a small heap may exceed the allowance.
_MAX_DEBT = 0.1
# In a large heap: how many sockets one search looks for, the range of its minimum time, and the
# share of the time that goes to the objects that own native sockets.
_MAX_AT_ONCE_FORWARD = 500
_MIN_SECONDS_FORWARD, _MAX_SECONDS_FORWARD = 0.005, 0.35
_NATIVE_OWNERS_SHARE = 0.3
_REFRESH_AFTER = 30.0
# Findings that need nothing done while a program runs; a test or a block has to close them.
_NOTHING_TO_DO = frozenset({Verdict.STALE_POOL, Verdict.HALF_CLOSED, Verdict.CLOSING})

_Site = tuple[Verdict, Frame | None]


class _Explanation(NamedTuple):
    """What is remembered of one socket: its holders and successor, and when they were found."""

    site: _Site
    holders: Holders
    at: float
    successor: int | None


_SearchFunction = Callable[[list[Finding], TimeLimit], dict[int, Holders | None]]


def _search_nowhere(_: list[Finding], __: TimeLimit) -> dict[int, Holders | None]:
    """Where the heap cannot be read safely, which the report says."""
    return {}


_FAILED = Holders(has_failed=True)
# Python 3.11 takes long to find a member by its name.
_CLOSED_ELSEWHERE = Verdict.CLOSED_ELSEWHERE
_NO_EXPLANATION = _Explanation((Verdict.OPEN, None), Holders(), 0.0, None)


class Explainer:
    """Adds to findings their holders, and the hint that fits the holder."""

    def __init__(self, registry: Registry, allowance: Allowance) -> None:
        self._registry = registry
        self._allowance = allowance
        self._hint_of_library = hints_of_libraries()
        self._explanations: dict[int, _Explanation] = {}
        # By serial, the text of each finding, and what it depends on.
        self.texts: dict[int, FindingText] = {}
        self._inputs: dict[int, tuple[object, ...]] = {}
        # The minimum time for a search in a large heap; raised when a shorter one was not enough.
        self._seconds_forward = _MIN_SECONDS_FORWARD
        # For how many of the leaks there was no search; holders of the same line may be known.
        self.unsearched = 0
        # Whether the last search has seen the variables of all running calls.
        self.has_seen_all_calls = True

    def time_to_search(self, *, paced: bool) -> TimeLimit:
        """How long a search may take now.

        Args:
            paced: The searches of a series must not take more than their share of the time. A
                single report may take the maximum.
        """
        balance = self._allowance.balance(now())
        if not paced:
            return TimeLimit(_MAX_SECONDS)
        if is_too_large():
            return TimeLimit(balance if balance >= self._seconds_forward else 0.0)
        return TimeLimit(_MAX_SECONDS if balance > -_MAX_DEBT else 0.0)

    def explain(
        self,
        findings: Iterable[Finding],
        pools: Mapping[int, PoolUse],
        calls: Mapping[int, CallUse],
        limit: TimeLimit,
        *,
        everything: bool = False,
    ) -> tuple[Finding, ...]:
        """Add the holders to the findings, as far as they are known or found within the limit.

        Args:
            findings: All findings of the report; explanations of other sockets are forgotten.
            pools: How pools use the sockets, by serial.
            calls: What running calls have to do with the sockets, by serial.
            limit: The time for searching.
            everything: Explain all findings, not only leaks, and do not pause.
        """
        findings = tuple(findings)
        # What held a dropped socket before does not any more.
        wanted = [
            finding
            for finding in findings
            if (everything or finding.verdict in FOLLOWED)
            and finding.observation.evidence not in GONE
        ]
        self._explanations = self._recall(wanted) | self._explain_dropped(findings)
        is_paused = self._allowance.balance(now()) < 0 and not everything
        unknown = self._without_explanation(wanted)
        self._search_all(self._choose_to_search(unknown, is_paused=is_paused), limit)
        known = self._explanations.copy()
        self.unsearched = sum(finding.observation.record.serial not in known for finding in unknown)
        explained = tuple(
            [self._add_explanation(each, pools, calls, must_close=everything) for each in findings]
        )
        self._forget_others(explained)
        return explained

    def _forget_others(self, findings: tuple[Finding, ...]) -> None:
        serials = {finding.observation.record.serial for finding in findings}
        for known in (self.texts, self._inputs):
            for serial in known.copy().keys() - serials:
                known.pop(serial, None)

    def _search_all(self, chosen: list[Finding], limit: TimeLimit) -> None:
        is_large = bool(chosen) and is_too_large()
        size = _MAX_AT_ONCE_FORWARD if is_large else _MAX_AT_ONCE
        search: _SearchFunction = self._search_forward if is_large else self._search_backward
        if not has_gil():
            search = _search_nowhere
        at = wall()
        for start in range(0, len(chosen), size):
            if limit.is_over():
                break
            self._search(chosen[start : start + size], search, limit, at)

    @property
    def failed(self) -> int:
        """For how many of the findings that were explained last the search has failed."""
        return sum(
            explanation.holders.has_failed for explanation in self._explanations.copy().values()
        )

    def _recall(self, findings: list[Finding]) -> dict[int, _Explanation]:
        known = self._explanations
        serials = [finding.observation.record.serial for finding in findings]
        return {serial: known[serial] for serial in serials if serial in known}

    def _explain_dropped(self, findings: Iterable[Finding]) -> dict[int, _Explanation]:
        """Of what held a dropped socket, only the calls that have opened it are known."""
        found: dict[int, _Explanation] = {}
        for finding in findings:
            if finding.observation.evidence in GONE:
                record = finding.observation.record
                known = self._explanations.get(record.serial)
                if known is None or known.site[0] is not finding.verdict:
                    holders = Holders(owners=calls_of_libraries(record))
                    known = _Explanation(_site_of(finding), holders, now(), None)
                found[record.serial] = known
        return found

    def _choose_to_search(self, unknown: list[Finding], *, is_paused: bool) -> list[Finding]:
        """What to search for: first one finding of each new site, then the others.

        While the search is paused, only those of new sites.
        """
        if not unknown:
            return []
        sites = {explanation.site for explanation in self._explanations.copy().values()}
        new: list[Finding] = []
        others: list[Finding] = []
        for finding in unknown:
            site = _site_of(finding)
            (others if site in sites else new).append(finding)
            sites.add(site)
        return new if is_paused else new + others

    def _without_explanation(self, findings: list[Finding]) -> list[Finding]:
        """Those to search for: there is no explanation yet, none of this verdict, or an old one."""
        known, oldest = self._explanations, now() - _REFRESH_AFTER
        unknown: list[Finding] = []
        for finding in findings:
            explanation = known.get(finding.observation.record.serial)
            if (
                explanation is None
                or explanation.site[0] is not finding.verdict
                or explanation.at < oldest
            ) and finding.verdict is not Verdict.CLOSED_ELSEWHERE:
                unknown.append(finding)
        return unknown

    def _search(
        self, findings: list[Finding], search: _SearchFunction, limit: TimeLimit, wall: float
    ) -> None:
        try:
            known = search(findings, limit)
            observations = [finding.observation for finding in findings]
            sharing = processes_sharing(observations)
            makings = describe_makings(observations, self._registry)
            successors = find_successors(observations, self._registry, wall)
        except Exception:
            # Report the findings without holders, and do not search again at once.
            serials = (finding.observation.record.serial for finding in findings)
            known, sharing = dict.fromkeys(serials, _FAILED), {}
            makings, successors = {}, {}
        for finding in findings:
            observation = finding.observation
            holders = known.get(observation.record.serial, Holders())
            successor = successors.get(observation.record.serial)
            if holders is not None:
                sentences = (*holders.sentences, *sharing.get(observation.inode or 0, ()))
                if making := makings.get(observation.record.serial):
                    sentences = (*sentences, making)
                holders = holders._replace(sentences=sentences)
                explanation = _Explanation(_site_of(finding), holders, now(), successor)
                self._explanations[observation.record.serial] = explanation

    def _search_backward(
        self, findings: list[Finding], limit: TimeLimit
    ) -> dict[int, Holders | None]:
        """Search from each socket to what refers to it, through the whole heap."""
        roots = Roots()
        self.has_seen_all_calls = roots.has_all_calls
        found, objects = self._find_objects(findings, all_instances)
        serials = [finding.observation.record.serial for finding in found]
        return dict(zip(serials, find_holders(objects, limit.end, roots), strict=True))

    def _search_forward(
        self, findings: list[Finding], limit: TimeLimit
    ) -> dict[int, Holders | None]:
        """Search from modules and local variables to the sockets; None for those not reached."""
        roots = Roots(with_values=True)
        self.has_seen_all_calls = roots.has_all_calls
        part = limit.part(_NATIVE_OWNERS_SHARE)
        found, objects = self._find_objects(
            findings, lambda classes: reachable_instances(classes, roots, part.is_over)[0]
        )
        serials = [finding.observation.record.serial for finding in findings]
        holders = find_holders_forward(objects, roots, limit.is_over)
        known = dict.fromkeys(serials) | {
            finding.observation.record.serial: each
            for finding, each in zip(found, holders, strict=True)
        }
        has_found_all = None not in known.values()
        self._seconds_forward = (
            _MIN_SECONDS_FORWARD
            if has_found_all
            else min(2 * self._seconds_forward, _MAX_SECONDS_FORWARD)
        )
        return known

    def _find_objects(
        self, findings: list[Finding], find: Callable[[dict[int, type]], Iterable[object]]
    ) -> tuple[list[Finding], list[object]]:
        """The objects that own the sockets, in a list that holds the only references to them."""
        without_socket = {
            finding.observation.fd: finding
            for finding in findings
            if self._socket_of(finding) is None
        }
        owners = owners_of_descriptors(without_socket.keys(), find) if without_socket else {}
        found = [without_socket[fd] for fd in owners]
        objects = list(owners.values())
        for finding in findings:
            sock = self._socket_of(finding)
            if sock is not None:
                found.append(finding)
                objects.append(sock)
        return found, objects

    def _socket_of(self, finding: Finding) -> object | None:
        """The socket of a finding, or its owner, or what the program has taken from a pool."""
        serial, table = finding.observation.record.serial, self._registry.owners
        if finding.observation.owner is not None:
            return None if table is None else table.owner_of(serial)
        if finding.observation.checkout is not None and table is not None:
            borrowed = table.checkouts.borrowed(serial)
            if borrowed is not None:
                return borrowed
        return self._registry.socket_of(finding.observation.fd, serial)

    def _add_explanation(
        self,
        finding: Finding,
        pools: Mapping[int, PoolUse],
        calls: Mapping[int, CallUse],
        *,
        must_close: bool,
    ) -> Finding:
        """The finding with its text, which is made again only if what it depends on has changed."""
        observation, verdict = finding.observation, finding.verdict
        serial = observation.record.serial
        explanation = self._explanations.get(serial, _NO_EXPLANATION)
        pool, call = pools.get(serial), calls.get(serial)
        if verdict is _CLOSED_ELSEWHERE:
            reuse = Holders((describe_reuse(observation.fd),))
            explanation, pool = _NO_EXPLANATION._replace(holders=reuse), None
        inputs = (
            verdict,
            explanation,
            pool,
            call,
            observation.record.origin,
            observation.state,
            observation.evidence,
            observation.connection,
            must_close,
        )
        text = self.texts.get(serial)
        if text is None or self._inputs.get(serial) != inputs:
            text = self._make_text(finding, explanation, pool, call, must_close=must_close)
            self.texts[serial], self._inputs[serial] = text, inputs
        is_known = finding.holders is text[0] and finding.hint is text[1]
        if is_known and finding.code is text[3] and finding.package is text[4]:
            return finding
        # replace() would take a tenth of a scan whose findings are all known.
        return Finding(observation, verdict, finding.severity, *text)

    def _make_text(
        self,
        finding: Finding,
        explanation: _Explanation,
        pool: PoolUse | None,
        call: CallUse | None,
        *,
        must_close: bool,
    ) -> FindingText:
        """What holds the socket, the hint, what has replaced it, and whose code opened it.

        Args:
            finding: Without them.
            explanation: What the search has found.
            pool: How a pool uses the socket.
            call: What a running call has to do with it.
            must_close: Whether it is to be closed even where a program would have nothing to do.
        """
        verdict = finding.verdict
        sentences, owners, _ = explanation.holders
        if (checkout := finding.observation.checkout) is not None:
            owners = (*owners, checkout.library)
        elif pool is not None and (pool.is_out_of_use or verdict is not Verdict.OPEN):
            sentences, owners = (*sentences, pool.sentence), (*owners, *pool.holders)
        wanted = Verdict.OPEN if must_close and verdict in _NOTHING_TO_DO else verdict
        if pool is not None and wanted is Verdict.OPEN:
            owners = pool.without_read_responses(owners)
        is_replaced = explanation.successor is not None
        surplus = pool.surplus if pool is not None and wanted is Verdict.STALE_POOL else ""
        if pool is not None and surplus:
            owners = (for_each_call(pool.library),)
        hint, code = self._hint_and_code(
            finding.observation, wanted, owners, is_replaced=is_replaced, surplus=surplus
        )
        if call is not None:
            sentences = (call.sentence, *sentences)
            hint = hint if finding.is_leak else call.hint
        packages = packages_of(finding.observation.record)
        return sentences, hint, explanation.successor, code, *packages

    def _hint_and_code(
        self,
        observation: Observation,
        verdict: Verdict,
        owners: tuple[str, ...],
        *,
        is_replaced: bool,
        surplus: str,
    ) -> tuple[str, str]:
        record = observation.record
        opener = record.opener.origin
        if observation.owner is not None:
            owners = (observation.type, *map(made_by, calls_of_libraries(record)))
        elif observation.state is State.LISTEN:
            # What libraries say is of connections.
            owners = ()
        elif verdict is Verdict.OPEN and LOOP_WAKER in calls_of_libraries(record):
            # A loop keeps these two itself, and all others for somebody else.
            owners = (LOOP_WAKER,)
        # Of too many pools it is the same to be changed, whether they leak or not yet.
        kind = Verdict.LEAKED if surplus else verdict
        of_library = self._hint_of_library(kind, opener, owners) if owners else ""
        if surplus:
            of_library = f"{surplus}: {of_library}"
        # TLS does not change which side has made the connection.
        origin = opener if record.origin is Origin.WRAPPED else record.origin
        facts = verdict, origin, observation.evidence, observation.connection
        hint = hint_for(*facts, is_replaced=is_replaced, of_library=of_library)
        known = owners if of_library else ()
        return hint, cause_code(*facts, is_replaced=is_replaced, owners=known)


def _site_of(finding: Finding) -> _Site:
    return finding.verdict, finding.observation.record.site
