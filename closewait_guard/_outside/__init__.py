"""Sockets of other processes, seen from outside: one file for each way to look."""

from __future__ import annotations

from closewait_guard._outside._netlink import answers as kernel_answers
from closewait_guard._outside._onlooker import Found, Glance, Onlooker
from closewait_guard._outside._sight import Refusal
from closewait_guard._outside._told import peer_of, told, told_missing, user

__all__ = [
    "Found",
    "Glance",
    "Onlooker",
    "Refusal",
    "kernel_answers",
    "peer_of",
    "told",
    "told_missing",
    "user",
]
