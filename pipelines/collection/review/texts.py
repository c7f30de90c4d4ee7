"""Texts of the review page in English and Swedish."""

from __future__ import annotations

from pipelines.inference.app.i18n import Texts

ENGLISH: Texts = {
    "title": "Review transcripts",
    "lead": "Listen, and decide whether the transcript says what is spoken. The least believable clips come first.",
    "language": "Language of the page",
    "reviewer": "Your name or initials (written beside your decisions)",
    "transcript": "Transcript",
    "heard": "The model heard",
    "correction": "What is said",
    "accept": "Accept",
    "save": "Save correction",
    "reject": "Reject",
    "keys": "Keys: <kbd>space</kbd> play and pause, <kbd>A</kbd> accept, <kbd>E</kbd> edit, "
    "<kbd>Ctrl</kbd>+<kbd>Enter</kbd> save the correction, <kbd>Esc</kbd> leave the text, <kbd>R</kbd> reject",
    "progress": "{reviewed} of {clips} reviewed, {wrong} wrong.",
    "share": "About {share:.0%} of the expected errors are found (an estimate from your decisions).",
    "no_share": "The share of errors found is estimated after {least} decisions.",
    "done": "All clips are reviewed. Thank you!",
    "no_audio": "This recording cannot be played.",
    "not_stored": "Not stored",
}
SWEDISH: Texts = {
    "title": "Granska transkript",
    "lead": "Lyssna och avgör om transkriptet säger det som talas. De minst trovärdiga klippen kommer först.",
    "language": "Sidans språk",
    "reviewer": "Ditt namn eller dina initialer (skrivs bredvid dina beslut)",
    "transcript": "Transkript",
    "heard": "Modellen hörde",
    "correction": "Det som sägs",
    "accept": "Godkänn",
    "save": "Spara rättelsen",
    "reject": "Förkasta",
    "keys": "Tangenter: <kbd>mellanslag</kbd> spela och pausa, <kbd>A</kbd> godkänn, <kbd>E</kbd> redigera, "
    "<kbd>Ctrl</kbd>+<kbd>Enter</kbd> spara rättelsen, <kbd>Esc</kbd> lämna texten, <kbd>R</kbd> förkasta",
    "progress": "{reviewed} av {clips} granskade, {wrong} fel.",
    "share": "Ungefär {share:.0%} av de väntade felen är hittade (en uppskattning av dina beslut).",
    "no_share": "Andelen hittade fel uppskattas efter {least} beslut.",
    "done": "Alla klipp är granskade. Tack!",
    "no_audio": "Den här inspelningen kan inte spelas upp.",
    "not_stored": "Inte sparat",
}
TEXTS = {"en": ENGLISH, "sv": SWEDISH}
