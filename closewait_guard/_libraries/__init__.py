"""What is known of foreign libraries: one file each. None of them is imported for it.

All but the names of what is patched is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from closewait_guard._libraries.classes import (
    OWNER_CLASSES,
    POOL_CLASSES,
    SOCKET_CLASSES,
    SOCKET_CONSTRUCTORS,
    DeclaredKinds,
)

if TYPE_CHECKING:
    from closewait_guard._libraries.all import LIBRARIES
    from closewait_guard._libraries.handles import HandleClasses, descriptor_of, handle_classes
    from closewait_guard._libraries.kinds import (
        MAX_CONNECTIONS,
        RESPONSES,
        CheckoutKind,
        HandleKind,
        HolderHint,
        Library,
        NativeCode,
        OwnerKind,
        PoolKind,
        PoolUse,
        connections_of,
        for_each_call,
        made_by,
        never,
        nothing,
        tracked_kind,
    )
    from closewait_guard._libraries.packages import Packages, packages_of
    from closewait_guard._libraries.stdlib import LOOP_WAKER, RUNNING_CALL

__all__ = [
    "LIBRARIES",
    "LOOP_WAKER",
    "MAX_CONNECTIONS",
    "OWNER_CLASSES",
    "POOL_CLASSES",
    "RESPONSES",
    "RUNNING_CALL",
    "SOCKET_CLASSES",
    "SOCKET_CONSTRUCTORS",
    "CheckoutKind",
    "DeclaredKinds",
    "HandleClasses",
    "HandleKind",
    "HolderHint",
    "Library",
    "NativeCode",
    "OwnerKind",
    "Packages",
    "PoolKind",
    "PoolUse",
    "connections_of",
    "descriptor_of",
    "for_each_call",
    "handle_classes",
    "kind_of_owner",
    "kind_of_pool",
    "made_by",
    "never",
    "nothing",
    "packages_of",
    "tracked_kind",
]

_HOMES = {
    "HandleClasses": "handles",
    "LIBRARIES": "all",
    "LOOP_WAKER": "stdlib",
    "Packages": "packages",
    "RUNNING_CALL": "stdlib",
    "descriptor_of": "handles",
    "handle_classes": "handles",
    "packages_of": "packages",
}


def kind_of_owner(name: str) -> OwnerKind:
    """What is known of a class of owners, `module:name`, from the file of its library alone."""
    home = import_module(f"{__name__}.{OWNER_CLASSES[name]}")
    kinds: list[OwnerKind] = [kind for library in home.LIBRARIES for kind in library.owners]
    return next(kind for kind in kinds if kind.owner_class == name)


def kind_of_pool(name: str) -> CheckoutKind:
    """The same of a class of pools."""
    home = import_module(f"{__name__}.{POOL_CLASSES[name]}")
    kinds: list[CheckoutKind] = [kind for library in home.LIBRARIES for kind in library.checkouts]
    return next(kind for kind in kinds if kind.pool_class == name)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"{__name__}.{_HOMES.get(name, 'kinds')}")
    value: object = home.__dict__[name]
    globals()[name] = value
    return value
