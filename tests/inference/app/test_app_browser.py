"""The app as a visitor meets it: a real process, a real model, Debian's Chromium and a microphone that plays a file."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
from servers.loopback import free_port

from pipelines.features.sources.synthetic import espeak
from pipelines.inference import feedback
from pipelines.inference.app.handlers import DOWNLOADS
from pipelines.inference.app.i18n import ENGLISH, SWEDISH
from pipelines.inference.app.uploads import EXAMPLES
from pipelines.infra import feedback_log, manifest
from pipelines.speech import text

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[3]
SENTENCE = "Vi ska åka till Stockholm på måndag."
"""whisper-tiny, untuned, hears every word of it."""
MICROPHONE_HZ = 48_000
PATIENCE_MS = 60_000
FLAGS = (
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def chromium():
    """The path of a Chromium; without one, skip here and fail in CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    mend = "apt-get install chromium && pip install playwright"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        found = None
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no Chromium or no playwright here. Run: {mend}")
    return found


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """SENTENCE twice as a 16-bit wav at 48 kHz, which is what Chromium's fake microphone plays.

    Twice, because Chromium's gain control overdrives the first one until it has settled.
    """
    import numpy as np
    import soundfile
    import soxr

    samples, rate_hz = soundfile.read(io.BytesIO(espeak.synthesise(SENTENCE, "sv+m3", 130, 50)), dtype="float32")
    path = tmp_path_factory.mktemp("microphone") / "spoken.wav"
    once = soxr.resample(samples, rate_hz, MICROPHONE_HZ)
    soundfile.write(path, np.concatenate([once, once]), MICROPHONE_HZ, subtype="PCM_16")
    return path


class Server:
    """app.py as its own process, on a port of its own."""

    def __init__(self, model: Path, folder: Path):
        self.log, self.port = folder / "log.csv", free_port()
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.lines: list[str] = []
        environ = {**os.environ, "TMPDIR": str(self.temporary), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "app.py", "--model", str(model), "--port", str(self.port), "--log", str(self.log)]
        command += [
            "--engine",
            "transformers",
        ]  # in eight bits the untuned weights hear still less of a synthetic voice
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def uploads(self) -> list[Path]:
        """Files in the folder of uploads, the page's own examples aside."""
        found = [path for path in self.temporary.glob("lab-app-*/**/*") if path.is_file()]
        return [path for path in found if path.name not in (*EXAMPLES, ".lock")]

    def wait(self, seconds: float = 400) -> None:
        assert self._ready.wait(seconds), "".join(self.lines)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("next: "):
                self._ready.set()


@pytest.fixture(scope="module")
def model(tiny_folder, tmp_path_factory):
    """The same weights as a tuned model that knows where it came from."""
    folder = tmp_path_factory.mktemp("runs") / "train-1" / "model"
    folder.mkdir(parents=True)
    for path in tiny_folder.iterdir():
        if path.is_file() and path.name != manifest.MANIFEST:
            os.link(path, folder / path.name)
    manifest.seal(folder, kind="model", name="tour-1", base_model=str(tiny_folder), base="whisper-tiny")
    return folder


@pytest.fixture(scope="module")
def server(chromium, model, tmp_path_factory):
    server = Server(model, tmp_path_factory.mktemp("server"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def launch(chromium):
    """`launch(flags)`: start a Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield lambda flags: playwright.chromium.launch(executable_path=chromium, args=[*flags])


@pytest.fixture(scope="module")
def browser(launch, spoken):
    browser = launch([*FLAGS, f"--use-file-for-fake-audio-capture={spoken}%noloop"])
    yield browser
    browser.close()


@pytest.fixture
def console_errors():
    """What the browser's console holds of severity error, and exceptions of the page's scripts."""
    return []


@pytest.fixture
def page(browser, server, console_errors):
    """The page, freshly opened.

    At the end: nothing came from outside, every route that the page used exists, and the console holds no error.
    """
    context = browser.new_context(viewport={"width": 1200, "height": 900}, permissions=["microphone"])
    page, requests, absent = context.new_page(), [], []
    page.set_default_timeout(PATIENCE_MS)
    page.on("request", lambda request: requests.append(request.url))
    page.on("response", lambda response: absent.append(response.url) if response.status == 404 else None)
    page.on("console", lambda message: console_errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: console_errors.append(str(error)))
    page.goto(server.address)
    page.wait_for_selector("#transcribe")
    page.wait_for_function("window.lab")
    yield page
    context.close()
    assert [url for url in requests if _leaves(url)] == []
    assert absent == []
    assert console_errors == []


def _leaves(url: str) -> bool:
    parts = urllib.parse.urlsplit(url.removeprefix("blob:"))
    return parts.scheme not in ("data", "about") and parts.hostname != "127.0.0.1"


def _words(sentence: str) -> set[str]:
    return set(text.normalise(sentence).split())


def _transcribed(page) -> str:
    """Press Transcribe by the keyboard and read what appears."""
    page.wait_for_selector("#transcribe:enabled")
    page.focus("#transcribe")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#transcript textarea').value !== ''")
    return page.input_value("#transcript textarea")


def _upload(page, file: Path) -> None:
    page.click("#recording button[aria-label='Upload file']")
    page.set_input_files("#recording input[type=file]", file)


def _record(page, duration_ms: float) -> None:
    page.click("#recording .record-button")
    page.wait_for_selector("#recording .stop-button", state="visible")
    page.wait_for_timeout(duration_ms)
    page.click("#recording .stop-button")


def _spoken_ms(wav: Path) -> float:
    import soundfile

    return 1_000 * soundfile.info(wav).duration


def test_speak_read_and_correct(page, server, spoken):
    _record(page, _spoken_ms(spoken) + 500)
    heard = _transcribed(page)
    assert len(_words(heard) & _words(SENTENCE)) >= 2, heard
    assert " s of speech in " in page.inner_text("#timing")
    assert server.uploads == [], "the recording is deleted once it is transcribed"
    page.wait_for_function("document.querySelector('#correction textarea').value !== ''")
    page.fill("#correction textarea", SENTENCE)
    page.fill("#username textarea, #username input", "Åsa")
    page.check("#keep input")
    page.click("#wrong")
    page.wait_for_selector("#thanks >> text=Thank you!")
    if os.environ.get("LAB_SCREENSHOT"):
        _screenshots(page, Path(os.environ["LAB_SCREENSHOT"]))
    row = feedback_log.read(server.log)[-1]
    assert (row["output"], row["flag"], row["username"], row["reference"]) == (heard, "wrong", "Åsa", SENTENCE)
    assert row["wer"] == feedback.wer(SENTENCE, heard)
    assert " @ " in row["model"]
    assert (server.log.parent / row["audio"]).stat().st_size > 40_000


def test_upload_and_confirm(page, server, spoken):
    _upload(page, spoken)
    heard = _transcribed(page)
    assert _words(heard) >= {"till", "stockholm"}, heard
    page.click("#right")
    page.wait_for_selector("#thanks >> text=Thank you!")
    page.click("#recording button[aria-label='Clear']")
    page.wait_for_function("document.querySelector('#transcript textarea').value === ''")
    assert page.is_disabled("#transcribe")
    assert page.input_value("#correction textarea") == ""
    row = feedback_log.read(server.log)[-1]
    assert (row["flag"], row["reference"], row["wer"], row["audio"]) == ("right", heard, "0.0000", "")
    assert server.uploads == []


def test_times_unsure_words_and_files_to_download(page, server, spoken):
    _upload(page, spoken)
    heard = _transcribed(page)
    page.wait_for_selector("#details summary")
    page.click("#details summary") if not page.is_visible("#details li") else None
    assert page.inner_text("#details li time") == "0:00.0"
    assert page.inner_text("#details li span").split() == heard.split()
    for ending in DOWNLOADS:
        with page.expect_download() as download:
            page.click(f"#downloads button:has-text('.{ending}'):enabled")
        assert download.value.suggested_filename == f"transcript.{ending}"
        content = Path(download.value.path()).read_text("utf-8")
        assert heard.split()[0] in content
        assert (ending == "txt") == (" --> " not in content)
    assert server.uploads == []


def test_click_on_a_segment_plays_it(page, spoken):
    _upload(page, spoken)
    _transcribed(page)
    page.wait_for_selector("#player canvas", state="visible")
    page.wait_for_selector("#details.playable")
    if not page.is_visible("#details li"):
        page.click("#details summary")
    playing = "(() => { const a = document.querySelector('#player audio'); return !a.paused && a.currentTime > 0.1 })()"
    page.focus("#details .play")
    page.keyboard.press("Enter")
    page.wait_for_function(playing)
    page.wait_for_selector("#details li.now")
    page.evaluate("document.querySelector('#player audio').pause()")
    page.click("#player .parts div")
    page.wait_for_function(playing)
    drawn = "[...document.querySelector('#player canvas').getContext('2d').getImageData(0, 0, 300, 64).data]"
    assert page.evaluate(f"{drawn}.some(value => value > 0)"), "a waveform is there"
    page.click("#recording button[aria-label='Clear']")
    page.wait_for_selector("#player canvas", state="hidden")


def _speak(page) -> None:
    page.click(f"button[role=tab]:has-text('{ENGLISH['live_tab']}')")
    page.click("#speak")
    page.wait_for_selector("#stop", state="visible")
    page.evaluate("void (window.stays = true)")  # gone where the page is loaded anew


def _heard_all(page) -> str:
    """The transcript of a microphone that was stopped: of all that the browser recorded, on the same page."""
    page.wait_for_function("document.querySelector('#transcript textarea').value !== ''")
    page.wait_for_selector("#speak", state="visible")
    length = page.evaluate("document.querySelector('#player audio').duration")
    assert float(page.inner_text("#timing").split(" s of")[0]) == pytest.approx(length, abs=0.1)
    assert page.inner_text("#live-note") == ""
    assert page.evaluate("window.stays"), "the page was not loaded anew"
    return page.input_value("#transcript textarea")


def test_live_words_appear_while_speaking(page, server, spoken):
    _speak(page)
    page.wait_for_function("document.querySelector('#live p')?.innerText.trim()")
    page.wait_for_timeout(_spoken_ms(spoken))
    assert 0 <= float(page.inner_text("#live small b")) < 30
    page.click("#stop")
    heard = _heard_all(page)
    assert _words(heard) & _words(SENTENCE), heard
    page.wait_for_selector("#player canvas", state="visible")
    page.click("#right")
    page.wait_for_selector("#thanks >> text=Thank you!")
    assert feedback_log.read(server.log)[-1]["output"] == heard
    assert page.evaluate("document.querySelector('#player audio').duration") > _spoken_ms(spoken) / 1_000
    assert server.uploads == [], "no piece ever was a file"


def test_microphone_closed_at_once_can_be_reopened(page, console_errors):
    page.click(f"button[role=tab]:has-text('{ENGLISH['live_tab']}')")
    page.evaluate(
        "void (navigator.mediaDevices.getUserMedia = (real => async how => { window.opened = (window.opened || 0) + 1;"
        "return window.stream = await real(how) })(navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices)))"
    )

    def nothing_came(route):
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "start": 0, "samples": ""}))

    page.route("**/live", nothing_came)
    page.evaluate("document.querySelector('#speak').click(); document.querySelector('#speak').click()")
    page.click("#stop")
    page.wait_for_selector(f"#live-note:has-text('{ENGLISH['refused']['no_recording']}')")
    page.wait_for_selector("#speak", state="visible")
    assert page.evaluate("[window.opened, window.stream.getTracks().every(track => track.readyState === 'ended')]") == [
        1,
        True,
    ]
    page.unroute("**/live")
    page.click("#speak")
    page.wait_for_function("document.querySelector('#live p')?.innerText.trim()")
    page.click("#stop")
    _away(console_errors)


ALLOWED, DEVICE = FLAGS[:2]


@pytest.mark.parametrize(
    ("reason", "flags", "address"),
    [
        ("blocked", set(FLAGS) - {ALLOWED}, ""),
        ("absent", set(FLAGS) - {DEVICE}, ""),
        ("insecure", {*FLAGS, "--host-resolver-rules=MAP lab.test 127.0.0.1"}, "http://lab.test:{port}"),
        ("framed", {*FLAGS, "--disable-features=LocalNetworkAccessChecks"}, "http://outer.localhost/"),
    ],
)
def test_missing_microphone_is_explained(launch, server, reason, flags, address):
    browser, shown = launch(sorted(flags)), ENGLISH["browser"][f"microphone_{reason}"]
    try:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        outer = f"<iframe width=1200 height=900 src='{server.address}'></iframe>"
        page.route("http://outer.localhost/", lambda route: route.fulfill(content_type="text/html", body=outer))
        page.goto(address.format(port=server.port) or server.address)
        inner = page.frames[-1]
        inner.wait_for_function("window.lab")
        inner.click("#recording .record-button")
        inner.wait_for_selector(f"#recorder-note:has-text('{shown}')")
        inner.click(f"button[role=tab]:has-text('{ENGLISH['live_tab']}')")
        inner.click("#speak")
        inner.wait_for_selector(f"#live-note:has-text('{shown}')")
        assert inner.is_visible("#speak")
    finally:
        browser.close()


def test_microphone_that_goes_away_is_reported(page, spoken):
    page.evaluate(
        "void (navigator.mediaDevices.getUserMedia = (real => async how => window.stream = await real(how))"
        "(navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices)))"
    )
    page.click(f"button[role=tab]:has-text('{ENGLISH['live_tab']}')")
    page.click("#speak")
    page.wait_for_selector("#stop", state="visible")
    page.wait_for_timeout(_spoken_ms(spoken) / 2)
    page.evaluate("for (const t of window.stream.getTracks()) { t.stop(); t.dispatchEvent(new Event('ended')) }")
    page.wait_for_selector(f"#live-note:has-text('{ENGLISH['browser']['microphone_lost']}')")
    page.wait_for_function("document.querySelector('#transcript textarea').value !== ''")
    page.wait_for_selector("#speak", state="visible")
    assert page.inner_text("#live-note") == ENGLISH["browser"]["microphone_lost"]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here, which reads webm and mp4")
@pytest.mark.parametrize("way", ["change", "drop"])
@pytest.mark.parametrize("ending", ["webm", "mp4"])
def test_recording_of_a_browser_is_accepted(page, console_errors, spoken, ending, way):
    page.click("#recording button[aria-label='Upload file']")
    page.evaluate(
        """async ([ending, way, duration]) => {
            const stream = await navigator.mediaDevices.getUserMedia({ audio: true })
            const type = MediaRecorder.isTypeSupported(`audio/${ending}`) ? `audio/${ending}` : "audio/webm"
            const recorder = new MediaRecorder(stream, { mimeType: type })
            const parts = []
            recorder.ondataavailable = event => parts.push(event.data)
            const stopped = new Promise(resolve => { recorder.onstop = resolve })
            recorder.start()
            await new Promise(resolve => setTimeout(resolve, duration))
            recorder.stop()
            await stopped
            const input = document.querySelector("#recording input[type=file]")
            const transfer = new DataTransfer()
            transfer.items.add(new File(parts, `recording.${ending}`, { type: `video/${ending}` }))
            if (way === "change") input.files = transfer.files
            const event = way === "change" ? new Event(way, { bubbles: true })
                : new DragEvent(way, { bubbles: true, cancelable: true, dataTransfer: transfer })
            ;(way === "change" ? input : input.parentElement).dispatchEvent(event)
        }""",
        [ending, way, _spoken_ms(spoken)],
    )
    assert _words(_transcribed(page)) & _words(SENTENCE)
    console_errors[:] = [line for line in console_errors if "Waveform load error" not in line]


def _away(console_errors) -> None:
    """The browser's own words for requests that failed, as the test had it."""
    console_errors[:] = [line for line in console_errors if not line.startswith("Failed to load resource")]


def test_failed_chunks_are_sent_again(page, console_errors):
    seen = []

    def passed_on(route):
        seen.append(route)
        if len(seen) == 2:
            route.fulfill(status=503, json={"reason": "busy", "detail": "later"})
        elif len(seen) == 4:
            route.abort()
        elif len(seen) != 6:  # that one is never answered
            route.continue_()

    page.route("**/live", passed_on)
    page.evaluate("void (window.lab.settings.requestTimeoutMs = 2000)")
    _speak(page)
    for _ in range(PATIENCE_MS // 100):
        if len(seen) > 6:
            break
        page.wait_for_timeout(100)
    assert len(seen) > 6
    page.click("#stop")
    _heard_all(page)
    _away(console_errors)


def test_lost_connection_loses_no_audio(page, server, console_errors, spoken):
    _speak(page)
    page.wait_for_function("document.querySelector('#live p')?.innerText.trim()")
    page.context.set_offline(True)
    page.wait_for_selector(f"#live-note:has-text('{ENGLISH['browser']['lost']}')")
    assert ENGLISH["browser"]["waiting"] in page.inner_text("#live-note")
    page.wait_for_timeout(_spoken_ms(spoken))
    page.context.set_offline(False)
    page.wait_for_selector("#live-note", state="hidden")
    page.click("#stop")
    heard = _heard_all(page)
    page.click("#right")
    page.wait_for_selector("#thanks >> text=Thank you!")
    assert feedback_log.read(server.log)[-1]["output"] == heard
    _away(console_errors)


def test_microphone_closes_at_the_limit_and_retries(page, console_errors):
    page.evaluate("void (window.lab.settings.maxDurationS = 2)")
    page.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "full"}), times=1)
    _speak(page)
    page.wait_for_function("document.querySelector('#transcript textarea').value !== ''")
    page.wait_for_selector(f"#live-note:has-text('{ENGLISH['browser']['full']}')")
    assert page.inner_text("#timing").startswith(("1.9 s", "2.0 s"))
    assert page.is_visible("#speak")
    _away(console_errors)


def test_first_stop_waits_and_second_stop_does_not(page, console_errors, spoken):
    _speak(page)
    page.wait_for_timeout(_spoken_ms(spoken))
    page.route("**/live", lambda route: route.abort())
    page.click("#stop")
    page.wait_for_selector(f"#live-note:has-text('{ENGLISH['browser']['waiting_closed']}')")
    page.unroute("**/live")
    _heard_all(page)
    page.route("**/live", lambda route: route.abort())
    _speak(page)
    page.wait_for_selector("#live-note:visible")
    page.click("#stop")
    page.wait_for_selector(f"#live-note:has-text('{ENGLISH['browser']['waiting_closed']}')")
    page.click("#stop")
    page.wait_for_selector("#speak", state="visible")
    assert page.inner_text("#live-note") == ENGLISH["browser"]["given_up"]
    assert page.evaluate("document.querySelector('#player audio').duration") > 0
    page.unroute("**/live")
    _speak(page)
    page.wait_for_function("document.querySelector('#live p')?.innerText.trim()")
    page.click("#stop")
    _heard_all(page)
    _away(console_errors)


def test_comparison_with_the_base_model(page, spoken):
    _upload(page, spoken)
    heard = _transcribed(page)
    page.click("#compare:enabled")
    page.wait_for_selector("#compared dl")
    assert page.locator("#compared dd").all_inner_texts() == [heard, heard]
    assert ENGLISH["same"] in page.inner_text("#compared")


def test_example_is_one_click(page, server):
    said = next(iter(EXAMPLES.values()))
    for _ in range(2):  # the file is there for the next visitor, too
        page.click(f"#examples button:has-text('{said}')")
        assert _transcribed(page)
        page.click("#recording button[aria-label='Clear']")
        page.wait_for_function("document.querySelector('#transcript textarea').value === ''")
    assert server.uploads == []


def test_page_is_swedish_by_browser_and_by_switch(browser, server, spoken):
    context = browser.new_context(locale="sv-SE", viewport={"width": 390, "height": 500})
    try:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(server.address)
        page.wait_for_selector(f"#transcribe:has-text('{SWEDISH['transcribe']}')")
        page.wait_for_function("document.documentElement.lang === 'sv'")
        _upload(page, spoken)
        _transcribed(page)
        assert " s tal på " in page.inner_text("#timing")
        page.wait_for_selector(f"#details summary:has-text('{SWEDISH['details']}')", state="attached")
        assert page.get_attribute("#player audio", "aria-label") == SWEDISH["player"]
        widths = "for (let i = 0; i < 20; i++) { await new Promise(requestAnimationFrame); "
        widths += "wide = Math.max(wide, document.documentElement.scrollWidth) }"
        assert page.evaluate(f"async () => {{ let wide = 0; {widths} return wide }}") <= 390
        bottom = "document.querySelector('#transcript').getBoundingClientRect().bottom"
        page.wait_for_function(f"{bottom} <= innerHeight + 1")  # a browser scrolls to whole pixels
        page.click("#language label:has-text('English')")
        page.wait_for_selector(f"#transcribe:has-text('{ENGLISH['transcribe']}')")
        page.wait_for_selector(f"#details summary:has-text('{ENGLISH['details']}')", state="attached")
        page.wait_for_function("document.documentElement.lang === 'en'")
        assert page.input_value("#transcript textarea"), "the transcript stays"
    finally:
        context.close()


def test_gradio_messages_are_translated(browser, server, spoken, tmp_path):
    large = tmp_path / "large.wav"
    large.write_bytes(b"a" * 25_000_001)
    context = browser.new_context(locale="sv-SE")
    try:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(server.address)
        page.wait_for_function("document.documentElement.lang === 'sv'")
        page.click("#recording button[aria-label='Ladda upp fil'], #recording button[aria-label='Upload file']")
        page.set_input_files("#recording input[type=file]", large)
        page.wait_for_selector(f".toast-body:has-text('{SWEDISH['browser']['too_large']}')")
        page.set_input_files("#recording input[type=file]", spoken)
        page.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "Queue is full."}))
        page.click("#transcribe:enabled")
        page.wait_for_selector(f".toast-body:has-text('{SWEDISH['browser']['busy']}')")
        assert SWEDISH["sorry"] in page.inner_text(".toast-body .toast-title")
        assert "maximum allowed" not in page.inner_text("body")
        page.unroute("**/queue/join*")
        assert _transcribed(page), "it can be pressed again"
    finally:
        context.close()


def test_page_has_no_accessibility_violations(page, spoken):
    """axe-core's rules of WCAG 2.1 A and AA, before and after a transcript, light and dark."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def violations():
        rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
        found = axe.run(page, options=rules).response["violations"]
        return [(one["id"], node["html"][:200]) for one in found for node in one["nodes"]]

    assert violations() == []
    _upload(page, spoken)
    _transcribed(page)
    page.click("#compare:enabled")
    page.wait_for_selector("#compared dl")
    assert violations() == []
    page.click(f"button[role=tab]:has-text('{ENGLISH['live_tab']}')")
    assert violations() == []
    page.emulate_media(color_scheme="dark")
    page.reload()
    page.wait_for_selector("#transcribe")
    assert violations() == []


def test_text_file_named_wav_is_one_line(page, console_errors, server, tmp_path):
    fake = tmp_path / "letter.wav"
    fake.write_text("Kära syster, jag skriver till dig.\n" * 40)
    _upload(page, fake)
    page.click("#transcribe:enabled")
    toast = page.wait_for_selector(".toast-body.error")
    assert ENGLISH["refused"]["unreadable"] in toast.inner_text()
    everything = page.inner_text("body")
    assert "Traceback" not in everything
    assert str(server.temporary) not in everything
    assert "Traceback" not in "".join(server.lines)
    assert server.uploads == []
    console_errors[:] = [line for line in console_errors if "Waveform load error" not in line]  # the player's own word


def test_feedback_before_any_transcript_is_a_warning(page, server):
    before = feedback_log.read(server.log)
    page.click("#wrong")
    toast = page.wait_for_selector(".toast-body.warning")
    assert ENGLISH["nothing_to_judge"] in toast.inner_text()
    assert feedback_log.read(server.log) == before


def test_page_shows_its_model_and_fits_a_phone(page, model):
    page.set_viewport_size({"width": 390, "height": 844})
    card = page.wait_for_selector("#card dl").inner_text()
    assert ENGLISH["not_scored"] in card
    assert ENGLISH["why"]["named"] in card
    assert str(model) not in page.content()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_browser_keeps_no_history_of_calls(page, spoken):
    _upload(page, spoken)
    _transcribed(page)
    stored = page.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage)")
    databases = page.evaluate("indexedDB.databases().then(found => found.map(one => one.name))")
    assert "stockholm" not in stored.lower()
    assert databases == []


def test_gradio_client_can_transcribe(server, spoken):
    from gradio_client import Client, handle_file

    heard, line = Client(server.address, verbose=False).predict(handle_file(spoken), api_name="/transcribe")
    assert _words(heard) >= {"till", "stockholm"}
    assert " s of speech in " in line


def _screenshots(page, path: Path) -> None:
    """The filled page at a desk, at `path`, and on a phone, beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, full_page=True)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    page.screenshot(path=path.with_stem(f"{path.stem}-phone"), full_page=True)
    page.set_viewport_size({"width": 1200, "height": 900})
