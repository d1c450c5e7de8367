"""Track socket leaks from inside the process: which, since when, opened where, and what to change.

The names are fetched when they are first used, so that importing the package costs next to
nothing and patches nothing.
PYTEST_DONT_REWRITE
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from closewait_guard._api import (
        attribute,
        install,
        no_leaks,
        report,
        scan,
        track,
        uninstall,
        watch,
        watch_async,
    )
    from closewait_guard._capture import label
    from closewait_guard._delivery import render_text
    from closewait_guard._guard import Guard
    from closewait_guard._libraries import OwnerKind
    from closewait_guard._monitor import Monitor
    from closewait_guard._render import from_dict, to_dict
    from closewait_guard.exceptions import (
        CloseWaitGuardError,
        ConfigurationError,
        MissingExtraError,
        NotLoadedError,
        ReportFormatError,
        SocketLeakError,
        UnsupportedPythonError,
    )
    from closewait_guard.integrations.aiohttp import aiohttp
    from closewait_guard.integrations.asgi import asgi
    from closewait_guard.integrations.wsgi import wsgi
    from closewait_guard.model import (
        Alert,
        AlertKind,
        AlertStatus,
        Checkout,
        ClosedLate,
        Connection,
        Coverage,
        DescriptorKind,
        Descriptors,
        Evidence,
        Finding,
        Frame,
        FrameKind,
        FullPool,
        Observation,
        OpenAtEnd,
        Origin,
        Report,
        Reporter,
        Severity,
        SiteGroup,
        SocketOwner,
        SocketRecord,
        State,
        Unanswered,
        Verdict,
    )
    from closewait_guard.settings import Settings

__all__ = [
    "Alert",
    "AlertKind",
    "AlertStatus",
    "Checkout",
    "CloseWaitGuardError",
    "ClosedLate",
    "ConfigurationError",
    "Connection",
    "Coverage",
    "DescriptorKind",
    "Descriptors",
    "Evidence",
    "Finding",
    "Frame",
    "FrameKind",
    "FullPool",
    "Guard",
    "MissingExtraError",
    "Monitor",
    "NotLoadedError",
    "Observation",
    "OpenAtEnd",
    "Origin",
    "OwnerKind",
    "Report",
    "ReportFormatError",
    "Reporter",
    "Settings",
    "Severity",
    "SiteGroup",
    "SocketLeakError",
    "SocketOwner",
    "SocketRecord",
    "State",
    "Unanswered",
    "UnsupportedPythonError",
    "Verdict",
    "__version__",
    "aiohttp",
    "asgi",
    "attribute",
    "from_dict",
    "install",
    "label",
    "no_leaks",
    "render_text",
    "report",
    "scan",
    "to_dict",
    "track",
    "uninstall",
    "watch",
    "watch_async",
    "wsgi",
]

_HOMES = {
    "_api": (
        "attribute",
        "install",
        "no_leaks",
        "report",
        "scan",
        "track",
        "uninstall",
        "watch",
        "watch_async",
    ),
    "_delivery": ("render_text",),
    "_guard": ("Guard",),
    "_capture": ("label",),
    "_libraries": ("OwnerKind",),
    "_monitor": ("Monitor",),
    "_render": ("from_dict", "to_dict"),
    "exceptions": (
        "CloseWaitGuardError",
        "ConfigurationError",
        "MissingExtraError",
        "NotLoadedError",
        "ReportFormatError",
        "SocketLeakError",
        "UnsupportedPythonError",
    ),
    "integrations.aiohttp": ("aiohttp",),
    "integrations.asgi": ("asgi",),
    "integrations.wsgi": ("wsgi",),
    "settings": ("Settings",),
}
_PUBLIC_MODULES = frozenset({"exceptions", "model", "reporters", "settings", "testing"})
# What IPython looks for at `%load_ext closewait_guard`.
_OF_IPYTHON = frozenset({"load_ipython_extension", "unload_ipython_extension"})
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    from importlib import import_module
    from sys import modules

    if (interruptions := modules.get(f"{__name__}._interruptions")) is not None:
        interruptions.restore_late()

    if name in _PUBLIC_MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _OF_IPYTHON:
        return getattr(import_module(f"{__name__}.integrations.ipython"), name)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("closewait_guard")
    value: object = getattr(import_module(f"{__name__}.{_HOME_OF.get(name, 'model')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_PUBLIC_MODULES})
