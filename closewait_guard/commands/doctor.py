"""`doctor`: what the guard can and cannot see on this machine, one topic after the other.

Among them: libraries that open sockets outside Python, and what has replaced the socket class.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

from closewait_guard import _descriptors, _libraries
from closewait_guard._capture import SOCKET, replacement_class, why_no_speedups
from closewait_guard._libraries import NativeCode
from closewait_guard._processes import how_to_be_permitted, kernel_answers
from closewait_guard.commands._output import FINE, USAGE, say
from closewait_guard.commands._parser import add_no_config, variables_of
from closewait_guard.commands.scan import pid
from closewait_guard.exceptions import CloseWaitGuardError, ReportFormatError
from closewait_guard.reporters.names import named
from closewait_guard.settings import Settings

__all__ = [
    "findings",
    "installed",
    "loaded_by",
    "replacements",
]


_DESCRIPTION = """\
Show what can and cannot be tracked here: Python, probe, limits, keepalive, C
extensions that open sockets, and libraries that replace socket.socket. With a
PID, also show which of these extensions that process has loaded."""
_EPILOG = """\
exit status: 0 printed, 2 usage error, bad settings, or no such process
example:     closewait-guard doctor"""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "pid", nargs="?", type=pid, metavar="PID", help="process to inspect as well"
    )
    add_no_config(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Examine, and print."""
    from closewait_guard._stream import layout_of

    layout = layout_of(sys.stdout)._replace(directory="")
    # All of it first: a process that does not exist is reported instead of everything else.
    found = list(findings(arguments.pid, variables_of(arguments)))
    for topic, text in found:
        say("\n".join(layout.wrap(f"{topic + ':':<13} {text}", " " * 14)))
    return USAGE if any(text.startswith(_UNUSABLE) for _, text in found) else FINE


def _native_code() -> Iterator[NativeCode]:
    for library in _libraries.LIBRARIES:
        yield from library.native


def installed() -> Iterator[tuple[NativeCode, str]]:
    """What this Python could import, with the versions; none of it is imported."""
    for code in _native_code():
        if find_spec(code.module) is not None:
            yield code, _version(code.distribution)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def loaded_by(pid: int) -> list[NativeCode]:
    """That of which a running process has mapped a file.

    Raises:
        ReportFormatError: There is no such process, or it may not be looked into.
    """
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except PermissionError:
        how = how_to_be_permitted()
        raise ReportFormatError(f"not permitted to inspect process {pid}: {how}") from None
    except OSError:
        raise ReportFormatError(f"no such process, or no /proc to read: {pid}") from None
    found: dict[str, NativeCode] = {}
    for code in _native_code():
        if code.file_part in maps:
            found.setdefault(code.file_part, code)
    return list(found.values())


_MAKERS = ("create_connection", "create_server", "socketpair", "fromfd", "getaddrinfo")


_STANDARD: str = SOCKET.__init__.__code__.co_filename


def replacements() -> Iterator[str]:
    """Each with the file and line of what stands there now."""
    class_name = replacement_class()
    if class_name is not None:
        yield f"socket.socket is {class_name} ({_place(socket.socket)})"
    for name, value in vars(SOCKET).items():
        if not _is_standard(value):
            yield f"socket.socket.{name} is {_name(value)} ({_place(value)})"
    for name in _MAKERS:
        value = getattr(socket, name, None)
        if value is not None and not _is_standard(value):
            yield f"socket.{name} is {_name(value)} ({_place(value)})"


def _is_standard(value: Any) -> bool:
    """Whether it is of the socket module's own file, or no function of anybody's."""
    if isinstance(value, FunctionType):
        return value.__code__.co_filename == _STANDARD
    # Wrapt's wrappers are no functions, but stand for one.
    return not hasattr(value, "__wrapped__")


def _name(value: Any) -> str:
    module = getattr(value, "__module__", None) or type(value).__module__
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _place(value: Any) -> str:
    code = getattr(value, "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    module = sys.modules.get(getattr(value, "__module__", None) or type(value).__module__)
    return str(getattr(module, "__file__", "no file"))


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
    yield "Descriptors", _descriptor_limits()
    yield "Keepalive", _keepalive()
    yield "From outside", _outside()
    yield "C extensions", _natives()
    if pid is not None:
        yield f"Process {pid}", _loaded(pid)
    yield "Socket class", "; ".join(replacements()) or "unchanged"
    yield "Extras", _extras()


def _natives() -> str:
    found = [f"{code.module}{number and ' '}{number} ({code.what})" for code, number in installed()]
    return _opening_outside(found) or "no installed library is known to open sockets in C"


def _opening_outside(found: Sequence[str]) -> str:
    return (
        f"{', '.join(found)}: their sockets are opened outside Python, see attribute()"
        if found
        else ""
    )


def _loaded(pid: int) -> str:
    found = [f"{code.module} ({code.what})" for code in loaded_by(pid)]
    return _opening_outside(found) or "no loaded library is known to open sockets in C"


# What install() and run would refuse, too.
_UNUSABLE = "cannot be used: "


def _settings(variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    try:
        settings = Settings.load(environ={**os.environ, **variables}, code_from_file=False)
        for name in settings.reporters:
            named(name)
    except CloseWaitGuardError as error:
        yield "Settings", f"{_UNUSABLE}{error}"
        return
    defaults = Settings().describe()
    found = settings.describe()
    changed = [f"{name}={value}" for name, value in found.items() if value != defaults[name]]
    yield "Settings", "; ".join((", ".join(changed) or "the defaults", *settings.notes))
    yield "Probe", _probe(settings.probe)
    yield "Recording", _recording(speedups=settings.speedups)


def _probe(chosen: str) -> str:
    if chosen == "linux" or (chosen == "auto" and _ON_LINUX):
        return (
            "linux: poll() finds sockets that the peer has closed, TCP_INFO says since when, even "
            "if that was before install()"
        )
    return (
        "portable: poll() or select(), and a peek where it is safe; the age counts from the first "
        "scan that sees the end, and unread data hides it"
    )


def _recording(*, speedups: bool) -> str:
    reason = why_no_speedups() if speedups else "the setting speedups is off"
    return "in C" if reason is None else f"in Python, with the same result but slower: {reason}"


def _descriptor_limits() -> str:
    used, limit = _descriptors.fd_used(), _descriptors.fd_limit()
    text = f"{used:,} in use" if used is not None else "in use unknown"
    if limit is None:
        return f"{text}, without a limit"
    return f"{text} of {limit:,} (soft limit{_hard_limit()})"


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
        text = (
            f"tcp_keepalive_time={idle} s, tcp_keepalive_intvl={interval} s, "
            f"tcp_keepalive_probes={probes}, for sockets that ask for it. "
        )
    except OSError:
        text = ""
    return text + (
        "Keepalive detects peers that vanished without closing. It does not end CLOSE_WAIT for "
        "the program: a peer that has closed answers probes while it remembers the connection, "
        "and resets it afterwards (then ss no longer shows it); either way the descriptor stays "
        "open until the program calls close()."
    )


def _outside() -> str:
    if not _ON_LINUX:
        return "scan and watch ask psutil: no ages, no unread bytes" + _rights()
    if kernel_answers():
        return "scan and watch ask the kernel by netlink, which dates each close" + _rights()
    return (
        "scan and watch read /proc/net, because the kernel answers no socket diagnostics: no ages"
        + _rights()
    )


def _rights() -> str:
    if getattr(os, "geteuid", int)() == 0:
        if _lacks_capability():
            return f"; you cannot inspect every process: {how_to_be_permitted()}"
        return "; you are root and can inspect all processes"
    return "; you can inspect your own processes, root all"


# CAP_SYS_PTRACE in the mask of capabilities.
_TRACE = 1 << 19


def _lacks_capability() -> bool:
    """Whether this process has not all the rights of root, as in a container."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return effective is not None and not int(effective[1], 16) & _TRACE


def _extras() -> str:
    return ", ".join(f"{name} {_version_of(name)}" for name in ("rich", "psutil", "argcomplete"))


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
