"""Fill generation_config.json from the tokenizer and config.json, where a base model has none or an early one.

Without these fields the `generate` of transformers, its pipeline and other programs refuse a language, write no
timestamps or no times of words. Alignment heads are OpenAI's (openai/whisper, `_ALIGNMENT_HEADS`), by the decoder's
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.infra import manifest
from pipelines.recipes import languages

FILE = "generation_config.json"
ENGLISH_ONLY_TOKENS = 51_864
"""Size of the vocabulary of OpenAI's English-only models."""
_LARGE_V3_TOKENS = 51_866
_COPIED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "suppress_tokens",
    "begin_suppress_tokens",
)  # fmt: skip
"""Fields that config.json of older models holds."""
_DROPPED = ("forced_decoder_ids", "_from_model_config", "transformers_version")
_MAX_FIRST_TIMESTAMP = 50
# (decoder layers, heads, whether English-only) -> pairs of layer and head
# fmt: off
_ALIGNMENT_HEADS = {
    (4, 6, False): [[2, 2], [3, 0], [3, 2], [3, 3], [3, 4], [3, 5]],
    (4, 6, True): [[1, 0], [2, 0], [2, 5], [3, 0], [3, 1], [3, 2], [3, 3], [3, 4]],
    (6, 8, False): [[3, 1], [4, 2], [4, 3], [4, 7], [5, 1], [5, 2], [5, 4], [5, 6]],
    (6, 8, True): [[3, 3], [4, 7], [5, 1], [5, 5], [5, 7]],
    (12, 12, False): [[5, 3], [5, 9], [8, 0], [8, 4], [8, 7], [8, 8], [9, 0], [9, 7], [9, 9], [10, 5]],
    (12, 12, True): [
        [6, 6], [7, 0], [7, 3], [7, 8], [8, 2], [8, 5], [8, 7], [9, 0], [9, 4], [9, 8], [9, 10], [10, 0], [10, 1],
        [10, 2], [10, 3], [10, 6], [10, 11], [11, 2], [11, 4],
    ],
    (24, 16, False): [[13, 15], [15, 4], [15, 15], [16, 1], [20, 0], [23, 4]],
    (24, 16, True): [
        [11, 4], [14, 1], [14, 12], [14, 14], [15, 4], [16, 0], [16, 4], [16, 9], [17, 12], [17, 14], [18, 7],
        [18, 10], [18, 15], [20, 0], [20, 3], [20, 9], [20, 14], [21, 12],
    ],
    (4, 20, False): [[2, 4], [2, 11], [3, 3], [3, 6], [3, 11], [3, 14]],
}
_LARGE_V3_HEADS = [
    [7, 0], [10, 17], [12, 18], [13, 12], [16, 1], [17, 14], [19, 11], [21, 4], [24, 1], [25, 6],
]
# fmt: on


def is_english_only(settings: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return True for a model without languages and tasks, such as whisper-tiny.en, whose prompt names neither."""
    multilingual = settings.get("is_multilingual")
    if isinstance(multilingual, bool):
        return not multilingual
    return config.get("vocab_size") == ENGLISH_ONLY_TOKENS


def is_english_only_folder(folder: Path) -> bool:
    """Return the result of `is_english_only` for the model or export in a folder."""
    settings, config = manifest.read_json(folder / FILE), manifest.read_json(folder / "config.json")
    return is_english_only(settings or {}, config or {})


def is_complete(settings: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return True if `generate` of transformers takes a language and timestamps with these settings."""
    ids = ("no_timestamps_token_id", *(() if is_english_only(settings, config) else ("lang_to_id", "task_to_id")))
    return all(settings.get(name) for name in ids)


def filled(settings: Mapping[str, Any], vocabulary: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation settings with the fields that they lack, and without forced prompts.

    `vocabulary`: token to id; `config`: the content of config.json.
    """
    english_only = is_english_only(settings, config)
    tasks = {name: vocabulary.get(f"<|{name}|>") for name in ("transcribe", "translate")}
    fields = {
        **{name: config.get(name) for name in _COPIED},
        "alignment_heads": _alignment_heads(config, english_only),
        "is_multilingual": not english_only,
        "max_initial_timestamp_index": _MAX_FIRST_TIMESTAMP,
        "max_length": config.get("max_target_positions"),
        "no_timestamps_token_id": vocabulary.get("<|notimestamps|>"),
        "prev_sot_token_id": vocabulary.get("<|startofprev|>"),
        "return_timestamps": False,
    }
    if not english_only:
        ids = {f"<|{code}|>": vocabulary.get(f"<|{code}|>") for code in languages.NAMES}
        fields["lang_to_id"] = {name: number for name, number in ids.items() if number is not None}
        fields["task_to_id"] = {name: number for name, number in tasks.items() if number is not None}
    given = {name: value for name, value in settings.items() if value is not None and name not in _DROPPED}
    return dict(sorted({**{name: value for name, value in fields.items() if value not in (None, {})}, **given}.items()))


def _alignment_heads(config: Mapping[str, Any], english_only: bool) -> list[list[int]] | None:
    """Return OpenAI's alignment heads of a model of this size; None if it is of another, or of two of them."""
    layers, heads = config.get("decoder_layers"), config.get("decoder_attention_heads")
    if (layers, heads, config.get("vocab_size")) == (32, 20, _LARGE_V3_TOKENS):
        return _LARGE_V3_HEADS
    if config.get("encoder_layers") not in (layers, 32):  # a distilled model, whose layers are others
        return None
    return _ALIGNMENT_HEADS.get((layers, heads, english_only))
