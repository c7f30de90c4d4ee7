"""Labels as the decoder is to produce them, made by a light process."""

import pickle
import subprocess
import sys

import pytest

from pipelines.features.curation.clip_filter import ClipFilter
from pipelines.features.shards import ShardTask, ShardWriter
from pipelines.features.sources import Example
from pipelines.infra.errors import LabError
from pipelines.whisper import model as whisper_model
from pipelines.whisper import tokens
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.model import ModelRef

LIGHT = """
import pickle, sys
write, task = pickle.load(sys.stdin.buffer)
result = write(task)
assert result.frames_path.stat().st_size, "no clip was kept"
print(*sorted({"transformers", "gradio", "datasets", "scipy"} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def processor(toy_model):
    return whisper_model.load_processor(ModelRef("toy", toy_model, "folder", ""), "sv")


@pytest.mark.parametrize("text", ["Hej på dig!", "  två  mellanslag ", "A" * 999, "\x00 🙂 é"])
def test_labels_equal_the_stock_tokenizer(processor, text):
    stock = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert tokens.labeller(processor, "sv")(text)[3:-1] == stock


@pytest.mark.parametrize("text", ["<|sv|> Hej<|endoftext|>", "<|0.00|>Hej", "<|startoftranscript|>", "a<|nospeech|>b"])
def test_control_tokens_in_a_text_are_text(processor, text):
    label = tokens.labeller(processor, "sv")
    ids = label(text)[len(label.prefix) : -1]
    assert max(ids) < processor.tokenizer.eos_token_id
    assert label.tokenizer.decode(ids) == text
    assert max(tokens.Spelling(processor.tokenizer.backend_tokenizer).ids(text)[0]) < processor.tokenizer.eos_token_id


def test_truncation_set_elsewhere_cuts_no_label(processor):
    long = "ord " * 400
    whole = tokens.labeller(processor, "sv")(long)
    processor.tokenizer(long, truncation=True, max_length=8)
    assert tokens.labeller(processor, "sv")(long) == whole


@pytest.mark.slow
def test_shard_process_imports_no_transformers(processor, encoded, speech, tmp_path):
    create_clip = ClipFilter(tokens.labeller(processor, "sv"), 80, 0.1, 30.0, 1e-3).create_clip
    writer = ShardWriter(tmp_path, create_clip, "float32", 80)
    task = ShardTask(0, [Example("a", "train", "hej på dig", encoded(speech(16_000)), "s")])
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], input=pickle.dumps((writer, task)), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == []


def test_english_only_model_has_one_language(toy_model, tmp_path):
    assert tokens.only_language(toy_model) == tokens.only_language(tmp_path / "absent") == ""
    (tmp_path / "generation_config.json").write_text('{"is_multilingual": false}')
    assert tokens.only_language(tmp_path) == "en"
    (tmp_path / "generation_config.json").unlink()  # as in uploads of 2022: only the size of the vocabulary tells
    (tmp_path / "config.json").write_text('{"vocab_size": 51864}')
    assert tokens.only_language(tmp_path) == "en"


def test_suppressed_token_beyond_the_vocabulary_is_refused(toy_model):
    spelling = tokens.read_spelling(toy_model)
    size = spelling.tokenizer.get_vocab_size()
    spelling.search_prompt(DecodingOptions(suppress_tokens=(size - 1,)), 448)
    with pytest.raises(LabError, match=f"below {size}.* got {size}"):
        spelling.search_prompt(DecodingOptions(suppress_tokens=(size,)), 448)
