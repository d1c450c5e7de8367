"""Draw what commands print, and the page of a report: python scripts/render_pictures.py [FOLDER].

Each command runs under a pseudo-terminal, in the folder of the page that the picture is for, and
is drawn as SVG. The page, and what Prometheus shows, are taken as a browser shows them: chromium,
where it is installed.
"""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyte
from page_programs import ROOT, environment, hide_folder, workplace
from rich.console import Console
from rich.text import Text

PICTURES = ROOT / "docs" / "pictures"
_LINES, _COLUMNS = 14, 80
# A picture fetches nothing from elsewhere.
_FETCHED_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)

# The date, the process and the host of the moment.
_HEADING = re.compile(r"^\S*closewait-guard  .*\n(?:\S*  \(pid .*\n)?")


_GROWING = """
import socket, time
server, kept = socket.create_server(("127.0.0.1", 0)), []
for _ in range(40):
    kept.append(socket.create_connection(server.getsockname()))
    server.accept()[0].close()
    time.sleep(0.25)
"""


class Picture(NamedTuple):
    """A command, the page whose programs it runs, and its title.

    Attributes:
        seconds: When to look at the screen of a command that does not end by itself.
    """

    command: str
    page: Path
    title: str
    seconds: float | None = None


_PICTURES = {
    "report": Picture(
        # The program of the page, but through the reporter for terminals.
        "sed -i '$ d' orders.py; echo '"
        "import sys; from closewait_guard import reporters; "
        "reporters.console(sys.stdout)(cwg.scan())' >> orders.py; python orders.py",
        ROOT / "docs" / "reading-a-report.md",
        "closewait_guard",
    ),
    "watch": Picture(
        f"python -c '{_GROWING}' & exec closewait-guard watch $! --interval 0.5",
        ROOT / "docs" / "commands" / "watch.md",
        "closewait-guard watch",
        seconds=4,
    ),
}


_LEAKING = """
import socket, time

def connect(address):
    return socket.create_connection(address)

server, kept = socket.create_server(("127.0.0.1", 0)), []
for _ in range(260):
    kept.append(connect(server.getsockname()))
    server.accept()[0].close()
time.sleep(60)
"""
_SCRAPING = """
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [alerts.yml]
scrape_configs:
  - {job_name: orders, static_configs: [{targets: ["127.0.0.1:9464"]}]}
"""
_PROMETHEUS = "http://127.0.0.1:9469"
_TABLES = "/graph?g0.expr=closewait_guard_leaked_sockets&g0.tab=1&g1.expr=ALERTS&g1.tab=1"

# Of the same program, as wide as a page of the site can show it.
_PAGE = "closewait-guard run --grace 0.1 --html report.html orders.py"
_PAGE_SIZE = "1100,900"


def main(folder_of_pictures: Path) -> None:
    _take_page(folder_of_pictures / "page.png")
    _take_prometheus(folder_of_pictures / "prometheus.png")
    for name, picture in _PICTURES.items():
        with workplace(picture.page.read_text(encoding="utf-8")) as folder:
            printed = _run_on_terminal(picture, folder)
            text = (
                _read_screen(printed)
                if picture.seconds
                else Text.from_ansi(_without_heading(printed, folder))
            )
        drawn = _draw(name, picture.title, text)
        (folder_of_pictures / f"{name}.svg").write_text(drawn, encoding="utf-8")


def _take_page(picture: Path) -> None:
    """The upper part of a page, without the folders of this machine."""
    if not _can_take(picture, "chromium"):
        return
    text = (ROOT / "docs" / "reading-a-report.md").read_text(encoding="utf-8")
    with workplace(text) as folder:
        page = folder / "report.html"
        command = ["bash", "-c", f"{_PAGE} >/dev/null 2>&1"]
        subprocess.run(command, cwd=folder, env=environment(), check=True)
        content = page.read_text(encoding="utf-8").replace(sys.base_prefix, "/usr")
        page.write_text(content, encoding="utf-8")
        _take(page.as_uri(), _PAGE_SIZE, picture)


def _take_prometheus(picture: Path) -> None:
    """The leaking line and the alert, where the rules wait for seconds instead of minutes."""
    if not _can_take(picture, "chromium", "prometheus"):
        return
    rules = (ROOT / "examples" / "monitoring" / "alerts.yml").read_text(encoding="utf-8")
    with workplace("") as folder, ExitStack() as running:
        (folder / "orders.py").write_text(_LEAKING, encoding="utf-8")
        (folder / "prometheus.yml").write_text(_SCRAPING, encoding="utf-8")
        (folder / "alerts.yml").write_text(rules.replace("for: 1m", "for: 3s"), encoding="utf-8")
        for command in (
            "closewait-guard run --interval 1 --metrics 127.0.0.1:9464 orders.py",
            "prometheus --config.file=prometheus.yml --storage.tsdb.path=data "
            f"--web.listen-address={_PROMETHEUS[7:]}",
        ):
            process = subprocess.Popen(
                command.split(),
                cwd=folder,
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            running.callback(process.wait)
            running.callback(process.terminate)
        deadline = time.monotonic() + 60
        while not _has_alert():
            assert time.monotonic() < deadline, "Prometheus shows no alert"
            time.sleep(1)
        _take(_PROMETHEUS + _TABLES, "1100,780", picture)


def _has_alert() -> bool:
    try:
        with urllib.request.urlopen(f"{_PROMETHEUS}/api/v1/alerts", timeout=5) as answer:
            return b'"firing"' in answer.read()
    except OSError:
        return False


def _can_take(picture: Path, *programs: str) -> bool:
    missing = [name for name in programs if shutil.which(name) is None]
    for name in missing:
        print(f"there is no {name}: {picture} is left as it is", file=sys.stderr)
    return not missing


def _take(address: str, size: str, picture: Path) -> None:
    """What a browser shows at an address."""
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={size}"]
        # For what a page asks for once it is there.
        command += ["--virtual-time-budget=5000", f"--screenshot={picture.absolute()}", address]
        subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60, check=True)


def _run_on_terminal(picture: Picture, folder: Path) -> bytes:
    """Everything that a command writes to a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (_LINES, _COLUMNS))
    deadline = time.monotonic() + (picture.seconds or 60)
    with subprocess.Popen(
        ["bash", "-c", picture.command],
        cwd=folder,
        env=environment() | {"TERM": "xterm-256color"},
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        parts = []
        while part := _read(ours, deadline):
            parts.append(part)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    os.close(ours)
    return b"".join(parts)


def _read(fd: int, deadline: float) -> bytes:
    """Nothing when it is enough, or when the other end has been closed."""
    left = max(0, deadline - time.monotonic())
    try:
        return os.read(fd, 65536) if select.select([fd], [], [], left)[0] else b""
    except OSError:
        return b""


def _without_heading(printed: bytes, folder: Path) -> str:
    return _HEADING.sub("", hide_folder(printed.decode().replace("\r\n", "\n"), folder))


def _read_screen(printed: bytes) -> Text:
    """What stands on the screen after all that, in its styles."""
    screen = pyte.Screen(_COLUMNS, _LINES)
    pyte.ByteStream(screen).feed(printed)
    return Text("\n").join(
        Text.assemble(*_styled_runs([screen.buffer[line][column] for column in range(_COLUMNS)]))
        for line in range(_LINES)
    )


def _styled_runs(cells: list[Any]) -> Iterator[tuple[str, str]]:
    for style, alike in groupby(cells, _style_of):
        yield "".join(cell.data for cell in alike), style


def _style_of(cell: Any) -> str:
    colour = {"default": "", "brown": "yellow"}.get(cell.fg, cell.fg)
    marks = [name for name in ("bold", "reverse") if getattr(cell, name)]
    return " ".join([*marks, colour]).strip()


def _draw(name: str, title: str, text: Text) -> str:
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    text.rstrip()
    console.print(text)
    return _FETCHED_FONTS.sub("", console.export_svg(title=title, unique_id=name))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES)
