"""What is known of foreign libraries: one file each. None of them is imported for it."""

from __future__ import annotations

from closewait_guard.integrations import (
    aiohttp,
    httpcore,
    psycopg,
    pycurl,
    python,
    redis,
    sqlalchemy,
    urllib3,
    uvloop,
)
from closewait_guard.integrations._owner import OwnerKind
from closewait_guard.integrations._pool import PoolKind, PoolUse

__all__ = ["ATTRIBUTED", "OWNERS", "POOLS", "OwnerKind", "PoolKind", "PoolUse"]

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
    *python.OWNERS,
)

# By the name of a library: what to wrap to know where its sockets are born.
ATTRIBUTED: dict[str, tuple[str, ...]] = {
    **psycopg.ATTRIBUTED,
    **pycurl.ATTRIBUTED,
    **uvloop.ATTRIBUTED,
}
