"""Every error that this library raises derives from `CloseWaitGuardError`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from closewait_guard.model import Descriptors, Report

__all__ = [
    "CloseWaitGuardError",
    "ConfigurationError",
    "MissingExtraError",
    "NotLoadedError",
    "ReportFormatError",
    "SocketLeakError",
    "UnsupportedPythonError",
]


class CloseWaitGuardError(Exception):
    """The base of every error of this library."""


class ConfigurationError(CloseWaitGuardError, ValueError):
    """A setting cannot be used; the text names the value and where it came from."""


class MissingExtraError(CloseWaitGuardError, ImportError):
    """A package is needed that is not installed; the text says how to install it."""


class NotLoadedError(CloseWaitGuardError, ImportError):
    """What scans could not be loaded when it was first needed; the text says why."""


class UnsupportedPythonError(CloseWaitGuardError, ImportError):
    """Sockets cannot be recorded in such an interpreter; the text names it."""


class ReportFormatError(CloseWaitGuardError, ValueError):
    """The data is not a saved report; the text names the place that does not fit."""


class SocketLeakError(CloseWaitGuardError, AssertionError):
    """Sockets were leaked; the text is the rendered report, with no leak as still open.

    Attributes:
        report: The `Report` that names the leaked sockets.
        descriptors: Other descriptors that were left open, where they were asked for.
    """

    def __init__(self, text: str, report: Report, descriptors: Descriptors | None = None) -> None:
        super().__init__(text, report, descriptors)
        self.report, self.descriptors = report, descriptors

    def __str__(self) -> str:
        return str(self.args[0])
