"""Every word of the page, in English and in Swedish: another language is another dictionary."""

from __future__ import annotations

from typing import Any

Words = dict[str, Any]

ENGLISH: Words = {
    "title": "Svenska, nedskriven",
    "lead": "Say something in Swedish, or choose a file, and read what the model heard.",
    "language": "Language of this page",
    "file_tab": "Recording or file",
    "live_tab": "Live",
    "recording": "Your voice",
    "live_hint": "Press Speak: the words appear as they are heard. Grey words may still change.",
    "speak": "Speak",
    "stop": "Stop",
    "no_microphone": "The browser gives this page no microphone. Allow it beside the address, and try again.",
    "live_line": "{audio_s:.1f} s heard; the words came {late} s after the sound",
    "privacy": "Your audio is turned into text on this server. The file is deleted as soon as that is done, and after "
    "half an hour if you never ask for it; a copy stays in memory for up to half an hour after your last click. The "
    "recording is stored only if you tick the box below.",
    "examples": "Nothing to say? Take an example (a synthetic voice):",
    "transcribe": "Transcribe",
    "transcribing": "Listening",
    "transcript": "Transcript",
    "transcript_hint": "The transcript appears here.",
    "took": "{audio_s:.1f} s of speech in {elapsed_s:.2f} s",
    "unsure": "Marked words are more likely wrong than right: the model is less than half sure of them.",
    "sure": "The model is more than half sure of every word.",
    "word": "{confidence:.0%} sure",
    "details": "When it was said, and how sure the model is",
    "play": "Play from {start}",
    "waveform": "The recording; each bar below it plays one part",
    "player": "The recording",
    "download": "Download .{ending}",
    "nothing_heard": "no words heard in {audio_s:.1f} s of sound ({elapsed_s:.2f} s)",
    "compare": "What did it hear before it was tuned?",
    "compared": "Before tuning, and now",
    "differs": "Words that only one of the two heard are marked. Which is right, your ears know.",
    "same": "Both heard the same words.",
    "no_words": "(no words)",
    "model": {
        "name": "Model",
        "revision": "Revision",
        "base": "Tuned from",
        "quantisation": "Weights",
        "test": "Test",
        "why": "Chosen as",
    },
    "q8": "dequantised from 8 bits (q8)",
    "not_scored": "not scored",
    "why": {
        "named": "the model that was asked for",
        "newest": "the newest finished run on this machine",
        "base": "the base model, as no run on this machine is finished yet",
    },
    "question": "Was it right?",
    "correction": "If not: what was said?",
    "correction_hint": "Correct the words, then press Wrong",
    "username": "Your name (optional)",
    "keep": "Keep my recording with this feedback",
    "stored": "Right and Wrong store the transcript, your correction and your name on this server, with or without "
    "this tick; the recording only with it.",
    "fleeting": "This page has no storage that stays: all of it is lost when its Space starts anew.",
    "right": "Right",
    "wrong": "Wrong",
    "flag": {"right": "right", "wrong": "wrong"},
    "thanks": "**Tack!** Noted as {flag}. Your feedback helps the next model.",
    "thanks_kept": "**Tack!** Noted as {flag}, and your recording is kept with it.",
    "thanks_too_long": "**Tack!** Noted as {flag}. The recording was over a minute long and is not kept.",
    "nothing_to_judge": "There is no transcript yet: record something and press Transcribe first.",
    "nothing_to_compare": "There is nothing to compare yet: transcribe a recording of at most a minute first.",
    "text_too_long": "That text is too long to keep: at most 2,000 characters, please.",
    "not_noted": "Your feedback could not be saved just now. Please try again later.",
    "sorry": "Sorry",
    "failed": "Something went wrong on the server. Please try again.",
    "browser": {
        "lost": "The server cannot be reached.",
        "waiting": "What you say is kept in this page, and sent as soon as possible.",
        "waiting_closed": "Your recording is kept in this page, and sent as soon as possible. Stop once more: wait no "
        "longer.",
        "given_up": "Not all of it reached the server. Your recording is below, where you can play and save it.",
        "full": "Ten minutes have been heard, which is all that fits: the microphone is closed.",
        "busy": "Many people are here just now. Please try again in a moment.",
        "too_large": "This file is too large: at most 25 MB, please.",
    },
    "refused": {
        "no_recording": "Record something or choose a file first.",
        "missing": "This recording is no longer on the server. Please record or choose it again.",
        "empty": "This file is empty. Please record or choose another one.",
        "unreadable": "This file is not audio that can be read here. Please choose a wav, flac, mp3 or ogg file.",
        "not_finite": "This file holds broken samples (not numbers). Please choose another one.",
        "silent": "The recording is silent. Is the right microphone chosen and switched on?",
        "too_long": "This recording is longer than 10 minutes. Please choose a shorter one.",
        "busy": "Many people are speaking just now. Your recording is still here: please try again in a moment.",
        "too_large": "This file is too large: at most 25 MB, please.",
        "address": "Only a file can be transcribed here, not an address on the web. Please send the file itself.",
        "too_slow": "This took longer than the server may spend on one recording. Please choose a shorter one.",
    },
}

SWEDISH: Words = {
    "title": "Svenska, nedskriven",
    "lead": "Säg något på svenska, eller välj en fil, och läs vad modellen hörde.",
    "language": "Sidans språk",
    "file_tab": "Inspelning eller fil",
    "live_tab": "Direkt",
    "recording": "Din röst",
    "live_hint": "Tryck på Tala: orden kommer allt eftersom de hörs. Grå ord kan ännu ändras.",
    "speak": "Tala",
    "stop": "Sluta",
    "no_microphone": "Webbläsaren ger sidan ingen mikrofon. Tillåt den bredvid adressen, och försök igen.",
    "live_line": "{audio_s:.1f} s hörda; orden kom {late} s efter ljudet",
    "privacy": "Ditt ljud blir till text på den här servern. Filen tas bort så snart det är gjort, och efter en "
    "halvtimme om du aldrig ber om det; en kopia finns i minnet i högst en halvtimme efter ditt senaste klick. "
    "Inspelningen sparas bara om du kryssar i rutan nedan.",
    "examples": "Inget att säga? Ta ett exempel (en syntetisk röst):",
    "transcribe": "Skriv ner",
    "transcribing": "Lyssnar",
    "transcript": "Utskrift",
    "transcript_hint": "Här kommer utskriften.",
    "took": "{audio_s:.1f} s tal på {elapsed_s:.2f} s",
    "unsure": "Markerade ord är troligare fel än rätt: modellen är mindre än till hälften säker på dem.",
    "sure": "Modellen är mer än till hälften säker på varje ord.",
    "word": "{confidence:.0%} säker",
    "details": "När det sades, och hur säker modellen är",
    "play": "Spela från {start}",
    "waveform": "Inspelningen; varje stapel under den spelar en del",
    "player": "Inspelningen",
    "download": "Ladda ner .{ending}",
    "nothing_heard": "inga ord hördes i {audio_s:.1f} s ljud ({elapsed_s:.2f} s)",
    "compare": "Vad hörde den innan den tränades?",
    "compared": "Före träningen, och nu",
    "differs": "Ord som bara den ena hörde är markerade. Vilken som har rätt vet dina öron.",
    "same": "Båda hörde samma ord.",
    "no_words": "(inga ord)",
    "model": {
        "name": "Modell",
        "revision": "Version",
        "base": "Tränad från",
        "quantisation": "Vikter",
        "test": "Test",
        "why": "Vald som",
    },
    "q8": "återställda från 8 bitar (q8)",
    "not_scored": "inte bedömd",
    "why": {
        "named": "modellen som efterfrågades",
        "newest": "den senast färdiga körningen på den här datorn",
        "base": "grundmodellen, då ingen körning på den här datorn är färdig än",
    },
    "question": "Var det rätt?",
    "correction": "Om inte: vad sades?",
    "correction_hint": "Rätta orden och tryck sedan på Fel",
    "username": "Ditt namn (frivilligt)",
    "keep": "Spara min inspelning med svaret",
    "stored": "Rätt och Fel sparar utskriften, din rättelse och ditt namn på den här servern, med eller utan krysset; "
    "inspelningen bara med det.",
    "fleeting": "Sidan har inget utrymme som består: allt går förlorat när dess Space startar om.",
    "right": "Rätt",
    "wrong": "Fel",
    "flag": {"right": "rätt", "wrong": "fel"},
    "thanks": "**Tack!** Noterat som {flag}. Ditt svar hjälper nästa modell.",
    "thanks_kept": "**Tack!** Noterat som {flag}, och din inspelning sparas med svaret.",
    "thanks_too_long": "**Tack!** Noterat som {flag}. Inspelningen var över en minut lång och sparas inte.",
    "nothing_to_judge": "Det finns ingen utskrift än: spela in något och tryck på Skriv ner först.",
    "nothing_to_compare": "Det finns inget att jämföra än: skriv först ner en inspelning på högst en minut.",
    "text_too_long": "Texten är för lång att spara: högst 2 000 tecken, tack.",
    "not_noted": "Ditt svar kunde inte sparas just nu. Försök igen senare.",
    "sorry": "Tyvärr",
    "failed": "Något gick fel på servern. Försök igen.",
    "browser": {
        "lost": "Servern går inte att nå.",
        "waiting": "Det du säger finns kvar på sidan och skickas så snart det går.",
        "waiting_closed": "Inspelningen finns kvar på sidan och skickas så snart det går. Sluta en gång till: "
        "vänta inte längre.",
        "given_up": "Allt nådde inte servern. Inspelningen finns nedan, där du kan spela och spara den.",
        "full": "Tio minuter är hörda, mer får inte plats: mikrofonen är stängd.",
        "busy": "Många är här just nu. Försök igen om en stund.",
        "too_large": "Filen är för stor: högst 25 MB.",
    },
    "refused": {
        "no_recording": "Spela in något eller välj en fil först.",
        "missing": "Inspelningen finns inte längre på servern. Spela in eller välj den igen.",
        "empty": "Filen är tom. Spela in eller välj en annan.",
        "unreadable": "Filen är inget ljud som kan läsas här. Välj en wav-, flac-, mp3- eller ogg-fil.",
        "not_finite": "Filen innehåller trasiga värden (inte tal). Välj en annan.",
        "silent": "Inspelningen är tyst. Är rätt mikrofon vald och påslagen?",
        "too_long": "Inspelningen är längre än 10 minuter. Välj en kortare.",
        "busy": "Många talar just nu. Din inspelning finns kvar: försök igen om en stund.",
        "too_large": "Filen är för stor: högst 25 MB.",
        "address": "Bara filer kan skrivas ner här, inte adresser på webben. Skicka själva filen.",
        "too_slow": "Det tog längre tid än servern får lägga på en inspelning. Välj en kortare.",
    },
}

WORDS: dict[str, Words] = {"en": ENGLISH, "sv": SWEDISH}


def preferred(accept_language: str) -> str:
    """The page's language for a browser that sends this Accept-Language header: the first it knows, else English."""
    wanted = []
    for place, entry in enumerate(accept_language.split(",")[:20]):
        tag, _, quality = entry.partition(";q=")
        try:
            weight = float(quality) if quality else 1.0
        except ValueError:
            continue
        wanted.append((-weight, place, tag.strip().lower().partition("-")[0]))
    return next((tag for weight, _, tag in sorted(wanted) if tag in WORDS and weight < 0), "en")
