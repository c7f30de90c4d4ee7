"""Marks in transcripts that may not be spoken."""

import pytest

from pipelines.speech import marks


@pytest.mark.parametrize(
    ("text", "kinds", "clean"),
    [
        ("<|0.00|> Hej på dig.<|0.60|>", {"control tokens"}, "Hej på dig."),
        ("Nu<|endoftext|> är det slut.", {"control tokens"}, "Nu är det slut."),
        ("<|sv|><|transcribe|> Hej.", {"control tokens"}, "Hej."),
        ("[skratt] Ja visst.", {"brackets"}, "Ja visst."),
        ("Ja {uh} visst [hostar].", {"brackets"}, "Ja visst."),
        ("Bröd &amp; smör, sa &quot;Eva&quot;.", {"HTML entities"}, 'Bröd & smör, sa "Eva".'),
        ("Vi st&#229;r", {"HTML entities"}, "Vi står"),
        ("<unk> Nej tack.", {"tags"}, "Nej tack."),
        ("Hej<br/>då", {"tags"}, "Hej då"),
        ("(ohörbart) kanske (Skrattar)", {"sounds"}, "kanske"),
        ("Hej *harklar sig* du ♪", {"sounds"}, "Hej du"),
        ("Kostar 3 < 5 & mer (se sidan 2), 5 * 3 * 2", set(), "Kostar 3 < 5 & mer (se sidan 2), 5 * 3 * 2"),
        ("AT&T; och A&B", set(), "AT&T; och A&B"),
    ],
)
def test_marks_are_found_and_removed(text, kinds, clean):
    assert {kind for kind, _ in marks.find(text)} == kinds
    assert marks.remove(text) == clean


def test_only_timestamps_are_never_text():
    assert marks.without_timestamps("<|0.00|>Hej <|sv|> [x]<|29.98|>").split() == ["Hej", "<|sv|>", "[x]"]
