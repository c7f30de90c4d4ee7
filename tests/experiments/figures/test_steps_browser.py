"""The player of texts by training step, in a real browser, with and without JavaScript."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from pipelines.experiments import figures
from pipelines.training.callbacks import samples

pytestmark = pytest.mark.browser
STEPS = (0, 4, 8)


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: sudo apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def player(toy_cache, tmp_path_factory) -> str:
    run = tmp_path_factory.mktemp("run")
    ids = toy_cache.rows["id"][toy_cache.rows["split"] == "validation"].tolist()
    for step in STEPS:
        samples.add(run, step, ids, [f"skrivet efter {step}"] * len(ids))
    return figures.samples(SimpleNamespace(uri=str(run / "model"), history=[]), toy_cache).data


def test_player_goes_step_by_step_and_stops_at_the_last(browser, player: str):
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.clock.install()
    page.set_content(player)
    visible = page.locator("tr[data-step]:visible")
    assert visible.count() == samples.CLIPS + 1
    assert "skrivet efter 0" in page.inner_text("table")
    page.click("button[title='one step on']")
    assert page.inner_text("output") == "step 4"
    page.click("button[title='play']")
    page.clock.run_for(10_000)
    assert page.inner_text("output") == "step 8"
    assert page.locator("button[title='play']").count() == 1, "it stopped"
    page.click("text=all steps")
    assert visible.count() == len(STEPS) * (samples.CLIPS + 1)
    assert errors == []


def test_table_has_all_steps_without_javascript(browser, player: str):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.set_content(player)
    assert page.locator("tr[data-step]:visible").count() == len(STEPS) * (samples.CLIPS + 1)
    assert page.locator("button").count() == 0
