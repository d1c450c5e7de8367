"""Run the cells of a program, which `# %%` separates, as a notebook does: with what they print.

python cells.py PROGRAM
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

config = Config()
config.InteractiveShell.colors = "NoColor"
config.HistoryManager.enabled = False
shell = InteractiveShell.instance(config=config)
for cell in Path(sys.argv[1]).read_text(encoding="utf-8").split("# %%\n"):
    prompt = f"In [{shell.execution_count}]: "
    print(prompt + textwrap.indent(cell.strip(), " " * len(prompt)).lstrip())
    shell.run_cell(cell, store_history=True)
    print()
