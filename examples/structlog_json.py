"""Reports as JSON lines, through the structlog configuration that the program already has.

python examples/structlog_json.py
"""

from __future__ import annotations

import time

import structlog

import closewait_guard as cwg
from closewait_guard.testing import half_closed_pair

structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.JSONRenderer(),
    ],
)

# The tenant of the moment is kept with each socket that is opened.
cwg.install(context="structlog", grace=0.2)
structlog.contextvars.bind_contextvars(tenant="acme")
with half_closed_pair(), cwg.watch(interval=0.5, reporters=["structlog"], at_exit=False):
    time.sleep(0.8)
cwg.uninstall()
