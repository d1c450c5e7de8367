"""Write the table of docs/settings.md from `Settings`, the only place where a default stands.

python scripts/settings_page.py          # writes
python scripts/settings_page.py --check  # 1 if the page is not what it would write
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path

from closewait_guard.settings import Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
_TABLE = re.compile(r"(<!-- settings -->\n).*(<!-- end of settings -->)", re.DOTALL)


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    new = _TABLE.sub(lambda found: found[1] + table() + found[2], text)
    if "--check" in sys.argv[1:]:
        return int(text != new)
    PAGE.write_text(new, encoding="utf-8")
    return 0


def table() -> str:
    """Name, default and meaning of every setting, in Markdown."""
    lines = ["| name | default | meaning |", "|---|---|---|"]
    defaults = Settings()
    for item in fields(Settings):
        default = getattr(defaults, item.name)
        lines.append(f"| `{item.name}` | `{default!r}` | {item.metadata['help']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
