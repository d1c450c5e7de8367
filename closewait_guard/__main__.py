"""`python -m closewait_guard`."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` looks for every module in the working directory first, which may be anybody's.
    _PACKAGE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib is one
    if sys.path[0] != os.path.dirname(_PACKAGE):  # noqa: PTH120
        del sys.path[0]

from closewait_guard.commands import main

if __name__ == "__main__":
    sys.exit(main())
