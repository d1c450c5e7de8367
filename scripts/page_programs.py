"""Run the programs that a page shows, and put what they print beneath them.

python scripts/page_programs.py                    # every page: write what is printed now
python scripts/page_programs.py --check README.md  # only say whether the page is true

In a page, `<!-- program: NAME -->` before a block of code gives the program its name, and
`<!-- output: COMMAND -->` before a block of text says what prints it, with the programs in the
working directory. Numbers that no two runs have in common are not compared.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from difflib import unified_diff
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A place with as many letters as the real one, so that lines break where they broke.
_SHOWN = "/srv/shop"
_PROGRAM = re.compile(r"<!-- program: (\S+) -->\n+```python\n(.*?)```", re.DOTALL)
_OUTPUT = re.compile(r"(<!-- output: (.+?) -->\n+```\w*\n)(.*?)(```)", re.DOTALL)
_TIMEOUT = 300
# The exit status of a helper that waited in vain: its output is not for the page.
_GAVE_UP = 75
_PAGES_AT_ONCE = 3
# What the programs of the pages talk to, what asks their servers, and what several pages run.
_HELPERS = (
    "cookbook/service.py",
    "guides/visit.py",
    "guides/cells.py",
    "commands/worker.py",
)
# How often to try: on a busy machine a peer may close late, or a search for holders end early.
_ATTEMPTS = 3

# What differs from run to run, from machine to machine, and from one Python to the next.
_VARYING = (
    (r":\d{4,5}\b", ":PORT"),
    (r"socket:\[\d+\]", "socket:[INODE]"),
    (r"\b\d+(\.\d+)? ?(s|min|h|ms)\b", "TIME"),
    (r"TIME to TIME|(less than|up to)\s+TIME|\d+(\.\d+)?-TIME", "TIME"),
    # It is there where the limit is low.
    (r"(\n|  )File descriptors: (at most )?[\d,]+ of [\d,]+ \(\d+%\)\.", ""),
    (r"(File descriptors: |fds )[\d,]+ of [\d,]+( \(\d+%\)(, CLOSE_WAIT: .*)?)?", "DESCRIPTORS"),
    (r",\s+[\d,.]+\s+(bytes?|kB|MB)\s+unread", ""),
    (r"\([\d,]+ library calls?\)", "(LIBRARY CALLS)"),
    (r"of [\d,]+ open sockets?|\([\d,]+ sockets?", "N sockets"),
    (r"\.py:\d+", ".py:LINE"),
    (r"\b((?:by|via) [A-Za-z][\w.-]*) \d[\w.]*", r"\1 VERSION"),
    (r"0x[0-9a-f]+", "ADDRESS"),
    (r"Slowest to settle: .*\n", ""),
    (r"\n +\d+ of \d+ replaced by a newer connection from the same line", ""),
    (r"\n\d+ closing connections? \(not (a leak|leaks)\)\.", ""),
    (r"(closewait_guard_(?:close_wait|descriptors|last|scan|sockets_)\w+) \S+", r"\1 NUMBER"),
    (r"(fingerprint=)[0-9a-f]{12}", r"\1FINGERPRINT"),
    (r"\bpid\s+\d+|[Pp]rocess\s+\d+", "PROCESS"),
    (r"\b(oldest_s|after_s|pid|taken_at)(\"?[:=] ?)[\d.]+", r"\1\2NUMBER"),
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.\d]*( [A-Z]{3}\b|Z)?", "MOMENT"),
    (r"PROCESS on \S+, MOMENT", "PROCESS"),
    (r"\b\d\d:\d\d:\d\d\b", "MOMENT"),
    (r"\s+", " "),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, help="all pages when left out")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if not true")
    arguments = parser.parse_args()
    pages = arguments.pages or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    # The programs mostly wait: for a peer to close, for a grace time to pass.
    with ThreadPoolExecutor(_PAGES_AT_ONCE) as pool:
        return max(pool.map(lambda page: _renew_or_check(page, check=arguments.check), pages))


def _renew_or_check(page: Path, *, check: bool) -> int:
    text = page.read_text(encoding="utf-8")
    new = _with_new_output(text)
    if not check:
        page.write_text(new, encoding="utf-8")
        return 0
    for _ in range(_ATTEMPTS):
        if _without_varying_parts(text) == _without_varying_parts(new):
            return 0
        new = _with_new_output(text)
    difference = unified_diff(text.splitlines(), new.splitlines(), "the page", "a run", lineterm="")
    print("\n".join((f"{page} does not show what its programs print:", *difference)))
    return 1


def _with_new_output(text: str) -> str:
    """The page with the output of this moment."""
    if not _OUTPUT.search(text):
        return text
    with workplace(text) as folder:
        return _OUTPUT.sub(lambda found: found[1] + _run(found[2], folder) + found[4], text)


@contextmanager
def workplace(text: str) -> Iterator[Path]:
    """A folder with the programs of a page, and the examples."""
    letters = len(_SHOWN) - len("/tmp/")
    while True:
        folder = Path("/tmp", "".join(random.choices(string.ascii_lowercase, k=letters)))
        try:
            folder.mkdir()
            break
        except FileExistsError:
            continue
    shutil.copytree(ROOT / "examples", folder / "examples")
    for helper in _HELPERS:
        shutil.copy(ROOT / "docs" / helper, folder)
    try:
        for name, source in _PROGRAM.findall(text):
            (folder / name).write_text(source, encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder)


def _run(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment() | {"NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if done.returncode == _GAVE_UP:
        raise TimeoutError(f"{command}: {done.stdout}")
    return hide_folder(done.stdout, folder) + "\n"


def environment() -> dict[str, str]:
    """Next to nothing of this machine's, but this Python's commands first."""
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join([here, os.environ["PATH"]])
    return {
        "PATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "80",
        "PYTEST_ADDOPTS": "-p no:cacheprovider -p no:asyncio -p no:randomly",
    }


def hide_folder(output: str, folder: Path) -> str:
    """The output of a command, with the folder that it ran in replaced by a plain one."""
    return output.rstrip().replace(str(folder), _SHOWN)


def _without_varying_parts(text: str) -> str:
    for pattern, word in _VARYING:
        text = re.sub(pattern, word, text)
    return text


if __name__ == "__main__":
    sys.exit(main())
