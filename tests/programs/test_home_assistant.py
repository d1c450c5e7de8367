"""The custom component of `examples/home_assistant`: leaked sockets by integration."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import closewait_guard as cwg

FOLDER = Path(__file__).parents[2] / "examples/home_assistant/custom_components/closewait_guard"
INTEGRATION = """
import socket

def fetch(address, kept):
    kept.append(socket.create_connection(address))
"""


class Hass:
    """As much of Home Assistant's core as the component uses; it needs a newer Python than this."""

    def __init__(self):
        self.actions = {}
        self.listeners = {}
        self.services = SimpleNamespace(async_register=self.register)
        self.bus = SimpleNamespace(async_listen_once=self.listeners.__setitem__)

    def register(self, domain, name, action, *, supports_response):
        assert supports_response == "only"
        self.actions[f"{domain}.{name}"] = action

    async def async_add_executor_job(self, target, *args):
        return await asyncio.get_running_loop().run_in_executor(None, target, *args)


@pytest.fixture
def component(monkeypatch):
    for name, values in (
        ("homeassistant", {}),
        ("homeassistant.const", {"EVENT_HOMEASSISTANT_STOP": "homeassistant_stop"}),
        ("homeassistant.core", {"SupportsResponse": SimpleNamespace(ONLY="only")}),
    ):
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("component", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def integrations(tmp_path, monkeypatch):
    """Two integrations of the user's that leak."""
    for name in ("foxess", "other"):
        package = tmp_path / "custom_components" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "client.py").write_text(textwrap.dedent(INTEGRATION))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CLOSEWAIT_GUARD_GRACE", "0")
    names = ("foxess", "other")
    yield [importlib.import_module(f"custom_components.{name}.client") for name in names]
    for name in [name for name in sys.modules if name.startswith("custom_components")]:
        del sys.modules[name]


def test_the_action_reports_leaked_sockets_by_integration(component, integrations):
    hass, kept = Hass(), []

    async def main():
        assert await component.async_setup(hass, {})
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        async with server:
            for integration in (integrations[0], integrations[0], integrations[1]):
                await asyncio.to_thread(integration.fetch, address, kept)
            async with asyncio.timeout(20):
                while (found := await hass.actions["closewait_guard.report"](None))["leaked"] < 3:
                    await asyncio.sleep(0.01)
        await hass.listeners["homeassistant_stop"](None)
        return found

    try:
        found = asyncio.run(main())
    finally:
        cwg.uninstall()
        while kept:
            kept.pop().close()
    assert found["summary"] == [
        "custom_components.foxess: 2 of 3",
        "custom_components.other: 1 of 3",
    ]
    assert found["integrations"][0]["opened"].endswith("foxess/client.py:5 in fetch()")
    assert "2 LEAKED" in found["report"]
    # Home Assistant sends the answer as JSON.
    json.dumps(found)


def test_all_is_imported_with_the_component_and_nothing_in_the_event_loop():
    code = f"""
import sys
from types import ModuleType
for name in ("homeassistant", "homeassistant.const", "homeassistant.core"):
    sys.modules[name] = ModuleType(name)
sys.modules["homeassistant.const"].EVENT_HOMEASSISTANT_STOP = ""
sys.modules["homeassistant.core"].SupportsResponse = None
sys.path.insert(0, {str(FOLDER.parents[1])!r})
import custom_components.closewait_guard
assert "closewait_guard._api" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_socket_that_a_library_opens_is_that_of_the_innermost_integration(component):
    frames = tuple(
        cwg.Frame(f"/{module}.py", 1, "call", module)
        for module in (
            "socket",
            "aiohttp.connector",
            "homeassistant.components.mqtt.client",
            "main",
        )
    )
    blamed = SimpleNamespace(stack=frames)
    record = SimpleNamespace(blamed=blamed, site=frames[0])
    observation = SimpleNamespace(record=record, peer=None)
    leak = SimpleNamespace(observation=observation, caller="", package="", hint="close it")
    assert component.integration_of(leak) == "homeassistant.components.mqtt"
    assert (
        component.details(leak)["opened"] == "/homeassistant.components.mqtt.client.py:1 in call()"
    )


def test_the_manifest_requires_this_version_and_the_action_is_described():
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["domain"] == FOLDER.name
    assert manifest["requirements"] == [f"closewait-guard>={cwg.__version__}"]
    assert manifest["version"] == cwg.__version__
    assert (FOLDER / "services.yaml").read_text(encoding="utf-8").startswith("report:\n")
