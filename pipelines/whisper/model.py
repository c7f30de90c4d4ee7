"""Find, load and save Whisper models, and let their encoder run at the length of a clip.

Weights are looked up in this order: a folder, the Hub's cache on this machine, the Hub and, if the Hub does not answer,
the registry mirror (mirror/). Missing weights are an error, never a random initialisation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra import environment, manifest, stores
from pipelines.infra.errors import LabError
from pipelines.infra.stores import hub_client, is_local_path
from pipelines.recipes import languages
from pipelines.recipes.settings import Recipe, TrainingSettings
from pipelines.whisper import bases, config, hub_models, mirror, model_files, tokens
from pipelines.whisper.bases import generation, weights
from pipelines.whisper.log_mel import FRAMES_PER_POSITION
from pipelines.whisper.mirror import pins

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

logger = logging.getLogger(__name__)


_START = "<|startoftranscript|>"
_MEL_MASK_PROB = 0.05
"""SpecAugment's probability that a mel band starts a masked span of ten: as `mask_time_prob` in Whisper's config."""


@dataclass(frozen=True)
class ModelRef:
    """A model on this machine, and its source."""

    name: str
    """A Hub id, a mirror's name, the name of a fine-tuned model, or the folder."""
    folder: Path
    """A Hugging Face folder with weights, tokenizer and feature extractor."""
    origin: str
    """`folder`, `hub cache`, `hub` or `registry mirror`."""
    revision: str
    """The Hub's commit, a sealed model's digest, or the first digits of the weights' sha256."""
    quantisation: str | None = None
    """`q8` if the weights were dequantised from int8, or the form of an export: printed with every figure."""
    context: str = "full"
    """`clip` for weights fine-tuned at the length of a clip; `full` for all others, which need the 30 s window."""
    facts: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The model's manifest without its file list: base, language, scores."""

    @property
    def title(self) -> str:
        """Name, quantisation and revision, as reports and the app print them."""
        return f"{self.name}{f' ({self.quantisation})' if self.quantisation else ''} @ {self.revision}"


def resolve(uri: str) -> ModelRef:
    """Find a model and download it if it is not on this machine.

    `uri`: a folder, `hub://owner/name[/path][@revision]`, a Hub id `owner/name[@revision]`, `hopsworks://project/path`,
    or a mirror's name with `@q8`. Raises LabError if the model is not available.
    """
    if uri.startswith("hopsworks://") or hub_client.is_repository_folder(uri):
        return _local(str(stores.local_folder(uri)))
    if is_local_path(uri):
        return _local(uri)
    name, _, revision = uri.removeprefix("hub://").partition("@")
    if revision == "q8":
        return _mirrored(uri)
    return _from_hub(uri, name, revision or None) or _mirrored(name, uri)


def load(
    ref: ModelRef, *, device: str = "cpu", dropout: float = 0.0, spec_augment: bool = False
) -> WhisperForConditionalGeneration:
    """Return the model in float32 on `device`, at any context up to 30 s (see `allow_short_context`)."""
    from transformers import WhisperForConditionalGeneration

    model_files.require_usable(ref.folder)
    _hide_progress_bar()
    try:
        model, report = WhisperForConditionalGeneration.from_pretrained(
            ref.folder,
            dtype="float32",
            attn_implementation="sdpa",
            dropout=dropout,
            apply_spec_augment=spec_augment,
            output_loading_info=True,
            # Whisper's configuration masks spans of time only
            **({"mask_feature_prob": _MEL_MASK_PROB} if spec_augment else {}),
        )
    except Exception as error:  # of any kind, for files with unexpected content
        raise LabError(
            f"{ref.folder} does not load as a Whisper model: {_first_line(error)}. Fetch the model again"
        ) from None
    if missing := sorted(report["missing_keys"]) + sorted(map(str, report.get("mismatched_keys", []))):
        raise LabError(
            f"{ref.folder} lacks weights of a Whisper model ({', '.join(missing[:3])} ...): "
            "it is not a whole checkpoint. Fetch the model again"
        )
    weights.require_finite(ref.folder, model.state_dict().items())
    # the sinusoids are constants, but from_pretrained of transformers 5 makes them trainable
    model.model.encoder.embed_positions.requires_grad_(False)
    weights.tie_output(ref.folder, model)
    allow_short_context(model)
    return model.to(device)


def load_processor(ref: ModelRef, language: str) -> WhisperProcessor:
    """Return the tokenizer and feature extractor of a model, set to transcribe `language` without timestamps."""
    from transformers import WhisperProcessor

    model_files.require_usable(ref.folder)
    prompt: dict[str, str | None] = {"language": language, "task": "transcribe"}
    if generation.is_english_only_folder(ref.folder):
        tokens.require_english(language, ref.name)
        prompt = {"language": None, "task": None}
    try:
        processor = WhisperProcessor.from_pretrained(ref.folder, **prompt)
    except Exception as error:  # of any kind, for files with unexpected content
        raise LabError(f"{ref.folder} has no usable tokenizer and feature extractor: {_first_line(error)}") from None
    _refuse_other_vocabulary(ref, processor.tokenizer)
    # meant for WordPiece: with byte-pair tokens it removes spaces, and transformers warns at every call
    processor.tokenizer.clean_up_tokenization_spaces = False
    return processor


def _refuse_other_vocabulary(ref: ModelRef, tokenizer: Any) -> None:
    """Raise LabError if the tokenizer has tokens that the weights lack, or another start token than they."""
    config = manifest.read_json(ref.folder / "config.json") or {}
    largest, start = max(tokenizer.get_vocab().values(), default=0), config.get("decoder_start_token_id")
    if largest >= config.get("vocab_size", largest + 1) or start not in (None, tokenizer.convert_tokens_to_ids(_START)):
        raise LabError(
            f"{ref.folder} has the tokenizer of another model (its largest token is {largest}, the weights have "
            f"{config.get('vocab_size')}): save the processor of this model again, with save_pretrained"
        )


def allow_short_context(model: WhisperForConditionalGeneration) -> None:
    """Let the encoder take any even number of log-mel frames up to 3000 instead of exactly 3000.

    The table of sinusoidal positions is sliced before each forward pass and restored after it, so a saved model always
    has the whole table. A second call has no effect.
    """
    encoder = model.model.encoder
    if getattr(encoder, "_takes_short_context", False):
        return
    encoder._takes_short_context = True
    encoder.register_forward_pre_hook(_shorten, with_kwargs=True)
    encoder.register_forward_hook(_restore, always_call=True)


def save(model: WhisperForConditionalGeneration, processor: WhisperProcessor, folder: Path) -> None:
    """Write weights, generation settings, tokenizer and feature extractor to `folder`, without a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # older clients and CTranslate2 read preprocessor_config.json, which the processor no longer writes
    processor.feature_extractor.save_pretrained(folder)


def set_language(model: WhisperForConditionalGeneration, language: str) -> None:
    """Set language and task in the generation settings: otherwise the language of every clip is detected.

    An English-only model has neither, and `generate` of transformers refuses them.
    """
    settings = model.generation_config
    is_multilingual = not generation.is_english_only(vars(settings), vars(model.config))
    settings.language, settings.task = (language, "transcribe") if is_multilingual else (None, None)
    model.generation_config.forced_decoder_ids = None


def allow_empty_transcripts(model: WhisperForConditionalGeneration) -> None:
    """Let the first token be the end of the text, which Whisper's generation settings suppress.

    A model that was trained on clips without speech then answers with an empty transcript, in every engine.
    """
    settings = model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    settings.begin_suppress_tokens = [id for id in settings.begin_suppress_tokens or [] if id not in ends] or None


def language_of(ref: ModelRef, default: str = "sv") -> str:
    """Return Whisper's code of the language that a model was tuned for: by its manifest, else its generation settings.

    `default` for a model of no language, such as a base model; English for an English-only one.
    """
    if generation.is_english_only_folder(ref.folder):
        return "en"
    recorded = ref.facts.get("language")
    if not recorded:
        recorded = (manifest.read_json(ref.folder / "generation_config.json") or {}).get("language")
    return (isinstance(recorded, str) and languages.find(recorded)) or default


def identity(ref: ModelRef) -> dict[str, Any]:
    """Return the fields that identify these weights in the digest of everything made from them."""
    source = ref.facts.get("made_of")
    if source and not (ref.folder / "model.safetensors").is_file():  # an export in an engine's format
        return {
            "weights_sha256": source["weights_sha256"],
            "quantisation": ref.quantisation,
            "export": ref.facts.get("digest", ""),  # another version of the format may round differently
        }
    own = {"weights_sha256": _weights_sha256(ref.folder), "quantisation": ref.quantisation or "none"}
    return own | config.unusual(ref.folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _hide_progress_bar() -> None:
    """Turn off transformers' progress bar for reading weights from disk: it fills notebooks and logs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _shorten(encoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    frames = (args[0] if args else kwargs["input_features"]).shape[-1]
    table = encoder.embed_positions.weight.data
    n_positions = frames // FRAMES_PER_POSITION
    if frames % FRAMES_PER_POSITION or not 0 < n_positions <= len(table):
        raise ValueError(
            f"the encoder takes an even number of frames from 2 to {len(table) * FRAMES_PER_POSITION}, got {frames}"
        )
    encoder._full_positions = table
    _set_positions(encoder, table[:n_positions])


def _restore(encoder: torch.nn.Module, args: tuple, output: Any) -> None:
    table = encoder.__dict__.pop("_full_positions", None)
    if table is not None:
        _set_positions(encoder, table)


def _set_positions(encoder: torch.nn.Module, table: torch.Tensor) -> None:
    """Replace the table of positions, float [n, d_model], and both records of its length."""
    encoder.embed_positions.weight.data = table
    encoder.embed_positions.num_embeddings = encoder.config.max_source_positions = table.shape[0]


def _local(uri: str) -> ModelRef:
    folder = Path(uri).expanduser()
    if not folder.exists():
        raise LabError(
            f"no model in {folder}: that folder is not on this machine. Name another, or publish the model (on Colab, "
            "each notebook has its own machine: keep `runs` on Drive)"
        )
    if folder.is_file():
        raise bases.kinds.refuse_file(folder)
    unverified = manifest.read(folder) or {}
    if unverified.get("kind") == "checkpoint" and "model.safetensors" not in unverified["files"]:
        raise LabError(f"{folder} holds an adapter without its base model: finish that run and name its model")
    sealed = model_files.read_manifest(folder, "Make it again, or name another model")
    if sealed and not (folder / "config.json").is_file():
        raise LabError(f"no model in {folder}: expected a folder with config.json and model.safetensors")
    facts = sealed or _mirror_facts(folder) or {}
    if not facts:
        folder = bases.complete(folder)
    if facts.get("kind") == "checkpoint":
        facts = {**_run_facts(folder), **facts}
    revision = facts.get("digest") or _weights_sha256(folder)[:12]
    return _described(facts.get("name") or uri, folder, "folder", revision, facts)


def _run_facts(checkpoint: Path) -> dict[str, str]:
    """Return the context and language of a run from the run.json above its checkpoint, which may not record them.

    Without that file the context is that of all recipes but those that change it.
    """
    for folder in checkpoint.absolute().parents[:2]:
        if (folder / "run.json").is_file():
            run = json.loads((folder / "run.json").read_text("utf-8"))
            return {"context": run["training.context"], "language": run["language"]}
    return {"context": TrainingSettings().context}


def _described(name: str, folder: Path, origin: str, revision: str, facts: dict[str, Any]) -> ModelRef:
    """Return the reference of a folder whose manifest is `facts`."""
    without_files = {key: value for key, value in facts.items() if key != "files"}
    quantisation, context = facts.get("quantisation"), facts.get("context", "full")
    return ModelRef(name, folder, origin, revision, quantisation, context, without_files)


def _from_hub(uri: str, name: str, revision: str | None) -> ModelRef | None:
    """Return the model from the Hub's cache or the Hub; None if it is not cached and the Hub does not answer."""
    if folder := hub_models.cached(name, revision):
        return _of_snapshot(uri, folder, "hub cache")
    if not environment.hub_reachable():
        return None
    return _of_snapshot(uri, hub_models.download(name, revision), "hub")


def _of_snapshot(uri: str, folder: Path, origin: str) -> ModelRef:
    """Return the reference of a Hub snapshot, with the facts of its manifest if the lab published it."""
    sealed = model_files.read_manifest(folder, "Publish it again, or name another model")
    if (sealed or {}).get("kind") != "model":
        return ModelRef(uri, bases.complete(folder), origin, folder.name[:12])
    return _described(uri, folder, origin, folder.name[:12], sealed)


def _mirrored(name: str, uri: str = "") -> ModelRef:
    if name not in pins.available():
        raise LabError(
            f"{uri or name} is not on this machine, and {environment.hub_unreachable_reason()}. "
            f"Give a folder, connect to the Hub, or take one of "
            f"{', '.join(pins.available())} from the registry mirror"
        )
    folder = mirror.fetch(name, environment.cache_folder() / "models", verify=True)
    facts = _mirror_facts(folder)
    return ModelRef(uri or name, folder, "registry mirror", _weights_sha256(folder)[:12], facts.get("quantisation"))


def _weights_sha256(folder: Path) -> str:
    """Return the sha256 of the weights, from the folder's manifest if it has one, else from the file."""
    facts = manifest.read(folder) or _mirror_facts(folder) or {}
    listed = facts.get("files", {}).get("model.safetensors")
    if isinstance(listed, dict) and listed.get("sha256"):
        return listed["sha256"]
    model_files.require_weights(folder)
    return manifest.sha256_once(Path(os.path.realpath(folder / "model.safetensors")))


def _mirror_facts(folder: Path) -> dict[str, Any] | None:
    """Return the mirror's manifest of `folder`; None if the mirror did not build it."""
    return manifest.read_json(folder / mirror.MANIFEST)


def processor(recipe: Recipe) -> WhisperProcessor:
    """Return the tokenizer and feature extractor of the recipe's base model."""
    return load_processor(resolve(recipe.model.base), recipe.language)


def vocabulary_sha256(processor: Any) -> str:
    """Return the first 16 hexadecimal digits of the sha256 of a processor's vocabulary."""
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
