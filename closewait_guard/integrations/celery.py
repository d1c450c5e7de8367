"""Celery: watch its workers, and label what a task opens with the name of the task."""

from __future__ import annotations

from typing import Any

from closewait_guard.exceptions import MissingExtraError
from closewait_guard.integrations._app import AppMonitor, Before, RequestLabel

try:
    from celery import signals
except ImportError as missing:
    raise MissingExtraError(
        f"watch_workers() needs Celery: pip install 'closewait-guard[celery]' ({missing})"
    ) from missing

__all__ = ["watch_workers"]


_Entered = tuple[RequestLabel, Before]


class _Label(RequestLabel):
    __slots__ = ()

    def _keep(self, name: str) -> str:
        return name


class _Worker:
    """The monitor of a process that runs tasks, and the labels of those that run now."""

    def __init__(self, monitor: AppMonitor) -> None:
        self._monitor = monitor
        self._labels: dict[str, _Entered] = {}

    def begin(self, **_: object) -> None:
        self._labels.clear()
        self._monitor.start()

    def begin_without_pool(self, sender: Any, **_: object) -> None:
        """In the main process: only if it runs tasks itself, in threads or one by one."""
        if not type(sender.pool).__module__.endswith(".prefork"):
            self.begin()

    def end(self, **_: object) -> None:
        self._monitor.stop()

    def begin_task(self, task_id: str, task: Any, **_: object) -> None:
        label = _Label()
        self._labels[task_id] = (label, label.enter(task.name))

    def end_task(self, task_id: str, **_: object) -> None:
        entered = self._labels.pop(task_id, None)
        if entered is not None:
            label, before = entered
            label.leave(before)
            label.end()


def watch_workers(**settings: Any) -> None:
    """Watch each process that runs tasks, from its start to its end.

    Call it in the module of the Celery application. The label of what is opened is the name of the
    task, such as `shop.tasks.refresh`. A process of the prefork pool reports on itself, and once
    more when it ends.

    Args:
        **settings: As for `watch()`: interval, reporters, at_exit, settings, and single settings.

    Raises:
        ConfigurationError: A setting cannot be used.
        MissingExtraError: Celery is not installed.
    """
    worker = _Worker(AppMonitor(**settings))
    # Not by weak references, which Celery keeps otherwise.
    for signal, receiver in (
        (signals.worker_process_init, worker.begin),
        (signals.worker_process_shutdown, worker.end),
        (signals.worker_ready, worker.begin_without_pool),
        (signals.worker_shutdown, worker.end),
        (signals.task_prerun, worker.begin_task),
        (signals.task_postrun, worker.end_task),
    ):
        signal.connect(receiver, weak=False)
