"""`python -m closewait_guard`."""

from __future__ import annotations

import sys

from closewait_guard.commands import main

if __name__ == "__main__":
    sys.exit(main())
