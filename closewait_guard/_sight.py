"""All the sockets that one look showed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from closewait_guard._socket_values import Observation

__all__ = ["Sight"]


class Sight(NamedTuple):
    """What one scan saw; of the undescribed, nothing but their birth is told."""

    open_sockets: int
    suspects: tuple[Observation, ...]
    dropped: tuple[Observation, ...]
    healthy: tuple[Observation, ...]
    undescribed: int = 0

    def only(self, wanted: Callable[[Observation], bool]) -> Sight:
        """Without what is not wanted."""
        return self._replace(
            suspects=tuple(filter(wanted, self.suspects)),
            healthy=tuple(filter(wanted, self.healthy)),
        )

    def with_natives(self, natives: Sight) -> Sight:
        """Both, but for the count, which is of tracked sockets."""
        return self._replace(
            suspects=self.suspects + natives.suspects,
            healthy=self.healthy + natives.healthy,
            undescribed=self.undescribed + natives.undescribed,
        )
