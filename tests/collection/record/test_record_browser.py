"""Two speakers record in Debian's Chromium, the server is killed in between, and the folder is trained on as it is."""

import csv
import io
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers.loopback import free_port

from pipelines.collection.record.i18n import ENGLISH, SWEDISH
from pipelines.features.sources.synthetic import espeak
from tests.inference.app.test_app_browser import FLAGS, MICROPHONE_HZ, PATIENCE_MS, ROOT, chromium  # noqa: F401

pytestmark = pytest.mark.browser

SPOKEN = "Vi ska åka till Stockholm på måndag."
SENTENCES = [SPOKEN, "Båten går klockan sju.", "Hon köper bröd och ost.", "Det snöar i hela Norrland."]


@pytest.fixture(scope="module")
def browser(chromium, tmp_path_factory):  # noqa: F811
    """A browser whose microphone plays SPOKEN once for each recording."""
    import numpy as np
    import soundfile
    import soxr
    from playwright.sync_api import sync_playwright

    samples, rate_hz = soundfile.read(io.BytesIO(espeak.synthesise(SPOKEN, "sv+m3", 130, 50)), dtype="float32")
    spoken = 0.5 * soxr.resample(samples, rate_hz, MICROPHONE_HZ)
    path = tmp_path_factory.mktemp("microphone") / "spoken.wav"
    silence = np.zeros(MICROPHONE_HZ // 4, dtype=np.float32)
    soundfile.write(path, np.concatenate([silence, spoken, silence]), MICROPHONE_HZ, subtype="PCM_16")
    with sync_playwright() as playwright:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={path}"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


class Server:
    """`python -m pipelines record` as its own process."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model, self.port = folder / "recordings", model, free_port()
        self.list = folder / "list.txt"
        self.list.write_text("# a list\n" + "\n".join(SENTENCES), "utf-8")
        self.start()

    def start(self) -> None:
        options = ["--sentences", self.list, "--to", self.folder, "--port", self.port, "--model", self.model]
        command = [sys.executable, "-m", "pipelines", "record", *map(str, options)]
        environ = {**os.environ, "TMPDIR": str(self.list.parent), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE)
        lines = iter(self.process.stdout.readline, "")
        assert any(line.startswith("Next: ") for line in lines), "the server ended"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)

    def rows(self) -> list[dict[str, str]]:
        path = self.folder / "metadata.csv"
        return list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []


@pytest.fixture
def server(tmp_path, toy_model):
    server = Server(tmp_path, toy_model)
    yield server
    server.kill()


def _open(browser, server, nickname, is_known=False, **options):
    """Open the page in its own session, agree, and begin; `is_known`: say that the nickname is one's own."""
    context = browser.new_context(permissions=["microphone"], **options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(f"http://127.0.0.1:{server.port}")
    page.wait_for_function("window.lab")
    page.wait_for_selector("#start")
    page.check("#agree input")
    page.fill("#nickname :is(input, textarea)", nickname)
    page.click("#start")
    if is_known:
        page.click("#known_yes")
    page.wait_for_selector("#sentence p")
    return page


_takes = itertools.count()


def _record(page, key="Space"):
    """Record by the keyboard alone, and wait until the take is checked."""
    page.keyboard.press(key)
    page.wait_for_selector("#recording .stop-button", state="visible")
    page.wait_for_timeout(2_500 + 150 * next(_takes))  # the microphone repeats itself: takes of one length are equal
    page.keyboard.press("Space")
    page.wait_for_selector("#next:enabled")


def _keep(page):
    """Keep the take by the keyboard; return the sentence that was read."""
    sentence = page.inner_text("#sentence")
    page.keyboard.press("Enter")
    page.wait_for_function("before => document.querySelector('#sentence').innerText !== before", arg=sentence)
    page.wait_for_selector("#recording .record-button", state="visible")
    return sentence.strip()


def _screenshots(page, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(500)
    page.screenshot(path=path, full_page=True)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)
    page.screenshot(path=path.with_stem(f"{path.stem}-phone"), full_page=True)
    page.set_viewport_size({"width": 1000, "height": 800})


def test_folder_of_two_speakers_is_trained_on_as_it_is(browser, server, toy_settings, tmp_path):
    from pipelines.features import pipeline as feature_pipeline
    from pipelines.training import pipeline as training_pipeline

    first = _open(browser, server, "Åsa", viewport={"width": 1000, "height": 800})
    second = _open(browser, server, "Bo", locale="sv-SE", viewport={"width": 390, "height": 844})
    assert first.inner_text("#sentence").strip() == SENTENCES[0]
    assert SWEDISH["again"] in second.inner_text("#again") and "mellanslag" in second.inner_text("#keys")
    assert second.evaluate("document.documentElement.scrollWidth") <= 390
    _record(first)
    assert ENGLISH["heard"] in first.inner_text("#status")
    _record(first, "r")
    if os.environ.get("LAB_SCREENSHOT"):
        _screenshots(first, Path(os.environ["LAB_SCREENSHOT"]))
    read = [_keep(first)]
    _record(second)
    read_by_second = [_keep(second)]

    _record(first)  # checked, and not kept
    server.kill()
    assert [row["text"] for row in server.rows()] == [*read, *read_by_second], "kept takes survive, no other"
    server.start()
    first.close()
    first = _open(browser, server, " åsa", is_known=True)
    assert "1 of 4" in first.inner_text("#progress")
    while len(read) < 4:
        _record(first)
        read.append(_keep(first))
    assert {*read} == {*SENTENCES} and ENGLISH["done"] in first.inner_text("#sentence")

    rows = server.rows()
    assert sorted(row["text"] for row in rows) == sorted([*read, *read_by_second])
    assert len({row["speaker"] for row in rows}) == 2
    on_disk = {path.relative_to(server.folder).as_posix() for path in server.folder.glob("clips/**/*.*")}
    assert on_disk == {row["path"] for row in rows}, "no half take"
    settings = toy_settings(
        {"source.kind": "folder", "source.path": str(server.folder), "training.steps": 2, "training.eval_every": 2}
    )
    cache = feature_pipeline.run(settings, runs=tmp_path / "runs")
    assert {*cache.rows["split"]} == {"train", "validation", "test"}
    assert {*cache.rows["text"]} == {*SENTENCES}
    trained = training_pipeline.run(settings, cache, runs=tmp_path / "runs")
    assert (Path(trained.uri) / "manifest.json").is_file()


def test_same_nickname_on_a_phone_is_asked_about(browser, server):
    phone = {"viewport": {"width": 390, "height": 844}}
    first = _open(browser, server, "Kim", **phone)
    context = browser.new_context(permissions=["microphone"], locale="sv-SE", **phone)
    other = context.new_page()
    other.set_default_timeout(PATIENCE_MS)
    other.goto(f"http://127.0.0.1:{server.port}")
    other.wait_for_function("window.lab")
    other.check("#agree input")
    other.fill("#nickname :is(input, textarea)", "kim")
    other.click("#start")
    other.wait_for_selector(f"text={SWEDISH['known']}")
    assert other.evaluate("document.documentElement.scrollWidth") <= 390
    other.click("#known_no")
    other.wait_for_selector("#known_yes", state="hidden")
    other.wait_for_function(
        "() => document.activeElement?.closest('#nickname')?.querySelector('input, textarea').value === ''"
    )
    other.keyboard.type("Kim från Ystad")
    other.keyboard.press("Tab")
    other.click("#start")
    other.wait_for_selector("#sentence p")
    assert "Kim från Ystad" in other.inner_text("#progress")
    _record(first)
    _keep(first)
    _record(other)
    _keep(other)
    assert len({row["speaker"] for row in server.rows()}) == 2
    other.reload()
    other.wait_for_function(
        "() => document.querySelector('#nickname :is(input, textarea)')?.value === 'Kim från Ystad'"
    )


def test_recording_that_arrives_late_is_not_of_the_next_sentence(browser, server):
    page = _open(browser, server, "Åsa")
    read = page.inner_text("#sentence").strip()
    held = []
    page.route("**/upload*", lambda route: held.append(route))
    page.keyboard.press("Space")
    page.wait_for_selector("#recording .stop-button", state="visible")
    page.wait_for_timeout(2_500)
    with page.expect_request("**/upload*"):
        page.keyboard.press("Space")
    page.click("#skip")
    page.wait_for_function("before => document.querySelector('#sentence').innerText.trim() !== before", arg=read)
    held[0].continue_()
    page.wait_for_selector(f"text={ENGLISH['other_sentence']}")
    page.wait_for_selector("#recording .record-button", state="visible")
    assert page.is_disabled("#next") and server.rows() == []
