"""The application of Django that INSTALLED_APPS names, and its system checks."""

from __future__ import annotations

from typing import Any

from django import conf
from django.apps import AppConfig
from django.core import checks
from django.core.signals import request_started

from closewait_guard._capture import why_no_speedups
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.integrations.django import (
    Middleware,
    read_project_options,
    watch_first_request,
)

__all__ = ["CloseWaitGuardConfig", "check_deployment", "check_settings"]


_TAG = "closewait_guard"
_MIDDLEWARE = f"closewait_guard.integrations.django.{Middleware.__name__}"


class CloseWaitGuardConfig(AppConfig):
    """Nothing is done before a process serves: `migrate`, `shell` and tests are left alone."""

    name = "closewait_guard.integrations.django"
    label = "closewait_guard"
    verbose_name = "closewait-guard"

    def ready(self) -> None:
        """Called by Django when the settings are there, in every process."""
        checks.register(check_settings, _TAG)
        checks.register(check_deployment, _TAG, deploy=True)
        request_started.connect(watch_first_request)


def check_settings(app_configs: Any, **_: object) -> list[checks.CheckMessage]:  # noqa: ARG001
    """Whether the settings of the guard can be used, and do what they say."""
    try:
        options = read_project_options()
    except ConfigurationError as error:
        return [checks.Error(str(error), id=f"{_TAG}.E001")]
    found = [checks.Warning(note, id=f"{_TAG}.W001") for note in options.settings.notes]
    if options.page.path and _MIDDLEWARE not in conf.settings.MIDDLEWARE:
        found.append(
            checks.Warning(
                "closewait-guard has a token for its status page, and no middleware to show it",
                hint=f"Add {_MIDDLEWARE!r} as the first to MIDDLEWARE.",
                id=f"{_TAG}.W002",
            )
        )
    return found


def check_deployment(app_configs: Any, **_: object) -> list[checks.CheckMessage]:  # noqa: ARG001
    """Whether anything makes the guard slower than it need be: `manage.py check --deploy`."""
    try:
        wants_speedups = read_project_options().settings.speedups
    except ConfigurationError:
        return []
    reason = why_no_speedups() if wants_speedups else None
    if reason is None:
        return []
    text = f"closewait-guard records sockets in Python, with the same result but slower: {reason}"
    return [checks.Warning(text, id=f"{_TAG}.W003")]
