"""Which processes are meant: what `scan` and `watch` have in common."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from closewait_guard._outside import Found, Onlooker

__all__ = ["add_targets", "complain", "pid", "pids_of", "state"]


def add_targets(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which processes to look at."""
    pids = parser.add_argument(
        "pids", nargs="*", type=pid, metavar="PID", help="a process; all of them if left out"
    )
    pids.completer = _numbers  # type: ignore[attr-defined]
    parser.add_argument("--tree", action="store_true", help="their descendants, too")


def pid(text: str) -> int:
    """The number of a process, as it is typed."""
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"not the number of a process: {text!r}")
    return int(text)


def _numbers(**_: object) -> list[str]:
    """For the shell's completion."""
    from pathlib import Path

    try:
        return [path.name for path in Path("/proc").iterdir() if path.name.isdecimal()]
    except OSError:
        return []


def state(text: str) -> str:
    """A TCP state by any of its usual spellings: CLOSE_WAIT, close-wait, Close-Wait."""
    from closewait_guard.model import State

    name = text.upper().replace("-", "_")
    name = {"SYN_SENT1": "SYN_SENT", "CLOSED": "CLOSE", "ESTAB": "ESTABLISHED"}.get(name, name)
    known = [each.value for each in State if each.value.isupper()]
    if name not in known:
        raise argparse.ArgumentTypeError(f"not a TCP state: {text!r}; known are {', '.join(known)}")
    return name


def pids_of(arguments: argparse.Namespace, onlooker: Onlooker) -> list[int] | None:
    """The processes to look at; None for all."""
    from closewait_guard.exceptions import ConfigurationError

    if not arguments.pids:
        if arguments.tree:
            raise ConfigurationError("--tree: whose descendants? Name a PID")
        return None
    pids: list[int] = arguments.pids
    return onlooker.with_descendants(pids) if arguments.tree else pids


def complain(found: Found, asked: list[int]) -> bool:
    """Say which of the processes asked for cannot be looked at; whether there are any."""
    from closewait_guard._outside import user
    from closewait_guard._stream import print_error

    missed = [each for each in found.refused if each.pid in asked]
    for each in missed:
        program = f" ({each.program})" if each.program else ""
        if each.why:
            text = f"process {each.pid}{program} {each.why}"
        elif each.exists:
            who = f"{each.pid}{program} of user {user(each.uid)}"
            text = f"not permitted to look into process {who}: run as root, or as that user"
        else:
            text = f"no such process: {each.pid}"
        print_error(text)
    return bool(missed)
