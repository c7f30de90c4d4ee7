"""Write a transcript in the formats of OpenAI's API and of openai-whisper.

lines.py          break words into lines at clauses
cues.py           divide a transcript into cues that can be read
writers.py        txt, tsv, srt, vtt
verbose_json.py   the verbose JSON
"""

from pathlib import Path

from pipelines.inference.subtitles.cues import DEFAULT, Style
from pipelines.inference.subtitles.verbose_json import as_dict, verbose_json
from pipelines.inference.subtitles.writers import srt, text, tsv, vtt
from pipelines.inference.transcript import Transcript

__all__ = ["CUE_FORMATS", "DEFAULT", "FORMATS", "Style", "as_dict", "srt", "text", "tsv", "verbose_json", "vtt"]

FORMATS = ("txt", "srt", "vtt", "tsv", "json")
"""Suffixes of the files that `write` can make."""
CUE_FORMATS = ("srt", "vtt")
"""Those to which a Style applies."""


def write(
    transcript: Transcript, form: str, style: Style = DEFAULT, language: str = "sv", model: Path | None = None
) -> str:
    """Return the content of a file of the format `form`; `language` and `model` are those of `as_dict`."""
    if form in CUE_FORMATS:
        return {"srt": srt, "vtt": vtt}[form](transcript, style)
    return verbose_json(transcript, language, model) if form == "json" else {"txt": text, "tsv": tsv}[form](transcript)
