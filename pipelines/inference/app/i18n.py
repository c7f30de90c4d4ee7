"""Texts of the page in English and Swedish. Another language is another dictionary."""

from __future__ import annotations

from pipelines.inference.app.components.localized import Texts
from pipelines.recipes import languages

ENGLISH: Texts = {
    "title": "{language} speech to text",
    "lead": "Record or upload {language} speech and read the transcript.",
    "language": "Language of the page",
    "file_tab": "Recording or file",
    "live_tab": "Live",
    "recording": "Recording",
    "web_address": "Address of a recording",
    "fetch": "Fetch",
    "not_fetched": {
        "address": "This address is not fetched: it must begin with http:// or https:// and be on the public internet.",
        "unreachable": "The address cannot be reached. Please check its spelling.",
        "status": "There is no file at this address, or access to it is not allowed.",
        "too_slow": "The file did not arrive within a minute. Please download it yourself and upload it.",
        "html": "There is a web page at this address. Please give the address of the audio file itself.",
        "broken": "The file could not be downloaded. Please download it yourself and upload it.",
    },
    "live_hint": "Press Start and speak: the text appears as you speak. Grey words may still change.",
    "speak": "Start",
    "stop": "Stop",
    "live_line": "{audio_s:.1f} s of speech; delay of the text: {late} s",
    "privacy": "Your recording is transcribed on this server. The file is deleted right afterwards, or after half an "
    "hour if you do not transcribe it. A copy stays in memory for at most half an hour after your last click. The "
    "recording is saved only if you tick the box below.",
    "examples": "No recording? Try an example (synthetic voice):",
    "split_channels": "Each channel has its own speaker (stereo recordings of interviews and calls)",
    "options": "Options",
    "prompt": "Text before the recording",
    "prompt_info": "Names and words as they are spelled, or the sentence before: the model goes on in this style.",
    "hotwords": "Hotwords",
    "hotwords_info": "Words that become more probable, separated by commas, such as Ågesta, Elfwing.",
    "beams": "Search width (beams)",
    "beams_info": "A wider search is slower and usually makes fewer errors.",
    "usual": "As usual",
    "channels": {"left": "Left", "right": "Right", "numbered": "Channel {number}"},
    "transcribe": "Transcribe",
    "transcribing": "Transcribing",
    "transcript": "Transcript",
    "transcript_hint": "The transcript appears here.",
    "took": "{audio_s:.1f} s of speech in {elapsed_s:.2f} s",
    "unsure": "Marked words are probably wrong: the model's confidence in them is below 50%.",
    "sure": "The model's confidence is above 50% for every word.",
    "word": "Confidence {percent}%",
    "details": "Times and confidence",
    "play": "Play from {start}",
    "waveform": "Waveform of the recording; each bar below it plays a segment",
    "player": "Player of the recording",
    "download": "Download .{ending}",
    "nothing_heard": "No words were recognised in {audio_s:.1f} s of audio ({elapsed_s:.2f} s)",
    "damaged": "The file is damaged: it could not be read {places}. What was said there is missing.",
    "places": {
        "at": "at {start_s:.1f} s",
        "between": "from {start_s:.1f} to {end_s:.1f} s",
        "after": "after {start_s:.1f} s",
    },
    "compare": "Compare with the model before fine-tuning",
    "compared": "Before and after fine-tuning",
    "differs": "Words that occur in only one of the transcripts are marked.",
    "same": "Both transcripts contain the same words.",
    "no_words": "(no words)",
    "model": {
        "name": "Model",
        "revision": "Revision",
        "base": "Base model",
        "quantisation": "Weights",
        "test": "Test score",
        "why": "Selected as",
    },
    "q8": "dequantised from 8 bits (q8)",
    "not_scored": "not evaluated",
    "why": {
        "named": "the requested model",
        "newest": "the newest finished training run on this machine",
        "base": "the base model, since no training run on this machine is finished",
    },
    "question": "Is the transcript correct?",
    "correction": "If not, what was said?",
    "correction_hint": "Correct the text, then press Wrong",
    "username": "Your name (optional)",
    "keep": "Save my recording with this feedback",
    "stored": "Right and Wrong save the transcript, your correction and your name on this server. The recording is "
    "saved only if the box is ticked.",
    "fleeting": "This page has no persistent storage: everything is deleted when its Space restarts.",
    "right": "Right",
    "wrong": "Wrong",
    "flag": {"right": "right", "wrong": "wrong"},
    "thanks": "**Thank you!** Saved as {flag}. Your feedback helps to improve the next model.",
    "thanks_kept": "**Thank you!** Saved as {flag}, together with your recording.",
    "thanks_too_long": "**Thank you!** Saved as {flag}. The recording is longer than a minute and was not saved.",
    "nothing_to_judge": "There is no transcript yet: record something and press Transcribe first.",
    "nothing_to_compare": "There is nothing to compare yet: transcribe a recording of at most one minute first.",
    "text_too_long": "The text is too long: at most 2,000 characters.",
    "not_noted": "Your feedback could not be saved. Please try again later.",
    "sorry": "Sorry",
    "failed": "Something went wrong on the server. Please try again.",
    "browser": {
        "lost": "The server cannot be reached.",
        "waiting": "What you say is stored in this page and sent as soon as possible.",
        "waiting_closed": "Your recording is stored in this page and sent as soon as possible. Press Stop again if you "
        "do not want to wait.",
        "given_up": "Part of the recording did not reach the server. You can play and save all of it below.",
        "full": "The limit of ten minutes is reached: the microphone is off.",
        "busy": "The server is busy. Please try again in a moment.",
        "too_large": "The file is too large: at most 25 MB.",
        "microphone_insecure": "Browsers give the microphone only to pages whose address begins with https:// or is "
        "localhost. You can upload a file instead.",
        "microphone_framed": "The page around this one does not let it use the microphone. Open this page in its own "
        "tab.",
        "microphone_blocked": "The browser does not let this page use the microphone. Allow it beside the address.",
        "microphone_absent": "The browser finds no microphone. Connect one and press the button again.",
        "microphone_in_use": "The microphone cannot be opened: another program may be using it.",
        "microphone_failed": "The microphone cannot be opened. You can upload a file instead.",
        "microphone_lost": "The microphone is no longer available. What you said until then is kept.",
    },
    "refused": {
        "no_recording": "Record something or choose a file first.",
        "missing": "The recording is no longer on the server. Please record or choose it again.",
        "empty": "The file is empty. Please record or choose another one.",
        "unreadable": "The file cannot be read as audio. Please choose a wav, flac, mp3 or ogg file.",
        "damaged": "The file is damaged or was cut off: no sound in it can be read. Please choose another one.",
        "not_finite": "The file contains invalid samples. Please choose another one.",
        "silent": "The recording is silent. Is the right microphone selected and switched on?",
        "too_long": "The recording is longer than 10 minutes. Please choose a shorter one.",
        "busy": "The server is busy. Your recording is still here: please try again in a moment.",
        "too_large": "The file is too large: at most 25 MB.",
        "options": "The options cannot be used: each text may have at most 2,000 characters.",
        "address": "Only files can be transcribed, not web addresses. Please upload the file.",
        "too_slow": "The transcription took too long. Please choose a shorter recording.",
        "too_many": "Your address has sent a lot in a short time. Please try again in {seconds} s.",
    },
}

SWEDISH: Texts = {
    "title": "Tal till text på {language}",
    "lead": "Spela in eller ladda upp tal på {language} och få det som text.",
    "language": "Sidans språk",
    "file_tab": "Inspelning eller fil",
    "live_tab": "Direkt",
    "recording": "Inspelning",
    "web_address": "Adress till en inspelning",
    "fetch": "Hämta",
    "not_fetched": {
        "address": "Adressen hämtas inte: den måste börja med http:// eller https:// och finnas på det öppna internet.",
        "unreachable": "Adressen går inte att nå. Kontrollera stavningen.",
        "status": "Det finns ingen fil på adressen, eller så är den inte tillåten att hämta.",
        "too_slow": "Filen kom inte fram inom en minut. Ladda ner den själv och ladda upp den här.",
        "html": "På adressen finns en webbsida. Ange adressen till själva ljudfilen.",
        "broken": "Filen kunde inte hämtas. Ladda ner den själv och ladda upp den här.",
    },
    "live_hint": "Tryck på Starta och tala: texten visas medan du talar. Grå ord kan fortfarande ändras.",
    "speak": "Starta",
    "stop": "Stoppa",
    "live_line": "{audio_s:.1f} s tal; textens fördröjning: {late} s",
    "privacy": "Din inspelning transkriberas på den här servern. Filen raderas direkt efteråt, eller efter en "
    "halvtimme om du inte transkriberar den. En kopia finns i minnet i högst en halvtimme efter ditt senaste klick. "
    "Inspelningen sparas bara om du kryssar i rutan nedan.",
    "examples": "Ingen inspelning? Prova ett exempel (syntetisk röst):",
    "split_channels": "Varje kanal har en egen talare (stereoinspelningar av intervjuer och samtal)",
    "options": "Alternativ",
    "prompt": "Text före inspelningen",
    "prompt_info": "Namn och ord som de stavas, eller meningen före: modellen fortsätter i samma stil.",
    "hotwords": "Nyckelord",
    "hotwords_info": "Ord som blir mer sannolika, åtskilda med kommatecken, till exempel Ågesta, Elfwing.",
    "beams": "Sökbredd",
    "beams_info": "En bredare sökning är långsammare och ger oftast färre fel.",
    "usual": "Som vanligt",
    "channels": {"left": "Vänster", "right": "Höger", "numbered": "Kanal {number}"},
    "transcribe": "Transkribera",
    "transcribing": "Transkriberar",
    "transcript": "Transkription",
    "transcript_hint": "Transkriptionen visas här.",
    "took": "{audio_s:.1f} s tal på {elapsed_s:.2f} s",
    "unsure": "Markerade ord är troligen fel: modellens säkerhet är under 50 %.",
    "sure": "Modellens säkerhet är över 50 % för alla ord.",
    "word": "Säkerhet {percent} %",
    "details": "Tider och säkerhet",
    "play": "Spela från {start}",
    "waveform": "Inspelningens vågform; varje stapel under den spelar upp ett avsnitt",
    "player": "Uppspelning av inspelningen",
    "download": "Ladda ner .{ending}",
    "nothing_heard": "Inga ord uppfattades i {audio_s:.1f} s ljud ({elapsed_s:.2f} s)",
    "damaged": "Filen är skadad: den kunde inte läsas {places}. Det som sades där saknas.",
    "places": {
        "at": "vid {start_s:.1f} s",
        "between": "från {start_s:.1f} till {end_s:.1f} s",
        "after": "efter {start_s:.1f} s",
    },
    "compare": "Jämför med modellen före finjusteringen",
    "compared": "Före och efter finjusteringen",
    "differs": "Ord som bara finns i den ena transkriptionen är markerade.",
    "same": "Båda transkriptionerna innehåller samma ord.",
    "no_words": "(inga ord)",
    "model": {
        "name": "Modell",
        "revision": "Version",
        "base": "Grundmodell",
        "quantisation": "Vikter",
        "test": "Testresultat",
        "why": "Vald som",
    },
    "q8": "återställda från 8 bitar (q8)",
    "not_scored": "inte utvärderad",
    "why": {
        "named": "den modell som angavs",
        "newest": "den senaste färdiga träningskörningen på den här datorn",
        "base": "grundmodellen, eftersom ingen träningskörning på den här datorn är klar",
    },
    "question": "Stämmer transkriptionen?",
    "correction": "Om inte, vad sades?",
    "correction_hint": "Rätta texten och tryck sedan på Fel",
    "username": "Ditt namn (frivilligt)",
    "keep": "Spara min inspelning med omdömet",
    "stored": "Rätt och Fel sparar transkriptionen, din rättelse och ditt namn på den här servern. Inspelningen "
    "sparas bara om rutan är ikryssad.",
    "fleeting": "Sidan saknar varaktig lagring: allt raderas när dess Space startas om.",
    "right": "Rätt",
    "wrong": "Fel",
    "flag": {"right": "rätt", "wrong": "fel"},
    "thanks": "**Tack!** Sparat som {flag}. Ditt omdöme bidrar till att förbättra nästa modell.",
    "thanks_kept": "**Tack!** Sparat som {flag}, tillsammans med din inspelning.",
    "thanks_too_long": "**Tack!** Sparat som {flag}. Inspelningen är längre än en minut och sparades inte.",
    "nothing_to_judge": "Det finns ingen transkription än: spela in något och tryck på Transkribera först.",
    "nothing_to_compare": "Det finns inget att jämföra än: transkribera först en inspelning på högst en minut.",
    "text_too_long": "Texten är för lång: högst 2 000 tecken.",
    "not_noted": "Ditt omdöme kunde inte sparas. Försök igen senare.",
    "sorry": "Tyvärr",
    "failed": "Något gick fel på servern. Försök igen.",
    "browser": {
        "lost": "Servern går inte att nå.",
        "waiting": "Det du säger sparas på sidan och skickas så snart det går.",
        "waiting_closed": "Inspelningen sparas på sidan och skickas så snart det går. Tryck på Stoppa igen om du inte "
        "vill vänta.",
        "given_up": "En del av inspelningen nådde inte servern. Du kan spela upp och spara hela inspelningen nedan.",
        "full": "Gränsen på tio minuter är nådd: mikrofonen är avstängd.",
        "busy": "Servern är upptagen. Försök igen om en stund.",
        "too_large": "Filen är för stor: högst 25 MB.",
        "microphone_insecure": "Webbläsare ger bara mikrofonen till sidor vars adress börjar med https:// eller är "
        "localhost. Du kan ladda upp en fil i stället.",
        "microphone_framed": "Sidan runt den här låter den inte använda mikrofonen. Öppna den här i en egen flik.",
        "microphone_blocked": "Webbläsaren låter inte sidan använda mikrofonen. Tillåt det bredvid adressen.",
        "microphone_absent": "Webbläsaren hittar ingen mikrofon. Anslut en och tryck på knappen igen.",
        "microphone_in_use": "Mikrofonen kan inte öppnas: kanske använder ett annat program den.",
        "microphone_failed": "Mikrofonen kan inte öppnas. Du kan ladda upp en fil i stället.",
        "microphone_lost": "Mikrofonen är inte längre tillgänglig. Det du sade fram till dess finns kvar.",
    },
    "refused": {
        "no_recording": "Spela in något eller välj en fil först.",
        "missing": "Inspelningen finns inte längre på servern. Spela in eller välj den igen.",
        "empty": "Filen är tom. Spela in eller välj en annan.",
        "unreadable": "Filen kan inte läsas som ljud. Välj en wav-, flac-, mp3- eller ogg-fil.",
        "damaged": "Filen är skadad eller avbruten: inget ljud i den kan läsas. Välj en annan.",
        "not_finite": "Filen innehåller ogiltiga ljudvärden. Välj en annan.",
        "silent": "Inspelningen är tyst. Är rätt mikrofon vald och påslagen?",
        "too_long": "Inspelningen är längre än 10 minuter. Välj en kortare.",
        "busy": "Servern är upptagen. Din inspelning finns kvar: försök igen om en stund.",
        "too_large": "Filen är för stor: högst 25 MB.",
        "options": "Alternativen kan inte användas: varje text får ha högst 2 000 tecken.",
        "address": "Bara filer kan transkriberas, inte webbadresser. Ladda upp filen i stället.",
        "too_slow": "Transkriberingen tog för lång tid. Välj en kortare inspelning.",
        "too_many": "Din adress har skickat mycket på kort tid. Försök igen om {seconds} s.",
    },
}

TEXTS: dict[str, Texts] = {"en": ENGLISH, "sv": SWEDISH}
_SWEDISH_NAMES = dict(
    pair.split()
    for pair in (
        "sv svenska, da danska, no norska, nn nynorska, fi finska, is isländska, fo färöiska, en engelska, de tyska, "
        "nl nederländska, fr franska, es spanska, it italienska, pt portugisiska, pl polska, et estniska, lv lettiska, "
        "lt litauiska, ru ryska, uk ukrainska, ar arabiska, fa persiska, so somaliska, tr turkiska, zh kinesiska"
    ).split(", ")
)
"""Other languages have their English names."""


def localized_texts(tag: str, speech: str) -> Texts:
    """Return the page's texts in the language `tag`, for a model of `speech`, Whisper's code of a language."""
    name = languages.NAMES[speech].title()
    if tag == "sv":
        name = _SWEDISH_NAMES.get(speech, name)
    texts = TEXTS[tag]
    return texts | {key: texts[key].format(language=name) for key in ("title", "lead")}


def choose_language(accept_language: str) -> str:
    """Return the most preferred available language of an Accept-Language header, or "en"."""
    preferences = []
    for position, entry in enumerate(accept_language.split(",")[:20]):
        tag, _, quality = entry.partition(";q=")
        try:
            weight = float(quality) if quality else 1.0
        except ValueError:
            continue
        preferences.append((-weight, position, tag.strip().lower().partition("-")[0]))
    return next((tag for weight, _, tag in sorted(preferences) if tag in TEXTS and weight < 0), "en")
