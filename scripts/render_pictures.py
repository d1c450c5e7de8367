"""Draw what commands print on a terminal, as SVG: python scripts/render_pictures.py.

Each command runs under a pseudo-terminal, in the folder of the page that the picture is for.
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from page_programs import ROOT, environment, shown, workplace
from rich.console import Console
from rich.text import Text

PICTURES = ROOT / "docs" / "pictures"
_COLUMNS = 80
# A picture fetches nothing from elsewhere.
_FETCHED_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)

# The date, the process and the host of the moment.
_HEADING = re.compile(r"^\S*== .*\n\s*\n")


class Picture(NamedTuple):
    """A command, the page whose programs it runs, and its title."""

    command: str
    page: Path
    title: str


_PICTURES = {
    "report": Picture(
        # The program of the page, but told by the reporter for terminals.
        "sed -i '$ d' orders.py; echo '"
        "import sys; from closewait_guard import reporters; "
        "reporters.console(sys.stdout)(cwg.scan())' >> orders.py; python orders.py",
        ROOT / "docs" / "reading-a-report.md",
        "closewait_guard",
    ),
}


def main() -> None:
    for name, picture in _PICTURES.items():
        with workplace(picture.page.read_text(encoding="utf-8")) as folder:
            printed = shown(_on_a_terminal(picture.command, folder), folder)
        (PICTURES / f"{name}.svg").write_text(
            _svg(name, picture.title, _HEADING.sub("", printed)), encoding="utf-8"
        )


def _on_a_terminal(command: str, folder: Path) -> str:
    """Everything that a command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment() | {"TERM": "xterm-256color", "LINES": "50"},
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    ):
        os.close(theirs)
        parts = []
        while part := _read(ours):
            parts.append(part)
    os.close(ours)
    return b"".join(parts).decode().replace("\r\n", "\n")


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:
        # The other end has been closed: what a terminal says instead of nothing.
        return b""


def _svg(name: str, title: str, printed: str) -> str:
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(printed))
    return _FETCHED_FONTS.sub("", console.export_svg(title=title, unique_id=name))


if __name__ == "__main__":
    main()
