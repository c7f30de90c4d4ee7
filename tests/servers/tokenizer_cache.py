"""Read Whisper's tokenizer once for all commands: that takes half a second, and it is the same in every toy model.

The fork server (fork_server.py) imports this module, with a model's folder in the variable TOY.
"""

import functools
import hashlib
import os
import tempfile
from pathlib import Path

from transformers import WhisperProcessor

from pipelines.whisper import model as whisper_model

_read = WhisperProcessor.from_pretrained
_folders: dict[str, str] = {}
"""Digest of a tokenizer to the first folder with it."""


@functools.cache
def _shared(digest: str, **options: str) -> WhisperProcessor:
    return _read(_folders[digest], **options)


def from_pretrained(folder: str | Path, **options: str) -> WhisperProcessor:
    """Return the processor of a folder, or the one that was read from another folder with the same files."""
    files = sorted(path for path in Path(folder).glob("*.json") if "token" in path.name or "process" in path.name)
    if not files:
        return _read(folder, **options)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    _folders.setdefault(digest, str(folder))
    return _shared(digest, **options)


WhisperProcessor.from_pretrained = from_pretrained
with tempfile.TemporaryDirectory() as _saved:  # a saved processor has other files: those of every tuned model
    for _folder in (os.environ["TOY"], _saved):
        _processor = whisper_model.load_processor(whisper_model.ModelRef("toy", Path(_folder), "folder", ""), "sv")
        if not any(Path(_saved).iterdir()):
            _processor.save_pretrained(_saved)
            _processor.feature_extractor.save_pretrained(_saved)
            for _name in ("config.json", "model.safetensors"):  # a processor is read from whole models only
                (Path(_saved) / _name).symlink_to(Path(os.environ["TOY"]) / _name)
