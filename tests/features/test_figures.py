"""Tables and plots of notebook 01."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines import recipes
from pipelines.features import figures
from pipelines.features.sources import Example, NoAudio
from pipelines.whisper.model import processor


def test_recipe_table_shows_changes_and_folds_the_rest(toy_settings):
    shown = figures.recipe_table(toy_settings({"training.seed": 5})).data
    table, folded = shown.split("<details>")
    assert "training.seed" in table and ">5<" in table and ">42<" in table, "the value and its default"
    assert "training.scheduler" not in table and "training.scheduler = &quot;linear&quot;" in folded


def test_recipe_with_defaults_has_a_table_of_its_name():
    assert figures.recipe_table(recipes.load("base")).data.count("<tr>") >= 2


def test_clip_table_has_a_player_per_clip_and_escapes_text(encoded):
    wav = encoded(np.zeros(1_600, np.float32))
    clips = [Example("a", "train", "<b>Hej</b>", wav, "anna"), Example("b", "train", "Nej", NoAudio("missing", ""))]
    shown = figures.clip_table(clips).data
    assert shown.count("<audio") == 1
    assert "&lt;b&gt;Hej" in shown and "<b>" not in shown


def test_curation_without_effect_is_one_line(toy_cache):
    assert "<td" not in figures.curation_table(toy_cache).data
    assert "Steps that found nothing: text, leak_speaker" in figures.curation_table(toy_cache).data
    assert f"All {len(toy_cache.rows)} clips are used." in figures.rejected_table(toy_cache).data


def test_tokens_are_shown_as_stored_and_as_read(toy_cache, toy_settings):
    tokenizer = processor(toy_settings()).tokenizer
    row = figures.row_with(toy_cache, "ö")
    assert "ö" in toy_cache.rows["text"].iloc[row].lower()
    shown = figures.token_table(toy_cache.labels(row), tokenizer).data
    assert "Ã¶" in shown and "ö" in shown and "␣" in shown
    assert shown.count("control") == 4, "language, task, no timestamps, end"


def test_token_with_half_a_letter_says_so(toy_settings):
    tokenizer = processor(toy_settings()).tokenizer
    half = tokenizer.convert_tokens_to_ids("Ã")
    assert "part of a letter" in figures.token_table([half], tokenizer).data


def test_row_without_the_letters_is_the_first(toy_cache):
    assert figures.row_with(toy_cache, "☃") == 0


def test_durations_reach_to_thirty_seconds(toy_cache):
    (axes,) = figures.durations(toy_cache).axes
    assert axes.get_xlim() == (0, 30)


@pytest.mark.parametrize("gone", [False, True], ids=["in the source", "gone"])
def test_sound_shows_waveform_log_mel_and_words(toy_cache, toy_settings, gone: bool):
    cache = replace(toy_cache, rows=toy_cache.rows.assign(id="other")) if gone else toy_cache
    upper, middle, lower, *_ = figures.sound(toy_settings(), cache, 2).axes
    assert upper.get_xlim() == middle.get_xlim() == lower.get_xlim()
    assert len(middle.images) == 1
    assert [text.get_text() for text in lower.texts] == cache.rows["text"].iloc[2].split()
    has_wave = any(len(line.get_xdata()) > 1_000 for line in upper.lines)
    assert has_wave is not gone
    assert ("<audio" in figures.clip_player(toy_settings(), cache, 2).data) is not gone


def test_words_are_left_out_for_large_weights(toy_cache, toy_settings, monkeypatch):
    monkeypatch.setattr(figures, "_MAX_ALIGNER_BYTES", 10)
    assert not list(figures.sound(toy_settings(), toy_cache, 0).axes[2].texts)


@pytest.mark.parametrize("interactive", [False, True])
def test_menu_of_clips_is_only_in_interactive_notebooks(toy_cache, toy_settings, monkeypatch, interactive: bool):
    import IPython.display

    displayed, updated = [], []

    def display(item, display_id=False):
        displayed.append(item)
        return SimpleNamespace(update=updated.append)

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(figures.environment, "interactive", lambda: interactive)
    figures.pick_clip(toy_settings(), toy_cache, 2)
    kinds = [type(item).__name__ for item in displayed]
    assert kinds == [*(["Dropdown"] if interactive else []), "HTML", "NotebookFigure"]
    if interactive:
        menu = displayed[0]
        assert (toy_cache.rows["text"].iloc[2], 2) in menu.options
        menu.value = 0
        assert [type(item).__name__ for item in updated] == ["HTML", "NotebookFigure"]


def test_bars_show_the_shares_of_splits_and_bytes(toy_cache):
    table = figures.corpus_table(toy_cache)
    assert {len(bar) for bar in table["share"]} == {20}
    assert table["share"].map(lambda bar: bar.count("█")).sum() == pytest.approx(20, abs=1)
    assert figures.size_table(toy_cache)[""].tolist()[0] == "█" * 20
