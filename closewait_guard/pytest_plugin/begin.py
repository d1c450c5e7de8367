"""The start, once somebody has asked: the watch where tests run, the ledger where they are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from closewait_guard._pyproject import project_file
from closewait_guard.pytest_plugin.ledger import Ledger
from closewait_guard.pytest_plugin.options import Options, options_of
from closewait_guard.pytest_plugin.watch import Watch

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin.outbox import Desk
    from closewait_guard.settings import Settings

__all__ = ["begin"]

_WATCH = pytest.StashKey[Watch]()


def begin(config: pytest.Config) -> Watch:
    """The watch of this run, made at the first call."""
    if _WATCH in config.stash:
        return config.stash[_WATCH]
    options, settings = options_of(config), _given_settings()
    desk = _desk(config, options, settings.notes if settings is not None else ())
    watch = config.stash[_WATCH] = Watch(config, options.plan, settings, desk)
    config.add_cleanup(watch.end)
    # Where pytest-xdist has others run the tests, there is nothing to watch.
    if not config.pluginmanager.has_plugin("dsession"):
        config.pluginmanager.register(watch, "closewait_guard_watch")
        if any(map(config.pluginmanager.has_plugin, ("anyio", "anyio.pytest_plugin"))):
            from closewait_guard.pytest_plugin.carrier import Carrier

            config.pluginmanager.register(Carrier(watch.ownership))
    return watch


def _desk(config: pytest.Config, options: Options, notes: tuple[str, ...]) -> Desk:
    if hasattr(config, "workerinput"):
        from closewait_guard.pytest_plugin.wire import Wire

        return Wire()
    ledger = Ledger(config, options, notes)
    config.pluginmanager.register(ledger, "closewait_guard_ledger")
    return ledger


def _given_settings() -> Settings | None:
    """The settings, if anything but the defaults is asked for. Complains of what cannot be used."""
    prefix, plugin = "CLOSEWAIT_GUARD_", "CLOSEWAIT_GUARD_SOCKET_LEAKS"
    given = (name for name in os.environ if name.startswith(prefix))
    if all(name.startswith(plugin) for name in given) and not _is_in_pyproject():
        return None
    from closewait_guard.exceptions import ConfigurationError
    from closewait_guard.settings import Settings

    try:
        return Settings.load()
    except ConfigurationError as error:
        raise pytest.UsageError(str(error)) from error


def _is_in_pyproject() -> bool:
    file = project_file(Path())
    return file is not None and file.may_have_settings
