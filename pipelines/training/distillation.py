"""Train a smaller student: some layers of a tuned teacher, trained on the teacher's transcripts and distributions.

The recipe of Distil-Whisper (Gandhi et al. 2023), at the length of the clips. The student starts from the teacher's
layers. A frozen encoder is shared by both and runs once. Everything else is ordinary training with the same trainer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.features.cache import FeatureCache, with_transcripts
from pipelines.features.clips import Rejected
from pipelines.features.curation import label_errors
from pipelines.features.curation.clip_filter import label_transcript
from pipelines.features.curation.leaks import HELD_OUT
from pipelines.infra import console, manifest
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes.settings import Recipe
from pipelines.recipes.training_settings import DistillationSettings
from pipelines.speech import text
from pipelines.whisper import decoding
from pipelines.whisper import model as whisper_model
from pipelines.whisper import tokens as whisper_tokens
from pipelines.whisper.batching import IGNORED, padded_frames
from pipelines.whisper.log_mel import FULL_S
from pipelines.whisper.model import ModelRef

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration

logger = logging.getLogger(__name__)


CODE = "1"
"""Version of this code: raised when the same recipe, cache and teacher would give other weights."""
TRANSCRIPTS = "heard.jsonl"
"""File with the teacher's transcript of each training clip, in a run's folder and in each of its checkpoints.

Another machine may decode a clip differently, so a resumed run needs the transcripts that it started with.
"""
_LONGER = 1.1
"""Largest ratio of the longest clip to the teacher's longest: augmentation stretches clips by as much."""


def student(model: WhisperForConditionalGeneration, settings: DistillationSettings) -> WhisperForConditionalGeneration:
    """Remove all layers of the teacher's `model` but the student's, in place, and return it.

    Alignment heads of remaining layers are renumbered, others removed. Raises LabError if the teacher has fewer layers
    than the settings request.
    """
    for half, count in (("encoder", settings.encoder_layers), ("decoder", settings.decoder_layers)):
        chosen = spaced_layers(getattr(model.config, f"{half}_layers"), count, half)
        stack = getattr(model.model, half)
        stack.layers = type(stack.layers)(stack.layers[index] for index in chosen)
        setattr(model.config, f"{half}_layers", len(chosen))
        for index, layer in enumerate(stack.layers if half == "decoder" else ()):
            layer.self_attn.layer_idx = layer.encoder_attn.layer_idx = index  # index in the key-value cache
    _renumber_alignment_heads(model.generation_config, chosen)
    return model


def spaced_layers(layers: int, count: int, half: str) -> list[int]:
    """Return `count` evenly spaced indices of a teacher's `layers`, always with the last one; 0 is all layers."""
    if count > layers:
        raise LabError(
            f"distillation.{half}_layers must be at most the teacher's, which are {layers}, got {count}: ask for fewer"
        )
    chosen = np.linspace(0, layers - 1, count or layers).round().astype(int)
    chosen[-1] = layers - 1
    return chosen.tolist()


def _renumber_alignment_heads(generation_config: Any, chosen: list[int]) -> None:
    heads = getattr(generation_config, "alignment_heads", None)
    if heads is None:
        return
    remaining = [[chosen.index(layer), head] for layer, head in heads if layer in chosen]
    if remaining:
        generation_config.alignment_heads = remaining
    else:  # without the attribute, readers use the upper half of all layers
        del generation_config.alignment_heads


def refuse_shorter_teacher(recipe: Recipe, cache: FeatureCache, teacher: ModelRef) -> None:
    """Raise LabError if the teacher was not tuned on inputs as long as the student's."""
    settings = recipe.training
    full_windows = settings.context == "full" or settings.window_share > 0
    if teacher.context == "full":
        if full_windows:
            return
        raise LabError(
            f"the teacher {teacher.title} was tuned on windows of 30 s only, and the student is to train at the length "
            "of its clips: set training.context=full, or tune the teacher at clip length first"
        )
    longest_s = float(teacher.facts.get("context_s", 0.0))  # 0: not recorded
    if full_windows and longest_s < FULL_S:
        raise LabError(
            f"the teacher {teacher.title} was tuned on at most {longest_s:g} s, and the student is to train on 30 s: "
            "leave out training.window_share and training.context=full, or take a teacher that was tuned with them"
        )
    longest = int(cache.rows["frames"].to_numpy()[cache.split("train")].max(initial=0))
    if longest_s and padded_frames(longest) > padded_frames(math.ceil(longest_s * 100 * _LONGER) + 2):
        raise LabError(
            f"the teacher {teacher.title} was tuned on at most {longest_s:g} s, and the student is to train on clips "
            f"of up to {longest / 100:g} s: set features.max_duration_s={longest_s:g}, or take a teacher that was "
            "tuned on clips as long"
        )


def student_cache(
    recipe: Recipe, cache: FeatureCache, teacher: ModelRef, run: Path, newest: Callable[[], Path | None]
) -> FeatureCache:
    """Return the cache that the student trains on.

    With `labels = "teacher"` the teacher's transcripts replace those of the training clips. Clips whose transcript
    differs too much from the reference (`max_label_wer`), cannot be used as a label, or is a sentence of validation or
    test are left out. Transcripts are stored beside the folder `run` and in it (TRANSCRIPTS); a resumed run takes those
    of its checkpoint `newest()`. Raises LabError if no clip remains.
    """
    settings, rows = recipe.distillation, cache.split("train")
    replace_labels, max_wer = settings.labels == "teacher", settings.max_label_wer or float("inf")
    if not replace_labels and not settings.max_label_wer:
        return cache
    transcripts = distributed.broadcast_from_main(lambda: _transcripts(recipe, cache, rows, teacher, run, newest))
    close = label_errors.label_wers(cache.rows["text"].iloc[rows].tolist(), transcripts) <= max_wer
    if replace_labels:
        labels = _labels(recipe, cache, teacher, transcripts)
        used = {int(row): labels[i] for i, row in enumerate(rows) if close[i] and labels[i]}
        cache = with_transcripts(cache, used)
    else:
        used = dict.fromkeys(rows[close].tolist())
    n_far = int((~close).sum())
    reasons = (
        f"in {n_far} the teacher's transcript differs (WER above {max_wer:g}), "
        f"and {len(rows) - n_far - len(used)} give no label"
    )
    if not used:
        raise LabError(
            f"none of {len(rows)} training clips can be used: {reasons}. Raise distillation.max_label_wer, or take a "
            "better teacher"
        )
    logger.info(f"{len(used)} of {len(rows)} training clips are used ({settings.labels} labels); {reasons}")
    stays = (cache.rows["split"] != "train") | cache.rows.index.isin(list(used))
    return replace(cache, rows=cache.rows[stays].reset_index(drop=True), counts={**cache.counts, "train": len(used)})


def _transcripts(
    recipe: Recipe,
    cache: FeatureCache,
    rows: np.ndarray,
    teacher: ModelRef,
    run: Path,
    newest: Callable[[], Path | None],
) -> list[str]:
    """Return the teacher's transcript of each row, from the newest checkpoint if it has all; write them to the run."""
    with console.silenced():  # skipped checkpoints are logged when training starts
        checkpoint = newest()
    names = label_errors.fingerprints(cache, rows)
    recorded = label_errors.read(checkpoint / TRANSCRIPTS) if checkpoint else {}
    if recorded.keys() >= set(names):
        logger.info(f"the teacher's transcripts of {len(rows)} training clips are taken from {checkpoint.name}")
        transcripts = [recorded[name] for name in names]
    else:
        logger.info(f"transcribing {len(rows)} training clips with the teacher {teacher.title}")
        folder, on_clips = run.parent / "heard", _log_tenths(len(rows))
        settings = recipe.evaluation
        transcripts = label_errors.transcribe(
            cache, rows, teacher, recipe.language, settings, folder, on_clips=on_clips
        )
    by_name = dict(sorted(zip(names, transcripts, strict=True)))
    manifest.write_bytes(run / TRANSCRIPTS, label_errors.format_lines(by_name).encode())
    return transcripts


def _labels(
    recipe: Recipe, cache: FeatureCache, teacher: ModelRef, transcripts: list[str]
) -> list[tuple[str, list[int]] | None]:
    """Return the text and label ids of each transcript; None for those that cannot be used."""
    tokenise = whisper_tokens.labeller(whisper_model.load_processor(teacher, recipe.language), recipe.language)
    held_out = set(map(text.normalise, cache.rows["text"][cache.rows["split"].isin(HELD_OUT)]))

    def label(transcript: str) -> tuple[str, list[int]] | None:
        if text.normalise(transcript) in held_out and recipe.curation.leaks != "ignore":
            return None
        try:
            return label_transcript(transcript, tokenise, recipe.curation.full_stop)
        except Rejected:
            return None

    return [label(transcript) for transcript in transcripts]


def _log_tenths(clips: int) -> Callable[[int], None]:
    """Return a function that is called with numbers of clips, and logs each tenth of `clips`."""
    done = 0

    def on_clips(n: int) -> None:
        nonlocal done
        before, done = done, done + n
        if n and done * 10 // clips > before * 10 // clips:
            logger.info(f"  {done} of {clips} clips")

    return on_clips


class Teacher:
    """The teacher of a student in training. With `shared` it reuses the student's encoder output."""

    def __init__(self, model: WhisperForConditionalGeneration, temperature: float, weight: float, *, shared: bool):
        self.model = model.eval().requires_grad_(False)
        self.temperature, self.weight, self.shared = temperature, weight, shared

    def divergence(
        self, inputs: dict[str, torch.Tensor], outputs: Any, labels: torch.Tensor, tokens: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Return the weighted KL divergence of the student's distributions from the teacher's, a scalar.

        It is summed over the label tokens of a batch and divided by `tokens`, their number in the whole optimizer step,
        like the cross entropy. The temperature softens both distributions, and its square restores the size of the
        gradients (Hinton et al. 2015). `inputs` are the student's, `labels` int64 [B, L] with IGNORED for no label.
        """
        import torch.nn.functional as F

        labelled = labels != IGNORED
        teacher, student = (
            F.log_softmax(logits[labelled].float() / self.temperature, dim=-1)
            for logits in (self._logits(inputs, outputs), outputs.logits)
        )
        total = F.kl_div(student, teacher, log_target=True, reduction="sum") * self.temperature**2
        return self.weight * total / (tokens if tokens is not None else labelled.sum())

    def _logits(self, inputs: dict[str, torch.Tensor], outputs: Any) -> torch.Tensor:
        import torch

        self.model.to(inputs["decoder_input_ids"].device)
        encoder_inputs = {"input_features": inputs["input_features"]}
        if self.shared:
            encoder_inputs = {"encoder_outputs": (outputs.encoder_last_hidden_state.detach(),)}
        with torch.no_grad(), decoding.autocast(self.model):
            return self.model(**encoder_inputs, decoder_input_ids=inputs["decoder_input_ids"], use_cache=False).logits


def load_teacher(recipe: Recipe, ref: ModelRef) -> Teacher | None:
    """Load the teacher of a recipe; return None if its distributions have no weight in the loss."""
    settings = recipe.distillation
    if not (settings.teacher and settings.kl_weight):
        return None
    shared = recipe.model.freeze_encoder and not settings.encoder_layers
    model = whisper_model.load(ref)
    if shared:
        model.model.encoder.layers = type(model.model.encoder.layers)()  # unused: frees their memory
    return Teacher(model, settings.temperature, settings.kl_weight, shared=shared)


def lineage(teacher: ModelRef) -> dict[str, Any]:
    """Return a student's manifest entry about its teacher: the weights and the caches that it was trained on.

    The caches include those of the teacher's own teacher; None stands for an unknown one.
    """
    earlier = (teacher.facts.get("teacher") or {}).get("caches", [])
    cache = None if teacher.facts.get("fork") else teacher.facts.get("cache")
    return {"digest": teacher.revision, **whisper_model.identity(teacher), "caches": [cache, *earlier]}
