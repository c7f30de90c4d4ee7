"""Lists of sentences, and the order that covers letters, clusters and terms first."""

import re

import pytest

from pipelines.collection.record.sentences import order_by_coverage, read_sentences, read_terms
from pipelines.infra.errors import LabError

LIST = "\ufeff# rubrik\nHej  på dig!\r\n\nVi ses.\nhej, på dig\n=1+1 är två\n"


def test_list_is_read_once_and_without_comments(tmp_path):
    (tmp_path / "list.txt").write_text(LIST, "utf-8")
    assert read_sentences(str(tmp_path / "list.txt")) == ["Hej på dig!", "Vi ses.", "=1+1 är två"]


def test_list_of_windows_is_read(tmp_path):
    (tmp_path / "list.txt").write_bytes("Är du där?\r\n".encode("cp1252"))
    assert read_sentences(str(tmp_path / "list.txt")) == ["Är du där?"]


def test_tour_has_a_list():
    assert len(read_sentences("tour")) > 500


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "one sentence in each line"),
        (b"", "at least one sentence"),
        (b"# nothing\n\n", "at least one sentence"),
        (b"Hej.\n" + b"ord " * 100, "line 2: a sentence has at most 250 characters, got 399"),
        (b"Hej.\n...\n", "line 2: a sentence must contain a word"),
        (bytes(range(128, 256)) * 4, "list.txt"),
    ],
)
def test_bad_list_is_refused_in_one_line(tmp_path, content, problem):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabError, match=problem) as error:
        read_sentences(str(path))
    assert "\n" not in str(error.value)


def test_order_covers_terms_and_letters_first():
    sentences = ["Vi ses i morgon.", "En till och en till.", "Åke äter öring.", "Skvadern sprang."]
    ordered = order_by_coverage(sentences, ["öring", "Kebnekaise"])
    assert ordered[:2] == ["Kebnekaise", "Åke äter öring."], "a term in no sentence is read alone"
    assert sorted(ordered) == sorted([*sentences, "Kebnekaise"])
    assert ordered == order_by_coverage(sentences, ["öring", "Kebnekaise"])


def test_greedy_order_covers_more_than_the_list_does():
    def clusters(sentences):
        return {found for sentence in sentences for found in re.findall(r"[bcdfghjklmnpqrstvwxz]{2,}", sentence)}

    sentences = read_sentences("tour")
    assert len(clusters(order_by_coverage(sentences)[:50])) > 1.5 * len(clusters(sentences[:50]))


def test_term_inside_a_word_does_not_count(tmp_path):
    (tmp_path / "terms.txt").write_text("al\n", "utf-8")
    assert order_by_coverage(["Salen var tom."], read_terms(tmp_path / "terms.txt")) == ["al", "Salen var tom."]


def test_only_the_first_sentences_of_a_long_list_are_chosen():
    listed = ["Hej.", "Nej.", "Stjärtmes.", "Ja."]
    assert order_by_coverage(listed, ["stjärtmes"], 1) == ["Stjärtmes.", "Hej.", "Nej.", "Ja."]
