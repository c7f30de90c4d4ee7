"""The worker's page as its user meets it: a server, Debian's Chromium, the keyboard and a phone."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.inference.app.test_app_browser import FLAGS, chromium  # noqa: F401  a fixture
from tests.worker.test_worker import NUMBERS, TOKEN, running

pytestmark = pytest.mark.browser
SCRIPT = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def browser(chromium):  # noqa: F811
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """An empty page; at the end the console holds no error but that requests were refused, and nothing left."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, errors, requests = context.new_page(), [], []
    page.set_default_timeout(60_000)
    page.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(f"dialog {dialog.message}"))
    page.on("request", lambda request: requests.append(request.url))
    yield page
    context.close()
    assert [error for error in errors if not re.search(r"status of (401|409) ", error)] == []
    assert [url for url in requests if not url.startswith(("http://127.0.0.1:", "data:"))] == []


def shows(page, state: str) -> None:
    page.wait_for_function("state => document.getElementById('state').textContent.startsWith(state)", arg=state)


def test_page_works_with_the_keyboard(page, tmp_path):
    with running(tmp_path, token=TOKEN) as client:
        page.goto(client.url)
        page.wait_for_selector("#token:focus")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#said.bad >> text=not the token")
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        shows(page, "Ready")
        assert page.is_hidden("#door")

        page.focus("section[aria-labelledby=title-train] button")
        page.keyboard.press("Enter")
        page.wait_for_selector("#said.bad >> text=send the task dataset first")
        client.do("dataset", NUMBERS)
        page.fill("input[name=say]", SCRIPT)
        page.keyboard.press("Enter")
        page.wait_for_selector("#log >> text=onerror")
        assert page.evaluate("document.querySelectorAll('#log img, #log script').length") == 0, "text is text"
        page.select_option("select[name=how]", "broken")
        page.click("section[aria-labelledby=title-eval] button")
        shows(page, "Error: eval failed unexpectedly")

        page.fill("input[name=steps]", "2")
        page.keyboard.press("Enter")
        page.wait_for_selector("#facts dd >> text=3.75")
        shows(page, "Ready")
        page.set_input_files("input[name=audio]", {"name": "a.wav", "mimeType": "audio/wav", "buffer": b"12345"})
        page.click("section[aria-labelledby=title-test] button")
        page.wait_for_selector("#said >> text=bytes: 5")

        client.post("train", {"steps": 500, "pause_s": 0.05})
        shows(page, "Busy training")
        assert page.get_attribute("section[aria-labelledby=title-save] button", "aria-disabled") == "true"
        if os.environ.get("LAB_SCREENSHOT"):
            page.screenshot(path=Path(os.environ["LAB_SCREENSHOT"]), full_page=True)
        page.focus("#cancel")
        page.keyboard.press("Enter")
        shows(page, "Ready")
        assert page.is_hidden("#cancel") and page.evaluate("document.activeElement.id") == "state"


def test_page_fits_a_phone_and_reconnects(page, tmp_path):
    page.set_viewport_size({"width": 360, "height": 740})
    with running(tmp_path) as client:
        page.goto(client.url)
        page.wait_for_selector("#tasks section")
        shows(page, "Ready")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        unnamed = "[...document.querySelectorAll('input, select')].filter(one => !one.labels.length).length"
        assert page.evaluate(unnamed) == 0
        small = (
            "[...document.querySelectorAll('button')].filter(one => one.offsetHeight && one.offsetHeight < 44).length"
        )
        assert page.evaluate(small) == 0, "a finger finds them"
    shows(page, "not connected")
