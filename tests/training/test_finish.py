"""A tuned folder is complete for other programs, and its card's snippet runs in transformers 4.57 and 5."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from pipelines.whisper import bases
from pipelines.whisper import model as whisper_model

OLD = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")


@pytest.fixture(scope="module")
def tuned(toy_model, tmp_path_factory) -> Path:
    """The toy, saved as a tuned model, from a base with a prompt that is forced and few generation settings."""
    base = Path(shutil.copytree(toy_model, tmp_path_factory.mktemp("tuned") / "base"))
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "forced_decoder_ids": [[1, 2]]}), "utf-8")
    ref, folder = whisper_model.resolve(str(base)), base.with_name("model")
    model = whisper_model.load(ref)
    whisper_model.set_language(model, "sv")
    model.generation_config.lang_to_id = model.generation_config.no_timestamps_token_id = None
    whisper_model.save(model, whisper_model.load_processor(ref, "sv"), folder)
    bases.finish_tuned(folder, base)
    return folder


def test_tuned_folder_is_complete_for_other_programs(tuned):
    tokenizer = {"vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer.json"}
    assert tokenizer | {"preprocessor_config.json"} <= {path.name for path in tuned.iterdir()}
    assert (tuned / "merges.txt").read_bytes() == (tuned.with_name("base") / "merges.txt").read_bytes()
    read = {name: json.loads((tuned / name).read_text("utf-8")) for name in ("config.json", "generation_config.json")}
    assert not any("forced_decoder_ids" in content for content in read.values())
    ids = whisper_model.load_processor(whisper_model.resolve(str(tuned)), "sv").tokenizer.convert_tokens_to_ids
    settings = read["generation_config.json"]
    assert settings["no_timestamps_token_id"] == ids("<|notimestamps|>") and settings["language"] == "sv"
    assert settings["lang_to_id"]["<|sv|>"] == ids("<|sv|>")
    assert not isinstance(json.loads((tuned / "tokenizer_config.json").read_text()).get("extra_special_tokens"), list)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.57", "5"])
def test_snippet_of_the_card_runs(tuned, tmp_path, speech, pytestconfig, version):
    card = (Path(__file__).parents[2] / "pipelines/training/model_card.py").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    arguments = '{"language": "sv", "task": "transcribe"}'
    for old, new in (("{{{code}}}", arguments), ("path or name of this model", str(tuned)), ("speech.wav", "s.wav")):
        assert old in code
        code = code.replace(old, new)
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed: the pipeline of transformers reads files with it")
    soundfile.write(tmp_path / "s.wav", speech(32_000), 16_000)
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    if version == "4.57":
        environment["PYTHONPATH"] = str(_old_transformers(pytestconfig))
    code = f"import transformers\nassert transformers.__version__.startswith('{version}')\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def _old_transformers(pytestconfig) -> Path:
    """Return a folder with transformers 4.57, installed once beside pytest's cache."""
    folder = Path(pytestconfig.cache.mkdir("transformers-4.57"))
    if not (folder / "done").exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(folder),
            "--upgrade",
            *OLD,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"transformers 4.57 cannot be installed here: {done.stderr.strip()[-200:]}")
        (folder / "done").touch()
    return folder
