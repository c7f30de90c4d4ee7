"""Read the text of a long recording as lines: subtitles, labels and annotations with times, manuscripts without."""

from __future__ import annotations

import html
import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines.features.sources.aligned import tiers
from pipelines.features.sources.aligned.tiers import Line, Tier
from pipelines.infra.errors import LabError
from pipelines.infra.tables import read_text
from pipelines.speech import marks

SUFFIXES = (".srt", ".vtt", ".textgrid", ".eaf", ".txt")
MAX_CHARS = 1_000
"""Longer lines are refused: people do not say so much in 30 s."""
_CUE = re.compile(r"\s*((?:\d+:)?\d{1,2}:\d{2}[.,]\d{1,3})\s*-->\s*((?:\d+:)?\d{1,2}:\d{2}[.,]\d{1,3})(?:\s.*)?")
_LABEL = re.compile(r"(\d+(?:[.,]\d+)?)\t(\d+(?:[.,]\d+)?)(?:\t(.*))?")
_VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+([^>]+)>")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>|<\d[\d:.]*>|\{\\[^}]*\}")
_DASH = re.compile(r"^(?:[-–—]|>>+)\s*")
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?…])([\"”’»)]*)\s+")
_ROLLING_SHARE = 0.5
"""Share of the cues that begin with the end of the cue before, above which all such repeats are rows still shown."""
_MIN_ROLLING = 3
_GRID_TOKEN = re.compile(r'"((?:[^"]|"")*)"|(?<![\w.\[])(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?![\w.])')


def read(path: Path, report: Callable[[str], None] = lambda note: None) -> list[Line]:
    """Return the lines of a text in order, without those that have no letter outside notes such as `[musik]`.

    `report` receives one line that names the tiers that were used and left out, if there are several.
    Raises LabError, with the line, for a malformed one.
    """
    content = read_text(path).lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    suffix = path.suffix.lower()
    if suffix in _TIER_READERS:
        lines = _of_tiers(path, _TIER_READERS[suffix](path, content), report)
    else:
        lines = _reader(path, content)(path, content)
    lines = [replace(line, text=" ".join(line.text.split())) for line in lines]
    lines = [line for line in lines if any(char.isalnum() for char in marks.remove(line.text))]
    if too_long := next((line for line in lines if len(line.text) > MAX_CHARS), None):
        raise LabError(
            f"{path}: a line must have at most {MAX_CHARS:,} characters, got {len(too_long.text):,} in "
            f"{too_long.text[:40]!r}: divide it into sentences"
        )
    if not lines:
        raise LabError(f"{path} must hold the text of its recording, got no line with a letter: correct or remove it")
    return lines


def _reader(path: Path, content: str) -> Callable[[Path, str], list[Line]]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        first = next((line for line in content.split("\n") if line.strip()), "")
        return _labels if _LABEL.fullmatch(first.rstrip()) else _manuscript
    return _subtitles


@dataclass
class _Cue:
    """A cue as it is shown: its rows, without tags."""

    start_s: float
    end_s: float
    rows: list[str] = field(default_factory=list)
    voices: set[str] = field(default_factory=set)


def _subtitles(path: Path, content: str) -> list[Line]:
    """Read SubRip and WebVTT. In WebVTT a row of blanks is part of its cue: YouTube writes them."""
    cues: list[_Cue] = []
    is_open, ends = False, (lambda row: not row) if path.suffix.lower() == ".vtt" else (lambda row: not row.strip())
    rows = content.split("\n")
    for number, (row, following) in enumerate(zip(rows, [*rows[1:], ""], strict=True), 1):
        if "-->" in row:
            match = _CUE.fullmatch(row)
            if not match:
                raise LabError(
                    f"{path}:{number}: a cue's times must be as 00:00:01,500 --> 00:00:04,000, got {row.strip()[:60]!r}"
                )
            cues.append(_Cue(*_checked(path, number, _clock_s(match[1]), _clock_s(match[2]))))
            is_open = True
        elif ends(row) or (row.strip().isdigit() and "-->" in following):  # the next cue's number
            is_open = False
        elif is_open and row.strip():
            cues[-1].voices |= {html.unescape(name).strip() for name in _VOICE.findall(row)}
            cues[-1].rows.append(_DASH.sub("", html.unescape(_TAG.sub("", _BREAK.sub(" ", row))).strip()))
    repeated = _rolled_rows(cues)
    return [
        Line(
            " ".join(["", *cue.rows[n:]]),
            cue.start_s,
            cue.end_s,
            next(iter(cue.voices)) if len(cue.voices) == 1 else "",
        )
        for cue, n in zip(cues, repeated, strict=True)
    ]


def _rolled_rows(cues: list[_Cue]) -> list[int]:
    """Return how many of the first rows of each cue are those that the cue before ended with.

    Captions that roll up show a row again until it leaves the screen. In other subtitles, where few cues begin so,
    words that are said twice stay: all numbers are 0.
    """
    filled = [n for n, cue in enumerate(cues) if cue.rows]
    repeated = [0] * len(cues)
    for before, n in itertools.pairwise(filled):
        earlier, rows = cues[before].rows, cues[n].rows
        longest = min(len(earlier), len(rows))
        repeated[n] = next((k for k in range(longest, 0, -1) if earlier[-k:] == rows[:k]), 0)
    rolled = sum(map(bool, repeated))
    is_rolling = rolled >= _MIN_ROLLING and rolled > _ROLLING_SHARE * len(filled)
    return repeated if is_rolling else [0] * len(cues)


def _labels(path: Path, content: str) -> list[Line]:
    lines = []
    for number, row in enumerate(content.split("\n"), 1):
        if not row.strip() or row.startswith("\\"):  # a second row with the frequencies of a spectral selection
            continue
        match = _LABEL.fullmatch(row.rstrip())
        if not match:
            raise LabError(f"{path}:{number}: a label must be start, tab, end, tab, text, got {row[:60]!r}")
        start_s, end_s = (float(cell.replace(",", ".")) for cell in match.groups()[:2])
        lines.append(Line(match[3] or "", *_checked(path, number, start_s, end_s)))
    return lines


def _manuscript(path: Path, content: str) -> list[Line]:
    lines = []
    for paragraph in re.split(r"\n\s*\n", content):
        sentences = _SENTENCE_END.sub(r"\1\n", " ".join(paragraph.split())).split("\n")
        without_stops = any(len(sentence) > MAX_CHARS for sentence in sentences)
        lines += map(Line, paragraph.split("\n") if without_stops else sentences)
    return lines


def _textgrid(path: Path, content: str) -> list[Tier]:
    """Read Praat's long and short form: without names and indices, both are the same sequence of values."""
    tokens = _GRID_TOKEN.finditer(content)
    values = [match[1].replace('""', '"') if match[1] is not None else float(match[2]) for match in tokens]
    if values[:2] != ["ooTextFile", "TextGrid"]:
        raise LabError(f"{path}:1: a TextGrid must begin with ooTextFile and TextGrid, got {str(values[:2])[:60]}")
    read: list[Tier] = []
    position = 5
    try:
        for _ in range(int(values[4])):
            kind, name, _, _, n = values[position : position + 5]
            position += 5
            width = 3 if kind == "IntervalTier" else 2
            rows = [values[position + i * width : position + (i + 1) * width] for i in range(int(n))]
            position += int(n) * width
            if kind == "IntervalTier":
                if not all(isinstance(text, str) for _, _, text in rows):
                    raise ValueError
                lines = [Line(text, *_checked(path, 1, start, end)) for start, end, text in rows]
                read.append(Tier(str(name), _in_order(lines)))
    except (ValueError, TypeError, IndexError, OverflowError):
        raise LabError(f"{path}: a TextGrid must hold as many values as it states, got another number") from None
    return read


def _elan(path: Path, content: str) -> list[Tier]:
    try:
        if "<!DOCTYPE" in content or "<!ENTITY" in content:
            raise LabError(f"{path}: an ELAN file must have no document type, got one: save it again in ELAN")
        root = ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", content))
        return _elan_tiers(path, root)
    except ElementTree.ParseError as error:
        raise LabError(f"{path}:{error.position[0]}: an ELAN file must be XML, got {error}: save it again") from None
    except ValueError:
        raise LabError(f"{path}: TIME_VALUE must be milliseconds, got another text: save it again in ELAN") from None


def _elan_tiers(path: Path, root: ElementTree.Element) -> list[Tier]:
    """Return the tiers of an ELAN document.

    An annotation that refers to another one has its times; several that refer to the same one are one line.
    """
    slots = {slot.get("TIME_SLOT_ID"): slot.get("TIME_VALUE") for slot in root.iter("TIME_SLOT")}
    elements = {tier.get("TIER_ID") or f"tier {n}": tier for n, tier in enumerate(root.iter("TIER"), 1)}
    refers_to = {one.get("ANNOTATION_ID"): one.get("ANNOTATION_REF") for one in root.iter("REF_ANNOTATION")}
    parents = {name: element.get("PARENT_REF") for name, element in elements.items()}
    by_id = {one.get("ANNOTATION_ID"): one for one in root.iter("ALIGNABLE_ANNOTATION")}
    read: list[Tier] = []
    for name, element in elements.items():
        texts: dict[tuple[str | None, ...], list[str]] = defaultdict(list)
        for one in (*element.iter("ALIGNABLE_ANNOTATION"), *element.iter("REF_ANNOTATION")):
            is_aligned = one.tag == "ALIGNABLE_ANNOTATION"
            timed = one if is_aligned else by_id.get(_chain(refers_to, one.get("ANNOTATION_REF"))[-1])
            if timed is not None:
                times = tuple(slots.get(timed.get(key)) for key in ("TIME_SLOT_REF1", "TIME_SLOT_REF2"))
                texts[times].append(one.findtext("ANNOTATION_VALUE") or "")
        lines = [
            Line(" ".join(filter(None, values)), *_checked(path, 1, *(float(time) / 1000 for time in times)))
            for times, values in texts.items()
            if None not in times
        ]
        chain = _chain(parents, name)
        speakers = (elements[key].get("PARTICIPANT") for key in chain if key in elements)
        read.append(Tier(name, _in_order(lines), next(filter(None, speakers), ""), frozenset(chain[1:])))
    return read


def _chain(parents: Mapping[str | None, str | None], name: str | None) -> list[str | None]:
    """Return a name, its parent, the parent of that and so on; a circle ends."""
    chain = [name]
    while (parent := parents.get(chain[-1])) and parent not in chain:
        chain.append(parent)
    return chain


_TIER_READERS = {".textgrid": _textgrid, ".eaf": _elan}


def _of_tiers(path: Path, read: list[Tier], report: Callable[[str], None]) -> list[Line]:
    """Return the lines of the tiers that hold the text. Several tiers of a TextGrid are several speakers."""
    chosen, note = tiers.choose(path, read)
    if note:
        report(f"{path.name}: {note}")
    by_name = len(chosen) > 1 and path.suffix.lower() == ".textgrid"
    return _in_order(
        [
            replace(line, speaker=tier.named_speaker or (tier.name if by_name else ""))
            for tier in chosen
            for line in tier.lines
        ]
    )


def _in_order(lines: list[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: line.start_s)


def _checked(path: Path, number: int, start_s: float, end_s: float) -> tuple[float, float]:
    if not 0 <= start_s <= end_s:
        raise LabError(f"{path}:{number}: a line must end after its start, got {start_s:g} to {end_s:g} s: correct it")
    return start_s, end_s


def _clock_s(clock: str) -> float:
    *hours, minutes, seconds = clock.replace(",", ".").split(":")
    return (int(hours[0]) if hours else 0) * 3600 + int(minutes) * 60 + float(seconds)
