"""The review page: its handlers, and the page in a browser with the keyboard alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.collection.review import clips, page
from pipelines.collection.review.queue import Item, Queue
from pipelines.collection.review.texts import ENGLISH, SWEDISH
from pipelines.features.curation import corrections
from pipelines.features.sources import Example, NoAudio
from tests.inference.app.test_app_browser import FLAGS, chromium  # noqa: F401  a fixture

ROOT = Path(__file__).parents[3]
SCRIPT = "<img src=x onerror=alert(1)>"


@pytest.fixture
def handlers(tmp_path):
    """Handlers over two clips, one with hostile texts; no clip has audio that can be played."""
    items = [Item("a", f"hej {SCRIPT}", f"nej {SCRIPT}", 2.0), Item("b", "två", "tre", 1.0)]
    examples = {"a": Example("a", "train", "hej", NoAudio("missing", "")), "b": Example("b", "train", "två", b"junk")}
    return page.Handlers(Queue(items, tmp_path / "c.csv", "m"), examples)


def test_texts_are_complete_in_both_languages():
    assert ENGLISH.keys() == SWEDISH.keys()
    names = {name: set(re.findall(r"{(\w+)", text)) for name, text in ENGLISH.items()}
    assert names == {name: set(re.findall(r"{(\w+)", text)) for name, text in SWEDISH.items()}


def test_decision_is_stored_and_the_next_clip_shown(handlers):
    shown = handlers.show("s", "en")[1]
    assert "<mark>hej</mark>" in shown and "<mark>nej</mark>" in shown and "<img" not in shown
    assert ENGLISH["no_audio"] in shown
    _, clip, text = handlers.decide("correct", "s", "hej då", "Åsa", "sv")
    assert SWEDISH["no_audio"] in clip and text["value"] == "två"
    progress, clip, _ = handlers.decide("reject", "s", "", "", "sv")
    assert "2 av 2" in progress and SWEDISH["done"] in clip
    assert handlers.decide("accept", "s", "", "", "en")[1].startswith("<p id='done'")
    assert {name: one.after for name, one in corrections.read(handlers.queue._path).items()} == {"a": "hej då", "b": ""}


def test_decision_is_about_the_clip_that_was_heard(handlers, monkeypatch):
    path = handlers.queue._path
    assert "hej" in handlers.show("s", "en")[1]
    Queue([*handlers.queue.items.values()], path, "m").decide("a", "reject", "", "another process")
    handlers.decide("accept", "s", "", "", "en")
    assert {name: one.verdict for name, one in corrections.read(path).items()} == {"a": "accept"}
    monkeypatch.setattr("pipelines.collection.review.queue.CLAIM_S", -1.0)  # a long pause: another session has it now
    handlers.show("t", "en")
    handlers.decide("correct", "s", "två tre", "", "en")
    assert corrections.read(path)["b"].after == "två tre"


def test_visitor_without_a_session_decides_nothing(handlers):
    handlers.decide("reject", None, "", "", "en")
    assert corrections.read(handlers.queue._path) == {}


def test_empty_correction_keeps_the_clip(handlers, monkeypatch):
    warned = []
    monkeypatch.setattr("gradio.Warning", lambda message, title: warned.append(message))
    handlers.show("s", "en")
    handlers.decide("correct", "s", "  ", "", "en")
    assert "needs a text" in warned[0] and corrections.read(handlers.queue._path) == {}


def test_queue_holds_training_clips_with_their_recordings(toy_settings, tmp_path, toy_cache, monkeypatch):
    monkeypatch.setattr(clips.pipeline, "run", lambda recipe, runs: toy_cache)
    loaded = clips.load(toy_settings(), tmp_path, "", 5)
    train = set(toy_cache.rows["id"][toy_cache.split("train")])
    assert len(loaded.items) == 5 and {item.id for item in loaded.items} <= train
    assert [item.score for item in loaded.items] == sorted((item.score for item in loaded.items), reverse=True)
    assert loaded.examples.keys() == {item.id for item in loaded.items}
    shown = page.Handlers(Queue(loaded.items, tmp_path / "c.csv", "m"), loaded.examples).show("s", "en")[1]
    assert "data:audio/wav;base64,UklGR" in shown


def serve(toy_recipe, toy_model, folder: Path) -> tuple[subprocess.Popen, str]:
    """Start the command; return it and the page's address."""
    command = [sys.executable, "-m", "pipelines", "review", "--recipe", str(toy_recipe), "--clips", "6"]
    command += ["--set", f"model.base={toy_model}", "--runs", str(folder / "runs"), "--to", str(folder / "c.csv")]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, env={**os.environ})
    for line in process.stdout:
        if found := re.match(r"page: (http://127\.0\.0\.1:\d+)", line):
            return process, found[1]
    raise AssertionError("the page was not served")


@pytest.mark.slow
@pytest.mark.browser
def test_keyboard_alone_reviews_and_a_killed_server_resumes(chromium, toy_recipe, toy_model, tmp_path):  # noqa: F811
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        process, address = serve(toy_recipe, toy_model, tmp_path)
        try:
            visited = browser.new_context(locale="en-GB").new_page()
            decide(visited, address, "a", 1)
            decide(visited, "", "e", 2)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process, address = serve(toy_recipe, toy_model, tmp_path)
            decide(visited, address, "r", 3)
        finally:
            process.terminate()
            process.wait()
            browser.close()
    read = corrections.read(tmp_path / "c.csv")
    assert sorted(one.verdict for one in read.values()) == ["accept", "correct", "reject"]
    (corrected,) = [one for one in read.values() if one.verdict == "correct"]
    assert corrected.after == f"{corrected.before} och mer"


def decide(visited, address: str, key: str, reviewed: int) -> None:
    """Press the keys of a decision, on a new page if there is an address, and wait until it is stored."""
    if address:
        visited.goto(address)
    visited.wait_for_selector("#before")
    visited.wait_for_function("() => document.querySelector('#review-player')?.duration > 0")
    assert visited.is_visible("#review-player")
    visited.keyboard.press(key)
    if key == "e":
        visited.keyboard.type(" och mer")
        visited.keyboard.press("Control+Enter")
    visited.wait_for_selector(f"#progress >> text={reviewed} of 6")
