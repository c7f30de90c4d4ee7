from __future__ import annotations

import pytest

from pipelines.inference.segments import divide, sentence_starts, starts_by_characters, within_speech
from pipelines.inference.transcript import Word


def words(text: str) -> tuple[Word, ...]:
    return tuple(Word(word, 0.9) for word in text.split())


def divided(text: str, stretches, starts=(), **options):
    parts = divide(words(text), stretches, lambda: list(starts), **options)
    return [(part.start_s, part.end_s, " ".join(word.text for word in part.words)) for part in parts]


def not_needed():
    raise AssertionError("word starts were computed without need")


def test_one_short_stretch_is_one_part_without_alignment():
    (part,) = divide(words("Ja. Nej."), [(1.0, 4.0)], not_needed)
    assert (part.start_s, part.end_s) == (1.0, 4.0)


def test_short_pause_does_not_divide():
    (part,) = divide(words("ett två"), [(1.0, 2.0), (2.4, 3.0)], not_needed)
    assert (part.start_s, part.end_s) == (1.0, 3.0)


# the third word starts a little before the second stretch, or within it
@pytest.mark.parametrize("third", [11.9, 12.3])
def test_parts_end_and_begin_with_the_speech(third):
    found = divided("ett två tre fyra", [(1.0, 3.0), (12.0, 14.0)], [1.1, 1.9, third, 13.0])
    assert found == [(1.0, 3.0, "ett två"), (12.0, 14.0, "tre fyra")]


def test_sentences_and_pauses_divide_a_long_window():
    found = divided("Hej. Du. Kom hit", [(0.0, 7.0), (9.0, 10.0)], [0.1, 3.0, 9.1, 9.5])
    assert found == [(0.0, 3.0, "Hej."), (3.0, 7.0, "Du."), (9.0, 10.0, "Kom hit")]


def test_stretch_without_words_belongs_to_no_part():
    found = divided("ett två", [(0.0, 1.0), (4.0, 5.0), (8.0, 9.0)], [0.1, 8.2])
    assert found == [(0.0, 1.0, "ett"), (8.0, 9.0, "två")]


def test_without_alignment_pauses_divide_by_characters():
    found = divided("aaaa bbbb", [(0.0, 1.0), (5.0, 6.0)])
    assert found == [(0.0, 1.0, "aaaa"), (5.0, 6.0, "bbbb")]


def test_word_times_do_not_reach_into_silence():
    parts = divide(words("a b c"), [(1.0, 2.0), (6.0, 7.0)], lambda: [0.8, 1.5, 5.8], word_times=True)
    times = [(word.start_s, word.end_s) for part in parts for word in part.words]
    assert times == [(1.0, 1.5), (1.5, 2.0), (6.0, 7.0)]


def test_sentence_of_no_duration_joins_the_one_before():
    assert divided("A. B. C.", [(0.0, 8.0)], [0.0, 3.0, 3.0]) == [(0.0, 3.0, "A."), (3.0, 8.0, "B. C.")]


def test_sentence_starts_after_final_marks_and_quotes():
    assert sentence_starts('Hej! "Kom." Vad? dr Ek'.split()) == [1, 2, 3]
    assert sentence_starts([]) == []


def test_starts_by_characters_skip_silence():
    starts = starts_by_characters(words("aaa aaa aaa aaa"), [(0.0, 1.0), (3.0, 4.0)])
    assert starts == pytest.approx([0.0, 0.5, 3.0, 3.5])


def test_times_without_speech_stay():
    assert within_speech(2.0, 3.0, [(0.0, 1.0), (5.0, 6.0)]) == (2.0, 3.0)
