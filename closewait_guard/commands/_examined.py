"""What `doctor` finds of this machine: one topic after the other, each in a sentence or two."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from closewait_guard import _census
from closewait_guard._outside import kernel_answers
from closewait_guard.commands._natives import installed, loaded_by
from closewait_guard.commands._replaced import replacements
from closewait_guard.exceptions import CloseWaitGuardError
from closewait_guard.settings import Settings

__all__ = ["findings"]

_ON_LINUX = sys.platform == "linux"


def findings(pid: int | None, variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Topics, with what there is to say of each.

    Args:
        pid: A process to look into, too.
        variables: What to take as if it were in the environment.
    """
    python = f"{platform.python_implementation()} {platform.python_version()}"
    yield "Python", f"{python}, {sys.executable}"
    yield "Platform", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield from _settings(variables)
    yield "Descriptors", _descriptors()
    yield "Keepalive", _keepalive()
    yield "From outside", _outside()
    yield "Unseen", _natives()
    if pid is not None:
        yield f"Process {pid}", _loaded(pid)
    yield "Socket class", "; ".join(replacements()) or "as the standard library has made it"
    yield "Extras", _extras()


def _natives() -> str:
    found = [f"{library.module} {number}: {library.what}" for library, number in installed()]
    return "; ".join(found) or "no library is installed that is known to open sockets in C"


def _loaded(pid: int) -> str:
    found = [f"{library.module}: {library.what}" for library in loaded_by(pid)]
    return "; ".join(found) or "has loaded no library that is known to open sockets in C"


def _settings(variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    try:
        settings = Settings.load(environ={**os.environ, **variables}, code_from_file=False)
    except CloseWaitGuardError as error:
        yield "Settings", f"cannot be used: {error}"
        return
    defaults = Settings().describe()
    found = settings.describe()
    changed = [f"{name}={value}" for name, value in found.items() if value != defaults[name]]
    yield "Settings", "; ".join((", ".join(changed) or "the defaults", *settings.notes))
    yield "Probe", _probe(settings.probe)


def _probe(chosen: str) -> str:
    if chosen == "linux" or (chosen == "auto" and _ON_LINUX):
        return (
            "linux: poll() finds whom the peer has left, TCP_INFO says since when, even if that "
            "was before the guard"
        )
    return (
        "portable: poll() or select(), and a peek where it is safe; dates an end by the first "
        "look that sees it, and sees none behind unread data"
    )


def _descriptors() -> str:
    used, limit = _census.fd_used(), _census.fd_limit()
    told = f"{used:,} in use" if used is not None else "in use unknown"
    if limit is None:
        return f"{told}, without a limit"
    return f"{told} of {limit:,} (soft limit{_hard_limit()})"


def _hard_limit() -> str:
    try:
        import resource
    except ImportError:
        return ""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return "; no hard limit" if hard == resource.RLIM_INFINITY else f"; hard limit {hard:,}"


def _keepalive() -> str:
    names = ("time", "intvl", "probes")
    try:
        idle, interval, probes = (
            int(Path(f"/proc/sys/net/ipv4/tcp_keepalive_{name}").read_text(encoding="ascii"))
            for name in names
        )
        told = (
            f"tcp_keepalive_time={idle} s, tcp_keepalive_intvl={interval} s, "
            f"tcp_keepalive_probes={probes}, for sockets that ask for it. "
        )
    except OSError:
        told = ""
    return told + (
        "Keepalive finds peers that have vanished without a word. It does not end CLOSE_WAIT for "
        "the program: a peer that has closed answers probes while it remembers the connection, "
        "and resets it afterwards (then ss shows it no more); either way the descriptor stays "
        "taken until the program calls close()."
    )


def _outside() -> str:
    if not _ON_LINUX:
        return "scan and watch ask psutil: no ages, no unread bytes" + _rights()
    if kernel_answers():
        return "scan and watch ask the kernel by netlink, which dates each peer's end" + _rights()
    return (
        "scan and watch read /proc/net, for the kernel answers no socket diagnostics: no ages"
        + _rights()
    )


def _rights() -> str:
    if getattr(os, "geteuid", int)() == 0:
        return "; you are root, and may look into the processes of all users"
    return "; you may look into your own processes, root into all"


def _extras() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in ("rich", "psutil", "argcomplete"))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
