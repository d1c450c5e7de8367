"""The public names, as literals: one that is added, renamed or lost is a decision of its own."""

from __future__ import annotations

import closewait_guard as cwg
from closewait_guard import model

ROOT = (
    "Alert AlertKind AlertStatus Checkout CloseWaitGuardError ClosedLate ConfigurationError "
    "Connection Coverage DescriptorKind Descriptors Evidence Finding Frame FrameKind FullPool "
    "Guard MissingExtraError Monitor NotLoadedError Observation OpenAtEnd Origin OwnerKind Report "
    "ReportFormatError Reporter Settings Severity SiteGroup SocketLeakError SocketOwner "
    "SocketRecord State Unanswered UnsupportedPythonError Verdict __version__ aiohttp asgi "
    "attribute from_dict install label no_leaks render_text report scan to_dict track uninstall "
    "watch watch_async wsgi"
)

MODEL = (
    "UNKNOWN_FAMILY Alert AlertKind AlertStatus Checkout ClosedLate Connection Coverage "
    "DescriptorKind Descriptors Evidence Finding Frame FrameKind FullPool Observation "
    "OpenAtEnd Origin Report Reporter Scalar Severity SiteGroup SocketOwner SocketRecord State "
    "Unanswered Verdict"
)

GUARD = (
    "attribute check failed_reports install installed mark no_leaks report scan settings track "
    "uninstall"
)


def test_the_package_offers_these_names():
    assert " ".join(cwg.__all__) == ROOT


def test_the_model_offers_these_names():
    assert " ".join(model.__all__) == MODEL


def test_a_guard_offers_these_names():
    names = (name for name in dir(cwg.Guard()) if not name.startswith("_"))
    assert " ".join(names) == GUARD
