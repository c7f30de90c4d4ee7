"""Choose the tiers of an annotation that hold the text: of words and phones, or of a text and its references, one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipelines.infra.errors import LabError

_SAME_TIME_SHARE = 0.9
"""Share of the shorter tier's time that lies in the time of the other, if both annotate the same speech."""
_MIN_TIME_SHARE = 0.4
"""Time of the shorter tier, as a share of the other's, below which it is another speaker who throws in a word."""
_LONGER = 1.5
"""So many times as many units are shorter units: a sentence has several words, a word several phones."""
_MIN_LETTERS = 1 / 3
"""Letters of a text, as a share of those of any tier of the same time. Topics, turns and numbers have far fewer."""
_WORD_SHARE = 0.9
"""Share of units of one word from which a tier is one of words."""
_PAUSE_S = 0.2
"""Between two words of one line."""
_MAX_LINE_S = 10.0
"""Longest line of joined words. Lines without a pause between them become one clip (places.py)."""
_SILENCE = re.compile(r"<(?:p:?|eps|sil|usb|nib)>", re.IGNORECASE)
_UNIT = re.compile(
    r"(?:(?P<speaker>.+?)\s*[-_:/@.]\s*)?(?:(?P<text>words?|ord|sentences?|utterances?|ort)|"
    r"(?P<sound>phones?|phonemes?|phonem|fonem|syllables?|ipa))|(?-i:ORT-MAU|(?P<maus>(?:KAN-)?MAU|KAN|MAS))",
    re.IGNORECASE,
)
"""Names of tiers of the Montreal Forced Aligner, WebMAUS and people, with the speaker before them."""


@dataclass(frozen=True)
class Line:
    """A cue, a label, an annotation or a sentence."""

    text: str
    start_s: float | None = None
    """As the text states it; None in a manuscript."""
    end_s: float | None = None
    speaker: str = ""


@dataclass(frozen=True, eq=False)
class Tier:
    """A tier with its lines in order."""

    name: str
    lines: list[Line]
    speaker: str = ""
    """As the file states it."""
    ancestors: frozenset[str] = frozenset()
    """Names of the tiers that it depends on (ELAN)."""

    @cached_property
    def filled(self) -> list[Line]:
        lines = [replace(line, text=" ".join(_SILENCE.sub(" ", line.text).split())) for line in self.lines]
        return [line for line in lines if any(map(str.isalnum, line.text))]

    @cached_property
    def letters(self) -> str:
        return "".join(char for line in self.filled for char in line.text.casefold() if char.isalnum())

    @cached_property
    def time_s(self) -> float:
        return sum(line.end_s - line.start_s for line in self.filled)

    @cached_property
    def named_speaker(self) -> str:
        """The speaker that the file or the name of the tier states."""
        match = _UNIT.fullmatch(self.name.strip())
        return self.speaker or (match["speaker"] or "" if match else "")

    @property
    def is_sound(self) -> bool:
        """Return whether its name says that it holds phones or syllables."""
        match = _UNIT.fullmatch(self.name.strip())
        return bool(match and (match["sound"] or match["maus"]))

    @property
    def holds_ids(self) -> bool:
        """Return whether each of its units is one token with a digit, or has no letter."""
        units = [line.text.split() for line in self.filled]
        return all(len(unit) == 1 and any(map(str.isdigit, unit[0])) for unit in units)


def choose(path: Path, tiers: Sequence[Tier]) -> tuple[list[Tier], str]:
    """Return the tiers that hold the text, words joined to lines, and a note that names them ("" for one tier).

    Tiers without text stay. Tiers that annotate the same speech of one speaker are one group: the text is the one of
    the longest units, if it is no tier of phones, topics or numbers. Raises LabError if several could be.
    """
    filled = [tier for tier in tiers if tier.filled]
    chosen = [tier for group in _groups(filled) if (tier := _text_of(path, group))]
    if filled and not chosen:
        raise LabError(f"{path} must have a tier of words or sentences, got {_names(filled)}: add one")
    chosen.sort(key=filled.index)
    left_out = [tier for tier in filled if tier not in chosen]
    note = f"text from the tiers {_names(chosen)}" + (f"; left out: {_names(left_out)}" if left_out else "")
    return [replace(tier, lines=_joined(tier)) for tier in tiers if tier not in left_out], note if len(
        filled
    ) > 1 else ""


def _groups(tiers: Iterable[Tier]) -> list[list[Tier]]:
    """Return the tiers of the same speech; a tier of topics over all speakers does not make them one."""
    groups: list[list[Tier]] = []
    for tier in tiers:
        group = next((one for one in groups if all(_same_speech(tier, other) for other in one)), None)
        if group is None:
            groups.append([tier])
        else:
            group.append(tier)
    return groups


def _same_speech(one: Tier, other: Tier) -> bool:
    speakers = {one.named_speaker.casefold(), other.named_speaker.casefold()}
    if len(speakers) == 2 and "" not in speakers:
        return False
    if one.name in other.ancestors or other.name in one.ancestors:
        return True
    shorter, longer = sorted((one, other), key=lambda tier: tier.time_s)
    shared_s = _shared_s(shorter.filled, longer.filled)
    return (
        shared_s > 0
        and shared_s >= _SAME_TIME_SHARE * shorter.time_s
        and shorter.time_s >= _MIN_TIME_SHARE * longer.time_s
    )


def _shared_s(lines: Sequence[Line], others: Sequence[Line]) -> float:
    shared_s, first = 0.0, 0
    for line in lines:
        while first < len(others) and others[first].end_s <= line.start_s:
            first += 1
        for other in others[first:]:
            if other.start_s >= line.end_s:
                break
            shared_s += max(0.0, min(line.end_s, other.end_s) - max(line.start_s, other.start_s))
    return shared_s


def _text_of(path: Path, group: list[Tier]) -> Tier | None:
    """Return the tier of a group that holds the text, None if all hold phones."""
    texts = [tier for tier in group if not tier.is_sound]
    most = max((len(tier.letters) for tier in texts), default=0)
    if len(texts) > 1:
        texts = [tier for tier in texts if len(tier.letters) >= _MIN_LETTERS * most]
        texts = [tier for tier in texts if not tier.holds_ids] or texts
    names = {tier.name for tier in texts}
    texts = [tier for tier in texts if not tier.ancestors & names]
    texts.sort(key=lambda tier: len(tier.filled))
    if not texts:
        return None
    rivals = [t for t in texts if t.letters != texts[0].letters and len(t.filled) < _LONGER * len(texts[0].filled)]
    if rivals:
        raise LabError(
            f"{path} must have one text for the same speech, got the tiers {_names([texts[0], *rivals])} with units of "
            "the same length: keep the one that holds what is said"
        )
    return texts[0]


def _joined(tier: Tier) -> list[Line]:
    """Return the lines of a tier; words are joined up to the next pause."""
    lines = tier.filled
    if sum(len(line.text.split()) == 1 for line in lines) < _WORD_SHARE * len(lines):
        return lines
    joined = lines[:1]
    for line in lines[1:]:
        last = joined[-1]
        if line.start_s - last.end_s < _PAUSE_S and line.end_s - last.start_s <= _MAX_LINE_S:
            joined[-1] = replace(last, text=f"{last.text} {line.text}", end_s=line.end_s)
        else:
            joined.append(line)
    return joined


def _names(tiers: Iterable[Tier]) -> str:
    return ", ".join(repr(tier.name) for tier in tiers)
