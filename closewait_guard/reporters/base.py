"""The base class of reporters that wrap another reporter."""

from __future__ import annotations

from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Finding, Reporter, close_reporter, reporter_name

__all__ = [
    "Wrapping",
    "serial_of",
]


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
        close_reporter(self._reporter)

    def __repr__(self) -> str:
        return f"{self._name}({reporter_name(self._reporter)})"


def serial_of(finding: Finding) -> int:
    """The serial number of the socket of a finding."""
    return finding.observation.record.serial
