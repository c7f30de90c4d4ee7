"""Write the corpus of the experiment with pseudo-labels (docs/experiments/pseudo): a part of the tour with transcripts.

    python benchmarks/pseudo_data.py [--to runs/pseudo-data] [--labelled 100] [--unlabelled 800]

labelled     the first training clips, validation and test: recordings with a table
unlabelled   the other training clips: recordings alone, under names that say nothing
true         the same recordings with their transcripts, for the upper bound

Files that are there already are written again, with the same content.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipelines.features.sources import Example
from pipelines.features.sources.synthetic.tour import TourSource

VALIDATION, TEST = 60, 160
"""Clips of both splits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--to", type=Path, default=Path("runs/pseudo-data"), help="folder to write to")
    parser.add_argument("--labelled", type=int, default=100, help="training clips with transcripts")
    parser.add_argument("--unlabelled", type=int, default=800, help="training clips without")
    options = parser.parse_args()
    source = TourSource(options.labelled + options.unlabelled, VALIDATION, TEST)
    training = list(source.examples(("train",)))
    labelled, others = training[: options.labelled], training[options.labelled :]
    held_out = list(source.examples(("validation", "test")))
    for name, examples in (("labelled", [*labelled, *held_out]), ("true", others)):
        write_table(options.to / name, examples)
    write_recordings(options.to / "unlabelled", others)
    print(f"{len(labelled)} clips with transcripts and {len(others)} without, {len(held_out)} held out: {options.to}")


def write_table(folder: Path, examples: list[Example]) -> None:
    """Write recordings and their table to a folder."""
    names = write_recordings(folder, examples)
    with open(folder / "transcripts.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "split", "speaker", "gender"])
        for name, one in zip(names, examples, strict=True):
            writer.writerow([name, one.text, one.split, one.speaker, one.meta["gender"]])


def write_recordings(folder: Path, examples: Iterable[Example]) -> list[str]:
    """Write the sound of each example to a numbered file of a folder; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, example in enumerate(examples, start=1):
        names.append(f"{number:04d}.wav")
        (folder / names[-1]).write_bytes(example.audio)
    return names


if __name__ == "__main__":
    main()
