"""Where the functions of a running process are: its mapped files, and what these export.

Read from `/proc` and the files themselves, so that a debugger need not read any symbol while the
process is stopped, and what cannot be found is known before. Linux, 64 bits.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

__all__ = [
    "Symbols",
    "find_symbols",
]


PYTHON = ("Py_AddPendingCall", "PyRun_SimpleString")
_WANTED = frozenset({*PYTHON, "Py_Version", "mmap"})
# The interpreter, alone or as a library in any program, and the C library: glibc's or musl's.
_LIBRARY = re.compile(r"(libpython|libc[.-]|ld-musl|python)")
_MAX_TABLE = 1 << 26
_LOAD, _DYNAMIC_SYMBOLS = 1, 11


class Symbols(NamedTuple):
    """What was found in a process.

    Attributes:
        addresses: Of each function that is exported, where it is in the memory of the process.
        version: The version of the interpreter as `sys.hexversion` has it; 0 if there is none, or
            it is older than 3.11.
        unread: A file that may be the interpreter's, and cannot be read.
    """

    addresses: dict[str, int]
    version: int
    unread: str


def find_symbols(pid: int) -> Symbols:
    """Look through the interpreter and the C library of a process.

    Raises:
        OSError: Its maps cannot be read.
    """
    addresses, version, unread = dict[str, int](), 0, ""
    for mapped in _mapped_files(pid):
        try:
            with _open(pid, mapped) as file:
                found = _Image(file)
        except (OSError, ValueError, struct.error):
            unread = unread or mapped.path
            continue
        version = version or found.version
        for name, value in found.values.items():
            addresses.setdefault(name, mapped.start + value - found.base)
    return Symbols(addresses, version, unread)


class _Mapped(NamedTuple):
    start: int
    end: int
    path: str
    is_program: bool


def _mapped_files(pid: int) -> Iterator[_Mapped]:
    """The program itself, and each library that may have what is wanted, where it begins."""
    program = os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115
    known = set[str]()
    # A path may have any bytes.
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123
        for line in file:
            place, _, offset, _, _, *rest = line.rstrip("\n").split(None, 5)
            path = rest[0] if rest else ""
            if int(offset, 16) or not path.startswith("/") or path in known:
                continue
            if path == program or _LIBRARY.match(path.rpartition("/")[2]):
                known.add(path)
                start, _, end = place.partition("-")
                yield _Mapped(int(start, 16), int(end, 16), path, path == program)


def _open(pid: int, mapped: _Mapped) -> BinaryIO:
    """As the process sees it: in its own root directory, and after an upgrade has replaced it."""
    if mapped.is_program:
        return open(f"/proc/{pid}/exe", "rb")  # noqa: PTH123
    if not mapped.path.endswith(" (deleted)"):
        return open(f"/proc/{pid}/root{mapped.path}", "rb")  # noqa: PTH123
    return open(f"/proc/{pid}/map_files/{mapped.start:x}-{mapped.end:x}", "rb")  # noqa: PTH123


class _Image:
    """What an ELF file exports of what is wanted, and the address that its start is meant for.

    Raises:
        ValueError: It is no such file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        head = file.read(64)
        # 64 bits, little-endian.
        if head[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a program of 64 bits")
        segments_at, sections_at = struct.unpack_from("<QQ", head, 32)
        segment, segments, section, sections = struct.unpack_from("<4H", head, 54)
        table = self._read(segments_at, segment * segments)
        self._loaded = [
            (offset, address, size)
            for kind, _, offset, address, _, size, *_ in struct.iter_unpack("<IIQQQQQQ", table)
            if kind == _LOAD
        ]
        self.base = min((address - offset for offset, address, _ in self._loaded), default=0)
        table = self._read(sections_at, section * sections)
        self._sections = list(struct.iter_unpack("<IIQQQQIIQQ", table))
        self.values = self._exported()
        self.version = self._word(self.values.pop("Py_Version", None))

    def _read(self, at: int, size: int) -> bytes:
        if size > _MAX_TABLE:
            raise ValueError("not a program")
        self._file.seek(at)
        return self._file.read(size)

    def _exported(self) -> dict[str, int]:
        found = dict[str, int]()
        for _, kind, _, _, at, size, link, *_ in self._sections:
            if kind != _DYNAMIC_SYMBOLS:
                continue
            names = self._read(*self._sections[link][4:6])
            # By the places where its name may begin, as the end of another too: thousands need
            # not be decoded.
            wanted = {
                match.start(): name
                for name in _WANTED
                for match in re.finditer(name.encode() + b"\0", names)
            }
            for name_at, _, _, section, value, _ in struct.iter_unpack(
                "<IBBHQQ", self._read(at, size)
            ):
                if section and name_at in wanted:
                    found[wanted[name_at]] = value
        return found

    def _word(self, address: int | None) -> int:
        """The number that the file has for an address."""
        for offset, start, size in self._loaded:
            if address is not None and start <= address < start + size:
                with suppress(struct.error):
                    return int(struct.unpack("<Q", self._read(offset + address - start, 8))[0])
        return 0
