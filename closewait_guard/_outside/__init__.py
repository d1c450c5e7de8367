"""Sockets of other processes, seen from outside: one file for each way to look."""

from __future__ import annotations

from closewait_guard._outside._missing import told_missing, user
from closewait_guard._outside._netlink import answers as kernel_answers
from closewait_guard._outside._onlooker import Found, Glance, Onlooker
from closewait_guard._outside._peers import peer_of
from closewait_guard._outside._sight import Refusal
from closewait_guard._outside._told import told

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
