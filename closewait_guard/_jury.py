"""From what was seen to what is told: verdicts, once the pools were asked, and who holds what."""

from __future__ import annotations

import time
from collections.abc import Iterable

from closewait_guard._explain import Explainer
from closewait_guard._judge import judge
from closewait_guard._pools import Pools
from closewait_guard._registry import Registry
from closewait_guard.integrations import PoolUse
from closewait_guard.model import Leak, Observation, Verdict
from closewait_guard.settings import Settings

__all__ = ["Jury"]


class Jury:
    """Judges, and remembers what it has found out about the accused."""

    def __init__(self, registry: Registry) -> None:
        self._pools = Pools()
        self._explainer = Explainer(registry)
        # Processor time of asking pools and going through the heap, which is limited by itself.
        self.spent = 0.0
        self.has_asked_pools = True

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
    ) -> tuple[Leak, ...]:
        """The verdicts with their holders.

        Args:
            seen: All that was seen in one look.
            settings: The thresholds.
            fd_limit: How many descriptors the process may have.
            everything: Say who holds the innocent too.
            explain: Find out who holds them, and ask the pools, at all.
        """
        seen = tuple(seen)
        leaks = judge(seen, settings, fd_limit)
        if not explain:
            return leaks
        begun = time.thread_time()
        accused = (leak for leak in leaks if leak.accused and leak.verdict is not Verdict.DROPPED)
        pools = self._ask_pools(leak.observation for leak in accused)
        idle = {serial for serial, use in pools.items() if use.is_idle and not use.is_surplus}
        if idle:
            leaks = judge(seen, settings, fd_limit, idle)
        leaks = self._explainer.explain(leaks, pools, everything=everything)
        self.spent += time.thread_time() - begun
        return leaks

    def _ask_pools(self, seen: Iterable[Observation]) -> dict[int, PoolUse]:
        try:
            uses = self._pools.uses(seen)
        except Exception:
            self.has_asked_pools = False
            return {}
        self.has_asked_pools = True
        return uses
