"""The only importer of rich: who needs a terminal in colour asks here, and only when needed."""

from __future__ import annotations

from closewait_guard.exceptions import MissingExtraError

try:
    from rich.console import Console, Group, RenderableType
    from rich.table import Table
    from rich.text import Text
except ImportError as missing:
    raise MissingExtraError(
        f"colour needs rich, which cannot be imported ({missing}); "
        "install it with: pip install 'closewait_guard[cli]'"
    ) from missing

__all__ = ["Console", "Group", "RenderableType", "Table", "Text"]
