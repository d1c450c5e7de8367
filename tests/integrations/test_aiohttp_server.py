"""`cwg.aiohttp()`: an application of aiohttp on its own server, in this process."""

from __future__ import annotations

import asyncio
import socket

import pytest

import closewait_guard as cwg
from closewait_guard import _api

aiohttp, web = pytest.importorskip("aiohttp"), pytest.importorskip("aiohttp.web")

TOKEN = "a token of some length"


@pytest.fixture(autouse=True)
def leave_no_guard():
    yield
    cwg.uninstall()


def test_an_application_of_aiohttp_is_watched_and_labelled_from_its_start_to_its_end():
    opened, during, reports, answers = [], [], [], []

    async def item(request):
        during.append(_api.is_watched(by_program=True))
        opened.append(socket.socket())
        await asyncio.to_thread(lambda: opened.append(socket.socket()))
        return web.Response(text="ok")

    @web.middleware
    async def send_elsewhere(request, handler):
        if request.path == "/old/42":
            match = await request.app.router.resolve(request.clone(rel_url="/items/42"))
            return await match.handler(request)
        return await handler(request)

    async def main():
        part, app = web.Application(), web.Application()
        part.router.add_get("/items/{item}", item)
        app.router.add_get("/items/{item:\\d+}", item)
        app.middlewares.append(send_elsewhere)
        cwg.aiohttp(part)
        app.add_subapp("/part", part)
        with pytest.raises(cwg.ConfigurationError, match="was added to another"):
            cwg.aiohttp(part)
        assert cwg.aiohttp(app, token=TOKEN, reporters=[reports.append]) is app
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        # All over one connection.
        async with aiohttp.ClientSession() as session:
            for path, sent in (
                ("/items/42", {}),
                ("/part/items/42", {}),
                ("/old/42", {}),
                ("/nothing", {}),
                ("/_closewait", {}),
                ("/_closewait", headers),
            ):
                async with session.get(url + path, headers=sent) as answer:
                    answers.append((answer.status, await answer.text()))
        seen = cwg.scan(full=True).observations
        with pytest.raises(cwg.ConfigurationError, match="has started"):
            cwg.aiohttp(app)
        with pytest.raises(cwg.ConfigurationError, match="Application, got 3"):
            cwg.aiohttp(3)
        await runner.cleanup()
        return seen

    seen = asyncio.run(main())
    fds = {sock.fileno() for sock in opened}
    labels = [each.record.labels for each in seen if each.fd in fds]
    for sock in opened:
        sock.close()
    assert sorted(labels) == [("GET /items/{item}",)] * 4 + [("GET /part/items/{item}",)] * 2
    assert not any(each.record.labels for each in seen if each.fd not in fds)
    assert [status for status, _ in answers] == [200, 200, 200, 404, 404, 200]
    assert answers[-1][1].startswith("closewait-guard: no leaks")
    assert during == [True] * 3
    assert not _api.is_watched(by_program=True)
    assert len(reports) == 1
