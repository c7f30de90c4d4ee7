"""Find, load and run Whisper weights at the length of a clip.

Weights are looked for in this order: a folder, the Hub's cache on this machine, the Hub, and where the Hub does not
answer, the registry mirror (mirror/). They are real or there is an error: never a random initialisation.
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
from pipelines.infra.stores import errors as store_errors
from pipelines.infra.stores import hub_client, is_local_path
from pipelines.recipes.settings import Recipe
from pipelines.whisper import mirror
from pipelines.whisper.log_mel import FRAMES_PER_POSITION
from pipelines.whisper.mirror import pins

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

logger = logging.getLogger(__name__)


_MEL_MASK_PROB = 0.05
"""SpecAugment's share of mel bands that begin a masked stretch of ten: as for frames in Whisper's configuration."""
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "README.md"]  # the card: the manifest of a tuned model names it


@dataclass(frozen=True)
class ModelRef:
    """A model that lies on this machine, and where it came from."""

    name: str
    """A Hub id, a mirror's name, the name that a tuned model was given, or the folder."""
    folder: Path
    """A Hugging Face folder with weights, tokenizer and feature extractor."""
    origin: str
    """folder, hub cache, hub, or the mirror's package."""
    revision: str
    """The Hub's commit, a sealed model's digest, or the first digits of the weights' sha256."""
    quantisation: str | None = None
    """`q8` where the weights were dequantised from eight bits, an export's form: every figure made with them says
    so."""
    context: str = "full"
    """`clip` for weights tuned at the length of a clip; `full` for all others, which need the whole 30 s window."""
    facts: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What the model's manifest tells besides: base, language, scores."""

    @property
    def title(self) -> str:
        """Name and revision, as reports and the app print them."""
        return f"{self.name}{f' ({self.quantisation})' if self.quantisation else ''} @ {self.revision}"


def resolve(uri: str) -> ModelRef:
    """Find the model `uri` and bring it to this machine.

    `uri`: a folder, `hub://owner/name[/path][@revision]`, a Hub id `owner/name[@revision]`, `hopsworks://project/path`,
    or a mirror's name with `@q8`. Raises LabError with one line that says what to do where the model is not to be had.
    """
    if uri.startswith("hopsworks://") or hub_client.is_repository_folder(uri):
        return _local(str(stores.local_folder(uri)))
    if is_local_path(uri):
        return _local(uri)
    name, _, revision = uri.removeprefix("hub://").partition("@")
    if revision == "q8":
        return _mirrored(uri)
    return _from_hub(uri, name, revision or None) or _mirrored(name, asked=uri)


def load(
    ref: ModelRef, *, device: str = "cpu", dropout: float = 0.0, spec_augment: bool = False
) -> WhisperForConditionalGeneration:
    """The model in float32 on `device`, able to run at any context up to 30 s (see `allow_short_context`)."""
    from safetensors import SafetensorError
    from transformers import WhisperForConditionalGeneration

    _quiet()
    try:
        model, report = WhisperForConditionalGeneration.from_pretrained(
            ref.folder,
            dtype="float32",
            attn_implementation="sdpa",
            dropout=dropout,
            apply_spec_augment=spec_augment,
            output_loading_info=True,
            # Whisper's own configuration masks stretches of time alone
            **({"mask_feature_prob": _MEL_MASK_PROB} if spec_augment else {}),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LabError(
            f"{ref.folder} does not load as a Whisper model: {_first_line(error)}. Fetch the model again"
        ) from None
    if report["missing_keys"] or report.get("mismatched_keys"):
        lacking = sorted(report["missing_keys"]) + sorted(map(str, report.get("mismatched_keys", [])))
        raise LabError(
            f"{ref.folder} lacks weights of a Whisper model ({', '.join(lacking[:3])} ...): "
            "it is not a whole checkpoint. Fetch the model again"
        )
    # from_pretrained makes the sinusoids trainable (facts of transformers 5): they are constants
    model.model.encoder.embed_positions.requires_grad_(False)
    allow_short_context(model)
    return model.to(device)


def load_processor(ref: ModelRef, language: str) -> WhisperProcessor:
    """Tokenizer and feature extractor of a model, set to transcribe `language` without timestamps."""
    from transformers import WhisperProcessor

    try:
        processor = WhisperProcessor.from_pretrained(ref.folder, language=language, task="transcribe")
    except (OSError, ValueError, TypeError) as error:  # TypeError: a tokenizer of no tokens, where its files are absent
        raise LabError(f"{ref.folder} has no usable tokenizer and feature extractor: {_first_line(error)}") from None
    # made for WordPiece: in Whisper's byte-pair tokens it would eat spaces, and transformers warns at every call
    processor.tokenizer.clean_up_tokenization_spaces = False
    return processor


def allow_short_context(model: WhisperForConditionalGeneration) -> None:
    """Let the encoder take any even number of log-mel frames up to 3000 instead of exactly 3000.

    The sinusoidal positions are sliced for the length of one forward pass and put back after it, so that
    what is saved is always the whole model. Calling it twice changes nothing.
    """
    encoder = model.model.encoder
    if getattr(encoder, "_takes_short_context", False):
        return
    encoder._takes_short_context = True
    encoder.register_forward_pre_hook(_shorten, with_kwargs=True)
    encoder.register_forward_hook(_restore, always_call=True)


def save(model: WhisperForConditionalGeneration, processor: WhisperProcessor, folder: Path) -> None:
    """Write a complete Hugging Face folder (weights, generation settings, tokenizer, feature extractor), unsealed."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # older clients and CTranslate2 look for preprocessor_config.json, which the processor alone no longer writes
    processor.feature_extractor.save_pretrained(folder)


def set_language(model: WhisperForConditionalGeneration, language: str) -> None:
    """Pin language and task in the generation settings: unpinned, every clip's language is guessed."""
    model.generation_config.language = language
    model.generation_config.task = "transcribe"
    model.generation_config.forced_decoder_ids = None


def identity(ref: ModelRef) -> dict[str, str]:
    """What names these weights: part of the digest of everything made from them."""
    made_of = ref.facts.get("made_of")
    if made_of and not (ref.folder / "model.safetensors").is_file():  # an export in a form of its own
        told = {"weights_sha256": made_of["weights_sha256"], "quantisation": ref.quantisation}
        return told | {"export": ref.facts.get("digest", "")}  # another version of an engine's form may round otherwise
    return {"weights_sha256": _weights_sha256(ref.folder), "quantisation": ref.quantisation or "none"}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _quiet() -> None:
    """No progress bar for reading 150 MB from the disk: it fills notebooks and logs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _shorten(encoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    frames = (args[0] if args else kwargs["input_features"]).shape[-1]
    positions = encoder.embed_positions
    full = positions.weight.shape[0]
    wanted = frames // FRAMES_PER_POSITION
    if frames % FRAMES_PER_POSITION or not 0 < wanted <= full:
        raise ValueError(
            f"the encoder takes an even number of frames from 2 to {full * FRAMES_PER_POSITION}, got {frames}"
        )
    encoder._whole_positions = positions.weight.data
    _set_positions(encoder, encoder._whole_positions[:wanted])


def _restore(encoder: torch.nn.Module, args: tuple, output: Any) -> None:
    whole = encoder.__dict__.pop("_whole_positions", None)
    if whole is not None:
        _set_positions(encoder, whole)


def _set_positions(encoder: torch.nn.Module, table: torch.Tensor) -> None:
    """The three places in which a length is kept."""
    encoder.embed_positions.weight.data = table
    encoder.embed_positions.num_embeddings = encoder.config.max_source_positions = table.shape[0]


def _local(uri: str) -> ModelRef:
    folder = Path(uri).expanduser()
    if not (folder / "config.json").is_file():
        raise LabError(f"no model in {folder}: expected a folder with config.json and model.safetensors")
    sealed = manifest.read(folder)
    if sealed is not None:
        sealed = manifest.require_complete(folder, "model", "Make it again, or name another model")
    facts = sealed or _mirror_facts(folder) or {}
    told = {name: value for name, value in facts.items() if name != "files"}
    return ModelRef(
        facts.get("name") or uri,
        folder,
        "folder",
        facts.get("digest") or _weights_sha256(folder)[:12],
        facts.get("quantisation"),
        facts.get("context", "full"),
        told,
    )


def _from_hub(uri: str, name: str, revision: str | None) -> ModelRef | None:
    """The model from the Hub's cache or the Hub itself; None where neither has it and the Hub does not answer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
        if _has_weights(folder):
            return _of_hub(uri, folder, "hub cache")
    except (LocalEntryNotFoundError, ValueError):
        pass
    if not environment.hub_reachable():
        return None
    logger.info(f"fetching {name} from {environment.hub_host()} ...")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # a lost connection raises an exception of the HTTP client, which depends on its version
        address, page = f"hub://{name}" + (f"@{revision}" if revision else ""), f"{environment.hub_endpoint()}/{name}"
        raise store_errors.explain_hub(error, address, page) or store_errors.explain(
            error, store="the Hub", uri=address, credential="HF_TOKEN"
        ) from None
    if not _has_weights(folder):
        raise LabError(f"{name} on the Hub has no model.safetensors: name a Whisper model in safetensors format")
    return _of_hub(uri, folder, "hub")


def _of_hub(uri: str, folder: Path, origin: str) -> ModelRef:
    """A snapshot of the Hub; one that this lab published tells by its manifest how it was tuned."""
    if (manifest.read(folder) or {}).get("kind") != "model":
        return ModelRef(uri, folder, origin, folder.name[:12])
    sealed = manifest.require_complete(folder, "model", "Publish it again, or name another model")
    told = {name: value for name, value in sealed.items() if name != "files"}
    context = sealed.get("context", "full")
    return ModelRef(uri, folder, origin, folder.name[:12], sealed.get("quantisation"), context, told)


def _mirrored(name: str, asked: str | None = None) -> ModelRef:
    if name not in pins.available():
        raise LabError(
            f"{asked or name} is not on this machine, and {environment.hub_silence()}. "
            f"Give a folder, connect to the Hub, or take one of "
            f"{', '.join(pins.available())} from the registry mirror"
        )
    folder = mirror.fetch(name, environment.cache_folder() / "models")
    facts = _mirror_facts(folder)
    return ModelRef(asked or name, folder, "registry mirror", _weights_sha256(folder)[:12], facts.get("quantisation"))


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _weights_sha256(folder: Path) -> str:
    """The sha256 of the weights: from the folder's manifest where it has one, else from the file."""
    facts = manifest.read(folder) or _mirror_facts(folder) or {}
    listed = facts.get("files", {}).get("model.safetensors")
    weights = folder / "model.safetensors"
    if isinstance(listed, dict) and listed.get("sha256"):
        return listed["sha256"]
    if not weights.is_file():
        raise LabError(
            f"no model.safetensors in {folder}: sharded or older weights are not read here; "
            "save the model with save_pretrained(..., max_shard_size='20GB')"
        )
    return manifest.sha256(Path(os.path.realpath(weights)))


def _mirror_facts(folder: Path) -> dict[str, Any] | None:
    """What the mirror noted when it made `folder`, or None for a folder of another origin."""
    note = folder / mirror.MANIFEST
    return json.loads(note.read_text("utf-8")) if note.is_file() else None


def processor(recipe: Recipe) -> WhisperProcessor:
    """Tokenizer and feature extractor of the recipe's base model: what is needed beside a cache that is at hand."""
    return load_processor(resolve(recipe.model.base), recipe.language)


def vocabulary_sha256(processor: Any) -> str:
    """Return the first 16 hexadecimal digits of the sha256 of a processor's vocabulary."""
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
