"""Names that a model cannot know: how many are spelled right with no help, with a prompt, and with hotwords.

    python benchmarks/rare_names.py --model runs/tour/train-…/model      minutes
    python benchmarks/rare_names.py --smoke                              a few sentences, to check that it runs

50 invented names of people and places stand in 200 sentences, four each, written for this benchmark. Sixteen eSpeak
voices, those of the tour's test split, take turns. The names form five lists of ten:

none            no help
prompt          the ten names of the sentence's list in a prompt
hotwords        the same ten as hotwords
hotwords_all    all 50 as hotwords

The tour's test sentences hold none of the names. They are transcribed with the same help, each with one of the lists in
turn, to see what it costs where nothing needs it.

The last line is one JSON object. `help` has for each kind of help: `wer`, `recall` (share of the names that are written
as they are spelled, case aside), `control_wer` (the tour's sentences), each with `ci95` over speakers and, except for
`none`, `minus_none` (paired: `delta`, `ci95`); and `control_names`, the number of names in transcripts of the tour's
sentences.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from pipelines.features.sources.synthetic import espeak, tour
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.inference.transcriber import Transcriber
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.speech import audio, scoring, text
from pipelines.speech.audio import Waveform
from pipelines.speech.edits import Edits
from pipelines.whisper import model as whisper_model

PEOPLE = """
Brånkvill Tjärnemo Hökvander Vrankell Skylvinge Mörtholt Ekvarnsten Glimsell Dörvander Njuråker
Kvarnefelt Snäpphag Rundelöv Ysterman Flåhammar Pärlevik Grönefalk Trastenius Vadelin Bjärnell
Krysander Fimbrell Ulvenhag Sotevall Tirkanell Zetterklyft Öviker Hasselgräv Lomander Stävling
""".split()
PLACES = """
Hallmyrby Skrovelinge Tranemyra Kråkmyrsele Ödeshyltan Vättersmo Norrstångby Brännhuvud Gärdsmöle Tuvehult
Älghyttebo Sävringe Molkesjö Rävshala Isfjärdsta Kolmarsvik Dimbäcka Stenkullarp Fårknuten Hjortabro
""".split()
ABOUT_PEOPLE = (
    "Har du pratat med {} om saken?",
    "Familjen {} bor på andra våningen.",
    "Doktor {} tar emot på måndag.",
    "Jag fick ett brev från {} i går.",
    "Ring {} innan du åker hem.",
    "Läraren heter {} och kommer från Norge.",
    "{} vann loppet med stor marginal.",
    "Vi väntar bara på {} nu.",
    "Boken är skriven av {} och hennes bror.",
    "Det var {} som målade taket.",
    "Kan {} hjälpa oss att flytta soffan?",
    "Advokaten {} svarade inte på frågan.",
    "I kväll spelar {} på den gamla teatern.",
    "Snickaren {} bygger en ny brygga.",
    "Chefen hälsade på {} i fabriken.",
    "Mötet leds av {} från kommunen.",
    "Min granne {} har fått en hund.",
    "Enligt {} är vägen stängd hela veckan.",
    "Vi köpte huset av {} för tio år sedan.",
    "Paketet ska till {} på tredje våningen.",
    "Fråga {} om hon har nyckeln.",
    "{} glömde sina handskar på bussen.",
    "Artikeln nämner {} bara en gång.",
    "Hela laget tackade {} efter matchen.",
)
ABOUT_PLACES = (
    "Tåget till {} går klockan åtta.",
    "Min mormor är född i {}.",
    "Vi hyrde en stuga utanför {}.",
    "Det snöar i {} sedan i morse.",
    "Vägen mellan {} och havet är smal.",
    "Skolan i {} ska byggas om.",
    "Har du någonsin varit i {}?",
    "Bussen stannar i {} på söndagar.",
    "I {} finns det en gammal kyrka.",
    "Alla butiker i {} är stängda.",
    "De flyttade från {} till staden.",
    "Marknaden i {} öppnar på lördag.",
    "Hon arbetar på sjukhuset i {}.",
    "Älven rinner förbi {} och vidare söderut.",
    "Festivalen i {} lockar många besökare.",
    "Posten i {} delas ut två gånger i veckan.",
)
SENTENCES_PER_NAME = 4
LIST_SIZE = 10
SEED = 7
HELP = ("none", "prompt", "hotwords", "hotwords_all")


@dataclass(frozen=True)
class Sentence:
    """A sentence, its recording, and the list of names that is given as help."""

    samples: np.ndarray
    text: str
    speaker: str
    names: tuple[str, ...]
    name: str = ""
    """The rare name in it."""


def main() -> None:
    try:
        print(json.dumps(measure(_options()), ensure_ascii=False))
    except LabError as error:
        sys.exit(str(error))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    ref = whisper_model.resolve(options.model)
    sentences, controls, limit = rare_sentences(), control_sentences(), {}
    if options.smoke:
        sentences, controls, limit = sentences[:2], controls[:2], {"max_new_tokens": 12}
    transcriber = Transcriber(ref, "sv", engine=options.engine, threads=options.threads, **limit)
    found: dict[str, Any] = {}
    before: dict[str, Edits] = {}
    for kind in HELP:
        edits, n_control_names = _edits(transcriber, kind, sentences, controls, options.beam_size)
        before = before or edits
        found[kind] = {**_scores(edits, before, sentences, controls), "control_names": n_control_names}
        print(f"{kind}: {json.dumps(found[kind])}", flush=True)
    sizes = {"sentences": len(sentences), "controls": len(controls)}
    beams = options.beam_size or transcriber.options.beam_size
    return {"model": ref.title, "engine": transcriber.loaded.name, "beam_size": beams, **sizes, "help": found}


def rare_sentences() -> list[Sentence]:
    """Return the sentences with names, in an order in which names and frames vary."""
    pairs = []
    for names, frames in ((PEOPLE, ABOUT_PEOPLE), (PLACES, ABOUT_PLACES)):
        for turn in range(SENTENCES_PER_NAME):
            # four different frames for each name
            pairs += [(name, frames[(number + 5 * turn) % len(frames)]) for number, name in enumerate(names)]
    voices = tour.personas("test", SEED, tour.PERSONAS["test"])
    texts = [(frame.format(name), name) for name, frame in pairs]
    lists = {name: names for names in name_lists() for name in names}
    return [
        Sentence(_speak(turn), turn.text, turn.speaker, lists[turn.origin], turn.origin)
        for turn in tour.turns("rare-names", "test", texts, voices, SEED)
    ]


def control_sentences() -> list[Sentence]:
    """Return the tour's test sentences; the lists of names take turns."""
    lists = name_lists()
    return [
        Sentence(audio.decode(example.audio).samples, example.text, example.speaker, lists[number % len(lists)])
        for number, example in enumerate(TourSource().examples(("test",)))
    ]


def name_lists() -> list[tuple[str, ...]]:
    names = PEOPLE + PLACES
    return [tuple(names[start : start + LIST_SIZE]) for start in range(0, len(names), LIST_SIZE)]


def _speak(turn: tour.Utterance) -> np.ndarray:
    return audio.decode(espeak.synthesise(turn.text, turn.variant, turn.rate_wpm, turn.pitch)).samples


def _edits(
    transcriber: Transcriber, kind: str, sentences: Sequence[Sentence], controls: Sequence[Sentence], beam_size: int
) -> tuple[dict[str, Edits], int]:
    """Transcribe everything with one kind of help. Returns the edits by figure, and the names in the controls."""
    texts = [
        [
            transcriber.with_options(**_options_of(kind, one.names), beam_size=beam_size or None)
            .transcribe(Waveform(one.samples))
            .text
            for one in part
        ]
        for part in (sentences, controls)
    ]
    edits = {
        "wer": scoring.count_edits([one.text for one in sentences], texts[0]),
        "recall": missed_names(sentences, texts[0]),
        "control_wer": scoring.count_edits([one.text for one in controls], texts[1]),
    }
    names = {text.normalise(name) for name in PEOPLE + PLACES}
    return edits, sum(word in names for transcript in texts[1] for word in text.normalise(transcript).split())


def _options_of(kind: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the decoding options of one of HELP."""
    return {
        "none": {},
        "prompt": {"prompt": f"{', '.join(names)}."},
        "hotwords": {"hotwords": names},
        "hotwords_all": {"hotwords": tuple(PEOPLE + PLACES)},
    }[kind]


def missed_names(sentences: Sequence[Sentence], transcripts: Sequence[str]) -> Edits:
    """Return one word for each name, and an edit for each that is not in its transcript: their WER is 1 - recall."""
    missed = [
        text.normalise(sentence.name) not in text.normalise(transcript).split()
        for sentence, transcript in zip(sentences, transcripts, strict=True)
    ]
    zeros, ones = np.zeros(len(missed), dtype=np.int64), np.ones(len(missed), dtype=np.int64)
    return Edits(np.array(missed, dtype=np.int64), zeros, zeros, ones, zeros, ones)


def _scores(
    edits: dict[str, Edits], before: dict[str, Edits], sentences: Sequence[Sentence], controls: Sequence[Sentence]
) -> dict[str, Any]:
    """Return WER, recall and the WER of the controls with intervals, and the differences to `before`."""
    found = {}
    for name, counted in edits.items():
        speakers = [one.speaker for one in (controls if name == "control_wer" else sentences)]
        score, difference = scoring.score_edits(counted, speakers), scoring.difference(counted, before[name], speakers)
        value, ci95, delta, delta_ci95 = score.wer, score.ci95, difference.delta, difference.ci95
        if name == "recall":
            value, delta = 1 - value, 0.0 - delta
            ci95, delta_ci95 = ci95 and (1 - ci95[1], 1 - ci95[0]), delta_ci95 and (-delta_ci95[1], -delta_ci95[0])
        found[name] = {"value": round(value, 4), "ci95": _rounded(ci95)}
        if edits is not before:
            found[name]["minus_none"] = {"delta": round(delta, 4), "ci95": _rounded(delta_ci95)}
    return found


def _rounded(interval: tuple[float, float] | None) -> list[float] | None:
    return interval and [round(limit, 4) for limit in interval]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few sentences, to check that it runs")
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--beam-size", type=int, default=0, help="beams; default: those that the model's manifest sets")
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    environment.share_cores()
    main()
