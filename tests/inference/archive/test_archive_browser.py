"""The archive page in Chromium, from file://: search, playback, hostile names, keyboard, accessibility."""

import json
import os
import shutil

import numpy as np
import pytest

from pipelines.inference.archive import folder, page

pytestmark = pytest.mark.browser

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run")
NAMES = ("intervju 1.wav", "möte 50% #2?.wav", "<img src=x onerror=alert(1)> 'a' \"b\".wav")
SENTENCES = ("Båten går, klockan sju.", "Hon köper BRÖD på torget.", "</script><script>document.title='x'</script> bål")
WORD_S = 2.0


@pytest.fixture(scope="module")
def archive(tmp_path_factory, encoded):
    """A page of NAMES; each recording says all SENTENCES, a word every two seconds. A fourth has no times of words."""
    root = tmp_path_factory.mktemp("archive")
    sound = encoded(0.1 * np.sin(np.arange(16_000 * 40) / 20).astype(np.float32))
    for name in (*NAMES, "utan.wav"):
        (root / name).write_bytes(sound)
        segments, start = [], 0.0
        for text in SENTENCES:
            words = [
                {"word": word, "start": start + WORD_S * n, "probability": 0.9 - 0.8 * (word == "torget.")}
                for n, word in enumerate(text.split())
            ]
            segments.append({"start": start, "text": text, "words": words if name in NAMES else []})
            start += WORD_S * len(words)
        (root / name).with_suffix(".json").write_text(json.dumps({"segments": segments}))
    (root / "gone.wav").write_bytes(b"no sound")
    shutil.copy(root / "intervju 1.json", root / "gone.json")
    page.write(root / "archive.html", folder.find_entries(root))
    return root / "archive.html"


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium or no playwright here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, archive):
    """`visit(locale="sv-SE")`: the opened page; afterwards, no error and no request to a server may have occurred."""
    problems, contexts = [], []

    def open_page(**options):
        context = chromium.new_context(**{"locale": "en-GB", **options})
        contexts.append(context)
        opened = context.new_page()
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("console", lambda message: problems.append(message.text))
        opened.on("request", lambda request: request.url.startswith("file:") or problems.append(request.url))
        opened.goto(archive.as_uri())
        return opened

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def search(opened, query: str) -> list[str]:
    """Return the marked texts of the matches."""
    opened.fill("#query", query)
    opened.wait_for_timeout(150)
    return opened.locator(".hit mark").all_text_contents()


def test_search_finds_words_over_punctuation_and_case(visit):
    opened = visit()
    assert opened.title() == "Transcripts"
    assert search(opened, "GÅR klockan") == ["går, klockan"] * 5
    assert opened.text_content("#status") == "5 matches in 5 recordings."
    assert search(opened, "bröd") == ["BRÖD"] * 5
    assert search(opened, "brod") == [] and search(opened, "bal") == []
    opened.check("#accents")
    assert search(opened, "brod") == ["BRÖD"] * 5
    opened.uncheck("#accents")
    assert search(opened, "bå") == ["Bå", "bå"] * 5
    opened.check("#whole")
    assert search(opened, "bå") == [] and search(opened, "bål") == ["bål"] * 5
    assert search(opened, "b") == [] and "at least two letters" in opened.text_content("#status")
    for odd in ("-.", "</script>", "[(", "\\", "((("):
        search(opened, odd)
    opened.fill("#names", "50% #2")
    assert search(opened, "bröd") == ["BRÖD"]


def test_hostile_names_and_texts_are_shown_as_text(visit):
    opened = visit()
    names = opened.locator("h2").all_text_contents()
    assert NAMES[2] in names
    opened.locator("summary").first.click()
    assert "document.title='x'" in opened.text_content(".text")
    assert opened.title() == "Transcripts" and opened.locator("img, main script").count() == 0


@pytest.mark.parametrize(("name", "seconds"), [*((name, 8.0 + 2 * WORD_S) for name in NAMES), ("utan.wav", 8.0)])
def test_match_plays_from_its_word(visit, name: str, seconds: float):
    opened = visit()
    opened.fill("#names", name)
    search(opened, "bröd")
    opened.click(".hit")
    opened.wait_for_function("() => !audio.paused && audio.readyState > 1")
    assert seconds - 0.3 < opened.evaluate("audio.currentTime") < seconds + 1.5
    assert opened.text_content("#playing") == name
    if name in NAMES:
        opened.wait_for_function("() => document.querySelector('#speaking .spoken')?.textContent === 'BRÖD'")


def test_recording_that_cannot_be_played_is_named(visit):
    opened = visit()
    opened.fill("#names", "gone")
    search(opened, "bröd")
    opened.click(".hit")
    opened.wait_for_selector("#failed:not([hidden])")
    assert "cannot be played" in opened.text_content("#failed")


def test_keyboard_moves_between_matches(visit):
    opened = visit()
    opened.keyboard.press("/")
    opened.keyboard.type("bröd")
    opened.wait_for_selector(".hit")
    for key in ("ArrowDown", "ArrowDown"):
        opened.keyboard.press(key)
    assert opened.evaluate("document.activeElement === document.querySelectorAll('.hit')[1]")
    opened.keyboard.press("Enter")
    opened.wait_for_selector("#player:not([hidden])")
    opened.keyboard.press("Escape")
    assert opened.evaluate("document.activeElement.id") == "query"


def test_page_is_accessible_in_swedish_on_a_phone(visit):
    from axe_playwright_python.sync_playwright import Axe

    for scheme in ("light", "dark"):
        opened = visit(locale="sv-SE", viewport={"width": 390, "height": 844}, color_scheme=scheme)
        search(opened, "torget")
        opened.locator("summary").first.click()
        opened.locator(".hit").first.click()
        assert "träffar i" in opened.text_content("#status")
        assert opened.locator(".unsure").count() > 0
        assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # axe-core's script cannot be added to a page whose policy forbids it: a copy without the policy is checked
        results = Axe().run(_without_policy(opened))
        assert results.violations_count == 0, results.generate_report()


def _without_policy(opened):
    opened.evaluate("document.querySelector('meta[http-equiv]').remove()")
    return opened


def test_thousand_recordings_are_searched_while_typing(chromium, tmp_path):
    from pipelines.inference.archive.page import Entry
    from pipelines.inference.archive.transcripts import Line

    words = "det var en gång en båt som gick över sjön till staden".split()
    lines = [Line(4.0 * n, " ".join(words), "", [4.0 * n + 0.3 * k for k in range(12)], [0.9] * 12) for n in range(60)]
    lines.append(Line(300.0, "nålen"))
    page.write(tmp_path / "archive.html", [Entry(f"{n}.wav", tmp_path / f"{n}.wav", lines) for n in range(1000)])
    assert (tmp_path / "archive.html").stat().st_size < 12e6
    opened = chromium.new_page()
    opened.goto((tmp_path / "archive.html").as_uri())
    for query, count in (("nålen", "1,000 matches"), ("båt", "60,000 matches"), ("finns inte", "0 matches")):
        opened.fill("#query", query)
        opened.wait_for_function("count => find('status').textContent.startsWith(count)", arg=count)
        elapsed_ms = opened.evaluate("() => { const t = performance.now(); search(); return performance.now() - t }")
        assert elapsed_ms < 1_000, "about 50 ms on an idle machine"
    assert opened.locator(".card").count() == 0
    search(opened, "nålen")
    assert opened.locator(".card").count() == 30
    opened.click("#more")
    assert opened.locator(".card").count() == 60
    opened.close()
