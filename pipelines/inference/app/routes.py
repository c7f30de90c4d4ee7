"""The routes of Gradio that the page and the documented API use. All others are refused.

Gradio has some seventy routes. Several store uploads (`process_recording`) or fetch any address (`file=http…`,
`proxy=…`), whether or not a page uses them. tests/inference/app/test_app_browser.py records what the page requests.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

LIVE_PATH = "/live"
UPLOAD_PATH = "/gradio_api/upload"
TRANSCRIBE_PATH = "/gradio_api/call/transcribe"
"""Where programs start a transcription."""
_FILE = "/gradio_api/file="
_GET = re.compile(
    r"/?"  # the page itself
    r"|/(?:config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)"
    r"|/(?:assets|static)/.+"
    r"|/gradio_api/(?:info|queue/data|upload_progress|startup-events|app_id)"  # app_id: is the server back?
    r"|/gradio_api/heartbeat/\w+"
    r"|/gradio_api/call/transcribe/\w+"
)
_POST = re.compile(rf"{LIVE_PATH}|{UPLOAD_PATH}|/gradio_api/(?:queue/join|run/predict|call/transcribe)")


def is_used(method: str, path: str, uploads: Path) -> bool:
    """Return whether the page uses this route; of files only those in the folder `uploads`.

    `path` is decoded and has no slash at its end.
    """
    if method == "POST":
        return bool(_POST.fullmatch(path))
    if method not in ("GET", "HEAD"):
        return False
    if path.startswith(_FILE):
        return Path(os.path.realpath(path.removeprefix(_FILE))).is_relative_to(os.path.realpath(uploads))
    return bool(_GET.fullmatch(path))
