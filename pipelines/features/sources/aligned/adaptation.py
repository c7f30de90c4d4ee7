"""Tune the aligner for some steps on the passages that it scores best, before it judges all of them.

An untuned model writes few words of a new language or voice right, so its scores do not tell a right line from one with
a changed word. The better half of its scores holds few wrong lines, and a model that learned from them scores the rest
well. The tuned aligner scores lines of these recordings only: no model is trained from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from pipelines.features.sources.aligned.passages import Passage
from pipelines.infra import environment, manifest, progress_file
from pipelines.infra.errors import LabError
from pipelines.speech.audio import Waveform, fingerprint
from pipelines.speech.recordings.pieces import read_piece
from pipelines.whisper import log_mel, tokens
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import Collator, bucketed
from pipelines.whisper.log_mel import LogMel
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

CODE_VERSION = "1"
"""Raised when the same passages would give another model."""
_BEST_SHARE = 0.5
"""Share of the passages that are trained on."""
MIN_PASSAGES = 80
"""With fewer, some four minutes, the aligner stays as it is: whether their half suffices was not measured."""
_BATCH, _POOL = 8, 8
"""Clips of a step, and steps whose clips are sorted by length together."""
_LEARNING_RATE, _WIDTH = 1e-4, 384
"""For whisper-tiny, and its width: the rate of a wider model is lower in proportion."""
_WARMUP_STEPS = 10
_PROGRESS_STEPS = 10
_MAX_STORED = 3
"""Adapted models that are kept: every recording that is added makes another one, and each has the size of its base."""


def is_tuned(ref: ModelRef) -> bool:
    """Return whether this lab tuned a model: its scores tell right lines from others."""
    return ref.context == "clip" or bool(ref.facts.get("language"))


def adapt(
    ref: ModelRef, language: str, candidates: Sequence[tuple[Path, Passage]], steps: int, folder: Path
) -> ModelRef | None:
    """Return the aligner after `steps` steps on the best of `candidates`; None if they are too few.

    The model is stored below `folder`. It is not trained again if the same passages come with the same base, unless
    several others were used since.
    """
    if len(candidates) < MIN_PASSAGES:
        logger.info(f"note: {len(candidates)} passages are too few to adapt the aligner {ref.title} to the recordings")
        return None
    chosen = _best(candidates, steps * _BATCH)
    target = folder / f"adapted-{_digest(ref, language, chosen, steps)}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        if manifest.problem(target):
            logger.info(f"adapting the aligner {ref.title} to the recordings: {steps} steps on {len(chosen)} passages")
            _train_within_memory(ref, language, chosen, steps, target)
        os.utime(target)
    _delete_unused(folder)
    return whisper_model.resolve(str(target))


def _delete_unused(folder: Path) -> None:
    """Delete the adapted models that were not used for the longest time, except those that are being trained."""
    used_at = {}
    for path in (path for path in folder.glob("adapted-*") if path.is_dir()):
        with contextlib.suppress(FileNotFoundError):  # another process deleted it
            used_at[path] = path.stat().st_mtime
    for path in sorted(used_at, key=used_at.__getitem__)[:-_MAX_STORED]:
        with contextlib.suppress(filelock.Timeout), filelock.FileLock(f"{path}.lock", timeout=0):
            shutil.rmtree(path, ignore_errors=True)


def _best(candidates: Sequence[tuple[Path, Passage]], n_most: int) -> list[tuple[Path, Passage]]:
    """Return the better half by score, in order of time; at most `n_most`, spread over all of them."""
    by_score = sorted(candidates, key=lambda one: -_score(one[1]))[: int(len(candidates) * _BEST_SHARE)]
    in_order = sorted(by_score, key=lambda one: (one[0], one[1].start_s))
    return [in_order[n] for n in np.unique(np.linspace(0, len(in_order) - 1, n_most).round().astype(int))]


def _score(passage: Passage) -> float:
    """Return the mean of a passage's tokens, and a share of the least: of 203 passages on validation one was wrong."""
    return passage.logprob + passage.lowest / 4


def _digest(ref: ModelRef, language: str, chosen: Sequence[tuple[Path, Passage]], steps: int) -> str:
    prints = {path: fingerprint(path).hex() for path in {path for path, _ in chosen}}
    parts = [[prints[path], one.start_s, one.end_s, one.text] for path, one in chosen]
    fields = json.dumps([CODE_VERSION, whisper_model.identity(ref), language, steps, parts], sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()[:24]


def _train_within_memory(ref: ModelRef, *args: Any) -> None:
    import torch

    try:
        _train(ref, *args)
    except torch.OutOfMemoryError:
        raise LabError(
            f"{environment.detect().device} has too little memory to adapt the aligner {ref.title}: name a smaller "
            "source.aligner, or set source.adapt_steps=0"
        ) from None


def _train(ref: ModelRef, language: str, chosen: Sequence[tuple[Path, Passage]], steps: int, target: Path) -> None:
    """Train and write the model to `target`, its manifest last.

    The model stays in evaluation mode: dropout that its configuration sets would make two runs differ.
    """
    import torch

    model = whisper_model.load(ref, device=environment.detect().device)
    processor = whisper_model.load_processor(ref, language)
    whisper_model.set_language(model, language)
    spelling = tokens.spelling_of(processor)
    n_mels, prompt = model.config.num_mel_bins, spelling.prompt(language)[1:]  # the model prepends the start token
    log_mels = [log_mel.extract(Waveform(read_piece(path, one.start_s, one.end_s)), n_mels) for path, one in chosen]
    labels = [[*prompt, *spelling.ids(one.text)[0], spelling.end] for _, one in chosen]
    rate = _LEARNING_RATE * min(1.0, _WIDTH / model.config.d_model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    for step, batch in enumerate(itertools.islice(_batches(log_mels, labels), steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / _WARMUP_STEPS, 1 - step / steps)
        loss = model(
            input_features=batch["input_features"].to(model.device), labels=batch["labels"].to(model.device)
        ).loss
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if not math.isfinite(norm):
            raise LabError(
                f"the aligner {ref.title} cannot be adapted: the gradient of step {step} is {norm}. Name another "
                "source.aligner, or set source.adapt_steps=0"
            )
        optimizer.step()
        optimizer.zero_grad()
        if step % _PROGRESS_STEPS == 0:
            progress_file.append(f"adapting the aligner: step {step}/{steps}, loss {loss.item():.2f}")
    shutil.rmtree(target, ignore_errors=True)
    whisper_model.save(model, processor, target)
    manifest.seal(target, kind="model", name=f"{ref.name}, adapted to recordings", language=language, context="clip")


def _batches(log_mels: Sequence[LogMel], labels: Sequence[list[int]]) -> Iterator[dict[str, Any]]:
    """Yield batches at the length of their clips, epoch after epoch."""
    lengths, collate = np.array([len(one.frames) for one in log_mels]), Collator(None).collate
    for epoch in itertools.count():
        for rows in bucketed(lengths, _BATCH, _POOL, seed=0, epoch=epoch):
            yield collate([log_mels[row] for row in rows], [labels[row] for row in rows])
