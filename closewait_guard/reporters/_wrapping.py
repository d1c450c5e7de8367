"""What reporters have in common that wrap another."""

from __future__ import annotations

from closewait_guard._reporting import closed, described
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Leak, Reporter

__all__ = ["Wrapping", "serial_of"]


class Wrapping:
    """A reporter that hands on to another; closing it closes the other."""

    def __init__(self, name: str, reporter: Reporter) -> None:
        if not callable(reporter):
            raise ConfigurationError(
                f"{name}: reporter must be callable with a report, not {reporter!r}"
            )
        self._name = name
        self._reporter = reporter

    def close(self) -> None:
        closed(self._reporter)

    def __repr__(self) -> str:
        return f"{self._name}({described(self._reporter)})"


def serial_of(leak: Leak) -> int:
    """What tells the socket of a leak from all others."""
    return leak.observation.record.serial
