"""Which project file counts, and whether it may be believed.

Light: the pytest plugin asks before it loads anything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from closewait_guard._trusted_file import UntrustedFileError, peek, read_trusted

__all__ = ["ProjectFile", "project_file"]

_NAME = b"closewait_guard"


class ProjectFile(NamedTuple):
    """The project file that counts.

    Attributes:
        content: What it contains; nothing where it is left out.
        left_out: Why it is left out; empty if it is not.
    """

    path: Path
    content: bytes
    left_out: str = ""

    @property
    def may_have_settings(self) -> bool:
        """Whether it names the guard, or is left out."""
        return bool(self.left_out) or _NAME in self.content


def project_file(directory: Path) -> ProjectFile | None:
    """The nearest one; none where another user's has nothing to do with the guard."""
    path = _nearest(directory)
    if path is None:
        return None
    try:
        return ProjectFile(path, read_trusted(str(path)))
    except UntrustedFileError as error:
        return ProjectFile(path, b"", str(error)) if _may_have_settings(path) else None
    except OSError as error:
        return ProjectFile(path, b"", f"it cannot be read: {error.strerror}")


def _may_have_settings(path: Path) -> bool:
    """Many projects name the guard among what their tests need, and set nothing."""
    try:
        content = peek(str(path))
    except (OSError, UntrustedFileError):
        return True
    if _NAME not in content:
        return False
    import tomllib

    try:
        return _NAME.decode() in tomllib.loads(content.decode())["tool"]
    except KeyError:
        return False
    except (ValueError, TypeError, RecursionError):
        return True


def _nearest(directory: Path) -> Path | None:
    """That of a folder, or of the first above it that has one."""
    try:
        here = directory.resolve()
    except (OSError, RuntimeError):
        return None
    candidates = (folder / "pyproject.toml" for folder in (here, *here.parents))
    return next((path for path in candidates if _is_there(path)), None)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # A folder that this user may not look into: it is not their project.
        return False
