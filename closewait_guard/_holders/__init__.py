"""Who keeps a socket open? The one stage that touches live objects."""

from __future__ import annotations

from closewait_guard._holders.explain import Explainer
from closewait_guard._holders.libraries import (
    PoolCount,
    PoolCounter,
    Pools,
    idle_pools,
    owners_of_descriptors,
)
from closewait_guard._holders.roots import modules_of
from closewait_guard._holders.threads import RunningCalls

__all__ = [
    "Explainer",
    "PoolCount",
    "PoolCounter",
    "Pools",
    "RunningCalls",
    "idle_pools",
    "modules_of",
    "owners_of_descriptors",
]
