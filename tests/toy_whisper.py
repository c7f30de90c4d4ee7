"""A Whisper folder with random weights and a generated tokenizer: tests need no download.

    python tests/toy_whisper.py FOLDER

The special tokens follow the text tokens in the order of the multilingual models; only the number of text tokens
differs (1,000 instead of 50,257), so that a training step on a CPU takes milliseconds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES
from transformers.utils import logging

SENTENCES = Path(__file__).parents[1] / "pipelines/features/sources/synthetic/tour_sentences.txt"
N_TEXT_TOKENS = 1_000
LANGUAGE_TOKENS = [f"<|{code}|>" for code in list(LANGUAGES)[:99]]
"""The languages of whisper-tiny; large-v3 added one."""
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    *LANGUAGE_TOKENS,
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]
TIMESTAMP_TOKENS = [f"<|{position * 0.02:.2f}|>" for position in range(1501)]
IDS = {name: N_TEXT_TOKENS + offset for offset, name in enumerate([*SPECIAL_TOKENS, *TIMESTAMP_TOKENS])}
END, START, TRANSCRIBE = (IDS[f"<|{name}|>"] for name in ("endoftext", "startoftranscript", "transcribe"))
SWEDISH, NO_TIMESTAMPS = IDS["<|sv|>"], IDS["<|notimestamps|>"]
FIRST_TIMESTAMP, LAST_TIMESTAMP = IDS[TIMESTAMP_TOKENS[0]], IDS[TIMESTAMP_TOKENS[-1]]
NON_SPEECH = '"#()*+/:;<=>@[\\]^_`{|}~'
"""Characters that Whisper's generation settings suppress."""
SPECIAL_IDS = {
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
    "decoder_start_token_id": START,
}


def write(folder: Path, width: int = 32) -> Path:
    """Write a model of two layers and `width` channels with tokenizer, feature extractor and generation settings."""
    logging.disable_progress_bar()
    write_tokenizer(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    make_model(width, blank=blank_id(folder)).save_pretrained(folder)
    return folder


def shorten(folder: Path, source: int = 1500, target: int = 448) -> Path:
    """Cut the positions of a model's encoder and decoder in its weights and config.json; return the folder."""
    from safetensors.torch import load_file, save_file

    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text("utf-8"))
    for part, size in (("encoder", source), ("decoder", target)):
        name = f"model.{part}.embed_positions.weight"
        weights[name] = weights[name][:size].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"max_source_positions": source, "max_target_positions": target}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer on the tour's sentences and write it as Whisper's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_TEXT_TOKENS, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train([str(SENTENCES)], trainer)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) != N_TEXT_TOKENS:
        raise ValueError(f"the tokenizer has {len(vocabulary)} text tokens instead of {N_TEXT_TOKENS}")
    tokenizer.model.save(str(_created(folder)))
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text("utf-8").splitlines()[1:]]
    vocabulary |= IDS  # 1,501 timestamps as added tokens, as in Whisper, would make each save ten times slower
    whisper = WhisperTokenizer(
        vocabulary, merges, pad_token=SPECIAL_TOKENS[0], additional_special_tokens=SPECIAL_TOKENS[1:]
    )
    whisper.save_pretrained(folder)
    for name, number in IDS.items():
        if whisper.convert_tokens_to_ids(name) != number:
            raise ValueError(f"{name} has id {whisper.convert_tokens_to_ids(name)} instead of {number}")


def blank_id(folder: Path) -> int:
    """Return the id of the token that is one space."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("\u0120")


def make_model(width: int, blank: int) -> WhisperForConditionalGeneration:
    """Return a model whose transcripts depend on the audio; the weights are the same on every machine."""
    import torch

    config = WhisperConfig(
        vocab_size=N_TEXT_TOKENS + len(IDS),
        num_mel_bins=80,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        num_hidden_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        init_std=0.2,
        begin_suppress_tokens=[blank, END],
        **SPECIAL_IDS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = WhisperForConditionalGeneration(config)
    model.generation_config = generation_config(blank)
    return model


def generation_config(blank: int) -> GenerationConfig:
    """Return the generation settings of a multilingual Whisper, with the ids of this tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    silent = ("startoftranscript", "translate", "transcribe", "startoflm", "startofprev", "nospeech")
    return GenerationConfig(
        alignment_heads=[[1, 0], [1, 1]],
        begin_suppress_tokens=[blank, END],
        is_multilingual=True,
        lang_to_id={name: IDS[name] for name in LANGUAGE_TOKENS},
        max_initial_timestamp_index=1,
        max_length=448,
        no_timestamps_token_id=NO_TIMESTAMPS,
        return_timestamps=False,
        suppress_tokens=sorted([*map(alphabet.index, NON_SPEECH), *(IDS[f"<|{name}|>"] for name in silent)]),
        task_to_id={name: IDS[f"<|{name}|>"] for name in ("translate", "transcribe")},
        **SPECIAL_IDS,
    )


def _created(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]))
