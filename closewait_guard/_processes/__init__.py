"""Sockets of other processes, seen from outside: one file for each way to look."""

from __future__ import annotations

from closewait_guard._processes.model import (
    ChildrensCopies,
    Inaccessible,
    ProcessReport,
    ProcessScan,
)
from closewait_guard._processes.netlink import answers as kernel_answers
from closewait_guard._processes.report import ProcessScanner, find_copies_in_children
from closewait_guard._processes.text import (
    how_to_be_permitted,
    render_inaccessible,
    render_processes,
    sentences_on_others,
    user,
)

__all__ = [
    "ChildrensCopies",
    "Inaccessible",
    "ProcessReport",
    "ProcessScan",
    "ProcessScanner",
    "find_copies_in_children",
    "how_to_be_permitted",
    "kernel_answers",
    "render_inaccessible",
    "render_processes",
    "sentences_on_others",
    "user",
]
