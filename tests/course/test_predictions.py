"""Cells "predict, try, check": what is measured, and what a prediction is told."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sample_reports

from pipelines.course import faulty_corpus, predictions
from pipelines.experiments.comparison.compare import compare
from pipelines.features.sources import Example
from pipelines.infra.errors import LabError
from pipelines.speech import audio_cells


@pytest.mark.parametrize(
    ("prediction", "within", "line"),
    [
        (None, 2, "Measured: 12.5 s. To compare, set PREDICTION to a number and run this cell again."),
        (..., 2, "Measured: 12.5 s. To compare, set PREDICTION to a number and run this cell again."),
        (7, 2, "You predicted 7 s, measured: 12.5 s. That is right within a factor of 2."),
        ("7,0", 2, "You predicted 7 s, measured: 12.5 s. That is right within a factor of 2."),
        (np.float32(26), 2, "You predicted 26 s, measured: 12.5 s. That is too high."),
        (0, 2, "You predicted 0 s, measured: 12.5 s. That is too low."),
        (12, 0.5, "You predicted 12 s, measured: 12.5 s. That is right within 0.5."),
        (11, 0.5, "You predicted 11 s, measured: 12.5 s. That is too low."),
        ("1200 %", 0.5, "You predicted 12 s, measured: 12.5 s. That is right within 0.5."),
    ],
)
def test_prediction_is_compared_with_tolerance(prediction, within: float, line: str, capsys):
    predictions.compare(prediction, 12.5, within=within, unit=" s")
    assert capsys.readouterr().out == f"{line}\n"


def test_reason_is_printed_with_a_prediction_only(capsys):
    predictions.compare(None, 1, within=0.1, why="Because.")
    assert "Because." not in capsys.readouterr().out
    predictions.compare(1, 1, within=0.1, why="Because.")
    assert "Because." in capsys.readouterr().out


@pytest.mark.parametrize(
    "prediction",
    ["much", True, 10**400, float("nan"), float("inf"), "", [1], {}, 1j],
    ids=lambda value: repr(value)[:9],
)
def test_prediction_that_is_no_number_is_one_line(prediction):
    with pytest.raises(LabError, match=r"^PREDICTION must be a number, such as 0\.5, or None .*, got .*$"):
        predictions.compare(prediction, 1, within=0.1)


def test_padding_is_the_share_of_all_frames(toy_cache, capsys):
    frames = toy_cache.rows["frames"]
    predictions.check_padding(toy_cache, 1 - frames.sum() / (3_000 * len(frames)))
    assert "right within 0.05" in capsys.readouterr().out


def test_tokens_are_those_of_the_text_alone(toy_cache, capsys):
    labels = toy_cache.labels(0)  # language, task, no timestamps, text, end
    predictions.check_tokens(toy_cache, 0, len(labels) - 4)
    assert f"measured: {len(labels) - 4} tokens. That is right" in capsys.readouterr().out


@pytest.fixture(scope="module")
def curated(toy_settings):
    return faulty_corpus.curate(toy_settings())


def test_each_curation_step_finds_its_fault(curated):
    steps, clips = curated
    assert [step["step"] for step in steps if not step["dropped"] and not step["changed"]] == []
    assert {clip["fault"]: clip["found by"] for clip in clips} == {
        "the file is missing": "missing",
        "no transcript": "no_text",
        "too short": "too_short",
        "too long": "too_long",
        "digital silence": "silent",
        "very quiet": "quiet",
        "clipped": "clipped",
        "noise": "noisy",
        "silence around it": "silence",
        "cut recording": "fast_speech",
        "by a test speaker": "leak_speaker",
        "the file holds a text": "unreadable",
        "cut transcript": "slow_speech",
        "a sentence of the test": "leak_sentence",
        "a recording of the test": "leak_audio",
        "the same sentence twice": "duplicate_sentence",
        "the same recording twice": "duplicate_audio",
        "another clip's transcript": "",
    }


def test_clips_without_a_fault_are_kept_and_not_listed(curated):
    _, clips = curated
    assert all(clip["fault"] for clip in clips)
    assert len(faulty_corpus.clips()) - len(clips) == 6


def test_check_of_curation_shows_players_and_steps(toy_settings, curated, monkeypatch, capsys):
    monkeypatch.setattr(faulty_corpus, "curate", lambda recipe: curated)
    shown = predictions.check_curation(toy_settings(), 18).data
    assert "measured: 17 of 18 faulty clips. That is right" in capsys.readouterr().out
    assert shown.count("<audio") == 15, "three have no sound, or one that is too long"
    assert "leak_audio" in shown and "duplicate_audio" in shown


def test_padding_to_30_s_takes_longer(toy_settings, toy_cache, capsys):
    predictions.check_padding_time(toy_settings(), toy_cache, None)
    shown = capsys.readouterr().out
    assert float(shown.partition("Measured: ")[2].partition(" times")[0]) > 1


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    wrong = sample_reports.wrong(lambda row: int(row.speaker[1:]) % 5)
    scored = sample_reports.report(tmp_path_factory.mktemp("runs"), "raw", wrong)
    return replace(scored, raw=replace(scored.raw, wer=0.5))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda report: report.score.wer, "Right: the lab has "),
        (lambda report: report.raw.wer, "This is the WER as written."),
        (lambda report: report.predictions["wer"].mean(), "This is the mean of the clips' rates."),
        (lambda report: 0.9, "Not yet: you have 0.900, the lab has "),
    ],
    ids=["right", "as written", "mean", "other"],
)
def test_wer_of_a_student_is_compared_with_the_labs(report, wrong, hint: str, capsys):
    predictions.check_wer(wrong(report), report)
    assert hint in capsys.readouterr().out


def test_wer_divided_by_written_words_is_named(report, capsys):
    more = replace(report, score=replace(report.score, insertions=90))
    predictions.check_wer(more.score.wer * more.score.words / (more.score.words + 90), more)
    assert "Divide by those of the references." in capsys.readouterr().out


def test_wer_that_is_no_number_is_one_line(report):
    with pytest.raises(LabError, match=r"^my_wer must be a number, such as 0\.5, got 'high'$"):
        predictions.check_wer("high", report)


def test_token_losses_are_those_of_rare_words(toy_settings, toy_cache, toy_model, capsys):
    (axes,) = predictions.check_token_losses(toy_settings(), toy_cache, str(toy_model), None).axes
    before, after = axes.containers
    assert [bar.get_height() for bar in before] == [bar.get_height() for bar in after], "the same model on both sides"
    assert re.search(r"[\d.]+ per token before training\.\nMeasured: [\d.]+ per token\.", capsys.readouterr().out)


def test_large_model_without_gpu_is_left_out_in_a_line(toy_settings, toy_cache, toy_model, monkeypatch, capsys):
    monkeypatch.setattr(predictions, "_MAX_BYTES_ON_CPU", 10)
    predictions.check_padding_time(toy_settings(), toy_cache, 3)
    assert predictions.check_token_losses(toy_settings(), toy_cache, str(toy_model), 3) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(r"This part is left out: .+ is too large for it without a GPU\.", line) for line in lines)


def test_machine_without_espeak_leaves_the_corpus_out(toy_settings, monkeypatch, capsys):
    def fail(*arguments):
        raise LabError("espeak-ng is missing. Run: pip install espeakng-loader")

    monkeypatch.setattr(faulty_corpus.espeak, "synthesise", fail)
    assert predictions.check_curation(toy_settings(), 3) is None
    assert capsys.readouterr().out == (
        "This part is left out: espeak-ng is missing. Run: pip install espeakng-loader\n"
    )


@pytest.mark.parametrize(
    ("speakers", "line"),
    [
        (None, "12 speakers: 6 better, 6 equal, 0 worse."),
        ("", "The speakers of this test set are unknown."),
    ],
)
def test_speakers_are_counted_over_all_seeds(tmp_path, speakers: str | None, line: str, capsys):
    table = sample_reports.rows() if speakers is None else sample_reports.rows().assign(speaker=speakers)

    def better(row):
        return 2 if row.gender == "female" else 3

    reports = [
        sample_reports.report(tmp_path, name, sample_reports.wrong(errors), table=table, seed=seed)
        for name, seed, errors in (("a", 1, 3), ("a", 2, 3), ("b", 1, 3), ("b", 2, better))
    ]
    predictions.check_speakers(compare([one.folder for one in reports], runs=tmp_path), 6)
    assert capsys.readouterr().out.splitlines()[0] == line


def test_noise_leaves_out_clips_that_cannot_be_scored(capsys):
    tone = audio_cells.encode(0.1 * np.sin(np.arange(1_600, dtype=np.float32)), 16_000)
    silence = audio_cells.encode(np.zeros(1_600, np.float32), 16_000)
    sounds = {"tone": (tone, "Hej."), "silent": (silence, "Hej."), "text": (b"no audio", "Hej."), "empty": (tone, "")}
    examples = [Example(name, "test", text, sound) for name, (sound, text) in sounds.items()]
    model = SimpleNamespace(transcribe=lambda sound: SimpleNamespace(text="Hej."))
    assert predictions.check_noise(model, examples, 0).data.count("<audio") == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" is left out: ")[0] for line in lines[:2]] == ["text", "empty"]
    assert lines[2] == "WER of these 2 clips:"
    assert lines[3].startswith("without noise  █") and lines[3].endswith(" 0.00")
    assert predictions.check_noise(model, [], 0) is None
    assert capsys.readouterr().out == "There is no clip that can be scored.\n"


def test_bars_have_the_ratio_of_their_values(capsys):
    predictions.print_bars({"base": 4.0, "tuned": 1.0, "none": 0.0}, ".1f", " s")
    assert capsys.readouterr().out.splitlines() == [
        f"base   {40 * '█'} 4.0 s",
        f"tuned  {10 * '█'} 1.0 s",
        "none   █ 0.0 s",
    ]


@pytest.mark.parametrize(("could_show", "words"), [(None, "too few speakers"), (0.0, "the same number of errors")])
def test_power_that_cannot_be_computed_is_told(could_show: float | None, words: str, capsys):
    finding = SimpleNamespace(could_show=could_show, difference=SimpleNamespace(delta=0.0))
    assert predictions.check_detectable(SimpleNamespace(findings=[None, finding]), 0.03) is None
    assert words in capsys.readouterr().out
