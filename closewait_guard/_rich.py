"""The only importer of rich, for output in color; import this module when it is needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from closewait_guard.exceptions import MissingExtraError

__all__ = [
    "Console",
    "Group",
    "Live",
    "RenderableType",
    "Table",
    "Text",
    "progress",
]


try:
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as missing:
    raise MissingExtraError(
        f"colored output needs rich: pip install 'closewait-guard[cli]' ({missing})"
    ) from missing


def progress(what: str, items: Collection[str]) -> Iterator[str]:
    """Yield each item, with a progress bar on stderr that disappears at the end."""
    columns = (TextColumn("{task.description:<32}", markup=False), BarColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=len(items))
        for item in items:
            bar.update(task, description=f"{what}: {item}")
            yield item
            bar.advance(task)
