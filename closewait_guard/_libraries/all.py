"""All libraries, in the order in which their hints are taken."""

from __future__ import annotations

from closewait_guard._libraries import (
    aiohttp,
    asyncpg,
    django,
    httpcore,
    others,
    processes,
    psycopg,
    pymongo,
    redis,
    sqlalchemy,
    stdlib,
    urllib3,
    uvloop,
)
from closewait_guard._libraries.kinds import Library

__all__ = ["LIBRARIES"]


# Of what a program holds before what that holds in turn. Listed, not found by going through the
# folder, so that it also works in archives and frozen programs.
LIBRARIES: tuple[Library, ...] = (
    stdlib.TRACEBACK,
    stdlib.RUNNING,
    *urllib3.LIBRARIES,
    *httpcore.LIBRARIES,
    *aiohttp.LIBRARIES,
    *redis.LIBRARIES,
    *sqlalchemy.LIBRARIES,
    *asyncpg.LIBRARIES,
    *django.LIBRARIES,
    *psycopg.LIBRARIES,
    *pymongo.LIBRARIES,
    *others.LIBRARIES,
    *processes.LIBRARIES,
    *stdlib.LIBRARIES,
    *uvloop.LIBRARIES,
)
