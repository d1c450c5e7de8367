"""What is known of foreign libraries: one file each. None of them is imported for it."""

from __future__ import annotations

from closewait_guard._libraries import (
    aiohttp,
    httpcore,
    others,
    psycopg,
    redis,
    sqlalchemy,
    stdlib,
    urllib3,
    uvloop,
)
from closewait_guard._libraries.kinds import (
    HolderHint,
    Library,
    NativeCode,
    OwnerKind,
    PoolKind,
    PoolUse,
)
from closewait_guard._libraries.stdlib import LOOP_WAKER

__all__ = [
    "LIBRARIES",
    "LOOP_WAKER",
    "SOCKET_CLASSES",
    "SOCKET_CONSTRUCTORS",
    "HolderHint",
    "Library",
    "NativeCode",
    "OwnerKind",
    "PoolKind",
    "PoolUse",
]


# Hints are taken in this order: of what a program holds before what that holds in turn. Listed, not
# found by going through the folder, so that it also works in archives and frozen programs.
LIBRARIES: tuple[Library, ...] = (
    stdlib.TRACEBACK,
    *urllib3.LIBRARIES,
    *httpcore.LIBRARIES,
    *aiohttp.LIBRARIES,
    *redis.LIBRARIES,
    *sqlalchemy.LIBRARIES,
    *psycopg.LIBRARIES,
    *others.LIBRARIES,
    *stdlib.LIBRARIES,
    *uvloop.LIBRARIES,
)
SOCKET_CLASSES = tuple(name for library in LIBRARIES for name in library.socket_classes)
SOCKET_CONSTRUCTORS = dict(each for library in LIBRARIES for each in library.socket_constructors)
