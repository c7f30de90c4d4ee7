"""Recordings at addresses that clients name: only if the server's operator enabled it, with its limits."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO

from pipelines.inference.http.guard import Refusal, wait_for_disconnect
from pipelines.infra.downloads import download
from pipelines.infra.downloads.download import Limits
from pipelines.infra.downloads.urls import DownloadError, Url

if TYPE_CHECKING:
    from starlette.types import Receive

DOWNLOAD_S = 60.0
"""Time limit of a download, during which the request occupies a slot."""
PARAM = "url"
_executor = ThreadPoolExecutor(16, thread_name_prefix="download")
"""Threads of downloads alone: in asyncio's, slow servers would also stop live sessions."""


class _Abandoned(Exception):
    """The client has disconnected."""


async def fetch_recording(text: str, limits: Limits | None, receive: Receive) -> BinaryIO:
    """Return the recording at an address as an unnamed file, which is deleted when it is closed or dropped.

    Raises Refusal: 400 if `limits` is None (not enabled), for an address that is not allowed or cannot be fetched, and
    if the client disconnects; 413 if the file is too large. The lines have no secrets.
    """
    if limits is None:
        raise Refusal(400, "this server fetches no addresses: send the recording itself as file", param=PARAM)
    abandoned, file = threading.Event(), tempfile.TemporaryFile()

    def stop_if_abandoned(_: int) -> None:
        if abandoned.is_set():
            raise _Abandoned

    loop = asyncio.get_running_loop()
    fetching = loop.run_in_executor(_executor, download.fetch, Url(text), file, limits, stop_if_abandoned)
    disconnect = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({fetching, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not fetching.done():
            raise Refusal(400, "the client disconnected")
        fetching.result()
    except DownloadError as error:
        status, code = (413, "file_too_large") if error.reason == "too_large" else (400, "invalid_url")
        raise Refusal(status, str(error), code, param=PARAM) from None
    finally:
        abandoned.set()
        fetching.cancel()
        disconnect.cancel()
    return file
