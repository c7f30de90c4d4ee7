"""Folders of other programs: Kaldi and LJSpeech are read, others are recognised and refused with the way to convert.

Kaldi (also ESPnet)   wav.scp, text; optional: segments, utt2spk; in the folder or in one subfolder for each split
LJSpeech              metadata.csv without a header: id|text|normalised text; audio in wavs/
"""

from __future__ import annotations

import logging
from pathlib import Path

from pipelines.infra.errors import LabError
from pipelines.infra.file_lookup import FileLookup
from pipelines.infra.tables import FOREIGN_SUFFIXES, Cells, read_text
from pipelines.infra.tables.encoding import readable
from pipelines.speech.audio_files import AUDIO_SUFFIXES
from pipelines.speech.recordings.columns import FILE, TEXT

logger = logging.getLogger(__name__)

_ANNOTATIONS = (".textgrid", ".eaf", ".srt", ".vtt", ".stm", ".trs", ".cha", ".ctm")


def kaldi_folders(folder: Path) -> list[Path]:
    """Return the Kaldi directories: the folder itself, else its subfolders."""
    candidates = [folder] if (folder / "wav.scp").is_file() else sorted(folder.glob("*/"))
    return [path for path in candidates if (path / "wav.scp").is_file()]


def kaldi_rows(folder: Path) -> list[tuple[str, Cells]]:
    """Return the utterances of a Kaldi directory; one without a recording names a file that does not exist.

    Raises LabError for a command in wav.scp: none is executed.
    """
    recordings = dict(_pairs(folder / "wav.scp"))
    for name, (where, value) in recordings.items():
        if value.startswith("|") or value.endswith("|") or (".ark:" in value and value[-1].isdigit()):
            raise LabError(
                f"{where}: {name} must be a file, got {value[:60]!r}, which is never executed: write the recordings to "
                "files first (Kaldi: wav-copy scp:wav.scp ark,scp:…; ESPnet: scripts/audio/format_wav_scp.sh)"
            )
    if not (folder / "text").is_file():
        raise LabError(f"{folder} has wav.scp, but no file `text` with the transcripts: add it")
    texts, speakers = dict(_pairs(folder / "text")), dict(_pairs(folder / "utt2spk"))
    segments = dict(_pairs(folder / "segments"))
    rows = []
    utterances = segments or recordings
    without_audio = {name: (where, name) for name, (where, _) in texts.items() if name not in utterances}
    for utterance, (where, value) in {**utterances, **without_audio}.items():
        is_segment = utterance in segments
        recording, *times = value.split() if is_segment else [utterance]
        if is_segment and len(times) != 2:
            raise LabError(f"{where}: a segment must be `utterance recording start end`, got {value[:60]!r}")
        row = {
            "path": recordings.get(recording, ("", recording))[1] if utterance in utterances else utterance,
            "text": texts.get(utterance, ("", ""))[1],
            "speaker": speakers.get(utterance, ("", ""))[1],
        }
        rows.append((where, row | dict(zip(("start", "end"), times, strict=False))))
    return rows


def ljspeech_rows(table: Path) -> list[tuple[str, Cells]] | None:
    """Return the rows of a table in LJSpeech's layout, or None for any other table."""
    if table.suffix.lower() != ".csv":
        return None
    with readable(table), open(table, "rb") as file:
        first = file.readline().decode(errors="replace")
    header = [cell.strip().strip('"').lower() for cell in first.split("|")]
    if len(header) not in (2, 3) or {*header} & {*FILE, *TEXT}:
        return None
    rows, lookup = [], FileLookup(table.parent)
    for number, line in enumerate(read_text(table).split("\n"), 1):
        cells = line.rstrip("\r").split("|")
        if not line.strip():
            continue
        has_suffix = Path(cells[0]).suffix.lower() in AUDIO_SUFFIXES
        if len(cells) != len(header) or (has_suffix and len(cells) == 3):
            raise LabError(
                f"{table.name} line {number}: without a header, a row must be `id|text` or `id|text|normalised text`, "
                f"got {line[:60]!r}: add a first line that names the columns, such as path|text|speaker"
            )
        file = cells[0] if has_suffix else _with_suffix(lookup, cells[0])
        rows.append((f"{table.name} line {number}", {"path": file, "text": cells[1]}))
    logger.info(f"{table.name}: no header, so it is read as LJSpeech: id|text; a third column is not used")
    return rows


def refuse_foreign(folder: Path) -> None:
    """Raise LabError, with the command that converts it, for a folder of another program that is not read."""
    names = {path.name: path for path in sorted(folder.iterdir())}

    def first(word: str) -> str | None:
        return next((name for name in names if word in name and ".jsonl" in name), None)

    hint = ""
    if (recordings := first("recordings")) and (supervisions := first("supervisions")):
        hint = f"manifests of lhotse. Convert them: lhotse kaldi export {recordings} {supervisions} ."
    elif cuts := first("cuts"):
        hint = f"cuts of lhotse. Convert them: lhotse cut decompose {cuts} . && lhotse kaldi export "
        hint += "recordings.jsonl.gz supervisions.jsonl.gz ."
    elif {"dataset_info.json", "dataset_dict.json"} & names.keys():
        hint = "a data set that `save_to_disk` wrote: set source.kind=parquet"
    elif any(folder.rglob("*.parquet")):
        hint = "Parquet files: set source.kind=parquet"
    elif tables := [name for name, path in names.items() if path.suffix.lower() in FOREIGN_SUFFIXES]:
        hint = f"{tables[0]}: save it as transcripts.xlsx or transcripts.csv"
    elif shards := [name for name in names if name.endswith(".tar")]:
        hint = f"{shards[0]}, perhaps of WebDataset. Unpack them: for f in *.tar; do tar xf $f; done"
    elif annotations := [name for name, path in names.items() if path.suffix.lower() in _ANNOTATIONS]:
        hint = f"{annotations[0]}: write a table transcripts.csv with the columns path, start, end and text"
    if hint:
        raise LabError(f"{folder} must hold a table of transcripts or .txt files, got {hint}")


def _pairs(path: Path) -> list[tuple[str, tuple[str, str]]]:
    """Return the first word of each line, with the line's position and the rest; nothing if there is no file."""
    pairs = []
    for number, line in enumerate(read_text(path).split("\n") if path.is_file() else (), 1):
        if words := line.split(maxsplit=1):
            pairs.append((words[0], (f"{path.name} line {number}", "".join(words[1:]).strip())))
    return pairs


def _with_suffix(lookup: FileLookup, name: str) -> str:
    """Return the file name of an id: the first that exists, else `<id>.wav`."""
    return next((f"{name}{suffix}" for suffix in AUDIO_SUFFIXES if lookup.find(f"{name}{suffix}")), f"{name}.wav")
