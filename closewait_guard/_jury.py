"""From what was seen to what is told: verdicts, once the pools were asked, and who holds what."""

from __future__ import annotations

import time
from collections.abc import Iterable

from closewait_guard._clock import now
from closewait_guard._explain import Explainer
from closewait_guard._judge import judge
from closewait_guard._pace import Allowance
from closewait_guard._pools import Pools
from closewait_guard._registry import Registry
from closewait_guard._time_limit import TimeLimit
from closewait_guard.integrations import PoolUse
from closewait_guard.model import Leak, Observation, Verdict
from closewait_guard.settings import Settings

__all__ = ["Jury"]

# The share of the time for searching that goes to pools.
_OF_POOLS = 0.3


class Jury:
    """Judges, and remembers what it has found out about the accused."""

    def __init__(self, registry: Registry) -> None:
        self._pools = Pools()
        self._allowance = Allowance(now())
        self._explainer = Explainer(registry, self._allowance)
        # Processor time of asking pools and going through the heap, which is limited by itself.
        self.spent = 0.0
        self.has_asked_pools = True

    def charge(self, seconds: float) -> None:
        """What looking has taken is no longer there for searching."""
        self._allowance.charge(seconds, now())

    @property
    def unsearched(self) -> int:
        """For how many of the accused there was no time to find out who holds them."""
        return self._explainer.unsearched

    @property
    def failed_searches(self) -> int:
        """For how many of the accused nobody could find out who holds them."""
        return self._explainer.failed

    def leaks(
        self,
        seen: Iterable[Observation],
        settings: Settings,
        fd_limit: int | None,
        *,
        everything: bool = False,
        explain: bool = True,
        paced: bool = False,
    ) -> tuple[Leak, ...]:
        """The verdicts with their holders.

        Args:
            seen: All that was seen in one look.
            settings: The thresholds.
            fd_limit: How many descriptors the process may have.
            everything: Say who holds the innocent too.
            explain: Find out who holds them, and ask the pools, at all.
            paced: Take no more than the share of the time that a series may take.
        """
        seen = tuple(seen)
        leaks = judge(seen, settings, fd_limit)
        if not explain:
            return leaks
        begun = time.thread_time()
        accused = (leak for leak in leaks if leak.accused and leak.verdict is not Verdict.DROPPED)
        limit = self._explainer.time_to_search(paced=paced)
        pools = self._ask_pools((leak.observation for leak in accused), limit.part(_OF_POOLS))
        idle = {serial for serial, use in pools.items() if use.is_idle and not use.is_surplus}
        if idle:
            leaks = judge(seen, settings, fd_limit, idle)
        leaks = self._explainer.explain(leaks, pools, limit, everything=everything)
        took = time.thread_time() - begun
        self.spent += took
        self.charge(took)
        return leaks

    def _ask_pools(self, seen: Iterable[Observation], limit: TimeLimit) -> dict[int, PoolUse]:
        try:
            uses = self._pools.uses(seen, limit)
        except Exception:
            self.has_asked_pools = False
            return {}
        self.has_asked_pools = True
        return uses
