"""The alert rules and the board of examples/monitoring: what they ask for is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from closewait_guard._numbers import MEASURES

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"
BOARD = json.loads((MONITORING / "dashboard.json").read_text())
NAMES = {
    "closewait_guard_up",
    *(f"closewait_guard_{each.name}{'_total' * each.is_total}" for each in MEASURES),
}


def promtool(*arguments, cwd=MONITORING):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        ["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def expressions_of_board():
    """As Prometheus gets them: without the variables of Grafana."""
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            yield re.sub(r"\$(?=__)\w+", "5m", target["expr"]).replace("$", "")


def test_every_metric_of_rules_board_and_page_is_exported_and_the_board_has_each():
    page = MONITORING.parents[1] / "docs" / "guides" / "prometheus.md"
    rules = [(MONITORING / name).read_text() for name in ("alerts.yml", "alerts_test.yml")]
    for text in (*rules, *expressions_of_board(), page.read_text()):
        assert set(re.findall(r"closewait_guard_\w+", text)) <= NAMES
    assert set(re.findall(r"closewait_guard_\w+", " ".join(expressions_of_board()))) == NAMES


def test_the_rules_fire_and_resolve_as_their_unit_tests_say():
    promtool("check", "rules", "alerts.yml")
    promtool("check", "config", "prometheus.yml")
    promtool("test", "rules", "alerts_test.yml")
    # Each alert has a test.
    alerts = re.findall(r"alert: (\w+)", (MONITORING / "alerts.yml").read_text())
    tested = (MONITORING / "alerts_test.yml").read_text()
    assert not [name for name in alerts if tested.count(f"alertname: {name}") < 2]


def test_the_board_has_valid_expressions_and_panels_that_do_not_overlap(tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, expression in enumerate(expressions_of_board())
    ]
    # JSON is YAML.
    text = json.dumps({"groups": [{"name": "board", "rules": rules}]})
    (tmp_path / "board.yml").write_text(text)
    cells = [
        (x, y)
        for panel in BOARD["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    promtool("check", "rules", "board.yml", cwd=tmp_path)
