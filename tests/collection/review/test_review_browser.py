"""The review page in Debian's Chromium: a decision is about the clip that was on the page and was listened to."""

from __future__ import annotations

import re

import pytest

from pipelines.collection.review import page
from pipelines.collection.review.queue import Item, Queue
from pipelines.collection.review.texts import ENGLISH
from pipelines.features.curation import corrections
from pipelines.features.sources import Example
from pipelines.inference.app import launch
from tests.inference.app.test_app_browser import FLAGS, PATIENCE_MS, chromium  # noqa: F401  a fixture

pytestmark = pytest.mark.browser

N_CLIPS = 8
HEARD = "() => document.querySelector('#review-player')?.currentTime > 1.2"


@pytest.fixture(scope="module")
def browser(chromium):  # noqa: F811
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = [*FLAGS, "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def served(tmp_path, encoded, speech):
    """The page's address and its table of decisions; the clips c0, c1, … have 3 s each."""
    items = [Item(f"c{n}", f"mening nummer {n}", f"menning {n}", float(N_CLIPS - n)) for n in range(N_CLIPS)]
    sounds = {item.id: encoded(speech(48_000, seed=n)) for n, item in enumerate(items)}
    examples = {item.id: Example(item.id, "train", item.text, sounds[item.id]) for item in items}
    table = tmp_path / "corrections.csv"
    demo = page.build(page.Handlers(Queue(items, table, "model"), examples), "sv")
    yield launch.launch(demo), table
    demo.close(verbose=False)


def visit(browser, address, **options):
    """Open the page in its own session and wait for its first clip."""
    visited = browser.new_context(locale="en-GB", **options).new_page()
    visited.set_default_timeout(PATIENCE_MS)
    visited.on("pageerror", lambda error: pytest.fail(str(error)))
    visited.goto(address)
    visited.wait_for_selector("#before")
    return visited


def clip_on(visited) -> str:
    """Return the id of the clip on a page."""
    return "c" + re.search(r"nummer (\d+)", visited.inner_text("#before"))[1]


def decided(table) -> dict[str, str]:
    return {name: one.verdict for name, one in corrections.read(table).items()}


def wait_for_next(visited, name: str) -> None:
    """Wait until the page shows another clip than `name`."""
    text = f"mening nummer {name[1:]}"
    visited.wait_for_function("text => document.querySelector('#before')?.innerText !== text", arg=text)


def test_second_press_does_not_decide_an_unheard_clip(browser, served):
    address, table = served
    visited = visit(browser, address)
    first = clip_on(visited)
    visited.wait_for_function(HEARD)
    visited.keyboard.press("a")
    wait_for_next(visited, first)
    visited.keyboard.press("a")
    visited.wait_for_function(HEARD)
    assert decided(table) == {first: "accept"}


def test_keys_of_an_answered_clip_are_about_that_clip(browser, served):
    """Press while the server still answers: the answer comes late, and both keys name the clip that was on the page."""
    address, table = served
    visited = visit(browser, address)
    first = clip_on(visited)
    visited.wait_for_function(HEARD)
    visited.evaluate("document.querySelector('#accept').click(), document.querySelector('#reject').click()")
    wait_for_next(visited, first)
    visited.wait_for_selector(f"text={ENGLISH['not_shown']}")
    assert len(decided(table)) == 1 and first in decided(table)


def test_held_key_and_typing_decide_nothing(browser, served):
    address, table = served
    visited = visit(browser, address)
    first = clip_on(visited)
    visited.wait_for_function(HEARD)
    visited.keyboard.press("e")
    visited.keyboard.type(" arbar säger b")
    assert visited.input_value("#correction textarea").endswith(" arbar säger b")
    visited.keyboard.press("Escape")
    assert visited.input_value("#correction textarea") == f"mening nummer {first[1:]}"
    visited.keyboard.down("a")
    wait_for_next(visited, first)
    visited.wait_for_function(HEARD)
    visited.keyboard.down("a")  # still held: Chromium sends repeats
    visited.wait_for_function("() => document.querySelector('#review-player').currentTime > 2")
    second = clip_on(visited)
    visited.dblclick("#skip")
    wait_for_next(visited, second)
    visited.wait_for_function(HEARD)
    visited.keyboard.press(" ")
    assert visited.evaluate("document.querySelector('#review-player').paused"), "space plays, and clicks no button"
    visited.reload()
    visited.wait_for_selector("#before")
    assert clip_on(visited) == second, "one double click skips one clip, until the page is loaded again"
    assert decided(table) == {first: "accept"}


def test_back_replaces_a_decision_in_the_table(browser, served):
    address, table = served
    visited = visit(browser, address)
    first = clip_on(visited)
    visited.wait_for_function(HEARD)
    visited.keyboard.press("r")
    wait_for_next(visited, first)
    visited.keyboard.press("b")
    visited.wait_for_selector(f"text={ENGLISH['earlier']['reject']}")
    visited.wait_for_function(HEARD)
    visited.keyboard.press("a")
    wait_for_next(visited, first)
    assert decided(table) == {first: "accept"}


def test_two_tabs_decide_on_their_own_clips(browser, served):
    address, table = served
    one = visit(browser, address)
    other = one.context.new_page()
    other.goto(address)
    other.wait_for_selector("#before")
    clips = [clip_on(one), clip_on(other)]
    assert len({*clips}) == 2
    for tab, name, key in ((other, clips[1], "r"), (one, clips[0], "a")):
        tab.bring_to_front()
        tab.wait_for_function(HEARD)
        tab.keyboard.press(key)
        wait_for_next(tab, name)
    assert decided(table) == {clips[1]: "reject", clips[0]: "accept"}
    open_on_other = clip_on(other)
    other.close()
    one.wait_for_function("() => true")
    one.reload()
    one.wait_for_selector("#before")
    assert decided(table).keys() == {*clips} and open_on_other not in clips


def test_page_comes_back_after_a_lost_connection(browser, served):
    address, table = served
    visited = visit(browser, address)
    visited.wait_for_function(HEARD)
    visited.fill("#reviewer :is(input, textarea)", "Åsa")
    visited.keyboard.press("Escape")
    visited.context.set_offline(True)
    visited.keyboard.press("a")
    visited.wait_for_selector(".toast-body")
    assert decided(table) == {}
    with visited.expect_navigation():
        visited.context.set_offline(False)
    visited.wait_for_selector("#before")
    visited.wait_for_function(HEARD)
    name = clip_on(visited)
    visited.keyboard.press("a")
    wait_for_next(visited, name)
    assert decided(table) == {name: "accept"}
    assert [row["reviewer"] for row in corrections.open_log(table).read()] == ["Åsa"]
