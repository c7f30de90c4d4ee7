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
    names = {name: set(re.findall(r"{(\w+)", str(text))) for name, text in ENGLISH.items()}
    assert names == {name: set(re.findall(r"{(\w+)", str(text))) for name, text in SWEDISH.items()}
    assert ENGLISH["earlier"].keys() == SWEDISH["earlier"].keys() == {*corrections.VERDICTS}


@pytest.fixture
def messages(monkeypatch):
    shown = []
    monkeypatch.setattr("gradio.Warning", lambda message, title: shown.append(message))
    return shown


def pressed(handlers, session="s", heard=True):
    """Return what the script of a session's page sends with a key."""
    showing = handlers.sessions.show(session)
    return {"token": showing.token if showing else "", "heard": heard}


def verdicts(handlers):
    return {name: one.verdict for name, one in corrections.read(handlers.queue._path).items()}


def test_decision_is_stored_and_the_next_clip_shown(handlers):
    shown = handlers.show("s", "en")[1]
    assert "<mark>hej</mark>" in shown and "<mark>nej</mark>" in shown and "<img" not in shown
    assert ENGLISH["no_audio"] in shown
    _, clip, text = handlers.decide("correct", "s", pressed(handlers), "hej då", "Åsa", "sv")
    assert SWEDISH["no_audio"] in clip and text["value"] == "två"
    progress, clip, _ = handlers.decide("reject", "s", pressed(handlers), "", "", "sv")
    assert "2 av 2" in progress and SWEDISH["done"] in clip
    assert {name: one.after for name, one in corrections.read(handlers.queue._path).items()} == {"a": "hej då", "b": ""}


def test_decision_is_about_the_clip_that_was_heard(handlers, monkeypatch):
    path = handlers.queue._path
    assert "hej" in handlers.show("s", "en")[1]
    on_page = pressed(handlers)
    Queue([*handlers.queue.items.values()], path, "m").decide("a", "reject", "", "another process")
    handlers.decide("accept", "s", on_page, "", "", "en")
    assert verdicts(handlers) == {"a": "accept"}
    monkeypatch.setattr("pipelines.collection.review.queue.CLAIM_S", -1.0)  # a long pause: another session has it now
    on_page = pressed(handlers)
    handlers.show("t", "en")
    handlers.decide("correct", "s", on_page, "två tre", "", "en")
    assert corrections.read(path)["b"].after == "två tre"


def test_press_for_an_earlier_clip_decides_nothing(handlers, messages):
    handlers.show("s", "en")
    first = pressed(handlers)
    handlers.decide("accept", "s", first, "", "", "en")
    for verdict in ("accept", "correct", "reject"):
        _, clip, text = handlers.decide(verdict, "s", first, "två", "", "en")
        assert "id='before'" in clip and text["value"] == "två", "the page is brought up to date"
    for action in (handlers.skip, handlers.back):
        assert "två" in action("s", first, "en")[1]
    assert messages == [ENGLISH["not_shown"]] * 5 and verdicts(handlers) == {"a": "accept"}


@pytest.mark.parametrize("sent", [None, [], "a", {}, {"token": "a", "heard": True}, {"token": 1}, {"heard": True}])
def test_press_without_the_clips_token_decides_nothing(handlers, messages, sent):
    handlers.show("s", "en")
    handlers.decide("reject", "s", sent, "", "", "en")
    handlers.skip("s", sent, "en")
    assert verdicts(handlers) == {} and len(messages) == 2


def test_unheard_clip_is_not_decided_on(handlers, messages):
    shown = handlers.decide("accept", "s", pressed(handlers, heard=False), "", "", "sv")
    assert messages == [SWEDISH["listen_first"]] and verdicts(handlers) == {}
    assert not any(isinstance(value, str) for value in shown), "the player goes on, and a typed text stays"


def test_changed_text_is_not_accepted(handlers, messages):
    handlers.decide("accept", "s", pressed(handlers), "något annat", "", "en")
    assert messages == [ENGLISH["text_changed"]] and verdicts(handlers) == {}
    handlers.decide("accept", "s", pressed(handlers), f" hej  {SCRIPT}", "", "en")
    assert verdicts(handlers) == {"a": "accept"}


def test_back_shows_the_decision_that_a_new_one_replaces(handlers, messages):
    handlers.back("s", pressed(handlers), "en")
    assert messages == [ENGLISH["no_earlier"]]
    handlers.decide("correct", "s", pressed(handlers), "hej då", "", "en")
    handlers.decide("accept", "s", pressed(handlers), "två", "", "en")
    _, clip, text = handlers.back("s", {"token": ""}, "sv")
    assert SWEDISH["earlier"]["accept"] in clip and text["value"] == "två"
    _, clip, text = handlers.back("s", pressed(handlers), "en")
    assert ENGLISH["earlier"]["correct"] in clip and text["value"] == "hej då"
    _, clip, _ = handlers.decide("reject", "s", pressed(handlers), "", "", "en")
    assert verdicts(handlers) == {"a": "reject", "b": "accept"} and ENGLISH["done"] in clip


def test_skipped_clip_is_left_to_others(handlers):
    handlers.show("s", "en")
    assert "två" in handlers.skip("s", pressed(handlers), "en")[1]
    assert ENGLISH["left"].format(left=2) in handlers.skip("s", pressed(handlers), "en")[1]
    assert "hej" in handlers.show("t", "en")[1] and verdicts(handlers) == {}


def test_clip_of_a_closed_page_is_offered_at_once(handlers):
    assert "hej" in handlers.show("s", "en")[1]
    on_page = pressed(handlers)
    handlers.sessions.leave("s")
    assert "hej" in handlers.show("t", "en")[1]
    handlers.decide("accept", "s", on_page, "", "", "en")  # its connection came back
    assert verdicts(handlers) == {"a": "accept"}


def test_open_page_does_not_expire(handlers):
    gr = pytest.importorskip("gradio")
    states = [block for block in page.build(handlers, "sv").blocks.values() if isinstance(block, gr.State)]
    assert states and all(state.time_to_live > 86_400 for state in states), "a review takes hours"


def test_visitor_without_a_session_decides_nothing(handlers):
    handlers.decide("reject", None, pressed(handlers), "", "", "en")
    assert verdicts(handlers) == {}


def test_empty_correction_keeps_the_clip(handlers, messages):
    handlers.show("s", "en")
    handlers.decide("correct", "s", pressed(handlers), "  ", "", "en")
    assert "needs a text" in messages[0] and verdicts(handlers) == {}


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
    visited.wait_for_function("() => document.querySelector('#review-player').currentTime > 1.2")
    visited.keyboard.press(key)
    if key == "e":
        visited.keyboard.type(" och mer")
        visited.keyboard.press("Control+Enter")
    visited.wait_for_selector(f"#progress >> text={reviewed} of 6")
