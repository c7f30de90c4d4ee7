"""Downloads of a server: in threads of their own."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from pipelines.inference.http.remote import fetch_recording
from pipelines.infra.downloads import download


async def connected_forever():
    await asyncio.Event().wait()


def test_waiting_downloads_leave_other_threads_free(monkeypatch):
    let_go = threading.Event()
    monkeypatch.setattr(download, "fetch", lambda *arguments: let_go.wait(20))

    async def fetch_and_work() -> str:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        fetching = asyncio.ensure_future(fetch_recording("https://a.test/b", download.Limits(), connected_forever))
        await asyncio.sleep(0)
        try:
            return await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 5)
        finally:
            let_go.set()
            (await fetching).close()

    assert asyncio.run(fetch_and_work()) == "done"
