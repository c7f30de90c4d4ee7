"""Serve the recording page until Ctrl-C or SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.collection.record.handlers import Handlers
from pipelines.collection.record.recorder import Recorder
from pipelines.inference.app import launch as app_launch
from pipelines.inference.app.uploads import temporary_folder
from pipelines.inference.http.rate_limits import RateLimiter


@dataclass(frozen=True)
class Address:
    """Where the page is served, and for whom."""

    host: str = "127.0.0.1"
    port: int | None = None
    """None: the first free one from 7860."""
    trusted_proxies: tuple[str, ...] = ()


def serve(recorder: Recorder, limiter: RateLimiter, address: Address, announce: Callable[[str], None]) -> None:
    """Serve the page; `announce` receives its address. Raises LabError if the port is taken."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # deletes the temporary folder
    with temporary_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read when Gradio is imported
        from pipelines.collection.record import page

        demo = page.build(Handlers(recorder, limiter))
        proxies = address.trusted_proxies
        try:
            announce(app_launch.launch(demo, host=address.host, port=address.port, trusted_proxies=proxies))
            demo.block_thread()
        finally:
            demo.close(verbose=False)
