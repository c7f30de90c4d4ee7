"""Check a model's folder before its weights are loaded: is it complete, and a Whisper that this lab can use?

Only `config.json`, the settings of the feature extractor and the header of the weights are read.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.whisper.bases import kinds
from pipelines.whisper.log_mel import FRAMES_PER_POSITION, FULL_FRAMES, HOP_SAMPLES, WINDOW_SAMPLES

TEXT_POSITIONS = 448
"""Tokens that the decoder of OpenAI's models takes."""
SOURCE_POSITIONS = FULL_FRAMES // FRAMES_PER_POSITION
"""Positions of the encoder of OpenAI's models: 30 s."""
_WEIGHTS = "model.safetensors"
_LAB_FILES = ("recipe.json", "training.json")
"""Files that this lab writes into a model's folder before the manifest."""
_MIN_POSITIONS = 100
"""Two seconds: shorter windows hold no sentence."""
_EXTRACTOR = {"sampling_rate": SAMPLE_RATE_HZ, "hop_length": HOP_SAMPLES, "n_fft": WINDOW_SAMPLES}
_MAX_HEADER_BYTES = 100_000_000
_FLOATS = ("F16", "BF16", "F32", "F64")
"""Precisions of weights that are converted to float32 without a scale."""


def read_manifest(folder: Path, remedy: str) -> dict[str, Any] | None:
    """Return the manifest of a model's folder after verifying every file; None if another program wrote the folder.

    Raises LabError, which ends with `remedy`, if this lab wrote the folder and it is unfinished or damaged.
    """
    path = folder / manifest.MANIFEST
    foreign = manifest.read(folder) is None and _is_json(path)  # other tools write a manifest.json, too
    if not path.exists() or foreign:
        run = [parent for parent in (folder, *folder.absolute().parents[:2]) if (parent / "run.json").is_file()]
        if not run and not all((folder / name).is_file() for name in _LAB_FILES):
            return None
        if foreign:
            raise LabError(f"model {folder} cannot be used: {manifest.MANIFEST} is damaged. {remedy}")
    return manifest.require_complete(folder, "model", remedy)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return True


def require_weights(folder: Path) -> None:
    """Raise LabError unless the folder has weights in one file in safetensors format."""
    if not (folder / _WEIGHTS).is_file():
        raise LabError(f"no {_WEIGHTS} in {folder}: fetch the whole model, or save it again with save_pretrained")


def require_usable(folder: Path) -> None:
    """Raise LabError unless the folder holds a Whisper whose parts fit each other and this lab."""
    config = manifest.read_json(folder / "config.json")
    if config is None:
        raise _unusable(folder, "config.json is not a JSON object")
    kinds.require_architecture(config, str(folder))
    require_weights(folder)
    sizes = _sizes(_shapes(folder))
    if not {"d_model", "vocab_size"} <= sizes.keys():
        raise _unusable(folder, f"{_WEIGHTS} holds no weights of a Whisper")
    for name, (actual, tensor) in sizes.items():
        if config.get(name, actual) != actual:
            raise _unusable(folder, f"{name} is {config[name]!r} in config.json, but {tensor} has {actual}")
    positions, _ = sizes.get("max_source_positions", (SOURCE_POSITIONS, ""))
    if not _MIN_POSITIONS <= positions <= SOURCE_POSITIONS:
        raise _unusable(
            folder,
            f"its encoder takes {positions * FRAMES_PER_POSITION / 100:g} s (max_source_positions {positions}), "
            f"expected {_MIN_POSITIONS * FRAMES_PER_POSITION / 100:g} to {FULL_FRAMES / 100:g} s",
        )
    _check_extractor(folder, sizes["num_mel_bins"][0])
    _check_generation(folder, sizes["vocab_size"][0])


def source_frames(folder: Path) -> int:
    """Return the log-mel frames that a model's encoder takes: 3000 unless its config.json differs."""
    positions = (manifest.read_json(folder / "config.json") or {}).get("max_source_positions")
    return FRAMES_PER_POSITION * (positions if isinstance(positions, int) else SOURCE_POSITIONS)


def require_full_window(folder: Path) -> None:
    """Raise LabError if a model's encoder takes less than the 30 s that batches of a feature cache may have."""
    if (frames := source_frames(folder)) < FULL_FRAMES:
        raise LabError(
            f"{folder} has an encoder of {frames / 100:g} s (max_source_positions {frames // FRAMES_PER_POSITION}): "
            f"such a model transcribes, but is not trained or scored here. For that, load it with "
            f"WhisperForConditionalGeneration.from_pretrained(..., max_source_positions={SOURCE_POSITIONS}, "
            "ignore_mismatched_sizes=True), which restores the encoder's constant positions, and save it"
        )


def text_positions(folder: Path) -> int:
    """Return the number of tokens that a model's decoder takes, prompt included: 448 unless its config.json differs."""
    positions = (manifest.read_json(folder / "config.json") or {}).get("max_target_positions")
    return positions if isinstance(positions, int) else TEXT_POSITIONS


def _unusable(folder: Path, reason: str) -> LabError:
    return LabError(f"{folder} is not a model that this lab can use: {reason}. Name a Whisper model")


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Return tensor name, without `model.`, to shape, from the header of the weights."""
    path = folder / _WEIGHTS
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else None
        header.pop("__metadata__", None)
        end = max(entry["data_offsets"][1] for entry in header.values())
        shapes = {name.removeprefix("model."): entry["shape"] for name, entry in header.items()}
        others = sorted((entry["dtype"], name) for name, entry in header.items() if entry["dtype"] not in _FLOATS)
    except OSError as error:
        raise _unusable(folder, f"{_WEIGHTS} cannot be read ({error.strerror})") from None
    except (struct.error, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise _unusable(folder, f"{_WEIGHTS} is damaged (its header cannot be read)") from None
    if path.stat().st_size != 8 + length + end:
        raise _unusable(folder, f"{_WEIGHTS} has {path.stat().st_size} bytes, not {8 + length + end}")
    if others:
        raise LabError(
            f"{folder} holds weights in {others[0][0]} ({others[0][1]}), whose scales are not read here: name the "
            "model in float16, bfloat16 or float32"
        )
    return shapes


def _sizes(shapes: dict[str, list[int]]) -> dict[str, tuple[int, str]]:
    """Return field of config.json to the size of the weights, and the tensor that has it."""
    fields = {
        "d_model": ("encoder.conv1.weight", 0),
        "num_mel_bins": ("encoder.conv1.weight", 1),
        "max_source_positions": ("encoder.embed_positions.weight", 0),
        "max_target_positions": ("decoder.embed_positions.weight", 0),
        "vocab_size": ("decoder.embed_tokens.weight", 0),
    }
    sizes = {
        name: (shapes[tensor][axis], tensor)
        for name, (tensor, axis) in fields.items()
        if len(shapes.get(tensor, ())) > axis
    }
    for part in ("encoder", "decoder"):
        layers = {name.split(".")[2] for name in shapes if name.startswith(f"{part}.layers.")}
        sizes[f"{part}_layers"] = (len(layers), _WEIGHTS)
    return sizes


def _check_extractor(folder: Path, bands: int) -> None:
    """Raise LabError if the feature extractor's settings do not fit the weights or are not Whisper's."""
    settings = (manifest.read_json(folder / "processor_config.json") or {}).get("feature_extractor")
    if not isinstance(settings, dict):
        settings = manifest.read_json(folder / "preprocessor_config.json") or {}
    if settings.get("feature_size", bands) != bands:
        raise _unusable(
            folder,
            f"its feature extractor makes {settings['feature_size']} mel bands, and its weights take {bands}: "
            "one of the two files belongs to another model",
        )
    for name, value in _EXTRACTOR.items():
        if settings.get(name, value) != value:
            raise _unusable(folder, f"its feature extractor has {name} {settings[name]}, Whisper's is {value}")


def _check_generation(folder: Path, vocabulary: int) -> None:
    """Raise LabError if generation_config.json has settings that engines cannot use: some would end the process."""
    path = folder / "generation_config.json"
    settings = manifest.read_json(path)
    if settings is None and path.exists():
        raise _unusable(folder, f"{path.name} is not a JSON object")
    for name in ("suppress_tokens", "begin_suppress_tokens", "eos_token_id"):
        value, is_end = (settings or {}).get(name), name == "eos_token_id"
        if value is None:
            continue
        tokens = [value] if is_end and type(value) is int else value
        are_tokens = isinstance(tokens, list) and all(type(one) is int and -1 <= one < vocabulary for one in tokens)
        if not are_tokens or (is_end and not tokens):
            kind = "a token, or some," if is_end else "a list of tokens"
            raise _unusable(folder, f"{name} in {path.name} must be {kind} from 0 to {vocabulary - 1}")
    heads = (settings or {}).get("alignment_heads") or []
    pairs = [
        head
        for head in heads
        if isinstance(head, list) and [type(part) for part in head] == [int, int] and min(head) >= 0
    ]
    if not isinstance(heads, list) or len(pairs) < len(heads):
        raise _unusable(folder, f"alignment_heads in {path.name} must be pairs of a layer and a head")
