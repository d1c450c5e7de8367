"""What is known of foreign libraries: one file each. None of them is imported for it."""

from __future__ import annotations

from closewait_guard._libraries import (
    aiohttp,
    httpcore,
    psycopg,
    pycurl,
    redis,
    sqlalchemy,
    stdlib,
    urllib3,
    uvloop,
)
from closewait_guard._libraries.kinds import OwnerKind, PoolKind, PoolUse, descriptor_of

__all__ = [
    "ATTRIBUTED",
    "OWNERS",
    "POOLS",
    "OwnerKind",
    "PoolKind",
    "PoolUse",
    "descriptor_of",
]


POOLS: tuple[PoolKind, ...] = (
    *urllib3.POOLS,
    *httpcore.POOLS,
    *aiohttp.POOLS,
    *redis.POOLS,
    *sqlalchemy.POOLS,
)

OWNERS: tuple[OwnerKind, ...] = (
    *psycopg.OWNERS,
    *pycurl.OWNERS,
    *uvloop.OWNERS,
    *stdlib.OWNERS,
)

# By the name of a library: what to wrap to know where its sockets are opened.
ATTRIBUTED: dict[str, tuple[str, ...]] = {
    **psycopg.ATTRIBUTED,
    **pycurl.ATTRIBUTED,
    **uvloop.ATTRIBUTED,
}
