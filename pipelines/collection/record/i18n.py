"""Texts of the recording page in English and Swedish."""

from __future__ import annotations

from pipelines.collection.record.recorder import AGES
from pipelines.inference.app.components.localized import Texts
from pipelines.recipes import languages

ENGLISH: Texts = {
    "title": "Read sentences aloud",
    "lead": "Your recordings help a computer to understand {language} speech.",
    "language": "Language of the page",
    "consent_title": "Before you begin",
    "consent": "I am at least 18 years old, or a parent or guardian agrees with me. I read sentences aloud. My "
    "recordings and what I state about myself below are saved on this server under a number. They may "
    "be published under the licence {licence} and used to train and test speech recognition. My nickname is not saved. "
    "A voice can be recognised, and published recordings cannot be called back.",
    "licence": "Licence of the recordings: **{licence}**",
    "agree": "I agree",
    "nickname": "Nickname",
    "nickname_info": "Only you need to know it: with the same nickname you continue where you stopped. Empty: the page "
    "makes one.",
    "age": "Age",
    "gender": "Gender",
    "accent": "Accent or region",
    "optional": "optional",
    "unstated": "not stated",
    "ages": {age: age.replace("-", "–") for age in AGES},
    "genders": {"female": "female", "male": "male", "other": "other"},
    "start": "Start",
    "known": "This nickname has been used here before. Is it yours?",
    "known_yes": "Yes, I continue",
    "known_no": "No, I choose another",
    "must_agree": "Please read the text above and tick the box first.",
    "too_long_name": "The nickname and the accent may have 60 characters each.",
    "progress": "{n_done} of {n_all} recorded. Your nickname: **{nickname}**",
    "recording": "Your voice",
    "keys": "Keys: <kbd>space</kbd> record and stop, <kbd>Enter</kbd> keep and go on, <kbd>R</kbd> record again",
    "hint": "Record the sentence, listen, then keep it.",
    "again": "Again",
    "next": "Keep, next",
    "skip": "Skip",
    "good": "Good. Keep it, or record it again.",
    "again_please": "Please record it again.",
    "keep_anyway": "If you said the sentence and the recording sounds right, you may keep it.",
    "heard": "The computer heard:",
    "no_words": "(no words)",
    "sorry": "Sorry",
    "problems": {
        "no_speech": "No speech can be heard. Is the right microphone switched on?",
        "too_long": "The recording is longer than 30 seconds.",
        "unreadable": "The recording cannot be read.",
        "clipped": "It is too loud and distorted: move away from the microphone.",
        "quiet": "It is very quiet: move closer to the microphone.",
        "noisy": "There is a lot of noise in the background.",
        "silence": "There is a long silence before or after the sentence.",
        "slow": "It is much slower than usual, or there is a long pause in it.",
        "fast": "It is much faster than usual, or the end is missing.",
        "mismatch": "It does not sound like this sentence.",
    },
    "not_saved": "The recording could not be saved: the disk of the server is full or cannot be written. It is still "
    "here: try again later, and tell the people who run this page.",
    "other_sentence": "This was about a sentence that is not on the page any more. Please read the one that is.",
    "repeated": "You had recorded that sentence on another page: the first recording is kept.",
    "done": "Thank you! There are no more sentences. Reload the page for those that you skipped.",
    "visit_expired": "This page was open too long. Please reload it and enter the same nickname: what you kept is "
    "saved.",
}

SWEDISH: Texts = {
    "title": "Läs meningar högt",
    "lead": "Dina inspelningar hjälper en dator att förstå tal på {language}.",
    "language": "Sidans språk",
    "consent_title": "Innan du börjar",
    "consent": "Jag är minst 18 år, eller så samtycker min vårdnadshavare. Jag läser meningar högt. Mina inspelningar "
    "och det jag uppger om mig själv nedan sparas på den här servern under ett nummer. De får publiceras med licensen "
    "{licence} och användas för att träna och testa taligenkänning. Mitt smeknamn sparas inte. En röst kan kännas "
    "igen, och publicerade inspelningar kan inte återkallas.",
    "licence": "Inspelningarnas licens: **{licence}**",
    "agree": "Jag samtycker",
    "nickname": "Smeknamn",
    "nickname_info": "Bara du behöver känna till det: med samma smeknamn fortsätter du där du slutade. Tomt: sidan "
    "hittar på ett.",
    "age": "Ålder",
    "gender": "Kön",
    "accent": "Dialekt eller landskap",
    "optional": "frivilligt",
    "unstated": "uppges inte",
    "ages": {**ENGLISH["ages"], "under 18": "under 18", "70 or over": "70 eller äldre"},
    "genders": {"female": "kvinna", "male": "man", "other": "annat"},
    "start": "Börja",
    "known": "Det här smeknamnet har använts här förut. Är det ditt?",
    "known_yes": "Ja, jag fortsätter",
    "known_no": "Nej, jag väljer ett annat",
    "must_agree": "Läs texten ovan och kryssa i rutan först.",
    "too_long_name": "Smeknamnet och dialekten får ha högst 60 tecken var.",
    "progress": "{n_done} av {n_all} inspelade. Ditt smeknamn: **{nickname}**",
    "recording": "Din röst",
    "keys": "Tangenter: <kbd>mellanslag</kbd> spela in och stoppa, <kbd>Enter</kbd> behåll och gå vidare, "
    "<kbd>R</kbd> spela in igen",
    "hint": "Spela in meningen, lyssna och behåll den sedan.",
    "again": "Igen",
    "next": "Behåll, nästa",
    "skip": "Hoppa över",
    "good": "Bra. Behåll den, eller spela in igen.",
    "again_please": "Spela in den igen, tack.",
    "keep_anyway": "Om du sa meningen och inspelningen låter rätt kan du behålla den.",
    "heard": "Datorn uppfattade:",
    "no_words": "(inga ord)",
    "sorry": "Tyvärr",
    "problems": {
        "no_speech": "Inget tal hörs. Är rätt mikrofon påslagen?",
        "too_long": "Inspelningen är längre än 30 sekunder.",
        "unreadable": "Inspelningen går inte att läsa.",
        "clipped": "Den är för stark och förvrängd: gå längre från mikrofonen.",
        "quiet": "Den är mycket svag: gå närmare mikrofonen.",
        "noisy": "Det är mycket brus i bakgrunden.",
        "silence": "Det är tyst länge före eller efter meningen.",
        "slow": "Den är mycket långsammare än vanligt, eller har en lång paus.",
        "fast": "Den är mycket snabbare än vanligt, eller så saknas slutet.",
        "mismatch": "Den låter inte som den här meningen.",
    },
    "not_saved": "Inspelningen kunde inte sparas: serverns disk är full eller skrivskyddad. Den finns kvar här: försök "
    "igen senare, och säg till dem som driver sidan.",
    "other_sentence": "Det gällde en mening som inte längre finns på sidan. Läs den som finns där.",
    "repeated": "Du hade redan spelat in den meningen på en annan sida: den första inspelningen är kvar.",
    "done": "Tack! Det finns inga fler meningar. Ladda om sidan för dem som du hoppade över.",
    "visit_expired": "Sidan var öppen för länge. Ladda om den och ange samma smeknamn: det du behöll är sparat.",
}

TEXTS = {"en": ENGLISH, "sv": SWEDISH}
_SWEDISH_NAMES = {"sv": "svenska", "en": "engelska"}


def localized_texts(tag: str, speech: str) -> Texts:
    """Return the page's texts in the language `tag`, for recordings in `speech`, Whisper's code of a language."""
    name = languages.NAMES[speech].title()
    name = _SWEDISH_NAMES.get(speech, name) if tag == "sv" else name
    return TEXTS[tag] | {"lead": TEXTS[tag]["lead"].format(language=name)}


def default_consent(licence: str) -> dict[str, str]:
    """Return the consent text in every language of the page."""
    return {tag: texts["consent"].format(licence=licence) for tag, texts in TEXTS.items()}
