"""Records the sockets of a run; makes the guard and the checker when one stays open."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING

import pytest

from closewait_guard._capture import PlainContext, Recording, Registry, kind_of_file
from closewait_guard._config import RECORDING_DEFAULTS
from closewait_guard._descriptors import SpareDescriptors
from closewait_guard._enums import FrameKind
from closewait_guard.pytest_plugin._attribution import Ownership
from closewait_guard.pytest_plugin._options import Plan

if TYPE_CHECKING:
    from closewait_guard._enums import Scalar
    from closewait_guard._guard import Guard
    from closewait_guard.pytest_plugin._checker import LeakChecker
    from closewait_guard.pytest_plugin._failing import UnraisableOfOther
    from closewait_guard.settings import Settings

__all__ = ["RunRecorder"]


# The records of dropped sockets must last until their owners are checked.
_MIN_DROPPED_RECORDS = 100_000


class _OwnerContext(PlainContext):
    """The owner of a socket, and what the program's own provider adds. Plain values already."""

    def __init__(self, ownership: Ownership, other: PlainContext | None) -> None:
        super().__init__(ownership.context_of_thread)
        self._ownership = ownership
        self._other = other

    @property
    def provider(self) -> Callable[[], dict[str, Scalar] | None]:
        if self._other is None:
            return self._ownership.context_of_variable
        owners, others = self._ownership, self._other.provider
        return lambda: {
            **(others() or {}),
            **(owners.context_of_variable() or owners.context_of_thread()),
        }

    @property
    def fallback_provider(self) -> Callable[[], dict[str, Scalar]]:
        return self._ownership.context_of_thread


class RunRecorder:
    """Records the sockets of a run.

    Args:
        plan: That of a test without markers, and of fixtures.
        settings: Those that are given, if any are.
        ownership: Who owns what.
        spare_descriptors: Released as soon as there is something to check.
        noted: What modules had in their variables before the first test.
        worker: The name of this process, if it is one of pytest-xdist's.
        warn: Takes what finalizers raise over a socket of another owner than the test.
        config: That of the run. It knows where pytest calls tests and fixtures, which files have
            tests, and what is tested.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings | None,
        ownership: Ownership,
        spare_descriptors: SpareDescriptors,
        noted: Mapping[str, Mapping[str, int]],
        worker: str | None,
        warn: Callable[[UnraisableOfOther], None],
        config: pytest.Config,
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._ownership = ownership
        self._spare_descriptors = spare_descriptors
        self._noted = noted
        self._worker = worker
        self._config = config
        self._warn = warn
        recording = settings or RECORDING_DEFAULTS
        self._registry = Registry(
            Recording(recording.stack_depth, _calling_code(config), recording.speedups),
            _OwnerContext(ownership, PlainContext.of(recording.context)),
            max(recording.dropped_kept, _MIN_DROPPED_RECORDS),
        )
        self._guard: Guard | None = None
        self._checker: LeakChecker | None = None
        # Called around every test.
        self.mark = self._registry.last_serial
        self.all_closed_since = self._registry.all_closed_since
        self.first_mark = self.mark()

    def begin(self) -> None:
        """Record sockets from now on."""
        if self._guard is None:
            self._registry.subscribe()
        else:
            self._guard.install()

    def record_unfinished(self) -> None:
        """Record the event loop whose first socket has made this begin, as one of the test."""
        if self._registry.owners is not None:
            self._registry.owners.record_unfinished()

    def end(self) -> None:
        """Record no more."""
        if self._guard is None:
            self._registry.unsubscribe()
        else:
            self._guard.uninstall()

    def guard(self) -> Guard:
        """The guard that scans what was recorded, and goes on recording."""
        if self._guard is None:
            from closewait_guard._guard import Guard
            from closewait_guard._inspect import count_as_own
            from closewait_guard.settings import Settings

            count_as_own(_own_files(self._config))

            # The program's own reporters and its signal are for its own guard.
            settings = (self._settings or Settings()).with_overrides(reporters=(), signal=None)
            self._guard = Guard(settings, registry=self._registry)
        return self._guard.install()

    def checker(self) -> LeakChecker:
        """The checker of this run. A run that closes all its sockets never loads it."""
        self._spare_descriptors.release()
        if self._checker is None:
            # Loading makes so many objects that garbage is collected: not before the first check.
            has_paused = gc.isenabled()
            gc.disable()
            try:
                self._checker = self._make_checker(has_paused=has_paused)
            except BaseException:
                if has_paused:
                    gc.enable()
                raise
        return self._checker

    def _make_checker(self, *, has_paused: bool) -> LeakChecker:
        from closewait_guard.pytest_plugin._checker import LeakChecker
        from closewait_guard.pytest_plugin._module_variables import ModuleVariables

        followed = self._config.pluginmanager.get_plugin("closewait_guard_baseline")
        return LeakChecker(
            self.guard(),
            self._ownership,
            self._plan,
            ModuleVariables(
                self._noted, _files_of_tests(self._config) | _files_of_plugins(self._config)
            ),
            self._worker,
            self._warn,
            list if followed is None else followed.baseline.split,
            has_paused=has_paused,
        )


def _calling_code(config: pytest.Config) -> tuple[CodeType, ...]:
    """The code that calls tests and fixtures: calls further out are pytest's own."""
    hook = config.hook
    callers = (hook.pytest_pyfunc_call, hook.pytest_fixture_setup, hook.pytest_runtest_call)
    functions = (each.function for caller in callers for each in caller.get_hookimpls())
    return tuple(function.__code__ for function in functions if hasattr(function, "__code__"))


def _own_files(config: pytest.Config) -> set[str]:
    """What is the program's own though it may be installed: tests, fixtures, and what is tested."""
    return _files_of_tests(config) | _files_of_project(config.rootpath)


def _files_of_project(root: Path) -> set[str]:
    """The installed files of the project in this folder, as `pip install .` and tox leave them.

    They are those of the distribution that `pyproject.toml` names, and of the packages that the
    folder has itself, or its `src`.
    """
    files: set[Path] = set()
    with suppress(Exception):
        import tomllib
        from importlib import metadata

        project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
        distribution = metadata.distribution(project["project"]["name"])
        files |= {Path(str(distribution.locate_file(each))) for each in distribution.files or ()}
    for marker in (*root.glob("*/__init__.py"), *root.glob("src/*/__init__.py")):
        with suppress(Exception):
            import importlib.util

            spec = importlib.util.find_spec(marker.parent.name)
            for folder in (spec and spec.submodule_search_locations) or ():
                if kind_of_file(f"{folder}/") is FrameKind.LIBRARY:
                    files |= set(Path(folder).rglob("*.py"))
    return {str(each) for each in files if each.suffix == ".py"}


def _files_of_tests(config: pytest.Config) -> set[str]:
    """The files of the tests of this run, and of the fixtures in `conftest.py`."""
    plugins = config.pluginmanager
    items = getattr(plugins.get_plugin("session"), "items", ())
    modules = {id(module): module for item in items if (module := getattr(item, "module", None))}
    files = {getattr(module, "__file__", None) for module in modules.values()}
    return {name for name in files if name} | {
        name for name in _files_of_plugins(config) if Path(name).name == "conftest.py"
    }


def _test_files(config: pytest.Config) -> set[str]:
    """The files of tests and of fixtures; in a plugin, those may have any name."""
    return _files_of_tests(config) | _files_of_plugins(config)


def _files_of_plugins(config: pytest.Config) -> set[str]:
    files = {getattr(each, "__file__", None) for each in config.pluginmanager.get_plugins()}
    return {name for name in files if name}
