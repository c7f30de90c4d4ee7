"""A smaller student: some layers of a tuned teacher, taught to answer as the teacher does.

    student    the teacher's model without most of its layers; those that stay are spaced as far apart as can be
    taught     the cache with what the teacher hears as transcripts, without the clips that it mishears
    Teacher    how far a student's distributions are from the teacher's, batch by batch

The recipe of Distil-Whisper (Gandhi et al. 2023), at the length of the clips. An encoder that both share, because it is
frozen, runs once. All else is ordinary training (training/): the student is tuned by the same trainer, from its first
weights, which are the teacher's.
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
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes.settings import Recipe
from pipelines.recipes.training_settings import DistillationSettings
from pipelines.speech import text
from pipelines.whisper import decoding
from pipelines.whisper import model as whisper_model
from pipelines.whisper import tokens as whisper_tokens
from pipelines.whisper.batching import IGNORED, padded_frames
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.model import ModelRef

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration

logger = logging.getLogger(__name__)


CODE = "1"
"""Version of the code that distils: raised whenever the same recipe, cache and teacher would give other weights."""
HEARD = "heard.jsonl"
"""In a run's folder and in each of its checkpoints: what the teacher heard in each training clip, as relabel.py has it.
A machine of another kind may hear a clip otherwise; so what a student began to learn goes with it."""
_LONGER = 1.1
"""Clips may be so much longer than the longest that a teacher heard: augmentation, too, stretches them by as much."""


# ---- the student


def student(model: WhisperForConditionalGeneration, settings: DistillationSettings) -> WhisperForConditionalGeneration:
    """The teacher's `model`, cut down to the student's layers, in place.

    Cross-attention heads that align words with time are renamed with their layers; those of layers that are gone are
    forgotten. LabError where the teacher has fewer layers than are asked for.
    """
    for half, wanted in (("encoder", settings.encoder_layers), ("decoder", settings.decoder_layers)):
        chosen = spaced(getattr(model.config, f"{half}_layers"), wanted, half)
        stack = getattr(model.model, half)
        stack.layers = type(stack.layers)(stack.layers[place] for place in chosen)
        setattr(model.config, f"{half}_layers", len(chosen))
        for place, layer in enumerate(stack.layers if half == "decoder" else ()):
            layer.self_attn.layer_idx = layer.encoder_attn.layer_idx = place  # where its keys and values are kept
    _rename_alignment_heads(model.generation_config, chosen)
    return model


def spaced(layers: int, wanted: int, half: str) -> list[int]:
    """The numbers of `wanted` of a teacher's `layers`, as far apart as can be, the last one among them; 0 is all."""
    if wanted > layers:
        raise LabError(
            f"distillation.{half}_layers must be at most the teacher's, which are {layers}, got {wanted}: ask for fewer"
        )
    chosen = np.linspace(0, layers - 1, wanted or layers).round().astype(int)
    chosen[-1] = layers - 1
    return chosen.tolist()


def _rename_alignment_heads(settings: Any, chosen: list[int]) -> None:
    known = getattr(settings, "alignment_heads", None)
    if known is None:
        return
    kept = [[chosen.index(layer), head] for layer, head in known if layer in chosen]
    if kept:
        settings.alignment_heads = kept
    else:  # readers take the upper half of all layers then
        del settings.alignment_heads


# ---- what it learns from


def refuse_unfit(recipe: Recipe, cache: FeatureCache, teacher: ModelRef) -> None:
    """LabError for a teacher that does not know the length of what the student is to hear."""
    settings = recipe.training
    whole = settings.context == "full" or settings.window_share > 0
    if teacher.context == "full":
        if whole:
            return
        raise LabError(
            f"the teacher {teacher.title} has heard nothing but 30 s, and the student is to hear clips at their "
            "length: set training.context=full, or tune the teacher first"
        )
    heard_s = float(teacher.facts.get("context_s", 0.0))  # 0: it does not tell
    if whole and heard_s < FULL_FRAMES / 100:
        raise LabError(
            f"the teacher {teacher.title} has heard no more than {heard_s:g} s, and the student is to hear 30 s: leave "
            "out training.window_share and training.context=full, or take a teacher that was tuned with them"
        )
    longest = int(cache.rows["frames"].to_numpy()[cache.split("train")].max(initial=0))
    if heard_s and padded_frames(longest) > padded_frames(math.ceil(heard_s * 100 * _LONGER) + 2):
        raise LabError(
            f"the teacher {teacher.title} has heard no more than {heard_s:g} s, and the student is to hear clips of up "
            f"to {longest / 100:g} s: set features.max_duration_s={heard_s:g}, or take a teacher that was tuned on "
            "clips as long"
        )


def taught(
    recipe: Recipe, cache: FeatureCache, teacher: ModelRef, run: Path, newest: Callable[[], Path | None]
) -> FeatureCache:
    """The cache as the student learns from it: training clips with what the teacher hears in them as their transcript,
    where the recipe asks for that, and without those in which it hears something too far from what was said.

    What it hears is kept beside the folder `run` (relabel.py) and in it (HEARD); a run that goes on from a checkpoint,
    `newest`, goes on with what that tells. A clip is left out, too, where the teacher hears nothing that can be learnt,
    or a sentence of validation or test. LabError where none is left.
    """
    settings, rows = recipe.distillation, cache.split("train")
    pseudo, most = settings.labels == "teacher", settings.max_label_wer or float("inf")
    if not pseudo and not settings.max_label_wer:
        return cache
    heard = distributed.broadcast_from_main(lambda: _heard(recipe, cache, rows, teacher, run, newest()))
    wers = label_errors.label_wers(cache.rows["text"].iloc[rows].tolist(), heard)
    near = wers <= most
    if pseudo:
        usable = _usable(recipe, cache, teacher, heard)
        kept = {int(row): usable[i] for i, row in enumerate(rows) if near[i] and usable[i]}
        cache = with_transcripts(cache, kept)
    else:
        kept = dict.fromkeys(rows[near].tolist())
    misheard = int((~near).sum())
    told = (
        f"in {misheard} the teacher hears something else (WER above {most:g}), and {len(rows) - misheard - len(kept)}"
    )
    if not kept:
        raise LabError(
            f"none of {len(rows)} training clips can be learnt from: {told} give no label. Raise "
            "distillation.max_label_wer, or take a better teacher"
        )
    logger.info(
        f"{len(kept)} of {len(rows)} training clips are learnt from ({settings.labels} labels); {told} give no label"
    )
    stays = (cache.rows["split"] != "train") | cache.rows.index.isin(list(kept))
    return replace(cache, rows=cache.rows[stays].reset_index(drop=True), counts={**cache.counts, "train": len(kept)})


def _heard(
    recipe: Recipe, cache: FeatureCache, rows: np.ndarray, teacher: ModelRef, run: Path, last: Path | None
) -> list[str]:
    """What the teacher heard in each of `rows` when this run began, or hears now; noted in the run's folder."""
    names = label_errors.fingerprints(cache, rows)
    known = label_errors.read(last / HEARD) if last else {}
    if known.keys() >= set(names):
        logger.info(f"what the teacher heard in {len(rows)} training clips is taken from {last.name}")
        heard = [known[name] for name in names]
    else:
        logger.info(f"asking the teacher {teacher.title} what it hears in {len(rows)} training clips")
        place, on_clips = run.parent / "heard", _tenths(len(rows))
        settings = recipe.evaluation
        heard = label_errors.transcribe(cache, rows, teacher, recipe.language, settings, place, on_clips=on_clips)
    told = dict(sorted(zip(names, heard, strict=True)))
    manifest.write_bytes(run / HEARD, label_errors.format_lines(told).encode())
    return heard


def _usable(
    recipe: Recipe, cache: FeatureCache, teacher: ModelRef, heard: list[str]
) -> list[tuple[str, list[int]] | None]:
    """For each transcript what is learnt of it: as the cache writes it, and its label ids; None where nothing is."""
    tokenise = whisper_tokens.labeller(whisper_model.load_processor(teacher, recipe.language), recipe.language)
    held_out = set(map(text.normalise, cache.rows["text"][cache.rows["split"].isin(HELD_OUT)]))

    def usable(told: str) -> tuple[str, list[int]] | None:
        if text.normalise(told) in held_out and recipe.curation.leaks != "ignore":
            return None
        try:
            return label_transcript(told, tokenise, recipe.curation.full_stop)
        except Rejected:
            return None

    return [usable(told) for told in heard]


def _tenths(clips: int) -> Callable[[int], None]:
    """Tells `log` of every tenth of the clips that is done."""
    done = 0

    def on_clips(n: int) -> None:
        nonlocal done
        before, done = done, done + n
        if n and done * 10 // clips > before * 10 // clips:
            logger.info(f"  {done} of {clips} clips")

    return on_clips


# ---- the teacher, while the student learns


class Teacher:
    """A teacher beside a student that is trained. With `shared` it takes the student's own encoder output."""

    def __init__(self, model: WhisperForConditionalGeneration, temperature: float, weight: float, *, shared: bool):
        self.model = model.eval().requires_grad_(False)
        self.temperature, self.weight, self.shared = temperature, weight, shared

    def divergence(
        self, inputs: dict[str, torch.Tensor], outputs: Any, labels: torch.Tensor, tokens: torch.Tensor | int | None
    ) -> torch.Tensor:
        """KL divergence of the student's distributions from the teacher's, weighted: a scalar.

        Summed over the label tokens of a batch and divided by `tokens`, their number in the whole optimizer step, as
        the cross entropy is. Both are softened by the temperature; its square keeps the gradients' size (Hinton et al.
        2015). `inputs` are those of the student, `labels` int64 [B, L] with IGNORED where nothing counts.
        """
        import torch.nn.functional as F

        counted = labels != IGNORED
        told, said = (
            F.log_softmax(logits[counted].float() / self.temperature, dim=-1)
            for logits in (self._logits(inputs, outputs), outputs.logits)
        )
        total = F.kl_div(said, told, log_target=True, reduction="sum") * self.temperature**2
        return self.weight * total / (tokens if tokens is not None else counted.sum())

    def _logits(self, inputs: dict[str, torch.Tensor], outputs: Any) -> torch.Tensor:
        import torch

        self.model.to(inputs["decoder_input_ids"].device)
        heard = {"input_features": inputs["input_features"]}
        if self.shared:
            heard = {"encoder_outputs": (outputs.encoder_last_hidden_state.detach(),)}
        with torch.no_grad(), decoding.autocast(self.model):
            return self.model(**heard, decoder_input_ids=inputs["decoder_input_ids"], use_cache=False).logits


def teacher_of(recipe: Recipe, ref: ModelRef) -> Teacher | None:
    """The teacher that a recipe trains with, loaded; None where its distributions count for nothing."""
    settings = recipe.distillation
    if not (settings.teacher and settings.kl_weight):
        return None
    shared = recipe.model.freeze_encoder and not settings.encoder_layers
    model = whisper_model.load(ref)
    if shared:
        model.model.encoder.layers = type(model.model.encoder.layers)()  # never called: no memory for them
    return Teacher(model, settings.temperature, settings.kl_weight, shared=shared)


def lineage(teacher: ModelRef) -> dict[str, Any]:
    """What a student's manifest tells of its teacher: its weights, and the caches that it learnt from (None: unknown),
    its own teacher's among them."""
    earlier = (teacher.facts.get("teacher") or {}).get("caches", [])
    own = None if teacher.facts.get("fork") else teacher.facts.get("cache")
    return {"digest": teacher.revision, **whisper_model.identity(teacher), "caches": [own, *earlier]}
