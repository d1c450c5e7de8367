"""Which project file counts. Light: the pytest plugin asks before it loads anything else."""

from __future__ import annotations

from pathlib import Path

__all__ = ["nearest_pyproject"]


def nearest_pyproject(directory: Path) -> Path | None:
    """That of a folder, or of the first above it that has one."""
    try:
        here = directory.resolve()
    except OSError:
        return None
    candidates = (folder / "pyproject.toml" for folder in (here, *here.parents))
    return next((path for path in candidates if _is_there(path)), None)


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A folder that this user may not look into: it is not their project.
        return False
