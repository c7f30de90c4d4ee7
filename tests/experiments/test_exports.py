"""Exports: equal transcripts, metadata, comparison tables and production folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from pipelines import __main__ as cli
from pipelines.experiments import exports
from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.inference.deploy import package
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.recipes.training_settings import DistillationSettings
from pipelines.training import distillation
from pipelines.whisper import engines, export
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import Collator
from pipelines.whisper.engines import search
from pipelines.whisper.engines.onnx_engine import OnnxDecoder
from pipelines.whisper.export import onnx_graph

pytestmark = pytest.mark.usefixtures("one_thread")
ct2 = pytest.mark.skipif(not export.installed(), reason="ctranslate2 is not installed")
FEW = {"evaluation.max_new_tokens": 6}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Store exports of the toy model in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(environment, "cache_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def sealed(toy_model, tmp_path_factory):
    """Return `sealed(n)`, which creates a finished clip-length model with n of the toy's two decoder layers."""
    ref = whisper_model.resolve(str(toy_model))

    def make(decoder_layers: int) -> Path:
        settings = DistillationSettings(teacher="x", decoder_layers=decoder_layers)
        folder = tmp_path_factory.mktemp("tuned") / "model"
        whisper_model.save(
            distillation.student(whisper_model.load(ref), settings), whisper_model.load_processor(ref, "sv"), folder
        )
        (folder / "README.md").write_text("---\nlanguage: sv\nlicense: apache-2.0\nmodel-index: []\n---\n\n# Toy\n")
        told = {"name": "toy-1a2b", "digest": "1a2b", "context": "clip", "context_s": 4.0, "language": "sv"}
        told |= {"base": "a @ b", "confidence": {"slope": 2.0, "words": 60}}
        manifest.seal(folder, kind="model", test={"wer": 0.1}, **told)
        return folder

    return make


@pytest.fixture(scope="module")
def tuned(sealed) -> Path:
    return sealed(1)


@pytest.fixture(scope="module")
def teacher(sealed) -> Path:
    return sealed(2)


@pytest.fixture(scope="module")
def windows(toy_cache) -> np.ndarray:
    return Collator(toy_cache)(toy_cache.split("test")[:6].tolist())["input_features"].numpy()


def opened(uri, engine="auto", **told):
    told = {"device": "cpu", "max_new_tokens": 12, **told}
    return engines.open_engine(whisper_model.resolve(str(uri)), "sv", engine, **told)


def converted(tuned: Path, form: str) -> Path:
    return export.convert(whisper_model.resolve(str(tuned)), form)


# ---- ONNX


@pytest.fixture(scope="module", params=["teacher", "student"])
def pair(request):
    """Return the same weights as a transformers engine and as ONNX graphs, with two decoder layers and with one."""
    uri = request.getfixturevalue("teacher" if request.param == "teacher" else "tuned")
    return opened(uri, "transformers"), opened(uri, "onnx", compute_type="float32")


def test_onnx_graphs_match_text_and_confidence(pair, windows):
    for one, other in zip(*(engine.decode(windows) for engine in pair), strict=True):
        assert one.text == other.text
        assert one.tokens == other.tokens
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [word for word, _ in one.words] == [word for word, _ in other.words]
        assert [sure for _, sure in one.words] == pytest.approx([sure for _, sure in other.words], abs=1e-2)
    hypotheses = pair[1].decode(windows)
    assert len({hypothesis.text for hypothesis in hypotheses}) > 1
    assert len({hypothesis.logprob for hypothesis in hypotheses}) > 2


def test_batched_transcript_equals_single_transcript(teacher, windows, monkeypatch):
    """Finished rows leave the batch while others continue; texts must not mix."""
    engine = opened(teacher, "onnx", compute_type="float32")
    monkeypatch.setattr(search, "hypothesis", lambda text, spelling, options: (text.ids, text.logprobs))
    whole = engine.decode(windows)
    first = {token: [ids.index(token) if token in ids else 99 for ids, _ in whole] for ids, _ in whole for token in ids}
    token = max(first, key=lambda token: len(set(first[token])))  # the toy never ends; this is to be its end token
    assert len(set(first[token])) > 2
    monkeypatch.setattr(type(engine.spelling), "end", property(lambda self: token))
    left = []
    monkeypatch.setattr(
        OnnxDecoder,
        "select",
        lambda self, rows, select=OnnxDecoder.select: (left.append(rows), select(self, rows)),
    )
    for (ids, sure), (known, known_sure) in zip(engine.decode(windows), whole, strict=True):
        ends = known.index(token) + 1 if token in known else len(known)
        assert ids == known[: ends - (token in known)]  # the end token is no part of the text
        assert sure == pytest.approx(known_sure[:ends], abs=1e-3)
    assert left


@pytest.mark.parametrize("frames", [2, 240, 3000])
def test_graphs_accept_any_even_window_length(pair, frames):
    sound = np.random.default_rng(0).standard_normal((1, 80, frames)).astype(np.float32)
    (one,), (other,) = (engine.decode(sound) for engine in pair)
    assert one.text == other.text
    assert one.no_speech == pytest.approx(other.no_speech, rel=1e-3)


@pytest.fixture(scope="module")
def eight_bits(teacher):
    return opened(teacher, "onnx", compute_type="int8")


def test_int8_encoder_is_close_to_float32(teacher, eight_bits, windows):
    """The toy has random weights, so encoder states are compared instead of texts."""
    exact = opened(teacher, "onnx", compute_type="float32")
    assert (exact.name, eight_bits.name) == ("onnxruntime cpu float32", "onnxruntime cpu int8")
    known, rounded = exact.encode(windows), eight_bits.encode(windows)
    for name, state in known.items():
        assert np.linalg.norm(state - rounded[name]) < 0.05 * np.linalg.norm(state)
    logits = [
        OnnxDecoder(engine, windows).step(np.tile(engine.prompt, (len(windows), 1))) for engine in (exact, eight_bits)
    ]
    assert not np.array_equal(*logits)
    assert np.corrcoef(logits[0].ravel(), logits[1].ravel())[0, 1] > 0.99


@pytest.fixture(scope="module")
def spiky(teacher, tmp_path_factory):
    """Return the int8 encoder of a model with one very large channel.

    Real models have such places behind GELU, a hundred times larger than others.
    """
    model = whisper_model.load(whisper_model.resolve(str(teacher)))
    layer = model.model.encoder.layers[0]
    with torch.no_grad():
        layer.fc1.weight *= 0.02
        layer.fc1.weight[0] *= 50_000.0

    folder = tmp_path_factory.mktemp("spiky")
    onnx_graph.write(model, folder, int8=True, seven_bits=onnx_graph.needs_seven_bits())
    session = onnxruntime.InferenceSession(str(folder / onnx_graph.ENCODER), providers=["CPUExecutionProvider"])
    return lambda windows: session.run(["key_0"], {"features": windows})[0]


def test_int8_transcript_does_not_depend_on_batch(spiky, windows):
    """One quantisation range per batch would make a clip depend on its neighbours."""
    beside = spiky(windows)
    for row, window in enumerate(windows):
        alone = spiky(window[None])[0]
        assert np.linalg.norm(alone - beside[row]) < 0.03 * np.linalg.norm(alone)


def test_int8_export_leaves_only_int8_graphs(teacher):
    folder = converted(teacher, "onnx-int8")
    assert {path.suffix for path in folder.iterdir()} <= {".onnx", ".json", ".md"}
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_int8_is_refused_if_it_would_overflow(teacher, monkeypatch):
    folder = converted(teacher, "onnx-int8")
    made = manifest.read(folder)["made_of"]["bits"]
    monkeypatch.setattr("pipelines.whisper.engines.onnx_engine.needs_seven_bits", lambda: True)
    if made == 8:
        with pytest.raises(LabError, match="which this one lacks: make the export on this machine"):
            opened(folder)
    monkeypatch.setattr(onnx_graph, "needs_seven_bits", lambda: made == 8)
    other = converted(teacher, "onnx-int8")
    assert other != folder
    assert manifest.read(other)["made_of"]["bits"] == 15 - made
    one, another = (whisper_model.resolve(str(place)) for place in (folder, other))
    assert one.quantisation == another.quantisation
    assert whisper_model.identity(one) != whisper_model.identity(another), (
        "a report of the one would be taken for the other's"
    )


@ct2
def test_word_times_match_ctranslate2(teacher, windows, tmp_path):
    ref = whisper_model.resolve(str(teacher))
    model = whisper_model.load(ref)
    for folder, heads in (("model", [[0, 0], [1, 1]]), ("no-heads", None)):
        model.generation_config.alignment_heads = heads
        whisper_model.save(model, whisper_model.load_processor(ref, "sv"), tmp_path / folder)
    one, other = (opened(tmp_path / "model", name, compute_type="float32") for name in ("onnx", "ctranslate2"))
    assert not opened(tmp_path / "no-heads", "onnx", compute_type="float32").can_align
    text = "Åke äter en apelsin i dag"
    apart = []
    frames, texts = [windows.shape[-1]] * len(windows), [text] * len(windows)
    for told in zip(*(engine.word_starts(windows, frames, texts) for engine in (one, other)), strict=True):
        assert len(told[0]) == len(text.split())
        assert told[0] == sorted(told[0])
        apart += np.abs(np.subtract(*told)).tolist()
    # heads of random weights look everywhere, so that now and then two ways cost the same
    assert np.mean(np.array(apart) < 0.06) > 0.75
    assert one.word_starts(windows[:1], [40], [""]) == [[]]


def test_windows_are_encoded_once_while_kept(teacher, windows):
    engine, runs = opened(teacher, "onnx", compute_type="float32"), []
    encoder = engine.encoder
    engine.encoder = SimpleNamespace(run=lambda *told: runs.append(1) or encoder.run(*told))
    both, alone = windows[:2], windows[:1]
    first = engine.decode(both)
    assert engine.decode(alone)[0].text == first[0].text
    assert engine.decode(both) == first
    engine.word_starts(both, [windows.shape[-1]] * 2, ["", "hej"])
    assert len(runs) == 2
    engine.decode(windows[1:3])
    assert len(runs) == 3
    del both, alone
    assert not engine.states._kept


def test_truncated_transcript_has_no_end_token(tuned, windows):
    for heard in opened(tuned, "onnx", max_new_tokens=2).decode(windows):
        assert heard.tokens <= 2
    long = opened(tuned, "onnx", max_new_tokens=2).decode(windows)
    stock = opened(tuned, "transformers", max_new_tokens=2).decode(windows)
    assert [one.tokens for one in long] == [one.tokens for one in stock]


def test_sampling_depends_on_seed(tuned, windows):
    engine = opened(tuned, "onnx")
    first, again, other = (
        engine.decode(windows[:2], dataclasses.replace(engine.options, seed=seed), 1.0) for seed in (1, 1, 2)
    )
    assert [one.text for one in first] == [one.text for one in again] != [one.text for one in other]


# ---- what an export tells of itself


@pytest.mark.parametrize(
    "form", ["onnx", "onnx-int8", "safetensors-float16", pytest.param("ctranslate2-int8", marks=ct2)]
)
def test_export_is_a_sealed_model_with_its_form(tuned, form):
    folder = converted(tuned, form)
    assert manifest.problem(folder) is None
    ref = whisper_model.resolve(str(folder))
    label = form.removeprefix("safetensors-")
    assert (ref.name, ref.context, ref.quantisation) == ("toy-1a2b", "clip", label)
    assert ref.title == f"toy-1a2b ({label}) @ {ref.revision}"
    assert ref.revision != "1a2b"
    assert ref.facts["context_s"] == 4.0
    assert ref.facts["confidence"] == {"slope": 2.0, "words": 60}
    assert "test" not in ref.facts, "that score is the float32 model's"
    assert whisper_model.identity(ref) != whisper_model.identity(whisper_model.resolve(str(tuned)))
    assert converted(tuned, form) == folder
    if form != "safetensors-float16":
        with pytest.raises(LabError, match="is an export itself"):
            export.convert(ref, "onnx")
        assert opened(folder).name.startswith("onnxruntime" if form.startswith("onnx") else "ctranslate2")
        with pytest.raises(LabError, match="name the model it was made of"):
            opened(folder, "transformers")


def test_float16_loads_as_rounded_weights(tuned, windows):
    folder = converted(tuned, "safetensors-float16")
    before, after = (load_file(place / "model.safetensors") for place in (tuned, folder))
    assert before.keys() == after.keys()
    for name, weights in before.items():
        assert torch.equal(after[name], weights.half())
    sizes = [(place / "model.safetensors").stat().st_size for place in (tuned, folder)]
    assert sizes[1] < 0.55 * sizes[0]
    model = whisper_model.load(whisper_model.resolve(str(folder)))
    assert model.dtype == torch.float32
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert not (folder / "recipe.json").exists()
    said = [[one.text for one in opened(place, "transformers").decode(windows)] for place in (tuned, folder)]
    assert sum(a == b for a, b in zip(*said, strict=True)) >= 4


def test_weights_beyond_float16_range_are_refused(tuned, tmp_path):
    from safetensors.torch import save_file

    weights = load_file(tuned / "model.safetensors")
    weights["model.decoder.layer_norm.weight"][0] = 1e6
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(tuned / "config.json", tmp_path)
    ref = dataclasses.replace(whisper_model.resolve(str(tuned)), folder=tmp_path)
    with pytest.raises(LabError, match=r"float16 cannot hold \(model.decoder.layer_norm.weight\)"):
        export.convert(ref, "safetensors-float16", to=tmp_path / "half")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    ("name", "told"), [("openai/whisper-tiny", "openai/whisper-tiny"), ("/srv/anna/secret/own", "own"), ("./a/b", "b")]
)
def test_exported_manifest_contains_no_path(name, told):
    assert export._without_path(name) == told


def test_unknown_export_form_is_named(tuned):
    with pytest.raises(LabError, match=r"an export must be one of ctranslate2-int8, .*onnx.*, got 'tflite'"):
        export.convert(whisper_model.resolve(str(tuned)), "tflite")


# ---- held against their source


@pytest.fixture(scope="module")
def rows(tuned, teacher, toy_settings, toy_cache, tmp_path_factory):
    """Return the table of a student and its teacher, with one export each."""
    runs, uris = tmp_path_factory.mktemp("runs"), [str(tuned), str(teacher)]
    recipe = toy_settings(FEW)
    return exports.compare_exports(recipe, toy_cache, uris, ["onnx"], runs=runs, threads=1), runs, recipe


def weights_bytes(row) -> int:
    return (Path(row.folder) / "model.safetensors").stat().st_size


def test_export_table_compares_each_export_with_its_model(rows, toy_cache, tuned):
    table, runs, recipe = rows
    made = table.rows
    assert [row.form for row in made] == ["", "onnx"] * 2
    assert all(row.score.n == len(toy_cache.split("validation")) for row in made)
    assert all(row.ms > 0 for row in made)
    source, graph, other, others = made
    assert source.difference is source.agreement is source.first is None
    assert graph.agreement == 1.0
    assert graph.difference.delta == 0
    assert graph.engine == "onnxruntime cpu float32"
    assert other.agreement < 1, "another model, held against the first"
    assert others.agreement == 1, "held against its own model, not against the first"
    assert weights_bytes(other) > weights_bytes(source)
    assert other.size_mb >= source.size_mb > 0
    assert others.first.delta == other.difference.delta == pytest.approx(other.score.wer - source.score.wer)
    assert others.difference.delta == 0
    assert json.loads(json.dumps([row.as_dict() for row in made]))[1]["agreement"] == 1.0
    words = table.markdown()
    assert len(words.splitlines()) == 2 + 4
    assert len({line.count("|") for line in words.splitlines()}) == 1
    assert "ΔWER, first model" in words
    assert "ΔWER, first model" not in dataclasses.replace(table, rows=made[:2]).markdown()
    reports = sorted(path.parent for path in runs.glob("*/reports/validation-*/manifest.json"))
    assert len(reports) == 4, "what is scored is an ordinary report"
    assert experiment_pipeline.evaluate(recipe, toy_cache, graph.folder, "validation", runs=runs).score == (graph.score)


def test_scoring_an_export_counts_and_keeps_its_model(tuned, toy_settings, toy_cache, tmp_path):
    before, recipe = (tuned / manifest.MANIFEST).read_bytes(), toy_settings(FEW)
    for form in ("onnx", "safetensors-float16"):
        experiment_pipeline.evaluate(recipe, toy_cache, str(converted(tuned, form)), "test", runs=tmp_path)
    looks = (tmp_path / "test_scorings.csv").read_text().splitlines()
    assert len(looks) == 3
    assert "(onnx)" in looks[1]
    assert (tuned / manifest.MANIFEST).read_bytes() == before
    assert manifest.problem(converted(tuned, "safetensors-float16")) is None


# ---- production

NEEDED = {
    "onnx": {"encoder.onnx", "decoder.onnx", "config.json", "generation_config.json", "tokenizer.json"},
    "ctranslate2-int8": {"model.bin", "config.json", "vocabulary.json", "tokenizer.json"},
    "safetensors-float16": {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"},
}
BESIDE = {"README.md", "manifest.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"}
BESIDE |= {"generation_config.json"}


@pytest.fixture(scope="module")
def recording(tmp_path_factory, encoded, speech) -> Path:
    path = tmp_path_factory.mktemp("sound") / "clip.wav"
    path.write_bytes(encoded(speech(2 * 16_000)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors-float16", pytest.param("ctranslate2-int8", marks=ct2)])
def test_production_folder_serves_in_a_new_process(tuned, tmp_path, recording, form):
    ref, folder = whisper_model.resolve(str(tuned)), tmp_path / "served"
    proof = package.production(ref, form, folder, recording=recording)
    names = {path.name for path in folder.iterdir()}
    assert NEEDED[form] <= names <= NEEDED[form] | BESIDE
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
    assert proof.without == (() if form == "safetensors-float16" else ("torch", "transformers"))
    assert proof.memory_mb > 10
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "model-index" not in card
    assert f"# toy-1a2b, {form}" in card
    assert manifest.problem(folder) is None
    assert whisper_model.resolve(str(folder)).context == "clip"
    with pytest.raises(LabError, match="must be empty or absent"):
        package.production(ref, form, folder, recording=recording)


def test_production_folder_that_fails_is_removed(tuned, tmp_path):
    (tmp_path / "no.wav").write_bytes(b"this is no sound")
    with pytest.raises(LabError, match="a fresh process could not serve the folder, so it was not kept: .*AudioError"):
        package.production(
            whisper_model.resolve(str(tuned)),
            "onnx",
            tmp_path / "served",
            recording=tmp_path / "no.wav",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["no.wav"]


# ---- by command


@pytest.fixture
def call(monkeypatch, capfd):
    """Return `call("export", ...)`, which runs the command and returns its output."""

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["pipelines", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        told = capfd.readouterr()
        assert not end.value.code, told.err
        return told.out

    return run


def test_export_and_production_commands(call, tuned, rows, toy_recipe, toy_model, toy_cache, tmp_path, recording):
    _, runs, _ = rows
    known = ["--recipe", toy_recipe, "--set", f"model.base={toy_model}", "--set", "evaluation.max_new_tokens=6"]
    known += ["--cache", toy_cache.uri, "--runs", runs, "--threads", 1]
    told = json.loads(call("export", tuned, "--to", "onnx", *known, "--json"))
    assert [row["form"] for row in told["rows"]] == ["", "onnx"]
    assert (told["split"], told["rows"][1]["agreement"]) == ("validation", 1.0)
    served = tmp_path / "served"
    produced = ("production", tuned, "--form", "onnx", "--to", served, "--recording", recording)
    assert "nothing was done" in call(*produced, "--dry-run")
    assert not served.exists()
    words = call(*produced)
    assert "in a fresh process, without torch and transformers" in words
    size = (served / "decoder.onnx").stat().st_size
    assert size < 1.1 * (tuned / "model.safetensors").stat().st_size, "the embeddings are written twice"
    assert {path.name for path in served.iterdir()} <= NEEDED["onnx"] | BESIDE
    assert opened(served).name == "onnxruntime cpu float32"
