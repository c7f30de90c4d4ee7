"""Whisper's tokenizer is read once for all commands: half a second each time, and the same in every toy.

Imported by the process that forks (forks.py), with a model's folder in the variable TOY.
"""

import functools
import hashlib
import os
import tempfile
from pathlib import Path

from transformers import WhisperProcessor

from pipelines.whisper import model as whisper_model

_read = WhisperProcessor.from_pretrained
_places: dict[str, str] = {}
"""Digest of a tokenizer to the first folder that had it."""


@functools.cache
def _shared(digest: str, **told: str) -> WhisperProcessor:
    return _read(_places[digest], **told)


def from_pretrained(folder: str | Path, **told: str) -> WhisperProcessor:
    """The processor of a folder; that of another one with the same files will do."""
    files = sorted(path for path in Path(folder).glob("*.json") if "token" in path.name or "process" in path.name)
    if not files:
        return _read(folder, **told)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    _places.setdefault(digest, str(folder))
    return _shared(digest, **told)


WhisperProcessor.from_pretrained = from_pretrained
with tempfile.TemporaryDirectory() as _saved:  # saved, the files are others: those of every model that is tuned
    from pipelines.whisper import model as whisper_model

    for _folder in (os.environ["TOY"], _saved):
        _processor = whisper_model.load_processor(whisper_model.ModelRef("toy", Path(_folder), "folder", ""), "sv")
        if not any(Path(_saved).iterdir()):
            _processor.save_pretrained(_saved)
            _processor.feature_extractor.save_pretrained(_saved)
