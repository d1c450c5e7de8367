"""What is known of foreign libraries: one file each. None of them is imported for it."""

from __future__ import annotations

from closewait_guard.integrations import aiohttp, httpcore, redis, sqlalchemy, urllib3
from closewait_guard.integrations._pool import PoolKind, PoolUse

__all__ = ["POOLS", "PoolKind", "PoolUse"]

POOLS: tuple[PoolKind, ...] = (
    *urllib3.POOLS,
    *httpcore.POOLS,
    *aiohttp.POOLS,
    *redis.POOLS,
    *sqlalchemy.POOLS,
)
