"""The lab's edits against those of sclite (NIST's SCTK; Debian: apt-get install sctk) on the same pairs."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.speech.scoring import Edits, count_edits

SCLITE = ["sclite"] if shutil.which("sclite") else ["sctk", "sclite"]
WORDS = "hej på dig å ä ö ett båt älg öga idé så vår var ålder den här".split()
SCORES = re.compile(r"id: \(u-(\d+)\)\nScores: \(#C #S #D #I\) \d+ (\d+) (\d+) (\d+)")

pytestmark = pytest.mark.skipif(not shutil.which(SCLITE[0]), reason="sclite is not installed: apt-get install sctk")


def heard(rng: random.Random, words: list[str]) -> list[str]:
    """The words as a model may hear them: some left out, some wrong, some of its own; at times nothing at all."""
    if rng.random() < 0.05:
        return []
    kept = [rng.choice(WORDS) if rng.random() < 0.2 else word for word in words if rng.random() > 0.12]
    for _ in range(rng.choice([0, 0, 1, 3])):
        kept.insert(rng.randint(0, len(kept)), rng.choice(WORDS))
    return kept


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str]]:
    rng = random.Random(1)
    references = [[rng.choice(WORDS) for _ in range(rng.randint(1, 14))] for _ in range(400)]
    return [" ".join(words) for words in references], [" ".join(heard(rng, words)) for words in references]


def sclite(folder: Path, references: list[str], hypotheses: list[str]) -> list[tuple[int, int, int]]:
    """Substitutions, deletions and insertions of each utterance."""
    for name, lines in (("ref", references), ("hyp", hypotheses)):
        told = "".join(f"{line} (u-{number:04d})\n" for number, line in enumerate(lines))
        (folder / f"{name}.trn").write_text(told, "utf-8")
    files = ["-r", "ref.trn", "trn", "-h", "hyp.trn", "trn"]
    command = [*SCLITE, *files, "-i", "rm", "-s", "-e", "utf-8", "-o", "pralign", "stdout"]
    shown = subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=60).stdout.decode()
    found = {int(number): tuple(map(int, counts)) for number, *counts in SCORES.findall(shown)}
    return [found[number] for number in range(len(references))]


def rows(edits: Edits) -> list[tuple[int, int, int]]:
    columns = (edits.substitutions, edits.deletions, edits.insertions)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_total_errors_are_those_of_sclite(pairs, tmp_path):
    """In every utterance. Where two alignments have as many errors they may differ in kind: jiwer takes any of them,
    sclite the cheapest at 4 a substitution and 3 a deletion or insertion, so the fewest substitutions."""
    ours, theirs = rows(count_edits(*pairs)), sclite(tmp_path, *pairs)
    assert [sum(edits) for edits in ours] == [sum(edits) for edits in theirs]
    assert sum(map(sum, ours)) > 500
    assert "" in pairs[1]
    # insertions less deletions are the lengths' difference, in both: only substitutions trade for a pair of them
    assert [edits[2] - edits[1] for edits in ours] == [edits[2] - edits[1] for edits in theirs]
    assert all(one[0] >= other[0] for one, other in zip(ours, theirs, strict=True))


def test_where_sclite_counts_more_errors_than_there_need_be(tmp_path):
    """Five substitutions cost it 20, three deletions and three insertions 18: it reports six errors, not five."""
    pair = ["a b c d e"], ["d e f g h"]
    assert rows(count_edits(*pair)) == [(5, 0, 0)]
    assert sclite(tmp_path, *pair) == [(0, 3, 3)]
