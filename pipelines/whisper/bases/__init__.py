"""Base models as they are stored: recognise the kind of a folder, and complete one that lacks files.

The lab, its exports and its engines read one kind of folder: `model.safetensors` with transformers' names, config.json,
tokenizer.json, the settings of the feature extractor and of generation. Most uploads are that already. Others are
completed once, in the lab's cache:

    kinds            what else a folder can hold, and what to do about it
    weights          shards, pytorch_model.bin, prefixes of names
    generation       generation_config.json, from the tokenizer and config.json
    tokenizer_files  files that older programs read

<cache>/bases/<digest>/   a complete folder; the digest is that of the files it was made from
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError, is_disk_full
from pipelines.infra.parallel import work_folder
from pipelines.recipes import digest
from pipelines.whisper.bases import generation, kinds, tokenizer_files, weights

logger = logging.getLogger(__name__)

_FORMAT = "1"
"""Raised whenever the files written for a base model change."""
_EXTRACTORS = ("preprocessor_config.json", "processor_config.json")


def complete(folder: Path) -> Path:
    """Return the folder of a base model with all files that the lab reads: `folder` itself, or a completed copy.

    Raises LabError if the folder holds no Whisper that can be loaded, with the reason and a remedy.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    config = kinds.require_whisper(folder, names)
    chosen = weights.choose(names)
    missing = _missing(folder, names, config, chosen)
    if not missing:
        return folder
    sources = [*weights.files(folder, chosen), *sorted(name for name in names if name in kinds.TEXTS)]
    identity = {
        "code.base": _FORMAT,
        **{f"file.{name}": manifest.sha256_once(Path(os.path.realpath(folder / name))) for name in sources},
    }
    target = environment.cache_folder() / "bases" / digest(identity)
    if (manifest.read(target) or {}).get("made_of") == identity and manifest.problem(target) is None:
        return target
    logger.info(f"completing {folder} (once): {', '.join(missing)} ...")
    try:
        with work_folder.create(target.parent, "base") as temporary:
            _write(folder, names, config, chosen, temporary / "model")
            manifest.seal(temporary / "model", kind="base", made_of=identity)
            shutil.rmtree(target, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was first
                os.replace(temporary / "model", target)
    except OSError as error:
        if is_disk_full(error, target.parent):
            raise LabError(f"the disk is full: {folder} is not completed in {target.parent}. Free some space") from None
        raise
    return target


def _missing(folder: Path, names: set[str], config: dict[str, Any], chosen: str) -> list[str]:
    """Return what a folder lacks, in words for the log."""
    missing = []
    if chosen != weights.SAFETENSORS:
        missing.append(f"weights from {chosen}")
    elif weights.prefix_in_header(folder / chosen):
        missing.append("names of the weights")
    if "tokenizer.json" not in names:
        missing.append("tokenizer.json")
    if not names & set(_EXTRACTORS):
        missing.append("preprocessor_config.json")
    settings = manifest.read_json(folder / generation.FILE)
    if settings is None and generation.FILE not in names:
        missing.append(generation.FILE)
    elif settings is not None and not generation.is_complete(settings, config):
        missing.append(f"fields of {generation.FILE}")
    return missing


def _write(folder: Path, names: set[str], config: dict[str, Any], chosen: str, target: Path) -> None:
    target.mkdir()
    for name in names & set(kinds.TEXTS):
        shutil.copyfile(folder / name, target / name)
    if chosen == weights.SAFETENSORS and not weights.prefix_in_header(folder / chosen):
        _link(folder / chosen, target / weights.SAFETENSORS)
    else:
        weights.write(folder, chosen, target / weights.SAFETENSORS)
    if "tokenizer.json" not in names:
        tokenizer_files.write_fast(folder, target)
    if not names & set(_EXTRACTORS):
        from transformers import WhisperFeatureExtractor

        WhisperFeatureExtractor(feature_size=config.get("num_mel_bins", 80)).save_pretrained(target)
    settings = manifest.read_json(folder / generation.FILE)
    if settings is not None or generation.FILE not in names:
        vocabulary = tokenizer_files.vocabulary(target)
        manifest.write_json(target / generation.FILE, generation.filled(settings or {}, vocabulary, config))


def _link(source: Path, target: Path) -> None:
    """Make `target` a link to a large file, or a copy where the system has no links."""
    try:
        target.symlink_to(os.path.realpath(source))
    except OSError:
        shutil.copyfile(source, target)


def finish_tuned(folder: Path, base: Path) -> None:
    """Complete the folder of a tuned model, just saved by transformers, for other programs and older versions.

    The tokenizer's files are those of the folder `base`; generation_config.json gets the fields that it lacks, and
    prompts forced by older versions go: they would contradict the language.
    """
    tokenizer_files.write_all(folder, base)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if "forced_decoder_ids" in config:
        del config["forced_decoder_ids"]
        manifest.write_json(folder / "config.json", config)
    settings = manifest.read_json(folder / generation.FILE) or {}
    vocabulary = tokenizer_files.vocabulary(folder)
    manifest.write_json(folder / generation.FILE, generation.filled(settings, vocabulary, config))
