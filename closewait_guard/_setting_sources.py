"""Where settings are read from: the environment, and the nearest project file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from closewait_guard._parse import shown, switch
from closewait_guard._pyproject import project_file
from closewait_guard.exceptions import ConfigurationError

__all__ = [
    "ENVIRONMENT_PREFIX",
    "NO_CONFIG",
    "Given",
    "from_environment",
    "from_pyproject",
    "is_without_config",
    "without_code",
]

# A name, its value, and where that came from.
Given = tuple[str, object, str]

ENVIRONMENT_PREFIX = "CLOSEWAIT_GUARD_"
NO_CONFIG = f"{ENVIRONMENT_PREFIX}NO_CONFIG"
# Variables that begin alike and belong to the pytest plugin.
PLUGIN_PREFIX = f"{ENVIRONMENT_PREFIX}SOCKET_LEAKS"
# Settings whose values name code to import.
_IMPORTING = frozenset({"context", "redact"})


def is_without_config(environ: Mapping[str, str]) -> bool:
    try:
        return switch(environ.get(NO_CONFIG, "0"))
    except ValueError as error:
        value = shown(environ[NO_CONFIG])
        message = f"environment variable {NO_CONFIG}: must be {error}, not {value}"
        raise ConfigurationError(message) from None


def from_environment(environ: Mapping[str, str]) -> Iterator[Given]:
    for key, value in environ.items():
        is_ours = key.startswith(ENVIRONMENT_PREFIX) and key != NO_CONFIG
        if is_ours and not key.startswith(PLUGIN_PREFIX):
            name = key.removeprefix(ENVIRONMENT_PREFIX).lower()
            yield name, value, f"environment variable {key}"


def from_pyproject(directory: Path, notes: list[str]) -> list[Given]:
    """The table of the nearest project file; notes say why one is left out."""
    file = project_file(directory)
    if file is None:
        return []
    if file.left_out:
        notes.append(f"settings in {file.path} are left out: {file.left_out}")
        return []
    table = _table_in(file.content, file.path)
    return [
        (name, value, f"[tool.closewait_guard] in {file.path}") for name, value in table.items()
    ]


def _table_in(content: bytes, path: Path) -> dict[str, object]:
    # Where there is no such file, nobody waits for its parser.
    import tomllib

    try:
        table = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    for name in ("tool", "tool.closewait_guard"):
        table = table.get(name.rpartition(".")[2], {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"{path}: [{name}] must be a table, not {shown(table)}")
    return table


def without_code(given: Iterable[Given], notes: list[str]) -> list[Given]:
    """What names no code to import; notes say what is left out."""
    kept: list[Given] = []
    for name, value, source in given:
        if name in _IMPORTING and value != "structlog":
            notes.append(f"{name} of {source} is left out: commands run no code that a file names")
        else:
            kept.append((name, value, source))
    return kept
