from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from pipelines import recipes
from pipelines.infra.errors import LabError
from pipelines.recipes import differences, digest, known_names, load, names
from pipelines.recipes.settings import Recipe, flatten

ROOT = Path(__file__).parents[2]


def refusal(*arguments) -> str:
    with pytest.raises(LabError) as error:
        load(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", names())
def test_every_shipped_recipe_loads_under_its_own_name(name):
    assert load(name).name == name
    assert set(flatten(load(name).model_dump())) == set(known_names())


def test_there_is_a_tour():
    assert "tour" in names()
    assert load().name == "tour"


@pytest.mark.parametrize(
    "overrides",
    [
        {"training": {"steps": 61}, "features": {"dtype": "float16"}},
        {"training.steps": 61, "features.dtype": "float16"},
        {"training.steps": 61, "features": {"dtype": "float16"}},
    ],
)
def test_overrides_nested_and_dotted(overrides):
    changed = load("tour", overrides)
    assert (changed.training.steps, changed.features.dtype) == (61, "float16")
    assert changed.training.batch_size == load("tour").training.batch_size
    assert differences(changed.settings(), load("tour").settings()) == [
        "features.dtype: wanted float16, found float32",
        f"training.steps: wanted 61, found {load('tour').training.steps}",
    ]


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nlanguage = "nb"\n[training]\nsteps = 7\n[model]\n', "utf-8")
    assert (load(path).language, load(str(path)).training.steps) == ("nb", 7)
    assert load(path, {"training.steps": 8}).training.steps == 8


@pytest.mark.parametrize(
    ("overrides", "suggestion"),
    [
        ({"training.stesp": 60}, "'training.steps'"),
        ({"training": {"learning_rat": 1}}, "'training.learning_rate'"),
        ({"learning_rate": 1}, "'training.learning_rate'"),
        ({"langauge": "da"}, "'language'"),
        ({"trianing.steps": 1}, "'training.steps'"),
        ({"training": 5}, "it is a group, name one of its settings, such as 'training."),
        ({"training.steps.x": 5}, "'training.steps'"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(overrides, suggestion):
    message = refusal("tour", overrides)
    assert "unknown setting" in message
    assert suggestion in message


def test_a_name_near_to_none_is_refused_too():
    assert "did you mean" not in refusal("tour", {"zzzzzzzz": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training.steps", 0),
        ("training.steps", 1.5),
        ("training.steps", "many"),
        ("training.learning_rate", 0),
        ("training.learning_rate", float("nan")),
        ("training.learning_rate", float("inf")),
        ("model.dropout", 1),
        ("features.max_duration_s", 30.5),
        ("features.dtype", "int8"),
        ("evaluation.max_new_tokens", 441),
        ("language", "Swedish"),
        ("name", "two words"),
        ("source.kind", "tape"),
        ("training.context", None),
    ],
)
def test_a_value_out_of_range_is_one_line(name, value):
    message = refusal("tour", {name: value})
    assert message.startswith(f"setting {name}: ")
    assert repr(value) in message


def test_a_folder_source_needs_its_folder():
    assert "source.path" in refusal("tour", {"source.kind": "folder"})
    assert load("tour", {"source.kind": "folder", "source.path": "x"}).source.path == "x"


@pytest.mark.parametrize(("kind", "what"), [("hub", "owner/name"), ("parquet", "Parquet"), ("feedback", "log")])
def test_other_sources_need_their_place(kind, what):
    assert what in refusal("tour", {"source.kind": kind})
    assert load("tour", {"source.kind": kind, "source.path": "x/y"}).source.kind == kind


PARTS = """
name = "mixed"
[source]
kind = "mix"
[[source.parts]]
name = "cv"
kind = "folder"
path = "x"
gives = ["train", "validation", "test"]
[[source.parts]]
name = "nst"
kind = "hub"
path = "jzju/nst"
count = 20
splits.train = "train"
"""


def test_parts_of_a_mix(tmp_path):
    path = tmp_path / "mixed.toml"
    path.write_text(PARTS, "utf-8")
    first, second = load(path).source.parts
    assert (first.name, first.gives, first.seed) == ("cv", ("train", "validation", "test"), 7)
    assert (second.gives, second.count, second.splits.train) == (("train",), 20, "train")
    dotted = load(path, {"source.parts": [{"name": "a", "kind": "tour", "splits.train": "x"}]})
    assert dotted.source.parts[0].splits.train == "x"
    assert digest(dotted.settings()) != digest(load(path).settings())
    json.dumps(load(path).settings())


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("count = 20", "cuont = 20", "unknown setting 'source.parts.1.cuont'; did you mean 'source.parts.1.count'?"),
        ("splits.train", "splits.trian", "'source.parts.1.splits.trian'; did you mean 'source.parts.1.splits.train'?"),
        ("count = 20", "count = -1", "setting source.parts.1.count: "),
        ('"cv"', '"c/v"', "setting source.parts.0.name: "),
        ('name = "nst"', "", "setting source.parts.1.name: "),
        ('"validation", ', '"validations", ', "setting source.parts.0.gives.1: "),
        ('path = "x"', "", "source.path must name the folder"),
        ('kind = "folder"', 'kind = "mix"', "parts"),
        ('kind = "mix"', 'kind = "tour"', "belong together"),
        ("[[source.parts]]", "[[source.prats]]", "unknown setting 'source.prats'; did you mean 'source.parts'?"),
    ],
)
def test_a_part_that_is_wrong_is_one_line(tmp_path, old, new, told):
    path = tmp_path / "mixed.toml"
    path.write_text(PARTS.replace(old, new), "utf-8")
    assert told in refusal(path)


@pytest.mark.parametrize("named", ["test", "validation+test", "test.clean", "Partial-Test", "cv_test", "dev + testing"])
def test_a_test_split_is_never_selected_by(tmp_path, named):
    told = refusal("tour", {"source.kind": "hub", "source.path": "a/b", "source.splits.validation": named})
    assert "must not be a test split" in told and "\n" not in told
    part = {"name": "a", "kind": "hub", "path": "a/b", "gives": ["validation"], "splits.validation": named}
    assert "must not be a test split" in refusal("tour", {"source.kind": "mix", "source.parts": [part]})


@pytest.mark.parametrize("named", ["", "none", "5%", "dev", "contest", "latest", "validation+other"])
def test_other_splits_are_selected_by(named):
    chosen = {"source.kind": "hub", "source.path": "a/b", "source.splits.validation": named}
    assert load("tour", {**chosen, "source.splits.test": "test"}).source.splits.validation == named


def test_a_mix_has_parts_and_they_are_no_mixes():
    assert "belong together" in refusal("tour", {"source.kind": "mix"})
    inner = {"name": "b", "kind": "tour"}
    nested = {"source.kind": "mix", "source.parts": [{"name": "a", "kind": "mix", "parts": [inner]}]}
    assert "a part cannot be a mix" in refusal("tour", nested)
    assert "list of tables" in refusal("tour", {"source.kind": "mix", "source.parts": "cv"})


@pytest.mark.parametrize("overrides", ["training.steps=60", ["training.steps"], 5])
def test_overrides_that_are_no_dictionary(overrides):
    assert "dictionary" in refusal("tour", overrides)


def test_recipes_that_cannot_be_read(tmp_path):
    assert "did you mean 'tour'" in refusal("tuor")
    assert "no recipe" in refusal(tmp_path / "nowhere.toml")
    for name, content in {
        "broken.toml": b"name = ",
        "latin.toml": "name = 'å'".encode("cp1252"),
        "nameless.toml": b"",
        "more.toml": b"name = 'x'\n[training]\nstep = 5",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name)
    (tmp_path / "folder.toml").mkdir()
    assert "folder.toml" in refusal(tmp_path / "folder.toml")


def test_settings_are_frozen():
    for group, field in ((load(), "name"), (load().training, "steps")):
        with pytest.raises(pydantic.ValidationError):
            setattr(group, field, getattr(group, field))


def test_settings_by_group():
    assert set(load().settings("training", "name")) == {
        name for name in known_names() if name.startswith("training.")
    } | {"name"}


def test_known_names_are_those_of_the_model():
    assert sorted(known_names()) == sorted(flatten(load().model_dump()))
    assert len(set(known_names())) == len(known_names())


def other_value(name: str, value):
    """Another valid value of a setting."""
    given = {
        "name": "another",
        "language": "da",
        "source.kind": "folder",
        "source.pool": "validated",
        "features.dtype": "float16",
        "training.context": "full",
        "training.tracker": "trackio",
        "training.scheduler": "cosine",
        "training.optimizer": "sgd",
        **dict.fromkeys(("training.beta1", "training.beta2"), 0.95),
        "features.max_duration_s": 29.0,
        "model.spec_augment": True,
        "model.dropout": 0.1,
        "features.min_peak": 0.5,
        "curation.leaks": "drop",
        "curation.label_errors": "repair",
        "source.men": 0.9,
        **{name: 0.1 for name in known_names() if name.startswith("source.faults.")},
        "curation.held_out": ["test.tsv"],
        "curation.balance_by": "gender",
        "curation.min_level_dbfs": -60.0,
        "curation.max_clipped_share": 0.1,
        "curation.max_silence_share": 0.5,
        **dict.fromkeys(("augment.speed", "augment.noise_share"), 0.1),
        "augment.time_mask_share": 0.2,
        **dict.fromkeys(("model.lora_dropout", "training.window_share"), 0.1),
        "model.adapter": "",
        "model.lora_targets": ["fc1"],
        "distillation.labels": "transcript",
    }
    if isinstance(value, bool):
        return not value
    return given[name] if name in given else value + (1 if isinstance(value, int | float) else "x")


@pytest.mark.parametrize("name", [name for name in known_names() if name != "source.parts"])  # they need their kind
def test_the_digest_feels_every_setting(name):
    told = {"source.path": "x", "model.adapter": "lora", "training.window_share": 0.5}  # some settings need another
    if name.startswith("distillation."):
        told = {"distillation.teacher": "run:tour"}
    base = load("tour", told)
    changed = load("tour", {**told, name: other_value(name, base.settings()[name])})
    assert digest(changed.settings()) != digest(base.settings())
    assert [line.partition(":")[0] for line in differences(base.settings(), changed.settings())] == [name]


def test_the_digest_is_the_same_in_every_process():
    script = "from pipelines.recipes import load, digest; print(digest(load().settings()))"
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {digest(load().settings())}
    assert len(found.pop()) == 12


def test_the_digest_does_not_feel_order():
    assert digest({"a": 1, "b": "å"}) == digest({"b": "å", "a": 1}) != digest({"a": "1", "b": "å"})


def test_differences():
    assert differences({"a": 1, "b": 2}, {"b": 2}) == ["a: wanted 1, found nothing"]
    assert differences({}, {"a": 1}) == ["a: wanted nothing, found 1"]
    assert differences({"a": 1}, {"a": 1}) == []


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}}, "d": 2, "e.f": 3}) == {"a.b.c": 1, "d": 2, "e.f": 3}


def test_the_language_and_the_name_are_plain_words():
    for language in ("sv", "nb", "yue"):
        assert Recipe(name="x", language=language).language == language
    assert recipes.RECIPES.is_dir()


def test_a_group_at_its_defaults_adds_nothing_to_an_identity():
    assert load().changed("curation") == load().changed("augment") == {}
    assert load("tour", {"curation.leaks": "drop", "curation.min_snr_db": 0.0}).changed("curation") == {
        "curation.leaks": "drop"
    }
