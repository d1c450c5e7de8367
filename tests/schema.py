"""The published schema of reports."""

from __future__ import annotations

import json
from pathlib import Path

import closewait_guard as cwg

SCHEMA = json.loads(Path(cwg.__file__).with_name("report.schema.json").read_text(encoding="utf-8"))
