"""The start, once somebody has asked: the watch where tests run, the ledger where they are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from closewait_guard._pyproject import nearest_pyproject
from closewait_guard.pytest_plugin.carrier import Carrier
from closewait_guard.pytest_plugin.ledger import Ledger
from closewait_guard.pytest_plugin.options import Mode, options_of
from closewait_guard.pytest_plugin.watch import Watch
from closewait_guard.pytest_plugin.wire import Wire

__all__ = ["begin", "wanted"]

_WATCH = pytest.StashKey[Watch]()


def wanted(config: pytest.Config) -> bool:
    """Whether all tests are to be watched. Complains of values that cannot be used."""
    return options_of(config).plan.mode is not Mode.OFF


def begin(config: pytest.Config) -> Watch:
    """The watch of this run, made at the first call."""
    if _WATCH in config.stash:
        return config.stash[_WATCH]
    options = options_of(config)
    _check_settings()
    is_worker = hasattr(config, "workerinput")
    ledger = None if is_worker else Ledger(config, options)
    watch = config.stash[_WATCH] = Watch(config, options.plan, ledger or Wire())
    config.add_cleanup(watch.end)
    if ledger is not None:
        config.pluginmanager.register(ledger, "closewait_guard_ledger")
    # Where pytest-xdist has others run the tests, there is nothing to watch.
    if not config.pluginmanager.has_plugin("dsession"):
        config.pluginmanager.register(watch, "closewait_guard_watch")
        if any(map(config.pluginmanager.has_plugin, ("anyio", "anyio.pytest_plugin"))):
            config.pluginmanager.register(Carrier(watch.ownership))
    return watch


def _check_settings() -> None:
    """Complain now of settings that cannot be used: the guard reads them at the first socket."""
    prefix, plugin = "CLOSEWAIT_GUARD_", "CLOSEWAIT_GUARD_SOCKET_LEAKS"
    given = (name for name in os.environ if name.startswith(prefix))
    if all(name.startswith(plugin) for name in given) and not _is_in_pyproject():
        return
    from closewait_guard.exceptions import ConfigurationError
    from closewait_guard.settings import Settings

    try:
        Settings.load()
    except ConfigurationError as error:
        raise pytest.UsageError(str(error)) from error


def _is_in_pyproject() -> bool:
    nearest = nearest_pyproject(Path())
    return nearest is not None and b"closewait_guard" in nearest.read_bytes()
