"""Estimate the memory that a recipe's training needs, from the model's configuration alone.

The layers of a half of Whisper are alike, so the peak of each phase of a step is a linear function of the number of
layers and of clips. It is counted for models of two and three layers, and extended to the real numbers.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.features.cache import FeatureCache
from pipelines.features.clips import MAX_LABEL_TOKENS
from pipelines.features.derived import PROMPT_TOKENS, SPARE_TOKENS, TOKENS_PER_S
from pipelines.infra.parallel import distributed
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.settings import MAX_NEW_TOKENS, Recipe
from pipelines.training import components
from pipelines.training.memory import simulation
from pipelines.training.memory.simulation import BatchShape, LiveBytes
from pipelines.training.trainer import shift_right, token_mean_loss
from pipelines.training.validation import rows_of
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import padded_frames
from pipelines.whisper.log_mel import FULL_FRAMES, FULL_S

if TYPE_CHECKING:
    import torch

PROCESS_BYTES = {"cuda": 700_000_000, "mps": 700_000_000, "cpu": 600_000_000}
"""Memory that no tensor uses, by device. CPU: Python with torch and transformers, measured. GPU: the context and the
libraries' workspaces, from experience."""
CPU_TRAINING_BYTES, CPU_ACTIVATIONS = 220_000_000, 0.34
"""What training on a CPU adds beside tensors: bytes, and a share of the activations. Fitted to benchmarks/memory.py."""
FRAGMENTATION = 0.05
"""Share of the tensors' bytes that the allocator of a GPU holds beside them, from experience."""
_PROMPT_TOKENS = 4
_SMALL = (2, 2, 1)
"""Encoder layers, decoder layers and clips of the smallest step that is counted."""


@dataclass(frozen=True)
class Estimate:
    """Peak memory of training in bytes, by what uses it."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    """The averaged weights of `training.ema_decay`."""
    activations: int
    """What a forward and backward pass of the longest batch adds at the peak."""
    teacher: int
    decoding: int
    """What validation adds to weights and optimizer state; it does not happen at the same time as a step."""
    overhead: int
    """The process, the device's libraries and fragmentation."""

    @property
    def total(self) -> int:
        """Bytes of the process at the peak of training, or of validation if that is higher."""
        step = self.gradients + self.activations
        always = self.weights + self.optimizer + self.average + self.teacher + self.overhead
        return always + max(step, self.decoding)


@dataclass(frozen=True)
class Workload:
    """The largest batches of a recipe."""

    shapes: tuple[BatchShape, ...]
    """Whole batches of training: of the longest clips and, if there are any, of windows."""
    validation: BatchShape
    decoded_tokens: int
    """Longest transcript in validation, prompt included."""
    assumed: str = ""
    """What was assumed, because there is no cache yet."""

    def with_clips(self, most: int) -> tuple[BatchShape, ...]:
        """Return the shapes of passes of at most `most` clips, without those that are smaller than another."""
        shapes = [BatchShape(min(most, shape.clips), shape.frames, shape.tokens) for shape in self.shapes]
        largest = [a for a in dict.fromkeys(shapes) if not any(a != b and a.is_within(b) for b in shapes)]
        return tuple(largest)


def workload(recipe: Recipe, cache: FeatureCache | None) -> Workload:
    """Return the largest batches that a recipe draws from its cache; without one, of the longest clips allowed."""
    settings, speed = recipe.training, 1 - recipe.augment.speed
    per_process = -(-settings.batch_size // distributed.world_size())
    if cache is None:
        longest_s = min(recipe.features.max_duration_s, float(FULL_S))
        frames = {"train": longest_s * 100, "validation": longest_s * 100}
        tokens = dict.fromkeys(frames, min(MAX_LABEL_TOKENS, int(longest_s * TOKENS_PER_S / 2) + SPARE_TOKENS))
        n_windows = max(1, settings.batch_size // 2)
        assumed = f"no cache yet: clips of {longest_s:g} s (features.max_duration_s), texts of {tokens['train']} tokens"
    else:
        frames, tokens, assumed = {}, {}, ""
        for split in ("train", "validation"):
            rows = cache.rows.iloc[rows_of(cache, split)]
            frames[split], tokens[split] = rows["frames"].max(), int(rows["label_count"].max())
            if settings.bpe_dropout and split == "train":  # at most one token for each byte
                longest = max(len(text.encode()) for text in rows["text"])
                tokens[split] = max(tokens[split], min(MAX_LABEL_TOKENS, longest + PROMPT_TOKENS + 1))
        n_windows = components.sampler_of(recipe, cache).windows_per_batch if settings.window_share else 0
    full = settings.context == "full"
    length = {split: FULL_FRAMES if full else padded_frames(int(n)) for split, n in frames.items()}
    longest = FULL_FRAMES if full else padded_frames(int(frames["train"] / speed) + 1)
    shapes = [BatchShape(per_process, longest, tokens["train"])]
    if settings.window_share:
        n_windows = min(per_process, -(-n_windows // distributed.world_size()))
        shapes.append(BatchShape(n_windows, FULL_FRAMES, MAX_LABEL_TOKENS))
    clips = max(1, recipe.evaluation.batch_frames // length["validation"])
    if cache is not None:
        clips = min(clips, len(cache.split("validation")))
    limit = recipe.evaluation.max_new_tokens
    decoded = _PROMPT_TOKENS + (MAX_NEW_TOKENS if limit == AUTO else limit)
    return Workload(tuple(shapes), BatchShape(clips, length["validation"], tokens["validation"]), decoded, assumed)


def estimate(recipe: Recipe, config: Any, work: Workload, device: str, dtype: str) -> Estimate:
    """Return the peak memory of a recipe on `device` in the training precision `dtype`.

    `config`: the base model's WhisperConfig, or the teacher's if the recipe trains a student.
    """
    settings = recipe.training
    if settings.optimizer == "adamw8bit":  # it counts as AdamW, so bitsandbytes is not needed
        recipe = changed(recipe, {"training.optimizer": "adamw"})
    micro_batch = settings.micro_batch or settings.batch_size
    shapes = work.with_clips(micro_batch)
    accumulates = settings.accumulation > 1 or micro_batch < max(shape.clips for shape in work.shapes)
    counts = [_counts(recipe, config, shape, work, dtype, accumulates) for shape in shapes]
    first = counts[0]
    saved = 0
    if settings.optimizer == "adamw8bit":  # one byte instead of four, but for the embeddings
        embeddings = 0 if recipe.model.adapter else 8 * config.d_model * config.vocab_size
        saved = max(0, first["optimizer"] - embeddings) * 3 // 4
    fixed = first["weights"] + first["optimizer"] - saved
    step = -saved + max(peak for count in counts for name, peak in count.items() if name.startswith("training"))
    decoding = -saved + max(peak for name, peak in first.items() if name.startswith("validation"))
    teacher = _teacher_bytes(recipe, config, shapes)
    average = first["gradients"] if settings.ema_decay else 0
    tensors = max(step, decoding) + teacher + average
    activations = max(0, step - fixed - first["gradients"])
    beside = CPU_TRAINING_BYTES + CPU_ACTIVATIONS * activations if device == "cpu" else FRAGMENTATION * tensors
    return Estimate(
        weights=first["weights"],
        gradients=first["gradients"],
        optimizer=first["optimizer"] - saved,
        average=average,
        activations=activations,
        teacher=teacher,
        decoding=decoding - fixed,
        overhead=PROCESS_BYTES[device] + int(beside),
    )


def _counts(
    recipe: Recipe, config: Any, shape: BatchShape, work: Workload, dtype: str, accumulates: bool
) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state, and the peak of each phase, by name."""
    sizes = (*_layers(recipe, config), shape.clips)
    base = tuple(map(min, sizes, _SMALL))
    recipe_json = changed(recipe, {"training.micro_batch": 0, "training.batch_size": 1}).model_dump_json()
    common = recipe_json, json.dumps(config.to_dict(), sort_keys=True, default=str), work, dtype, accumulates

    def count(encoder: int, decoder: int, clips: int) -> dict[str, int]:
        return _count_small((encoder, decoder), BatchShape(clips, shape.frames, shape.tokens), *common)

    def with_layers(clips: int) -> dict[str, int]:
        """Return the counts of all layers for this number of clips."""
        small = count(*base[:2], clips)
        total = dict(small)
        for half in (0, 1):
            if missing := sizes[half] - base[half]:
                larger = count(base[0] + (half == 0), base[1] + (half == 1), clips)
                total = {name: n + missing * (larger[name] - small[name]) for name, n in total.items()}
        return total

    one = with_layers(base[2])
    if more := sizes[2] - base[2]:
        two = with_layers(base[2] + 1)
        one = {name: n + more * (two[name] - n) for name, n in one.items()}
    return one


@functools.lru_cache(maxsize=512)
def _count_small(
    layers: tuple[int, int], shape: BatchShape, recipe: str, config: str, work: Workload, dtype: str, accumulates: bool
) -> dict[str, int]:
    """Return the result of `count_step` for a recipe and a configuration in JSON."""
    from transformers import WhisperConfig

    sized = _resized(WhisperConfig.from_dict(json.loads(config)), *layers)
    return count_step(Recipe.model_validate_json(recipe), sized, shape, work, dtype, accumulates)


def count_step(
    recipe: Recipe, config: Any, shape: BatchShape, work: Workload, dtype: str, accumulates: bool
) -> dict[str, int]:
    """Count a step and a validation batch of a model with the layers of `config`; see `_counts`."""
    import torch

    live, half = LiveBytes(), dtype != "float32"
    with simulation.simulated(), simulation.counted(live), torch.random.fork_rng([]):
        model = random_model(recipe, config)
        optimizer = components.build_optimizer(recipe, model)
        sizes = {"weights": live.live, "gradients": sum(w.nbytes for w in model.parameters() if w.requires_grad)}
        simulation.mark_layers(model, live)
        batch, smoothing = simulation.zero_batch(shape, config.num_mel_bins), recipe.training.label_smoothing
        loss = functools.partial(training_loss, model, batch, half=half, smoothing=smoothing)
        del batch
        simulation.train_step(model, optimizer, loss, live, accumulates=accumulates)
        optimizer.zero_grad(set_to_none=True)
        del loss
        state = {id(t): t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t)}
        sizes["optimizer"] = sum(tensor.nbytes for tensor in state.values())
        live.stage = "validation"
        features = torch.zeros(work.validation.clips, config.num_mel_bins, work.validation.frames)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            simulation.decode(model, features, work.decoded_tokens, work.validation.tokens, live)
    return {name: peak for name, peak in live.peaks.items() if name != "model"} | sizes


def random_model(recipe: Recipe, config: Any) -> Any:
    """Return the model that `components.build_model` would build, with random weights.

    It drops no layers: the step that needs most memory is one in which `model.layer_drop` keeps them all.
    """
    from transformers import WhisperForConditionalGeneration

    whisper = WhisperForConditionalGeneration(config)
    whisper_model.allow_short_context(whisper)
    whisper.model.encoder.embed_positions.requires_grad_(False)
    if recipe.model.load_in_8bit:
        simulation.use_8bit_linears(whisper.model)  # bitsandbytes is not needed to count
    recipe = changed(recipe, {"model.load_in_8bit": False, "model.layer_drop": 0.0})
    return components.prepare_model(recipe, whisper).train()


def training_loss(
    model: Any, batch: dict[str, torch.Tensor], *, half: bool = False, smoothing: float = 0.0
) -> torch.Tensor:
    """Return the loss of a batch, computed as the trainer does."""
    import torch

    labels = batch["labels"]
    decoder_input_ids = shift_right(labels, model.config.decoder_start_token_id, model.config.pad_token_id)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        outputs = model(batch["input_features"], decoder_input_ids=decoder_input_ids, use_cache=False)
        outputs.logits = outputs.logits.float()
        return token_mean_loss(outputs, labels, smoothing=smoothing)


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """Return the recipe with settings of its groups model and training, `group.name` to value."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        group, _, field = name.partition(".")
        groups.setdefault(group, {})[field] = value
    copies = {group: getattr(recipe, group).model_copy(update=fields) for group, fields in groups.items()}
    return recipe.model_copy(update=copies)


def _layers(recipe: Recipe, config: Any) -> tuple[int, int]:
    """Return the encoder and decoder layers of the model that is trained."""
    student = recipe.distillation
    return student.encoder_layers or config.encoder_layers, student.decoder_layers or config.decoder_layers


def _resized(config: Any, encoder_layers: int, decoder_layers: int) -> Any:
    config = copy.deepcopy(config)
    config.encoder_layers, config.decoder_layers = encoder_layers, decoder_layers
    config.apply_spec_augment = False  # it depends on values, which fake tensors do not have
    config._attn_implementation = "sdpa"
    config.use_cache = False  # else transformers warns of it for an encoder with checkpointed activations
    return config


def _teacher_bytes(recipe: Recipe, config: Any, shapes: tuple[BatchShape, ...]) -> int:
    """Return the bytes of a teacher: its weights, its logits and the two distributions that are compared."""
    settings = recipe.distillation
    if not (settings.teacher and settings.kl_weight):
        return 0
    width = config.d_model
    layer = 4 * width * width
    decoder = config.decoder_layers * (2 * layer + 2 * width * config.decoder_ffn_dim) + config.vocab_size * width
    shared = recipe.model.freeze_encoder and not settings.encoder_layers
    encoder = 0 if shared else config.encoder_layers * (layer + 2 * width * config.encoder_ffn_dim)
    logits = max(shape.clips * shape.tokens for shape in shapes) * config.vocab_size
    return 4 * (encoder + decoder + 3 * logits)
