"""Texts of the review page in English and Swedish."""

from __future__ import annotations

from pipelines.inference.app.components.localized import Texts

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
    "skip": "Skip",
    "back": "Back",
    "keys": "Keys: <kbd>space</kbd> play and pause, <kbd>A</kbd> accept, <kbd>R</kbd> reject, <kbd>E</kbd> edit, "
    "<kbd>Ctrl</kbd>+<kbd>Enter</kbd> save the correction, <kbd>Esc</kbd> restore the transcript, <kbd>S</kbd> skip, "
    "<kbd>B</kbd> back to your last decision",
    "progress": "{reviewed} of {clips} reviewed, {wrong} wrong.",
    "share": "About {share:.0%} of the expected errors are found (an estimate from your decisions).",
    "no_share": "The share of errors found is estimated after {least} decisions.",
    "done": "All clips are reviewed. Thank you!",
    "left": "No other clip for you now. {left} are skipped or open on another page: reload this page later.",
    "no_audio": "This recording cannot be played.",
    "earlier": {
        "accept": "Decided before: accepted.",
        "correct": "Decided before: corrected to the text below.",
        "reject": "Decided before: rejected.",
    },
    "not_stored": "Not stored",
    "listen_first": "Listen first: play at least one second of the clip (space), then decide.",
    "not_shown": "That clip was not on the page any more. Decide on the one that is.",
    "text_changed": "You changed the text: save the correction, or restore the transcript with Esc.",
    "no_earlier": "You have not decided on a clip before this one on this page.",
}
SWEDISH: Texts = {
    "title": "Granska transkriptioner",
    "lead": "Lyssna och avgör om transkriptionen stämmer med det som sägs. De minst trovärdiga klippen kommer först.",
    "language": "Sidans språk",
    "reviewer": "Ditt namn eller dina initialer (skrivs bredvid dina beslut)",
    "transcript": "Transkription",
    "heard": "Modellen hörde",
    "correction": "Det som sägs",
    "accept": "Godkänn",
    "save": "Spara rättelsen",
    "reject": "Förkasta",
    "skip": "Hoppa över",
    "back": "Tillbaka",
    "keys": "Tangenter: <kbd>mellanslag</kbd> spela och pausa, <kbd>A</kbd> godkänn, <kbd>R</kbd> förkasta, "
    "<kbd>E</kbd> redigera, <kbd>Ctrl</kbd>+<kbd>Enter</kbd> spara rättelsen, <kbd>Esc</kbd> återställ "
    "transkriptionen, <kbd>S</kbd> hoppa över, <kbd>B</kbd> tillbaka till ditt senaste beslut",
    "progress": "{reviewed} av {clips} granskade, {wrong} fel.",
    "share": "Ungefär {share:.0%} av de väntade felen är hittade (en uppskattning av dina beslut).",
    "no_share": "Andelen hittade fel uppskattas efter {least} beslut.",
    "done": "Alla klipp är granskade. Tack!",
    "left": "Det finns inga fler klipp för dig just nu. {left} är överhoppade eller öppna på en annan sida: ladda om "
    "sidan senare.",
    "no_audio": "Den här inspelningen kan inte spelas upp.",
    "earlier": {
        "accept": "Tidigare beslut: godkänt.",
        "correct": "Tidigare beslut: rättat till texten nedan.",
        "reject": "Tidigare beslut: förkastat.",
    },
    "not_stored": "Inte sparat",
    "listen_first": "Lyssna först: spela minst en sekund av klippet (mellanslag) och besluta sedan.",
    "not_shown": "Det klippet fanns inte längre på sidan. Besluta om det som finns där.",
    "text_changed": "Du har ändrat texten: spara rättelsen, eller återställ transkriptionen med Esc.",
    "no_earlier": "Du har inte beslutat om något klipp före det här på den här sidan.",
}
TEXTS = {"en": ENGLISH, "sv": SWEDISH}
