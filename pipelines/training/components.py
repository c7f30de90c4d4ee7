"""Build the parts of a recipe's training: model, optimizer, schedule, loaders and validation.

The trainer uses these builders, and a custom training loop can use them too:

    parts = build(recipe, cache)
    parts = build(recipe, cache, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.01))

A part that is passed in is not built, and the others are built around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.features import derived
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.recipes.settings import Recipe
from pipelines.training import adapters, distillation
from pipelines.training.callbacks import interruptions
from pipelines.training.data import augmentation, bpe_dropout, packing, recordings
from pipelines.training.optimization import optimizers, precision
from pipelines.training.trainer import SCHEDULES, shift_right, token_mean_loss, use_deterministic_sums
from pipelines.training.validation import rows_of, validator
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import BucketSampler, ClipDataset, Collator, sorted_batches
from pipelines.whisper.model import ModelRef

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader
    from transformers import WhisperProcessor


@dataclass
class Parts:
    """The parts of a training loop; see `build`."""

    model: Any
    """Whisper in float32 on this machine's device, for any context up to 30 s; with LoRA, peft's wrapper of it."""
    processor: WhisperProcessor
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    """Schedule that is stepped after each step of the optimizer."""
    loader: DataLoader
    """One epoch of training batches, see whisper.batching.Collator."""
    validation_loader: DataLoader
    """Validation split, longest clips first."""
    validate: Callable[[Any], dict[str, float]]
    """Function from a model to its `wer`, `wer_low`, `wer_high` (95 %) and `loss` on the validation split."""
    precision: str = "float32"
    """Precision of `loss` and its gradient: float32, bfloat16 or float16."""
    label_smoothing: float = 0.0

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield training batches on the model's device without end; each epoch has another order."""
        device = next(self.model.parameters()).device
        for epoch in itertools.count():
            sampler = getattr(self.loader, "batch_sampler", None)  # a custom loader may have none
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            for batch in self.loader:
                yield {name: value.to(device) for name, value in batch.items()}

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean cross entropy per label token of a batch; its gradient is that of smoothed labels if the
        recipe smoothes them. It is computed in bfloat16 if that is the recipe's precision on this device."""
        import torch

        inputs, config = dict(batch), self.model.config
        labels = inputs.pop("labels")
        if "decoder_input_ids" not in inputs:  # windows with a prompt have them
            inputs["decoder_input_ids"] = shift_right(labels, config.decoder_start_token_id, config.pad_token_id)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            outputs = self.model(**inputs, use_cache=False)
            return token_mean_loss(outputs, labels, smoothing=self.label_smoothing)


def build(
    recipe: Recipe,
    cache: FeatureCache,
    *,
    model: Any = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[Any], LRScheduler] | None = None,
    loader: Iterable[dict[str, torch.Tensor]] | None = None,
    validate: Callable[[Any], dict[str, float]] | None = None,
) -> Parts:
    """Build all parts as the trainer has them; a part that is passed in is not built.

    `optimizer` is a function of the model, `scheduler` one of the optimizer. The test split is not among the
    parts.
    """
    if recipe.distillation.teacher:
        raise LabError(
            "a custom training loop has no teacher: leave distillation.teacher out, or call training.pipeline.distill"
        )
    if recipe.training.ema_decay:
        raise LabError("a custom training loop averages its weights itself: leave training.ema_decay out")
    base, recipe = whisper_model.resolve(recipe.model.base), derived.resolve(recipe, cache)
    seed_everything(recipe)
    processor = whisper_model.load_processor(base, recipe.language)
    if model is None:
        model = build_model(recipe, base).to(environment.detect().device).train()
    built_optimizer = optimizer(model) if optimizer else build_optimizer(recipe, model)
    return Parts(
        model,
        processor,
        built_optimizer,
        scheduler(built_optimizer) if scheduler else build_scheduler(recipe, built_optimizer),
        build_loader(recipe, cache, processor) if loader is None else loader,
        build_loader(recipe, cache, processor, "validation"),
        validate or build_validator(recipe, cache, processor),
        precision.of_training(recipe.training.precision),
        recipe.training.label_smoothing,
    )


def seed_everything(recipe: Recipe) -> None:
    """Seed all random number generators and use deterministic sums; call it before anything is built."""
    import transformers

    transformers.set_seed(recipe.training.seed)
    use_deterministic_sums()


def build_model(recipe: Recipe, base: ModelRef) -> Any:
    """Build the model that is trained, on the CPU, with the recipe's language, dropout, layer drop and adapter."""
    model = whisper_model.load(base, dropout=recipe.model.dropout, spec_augment=recipe.model.spec_augment)
    if recipe.distillation.teacher:
        model = distillation.student(model, recipe.distillation)
    return prepare_model(recipe, model)


def prepare_model(recipe: Recipe, model: Any) -> Any:
    """Set language, activation checkpointing and adapter of a Whisper; return it or peft's wrapper of it."""
    set_decoding(recipe, model)
    if recipe.model.layer_drop:
        model.model.encoder.layerdrop = model.model.decoder.layerdrop = recipe.model.layer_drop
    if recipe.training.checkpoint_activations:
        # transformers 5.15 has only the older name. Each layer is computed again with its own dropout masks
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return adapters.prepare(model, recipe.model)


def set_decoding(recipe: Recipe, model: Any) -> None:
    """Set how the model decodes: the language, and whether a transcript may be empty."""
    whisper_model.set_language(model, recipe.language)
    if recipe.curation.non_speech_share:
        whisper_model.allow_empty_transcripts(model)


def build_optimizer(recipe: Recipe, model: Any) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable weights, see optimization/optimizers.py."""
    return optimizers.build(recipe.training, model)


def build_scheduler(recipe: Recipe, optimizer: Any) -> LRScheduler:
    """Build the learning-rate schedule over the recipe's steps."""
    from transformers import get_scheduler

    settings = recipe.training
    return get_scheduler(
        SCHEDULES[settings.scheduler],
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.steps,
    )


def build_loader(recipe: Recipe, cache: FeatureCache, processor: Any, split: str = "train") -> DataLoader:
    """Build the loader of the training split, as the trainer draws it, or of the validation split.

    Raises LabError for another split.
    """
    if split == "train":
        sampler, clips, collate = training_clips(recipe, cache, processor)
        return loader_of(recipe, sampler, clips, collate)
    if split != "validation":
        raise LabError(
            f"split must be train or validation, got {split!r}: experiments.pipeline.evaluate scores the test split"
        )
    rows, full_context = rows_of(cache, "validation"), recipe.training.context == "full"
    batches = sorted_batches(cache.rows["frames"].to_numpy()[rows], recipe.evaluation.batch_frames)
    clips, collate = ClipDataset(cache, rows), Collator(cache, full_context=full_context)
    return loader_of(recipe, [batch.tolist() for batch in batches], clips, collate)


def build_validator(recipe: Recipe, cache: FeatureCache, processor: Any) -> Callable[[Any], dict[str, float]]:
    """Build the function that scores a model on the validation split."""
    validate = validator(recipe, cache, processor, recipe.training.context == "full")
    return lambda model: validate(adapters.unwrap(model))


def sampler_of(recipe: Recipe, cache: FeatureCache) -> BucketSampler:
    """Build the sampler of the training clips."""
    settings, rows = recipe.training, rows_of(cache, "train")
    order = cache.rows["frames"].to_numpy()[rows], settings.batch_size, settings.bucket_batches, settings.seed
    augmented = bool(settings.bpe_dropout or augmentation.Variation(**recipe.augment.model_dump()))
    if settings.window_share:
        windows = {"options": packing.WindowOptions.of(settings), "with_epoch": augmented}
        if in_recordings := recordings.order_of(cache, rows):
            return recordings.RecordingSampler(*order, order=in_recordings, **windows)
        return packing.WindowSampler(*order, **windows)
    return augmentation.EpochSampler(*order) if augmented else BucketSampler(*order)


def training_clips(recipe: Recipe, cache: FeatureCache, processor: Any) -> tuple[BucketSampler, Any, Any]:
    """Build the sampler, data set and collator of the training clips."""
    settings, rows = recipe.training, rows_of(cache, "train")
    full_context = settings.context == "full"
    variation = augmentation.Variation(**recipe.augment.model_dump())
    clips, collate = ClipDataset(cache, rows), Collator(cache, full_context=full_context)
    merges = bpe_dropout.of_recipe(recipe, processor)
    if variation or merges:
        clips = augmentation.EpochClips(cache, rows)
        collate = augmentation.AugmentingCollator(cache, variation, merges, full_context=full_context)
    if settings.window_share:
        clips, cut_last = packing.WindowClips(clips), settings.window_fill == "random"
        collate = packing.WindowCollator(collate, processor, recipe.language, merges, cut_last=cut_last)
    return sampler_of(recipe, cache), clips, collate


def loader_of(
    recipe: Recipe, sampler: Any, clips: Any, collate: Callable[[Any], dict[str, torch.Tensor]]
) -> DataLoader:
    """Build the loader of a sampler, data set and collator, with the recipe's number of worker processes."""
    from torch.utils.data import DataLoader

    return DataLoader(
        clips,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=recipe.training.workers,
        worker_init_fn=interruptions.leave_to_trainer,
        pin_memory=environment.detect().device == "cuda",
    )
