"""The field for the address of a recording: off by default; the download is an upload like any other."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from servers.loopback import free_port
from servers.recordings import Recordings, treated_as_public

from pipelines.inference.app import handlers as app_handlers
from pipelines.inference.app import launch
from pipelines.inference.app.handlers import Handlers
from pipelines.inference.app.i18n import SWEDISH, TEXTS
from pipelines.inference.app.launch import build
from pipelines.inference.app.uploads import discard_upload
from pipelines.infra.downloads.download import Limits
from tests.inference.app.app_fakes import FakeTranscriber

gr = pytest.importorskip("gradio")


@pytest.fixture
def recordings(monkeypatch, tmp_path):
    server = Recordings()
    server.files["/a/talk.wav"] = b"sound"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    with treated_as_public(monkeypatch):
        yield server
    server.close()


def test_address_becomes_an_upload_of_its_own_folder(recordings, tmp_path):
    handlers = Handlers(SimpleNamespace())
    handlers.downloads = Limits(0.1, 0.5, (recordings.port,))
    paths = [Path(handlers.fetch_recording(f" {recordings.url('/a/talk.wav')} ", "en")) for _ in range(2)]
    assert paths[0] != paths[1] and {path.name for path in paths} == {"talk.wav"}
    assert all(path.read_bytes() == b"sound" and path.is_relative_to(tmp_path / "uploads") for path in paths)
    discard_upload(str(paths[0]))
    assert not paths[0].parent.exists() and paths[1].exists()


@pytest.mark.parametrize("language", ["en", "sv"])
@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/none?token=hemligt", "status"),
        ("/slow-head", "too_slow"),
        ("/zip", "broken"),
        ("http://127.0.0.2/", "address"),
        ("file:///etc/passwd", "address"),
        ("x", "address"),
    ],
)
def test_address_that_fails_is_one_line(recordings, tmp_path, path: str, key: str, language: str):
    handlers = Handlers(SimpleNamespace())
    handlers.downloads = Limits(0.1, 0.5, (recordings.port,))
    address = path if "://" in path or path == "x" else recordings.url(path)
    with pytest.raises(gr.Error) as error:
        handlers.fetch_recording(address, language)
    assert error.value.message == TEXTS[language]["not_fetched"][key]
    assert not list((tmp_path / "uploads").rglob("*"))


@pytest.mark.browser
def test_recording_at_an_address_is_transcribed(recordings, tmp_path, encoded, speech, monkeypatch, all_is_speech):
    """In a browser; the test's own server counts as public."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    playwright = pytest.importorskip("playwright.sync_api")
    if chromium is None:
        pytest.skip("no Chromium here. Run: apt-get install chromium")
    recordings.files["/a/talk.wav"] = encoded(speech(33_600))
    (tmp_path / "uploads").mkdir()
    monkeypatch.setattr(app_handlers, "Limits", lambda mb, seconds: Limits(mb, seconds, (recordings.port,)))
    demo = build(FakeTranscriber(tmp_path), tmp_path / "log.csv", fetches_urls=True)
    url = launch.launch(demo, port=free_port())
    try:
        with playwright.sync_playwright() as player:
            browser = player.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
            page = browser.new_page(locale="sv-SE")
            page.goto(url)
            page.wait_for_function("document.documentElement.lang === 'sv' && window.lab")
            page.fill("#address input, #address textarea", recordings.url("/none.wav"))
            page.keyboard.press("Enter")
            page.wait_for_selector(f".toast-body:has-text('{SWEDISH['not_fetched']['status']}')")
            page.fill("#address input, #address textarea", recordings.url("/a/talk.wav?token=hemligt"))
            page.click(f"#address button:has-text('{SWEDISH['fetch']}')")
            page.click("#transcribe:enabled")
            page.wait_for_function("document.querySelector('#transcript textarea').value === 'Hej på dig.'")
            assert "2.1 s tal på" in page.inner_text("#timing")
            browser.close()
    finally:
        demo.close(verbose=False)
    assert not [path for path in (tmp_path / "uploads").rglob("*.wav") if path.name == "talk.wav"], "deleted again"


def test_address_field_exists_only_if_enabled(tmp_path):
    def endpoints(**options):
        demo = build(FakeTranscriber(tmp_path), tmp_path / "log.csv", **options)
        return [block for block in demo.fns.values() if block.name == "fetch"]

    assert endpoints() == []
    (fetch,) = endpoints(fetches_urls=True)
    assert [block.elem_id for block in fetch.outputs] == ["recording"]
    shown_on = {id(block) for block in fetch.show_progress_on}
    assert shown_on and not shown_on & {id(block) for block in fetch.outputs}, "an error would cover the recorder"
