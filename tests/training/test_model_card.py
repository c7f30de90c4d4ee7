from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from servers.hub import Hub

from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.infra import manifest, redact, stores
from pipelines.training import model_card, validation
from pipelines.training import pipeline as training_pipeline
from pipelines.training.callbacks.progress import Progress
from pipelines.whisper import lineage
from pipelines.whisper import model as whisper_model

pytestmark = pytest.mark.usefixtures("one_thread")
SECRET = "hf_" + 20 * "s"
STEPS = {"training.steps": 2, "training.eval_every": 2, "training.patience": 1, "training.learning_rate": 1e-5}
"""With a higher learning rate the toy writes nothing, and its WER has no interval."""


@pytest.fixture(scope="module")
def trained(toy_settings, toy_cache, tmp_path_factory):
    """The toy, trained for two steps: its recipe, and the folder of its model."""
    settings, runs = toy_settings(STEPS), tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        made = training_pipeline.run(settings, toy_cache, runs=runs, progress=Progress())
    return settings, Path(made.uri), runs


@pytest.fixture(scope="module")
def scored(trained, toy_cache):
    """Its test report; the model's card is told of it."""
    settings, folder, runs = trained
    return experiment_pipeline.evaluate(settings, toy_cache, str(folder), runs=runs)


def read(folder: Path) -> ModelCard:
    return ModelCard((folder / lineage.FILE).read_text("utf-8"), ignore_metadata_errors=False)


def results(folder: Path) -> dict[tuple[str, str], float]:
    """(split, metric name) to value, as a leaderboard reads it."""
    return {(told.dataset_split, told.metric_name): told for told in read(folder).data.eval_results}


def made_card(tmp_path: Path, recipe, **facts) -> ModelCard:
    """The card of a model of this recipe that was never trained."""
    manifest.write_json(tmp_path / "recipe.json", recipe.model_dump(mode="json"))
    best = {"step": 2, "eval_wer": 0.5, "eval_loss": 1.0}
    told = {"best_step": 2, "validation": best, "history": [best], "seconds": 1.0}
    manifest.write_json(tmp_path / "training.json", told)
    model_card.write(tmp_path, {"name": f"{recipe.name}-1a2b", "base_model": "openai/whisper-tiny", **facts})
    return read(tmp_path)


# ---- what it tells


def test_card_is_valid_for_huggingface_hub(trained, toy_cache):
    _, folder, _ = trained
    assert manifest.problem(folder) is None
    assert lineage.FILE in manifest.read(folder)["files"]
    data = read(folder).data
    assert (data.language, data.library_name, data.pipeline_tag) == (
        "sv",
        "transformers",
        "automatic-speech-recognition",
    )
    assert data.model_name == manifest.read(folder)["name"]
    assert data.base_model is None and data.license is None  # the toy lies in a folder
    text = read(folder).text
    assert f"- train: {len(toy_cache.split('train'))} clips" in text
    assert "training.steps = 2\n" in text and "Derived from" not in text
    assert "2 steps of 4 clips, all weights" in text


def test_validation_score_has_an_interval(trained):
    _, folder, _ = trained
    best = json.loads((folder / "training.json").read_text())["validation"]
    low, high = best["eval_wer_low"], best["eval_wer_high"]
    assert low < best["eval_wer"] < high
    told = results(folder)["validation", "WER, normalised"]
    assert (told.metric_value, told.metric_args) == (best["eval_wer"], {"ci95": [low, high]})


def test_validation_interval_equals_that_of_the_score(toy_settings, toy_cache):
    from pipelines.speech import scoring
    from pipelines.whisper import decoding

    settings = toy_settings()
    ref = whisper_model.resolve(settings.model.base)
    processor, rows = whisper_model.load_processor(ref, "sv"), toy_cache.split("validation")
    found = validation.validator(settings, toy_cache, processor, False)(whisper_model.load(ref))
    told = toy_cache.rows.iloc[rows]
    options = decoding.RowDecodingOptions("sv", 16, batch_frames=24_000)
    heard = decoding.decode_rows_to_text(whisper_model.load(ref), processor, toy_cache, rows, options)
    score = scoring.score(told["text"].tolist(), heard, told["speaker"].tolist(), samples=100, seed=13)
    assert (found["wer"], found["wer_low"], found["wer_high"]) == (score.wer, *score.ci95)


def test_test_score_is_added_and_folder_stays_sealed(scored, trained):
    _, folder, _ = trained
    assert manifest.problem(folder) is None
    told = results(folder)
    assert told["test", "WER, normalised"].metric_value == scored.score.wer
    assert told["test", "WER, normalised"].metric_args == {
        "ci95": list(scored.score.ci95),
        "test_set": scored.test_set,
        "normaliser": scored.normaliser,
        "n": scored.score.n,
    }
    assert told["test", "CER, normalised"].metric_value == scored.score.cer
    assert told["test", "WER, as written"].metric_value == scored.raw.wer
    assert f"| {scored.score.wer:.3f} | {scored.score.ci95[0]:.3f} to {scored.score.ci95[1]:.3f} |" in read(folder).text
    assert "not scored yet" not in read(folder).text
    assert "decoded by transformers cpu float32, greedy, without timestamps." in read(folder).text


def test_equal_score_changes_no_byte_of_the_model(scored, trained, toy_cache):
    settings, folder, runs = trained
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    experiment_pipeline.evaluate(settings, toy_cache, str(folder), runs=runs)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_later_score_reaches_the_published_card(trained, tmp_path):
    folder, copy = tmp_path / "model", tmp_path / "published"
    shutil.copytree(trained[1], folder)
    for wer in (0.25, 0.24):
        model_card.refresh(folder, test={"wer": wer, "cer": 0.1, "ci95": [0.2, 0.3]})
        stores.open_store(str(copy)).publish(folder, str(copy))
        assert results(copy)["test", "WER, normalised"].metric_value == wer
        assert manifest.problem(copy) is None


def test_card_labels_intervals_over_clips(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained[1], folder)
    score = {"wer": 0.25, "cer": 0.1, "ci95": [0.2, 0.3], "n": 17, "speakers": 1, "over": "clips"}
    model_card.refresh(folder, test=score, test_caveats=["1 speaker is in train and in test"])
    arguments = results(folder)["test", "WER, normalised"].metric_args
    assert (arguments["ci95"], arguments["over"]) == ([0.2, 0.3], "clips")
    text = read(folder).text
    assert "| 0.250 | 0.200 to 0.300 over clips |" in text
    assert "- Of the test scores: 1 speaker is in train and in test." in text


def test_hub_accepts_a_model_with_its_card(trained, tmp_path, monkeypatch):
    import huggingface_hub

    server, folder = Hub(), tmp_path / "model"
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    shutil.copytree(trained[1], folder)
    told = {"base_model": "openai/whisper-tiny", "test": {"wer": 0.25, "cer": 0.1, "ci95": [0.2, 0.3]}}
    for facts in ({}, told):
        model_card.refresh(folder, **facts)
        stores.open_store("hub://lab/tuned").publish(folder, "hub://lab/tuned")
        published = server.files("model", "lab/tuned")
        assert published[lineage.FILE] == (folder / lineage.FILE).read_bytes()
    assert [request for request in server.requests if "validate-yaml" in request]
    assert ModelCard(published[lineage.FILE].decode()).data.base_model == "openai/whisper-tiny"
    server.close()
    huggingface_hub.close_session()


def test_interrupted_card_refresh_leaves_a_whole_model(trained, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(trained[1], folder)
    write, left = manifest.write_bytes, [0]

    def cut(path, content):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, content)

    score = {"wer": 0.25, "cer": 0.1, "ci95": [0.2, 0.3]}
    monkeypatch.setattr(manifest, "write_bytes", cut)
    for allowed in range(4):
        left[0] = allowed
        try:
            model_card.refresh(folder, test=score)
        except KeyboardInterrupt:
            assert allowed < 3
        assert manifest.problem(folder) is None, f"cut off after {allowed} writes"
    assert results(folder)["test", "WER, normalised"].metric_value == 0.25


def test_model_without_card_records_its_score(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    manifest.seal(tmp_path, kind="model", name="old")
    model_card.refresh(tmp_path, test={"wer": 0.25})
    assert manifest.read(tmp_path)["test"] == {"wer": 0.25}
    assert not (tmp_path / lineage.FILE).exists()


# ---- what it does not tell


def test_published_files_have_no_path_and_no_token(scored, trained, toy_model):
    settings, folder, runs = trained
    assert settings.model.base == str(toy_model)  # there is one to tell
    texts = {path.name: path.read_text("utf-8") for path in folder.iterdir() if path.suffix in (".json", ".md")}
    assert texts.keys() >= {lineage.FILE, "recipe.json", "training.json", "config.json", manifest.MANIFEST}
    for name, text in texts.items():
        for secret in (str(toy_model), str(runs), str(Path.home()) + "/", SECRET):
            assert secret not in text, name
    assert not re.search(r"(?<![\w.:/)])/(?:home|root|tmp|work|Users)/", texts[lineage.FILE])
    assert 'model.base = "(a local path)"' in texts[lineage.FILE]
    assert json.loads(texts["recipe.json"])["model"]["base"] == "(a local path)"
    assert manifest.read(folder)["base"].startswith("(a local path) @ ")


def test_relative_folder_is_redacted(toy_settings, toy_model, tmp_path, monkeypatch):
    """No slash in it: it could be a model's name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_model, tmp_path / "annas")
    base = whisper_model.resolve("annas")
    assert lineage.base_of(base) == f"(a local path) @ {base.revision}"
    told = redact.redact_settings({"model": {"base": "annas"}, "curation": {"label_model": "annas"}})
    assert "annas" not in str(told)
    assert redact.redact_settings({"model": {"base": "openai/whisper-tiny"}}) == {
        "model": {"base": "openai/whisper-tiny"}
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {"source.kind": "folder", "source.path": "anna"},
        {"source.kind": "folder", "source.path": "/data/anna/recordings"},
        {"source.kind": "common_voice", "source.path": "D:\\anna\\cv.tar.gz"},
        {"curation.held_out": ["anna.tsv", "~/anna/other.tsv"]},
        {"curation.label_model": "/data/anna"},
        {"source.kind": "planted", "source.sentences": "anna.txt"},
        {
            "source.kind": "mix",
            "source.parts": [{"name": "own", "kind": "folder", "path": "anna"}, {"name": "two", "kind": "tour"}],
        },
    ],
)
def test_local_paths_are_redacted_in_settings(toy_settings, tmp_path, overrides):
    told = made_card(tmp_path, toy_settings(overrides))
    assert "anna" not in str(told)


HOSTILE = [
    "x\n---\nlicense: mit\n---\n",
    "a'b\"c: [d] # {e}\n- f: &g *h !!python/object:os.system",
    "```\n</details><script>alert(1)</script>",
    "| a | b |\n|---|---|",
    "\u2028\u0085 åäö \x07",
    "- license: mit",
    "null",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_in_a_recipe_cannot_break_the_card(toy_settings, tmp_path, hostile):
    overrides = {"source.kind": "hub", "source.path": hostile, "source.config": hostile, "source.text_column": hostile}
    recipe = toy_settings(overrides)
    plain = made_card(tmp_path, toy_settings({"source.kind": "hub", "source.path": "own/er"}))
    found = made_card(
        tmp_path,
        recipe,
        test_data={"type": hostile, "name": hostile},
        test={"wer": 0.25, "cer": 0.1, "ci95": [0.2, 0.3]},
    )
    assert found.data.to_dict().keys() == plain.data.to_dict().keys() - {"datasets"}
    assert found.data.license == "apache-2.0"
    assert {told.dataset_name for told in found.data.eval_results} == {hostile}
    lines = (tmp_path / lineage.FILE).read_text("utf-8").split("\n")
    assert lines.count("---") == 2
    body = found.text.split("<details>")
    assert body[0].count("```") == 2 and "<script" not in body[0]
    assert [line for line in body[1].split("\n") if line.startswith("```")] == ["```toml", "```"]
    assert len([line for line in body[0].split("\n") if line.startswith("|")]) == 2 + 3


# ---- of what it is made


@pytest.mark.parametrize(
    ("name", "origin", "hub_id"),
    [
        ("openai/whisper-tiny", "registry mirror", "openai/whisper-tiny"),
        ("openai/whisper-small@q8", "registry mirror", "openai/whisper-small"),
        ("hub://KBLab/kb-whisper-small@main", "hub cache", "KBLab/kb-whisper-small"),
        ("models/mine", "folder", None),
        ("/data/model", "folder", None),
    ],
)
def test_base_model_is_named_if_on_the_hub(name, origin, hub_id):
    assert model_card._hub_id(whisper_model.ModelRef(name, Path("x"), origin, "0")) == hub_id


def test_hub_data_sets_are_in_the_front_matter(toy_settings, tmp_path):
    parts = [{"name": "nst", "kind": "hub", "path": "jzju/nst"}, {"name": "tour", "kind": "tour"}]
    found = made_card(tmp_path, toy_settings({"source.kind": "mix", "source.parts": parts}))
    assert found.data.datasets == ["jzju/nst"]
    assert found.data.base_model == "openai/whisper-tiny"
    front = yaml.safe_load((tmp_path / lineage.FILE).read_text("utf-8").split("---\n")[1])
    (entry,) = front["model-index"]
    assert entry["name"] == "toy-1a2b"
    assert [told["dataset"]["split"] for told in entry["results"]] == ["validation"]
    assert "synthetic-speech" not in front["tags"]


def test_planted_corpus_is_tagged_synthetic(toy_settings, tmp_path):
    found = made_card(tmp_path, toy_settings({"source.kind": "planted"}))
    assert "synthetic-speech" in found.data.tags
    assert "Its speech was synthetic" in found.text


def test_card_describes_lora_and_windows(toy_settings, tmp_path):
    lora = {"model.adapter": "lora", "model.freeze_encoder": True, "training.window_share": 0.2}
    text = made_card(tmp_path, toy_settings(lora), context="clip", quantisation="q8").text
    assert "LoRA, merged into the weights, the encoder frozen" in text
    assert "often ends after the first sentence" not in text
    assert "(q8)" in text
    assert "often ends after the first sentence" in made_card(tmp_path, toy_settings(), context="clip").text


def test_unknown_source_is_named_by_its_kind():
    assert lineage.data_of({"kind": "not_yet"}) == {"type": "not_yet", "name": "not_yet"}
