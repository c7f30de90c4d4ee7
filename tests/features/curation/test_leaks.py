from __future__ import annotations

import numpy as np
import pytest

from pipelines.features.curation import leaks
from pipelines.features.curation.leaks import AudioLeak, HeldOut, SentenceLeak, SpeakerLeak, fingerprint
from pipelines.features.curation.selection import Drop, select
from pipelines.features.sources import Example
from pipelines.infra.errors import LabError
from pipelines.speech import audio
from pipelines.whisper import log_mel
from pipelines.whisper.log_mel import LogMel


def row(name: str, split: str, text: str = "", speaker: str = "") -> Example:
    return Example(name, split, text or f"Mening {name}.", b"", speaker)


def dropped(rows: list[Example], held_out: HeldOut | None = None) -> dict[str, str]:
    held_out = held_out or HeldOut()
    selection = select(lambda: iter(rows), [SpeakerLeak(held_out), SentenceLeak(held_out)])
    return {name: drop.reason for name, drop in selection.dropped.items()}


def test_planted_leaks_and_only_they_are_dropped():
    rows = [row(f"t{n}", "test", f"Sanningen om {n}.", f"tess{n % 4}") for n in range(20)]
    rows += [row(f"v{n}", "validation", f"Villan nummer {n}.", f"vera{n % 4}") for n in range(20)]
    rows += [row(f"a{n}", "train", f"Allt om {n}.", f"anna{n % 9}") for n in range(200)]
    planted = {f"s{n}": "leak_speaker" for n in range(7)} | {f"m{n}": "leak_sentence" for n in range(6)}
    rows += [row(f"s{n}", "train", f"Ny mening {n}.", ("tess1", "vera3")[n % 2]) for n in range(7)]
    sentences = ("SANNINGEN om 3", "sanningen, om: 4!", "”Villan nummer 5”", "villan  nummer 6", "Villan nummer 7?")
    rows += [row(f"m{n}", "train", text, "bo") for n, text in enumerate((*sentences, "Sanningen om\xad 8."))]
    for order in (rows, rows[::-1]):  # held-out rows may come last
        assert dropped(order) == planted


def test_row_with_two_leaks_is_dropped_once():
    rows = [row("t", "test", "Hej.", "tess"), row("a", "train", "hej", "tess"), row("b", "train", "nej", "bo")]
    assert dropped(rows) == {"a": "leak_speaker"}


def test_corpus_of_one_speaker_keeps_it_and_no_sentence():
    rows = [row("t", "test", "Hej.", "me"), row("a", "train", "hej", "me"), row("b", "train", "nej", "me")]
    assert dropped(rows) == {"a": "leak_sentence"}
    elsewhere = HeldOut()
    elsewhere.add("test.tsv, row 1", "me", "Det regnar.")
    assert dropped(rows, elsewhere) == {"a": "leak_speaker", "b": "leak_speaker"}


@pytest.mark.parametrize(("n_speakers", "leaks"), [(2, 0), (5, 0), (6, 12)])
def test_few_speakers_that_are_all_held_out_are_kept(n_speakers, leaks):
    rows = [row(f"{split}{n}", split, speaker=f"s{n % n_speakers}") for n in range(12) for split in ("train", "test")]
    assert len(dropped(rows)) == leaks


def test_speakers_of_divided_sentences_are_kept_in_a_mix():
    own = [row(f"a{n}", ("train", "test")[n % 2], speaker="own/me") for n in range(4)]
    others = [row(f"b{n}", "train", speaker=f"nst/{n}") for n in range(9)]
    steps = [SpeakerLeak(HeldOut(), frozenset({"own/me"}))]
    assert select(lambda: iter(own + others), steps).dropped == {}
    assert len(select(lambda: iter(own + others), [SpeakerLeak(HeldOut())]).dropped) == 2


def test_unknown_values_are_no_leak():
    assert dropped([row("t", "test", "?", ""), row("a", "train", "!", "")]) == {}


def test_similar_values_are_no_leak():
    rows = [row("t", "test", "Får får får?", "tess"), row("a", "train", "Far far far?", "Téss")]
    assert dropped([*rows, row("b", "train", "Får får får får?", "tess 2")]) == {}


@pytest.mark.parametrize(
    ("speaker", "other"),
    [("3", "3.0"), ("3", "03"), ("mix/3", "mix/3.0"), ("Åsa", "A\u030asa"), ("Åsa", "åsa"), ("Anna Ek", " anna  ek ")],
)
def test_spellings_of_a_speaker_are_a_leak(speaker, other):
    rows = [row("t", "test", "Hej.", speaker), row("a", "train", "Nej.", other), row("b", "train", "Ja.", "someone")]
    assert dropped(rows) == {"a": "leak_speaker"}


@pytest.mark.parametrize("text", ["<|0.00|> Hej på dig.<|0.60|>", "[skratt] Hej på dig", "Hej p&aring; dig!"])
def test_marks_hide_no_sentence_leak(text):
    assert dropped([row("t", "test", "Hej på dig.", "x"), row("a", "train", text, "y")]) == {"a": "leak_sentence"}


def test_validation_and_test_rows_are_never_dropped():
    assert dropped([row("t", "test", "Hej.", "x"), row("v", "validation", "Hej.", "x")]) == {}


def test_rows_held_out_elsewhere_drop_training_rows():
    held_out = HeldOut()
    held_out.add("test.tsv, row 1", "kajsa", "Det regnar.")
    rows = [row("a", "train", speaker="kajsa"), row("b", "train", "det regnar"), row("c", "train", "Det snöar.")]
    assert dropped(rows, held_out) == {"a": "leak_speaker", "b": "leak_sentence"}


# --- audio ------------------------------------------------------------------------------------------------------------


def fingerprint_of(sound: bytes) -> str:
    return fingerprint(log_mel.extract(audio.decode(sound)))


def test_fingerprint_is_equal_in_lossless_containers(encoded, speech):
    samples = (speech(20_000) * 32_767).astype(np.int16)
    forms = [
        encoded(samples, format="WAV", subtype="PCM_16"),
        encoded(samples, format="FLAC", subtype="PCM_16"),
        encoded(np.stack([samples, samples], axis=1), format="AIFF", subtype="PCM_16"),
    ]
    assert len({fingerprint_of(form) for form in forms}) == 1
    stored = audio.decode(forms[0]).samples
    assert fingerprint_of(encoded(stored, format="WAV", subtype="FLOAT")) == fingerprint_of(forms[0])


def test_fingerprint_differs_between_recordings(encoded, speech):
    prints = [fingerprint_of(encoded(speech(n, seed))) for n in (8_000, 8_160, 20_000) for seed in range(40)]
    assert len(set(prints)) == len(prints)
    assert fingerprint_of(encoded(speech(20_000)[:-160])) != fingerprint_of(encoded(speech(20_000)))


def test_fingerprint_is_equal_at_both_precisions(speech):
    full = log_mel.extract(audio.Waveform(speech(30_000)))
    half = LogMel(full.frames.astype(np.float16), full.pad_value)
    assert fingerprint(full) == fingerprint(half)
    assert fingerprint(LogMel(full.frames, full.pad_value + 0.1)) != fingerprint(full)


def test_audio_leaks_are_dropped():
    prints = {"t": "1", "v": "2", "a": "1", "b": "2", "c": "3", "d": "4"}
    rows = [row(name, {"t": "test", "v": "validation"}.get(name, "train")) for name in prints]
    held_out = HeldOut()
    held_out.add("elsewhere", audio="4")
    selection = select(lambda: iter(rows), [AudioLeak(held_out, prints.__getitem__)])
    assert {name: drop.detail for name, drop in selection.dropped.items()} == {
        "a": "the same audio is in test row t",
        "b": "the same audio is in validation row v",
        "d": "the same audio is in elsewhere",
    }


# --- refusing ---------------------------------------------------------------------------------------------------------


def test_leak_error_has_counts_examples_and_advice():
    drops = [Drop(f"a{n}", "train", "leak_speaker", "speaker 'x' is in test row t") for n in range(3)]
    drops += [Drop("b", "train", "leak_sentence", "sentence 'Hej' is in test row t"), Drop("c", "train", "votes", "no")]
    with pytest.raises(LabError) as error:
        leaks.refuse({drop.id: drop for drop in drops})
    message = str(error.value)
    assert "got 4 that do: 3 by leak_speaker (a0: speaker 'x'" in message
    assert "1 by leak_sentence (b: " in message
    assert "curation.leaks=drop" in message
    assert "\n" not in message
    leaks.refuse({"c": drops[-1]})


def test_long_sentence_is_quoted_on_one_short_line():
    held_out = HeldOut()
    detail = SentenceLeak(held_out).verdict(row("a", "train", "x")) or ""
    assert detail == ""
    held_out.add("test row t", sentence="lång\n" * 30)
    detail = SentenceLeak(held_out).verdict(row("a", "train", "lång\n" * 30))
    assert "\n" not in detail
    assert len(detail) < 80
