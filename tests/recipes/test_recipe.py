from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydantic
import pytest

from pipelines import recipes
from pipelines.infra.errors import LabError
from pipelines.recipes import differences, digest, load, names, runs, setting_names
from pipelines.recipes.base_settings import flatten

ROOT = Path(__file__).parents[2]


def error_message(*arguments) -> str:
    with pytest.raises(LabError) as error:
        load(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


LATE = ("curation.corrections",)
"""Settings that a dump leaves out with their default."""


@pytest.mark.parametrize("name", names())
def test_shipped_recipe_loads_with_its_file_name(name):
    assert load(name).name == name
    assert {*flatten(load(name).model_dump()), *LATE} == set(setting_names())


def test_default_recipe_is_the_tour():
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
def test_overrides_may_be_nested_or_dotted(overrides):
    changed = load("tour", overrides)
    assert (changed.training.steps, changed.features.dtype) == (61, "float16")
    assert changed.training.batch_size == load("tour").training.batch_size
    assert differences(changed.settings(), load("tour").settings()) == [
        "features.dtype: wanted float16, found float32",
        f"training.steps: wanted 61, found {load('tour').training.steps}",
    ]


def test_recipe_file_loads_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nlanguage = "nb-NO"\n[training]\nsteps = 7\n[model]\n', "utf-8")
    assert (load(path).language, load(str(path)).training.steps) == ("no", 7)
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
def test_misspelt_name_error_suggests_the_nearest(overrides, suggestion):
    message = error_message("tour", overrides)
    assert "unknown setting" in message
    assert suggestion in message


def test_unrelated_name_error_has_no_suggestion():
    assert "did you mean" not in error_message("tour", {"zzzzzzzz": 1})


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
        ("model.layer_drop", 1),
        ("training.layer_decay", 0),
        ("training.layer_decay", 1.1),
        ("training.label_smoothing", 1),
        ("training.bpe_dropout", -0.1),
        ("training.precision", "float16"),
        ("training.optimizer", "adam"),
        ("features.max_duration_s", 30.5),
        ("features.dtype", "int8"),
        ("evaluation.max_new_tokens", 441),
        ("language", "Svedish"),
        ("language", "auto"),
        ("name", "two words"),
        ("source.kind", "tape"),
        ("training.context", None),
    ],
)
def test_value_out_of_range_is_a_one_line_error(name, value):
    message = error_message("tour", {name: value})
    assert message.startswith(f"setting {name}: ")
    assert repr(value) in message


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("training.steps", "many", "should be 'auto' or a valid integer"),
        ("training.warmup_steps", -1, "should be 'auto' or greater than or equal to 0, got -1"),
        ("evaluation.max_new_tokens", 1.5, "should be 'auto' or a valid integer"),
        ("evaluation.stock_pipeline", "some", "should be 'auto', true, false or a number from 1, got 'some'"),
        ("evaluation.stock_pipeline", -2, "should be 'auto', true, false or a number from 1, got -2"),
    ],
)
def test_error_of_a_setting_names_auto_if_it_is_allowed(name, value, choices):
    message = error_message("tour", {name: value})
    assert message.startswith(f"setting {name}: Input {choices}")
    assert load("tour", {name: "auto"}).settings()[name] == "auto"


def test_folder_source_without_path_is_an_error():
    assert "source.path" in error_message("tour", {"source.kind": "folder"})
    assert load("tour", {"source.kind": "folder", "source.path": "x"}).source.path == "x"


@pytest.mark.parametrize(("kind", "what"), [("hub", "owner/name"), ("parquet", "Parquet"), ("feedback", "log")])
def test_source_without_path_is_an_error(kind, what):
    assert what in error_message("tour", {"source.kind": kind})
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


def test_parts_of_a_mix_are_read_and_overridden(tmp_path):
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
    ("old", "new", "message"),
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
def test_invalid_part_is_a_one_line_error(tmp_path, old, new, message):
    path = tmp_path / "mixed.toml"
    path.write_text(PARTS.replace(old, new), "utf-8")
    assert message in error_message(path)


@pytest.mark.parametrize("split", ["test", "validation+test", "test.clean", "Partial-Test", "cv_test", "dev + testing"])
def test_test_split_as_validation_is_an_error(tmp_path, split):
    message = error_message("tour", {"source.kind": "hub", "source.path": "a/b", "source.splits.validation": split})
    assert "must not be a test split" in message and "\n" not in message
    part = {"name": "a", "kind": "hub", "path": "a/b", "gives": ["validation"], "splits.validation": split}
    assert "must not be a test split" in error_message("tour", {"source.kind": "mix", "source.parts": [part]})


@pytest.mark.parametrize("split", ["", "none", "5%", "dev", "contest", "latest", "validation+other"])
def test_other_splits_are_allowed_as_validation(split):
    overrides = {"source.kind": "hub", "source.path": "a/b", "source.splits.validation": split}
    assert load("tour", {**overrides, "source.splits.test": "test"}).source.splits.validation == split


def test_mix_without_parts_or_in_a_mix_is_an_error():
    assert "belong together" in error_message("tour", {"source.kind": "mix"})
    inner = {"name": "b", "kind": "tour"}
    nested = {"source.kind": "mix", "source.parts": [{"name": "a", "kind": "mix", "parts": [inner]}]}
    assert "a part cannot be a mix" in error_message("tour", nested)
    assert "list of tables" in error_message("tour", {"source.kind": "mix", "source.parts": "cv"})


@pytest.mark.parametrize("overrides", ["training.steps=60", ["training.steps"], 5])
def test_overrides_of_another_type_are_an_error(overrides):
    assert "dictionary" in error_message("tour", overrides)


def test_unreadable_recipe_is_a_one_line_error(tmp_path):
    assert "did you mean 'tour'" in error_message("tuor")
    assert "no recipe" in error_message(tmp_path / "nowhere.toml")
    for name, content in {
        "broken.toml": b"name = ",
        "latin.toml": "name = 'å'".encode("cp1252"),
        "nameless.toml": b"",
        "more.toml": b"name = 'x'\n[training]\nstep = 5",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert error_message(tmp_path / name)
    (tmp_path / "folder.toml").mkdir()
    assert "folder.toml" in error_message(tmp_path / "folder.toml")


def test_settings_are_immutable():
    for group, field in ((load(), "name"), (load().training, "steps")):
        with pytest.raises(pydantic.ValidationError):
            setattr(group, field, getattr(group, field))


def test_settings_returns_the_named_groups():
    assert set(load().settings("training", "name")) == {
        name for name in setting_names() if name.startswith("training.")
    } | {"name"}


def test_setting_names_match_the_model():
    assert sorted(setting_names()) == sorted([*flatten(load().model_dump()), *LATE])
    assert len(set(setting_names())) == len(setting_names())


def other_value(name: str, value):
    """Return another valid value of a setting."""
    values = {
        "name": "another",
        "language": "da",
        "source.kind": "folder",
        "source.pool": "validated",
        "features.dtype": "float16",
        "training.context": "full",
        "training.tracker": "trackio",
        "training.scheduler": "cosine",
        "training.optimizer": "sgd",
        **dict.fromkeys(("training.beta1", "training.beta2", "training.ema_decay", "training.layer_decay"), 0.95),
        **dict.fromkeys(("model.layer_drop", "training.label_smoothing", "training.bpe_dropout"), 0.1),
        "training.precision": "bfloat16",
        "features.max_duration_s": 29.0,
        "model.spec_augment": True,
        "model.dropout": 0.1,
        "features.min_peak": 0.5,
        "features.max_rejected_share": 0.5,
        "curation.leaks": "drop",
        "curation.marks": "remove",
        "curation.label_errors": "repair",
        "source.men": 0.9,
        "source.test_voices": 64,
        "source.min_confidence": 0.9,
        **{name: 0.1 for name in setting_names() if name.startswith("source.faults.")},
        "curation.held_out": ["test.tsv"],
        "curation.balance_by": "gender",
        "curation.min_level_dbfs": -60.0,
        "curation.max_clipped_share": 0.1,
        "curation.non_speech_share": 0.1,
        "curation.max_silence_share": 0.5,
        **dict.fromkeys(("augment.speed", "augment.noise_share"), 0.1),
        "augment.time_mask_share": 0.2,
        **dict.fromkeys(("model.lora_dropout", "training.window_share", "training.window_prompt"), 0.1),
        "training.window_fill": "full",
        "training.window_timestamps": 0.1,
        "model.adapter": "",
        "model.lora_targets": ["fc1"],
        "distillation.labels": "transcript",
        "evaluation.stock_pipeline": 7,
    }
    if isinstance(value, bool):
        return not value
    return values[name] if name in values else value + (1 if isinstance(value, int | float) else "x")


@pytest.mark.parametrize("name", [name for name in setting_names() if name != "source.parts"])  # they need their kind
def test_digest_changes_with_every_setting(name):
    required = {"source.path": "x", "model.adapter": "lora", "training.window_share": 0.5}
    if name.startswith("distillation."):
        required = {"distillation.teacher": "run:tour"}
    base = load("tour", required)
    changed = load("tour", {**required, name: other_value(name, base.settings().get(name, ""))})
    assert digest(changed.settings()) != digest(base.settings())
    assert [line.partition(":")[0] for line in differences(base.settings(), changed.settings())] == [name]


@pytest.mark.slow
def test_digest_is_equal_in_every_process():
    script = "from pipelines.recipes import load, digest; print(digest(load().settings()))"
    digests = {
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
    assert digests == {digest(load().settings())}
    assert len(digests.pop()) == 12


def test_digest_ignores_the_order_of_fields():
    assert digest({"a": 1, "b": "å"}) == digest({"b": "å", "a": 1}) != digest({"a": "1", "b": "å"})


def test_differences_has_one_line_per_field():
    assert differences({"a": 1, "b": 2}, {"b": 2}) == ["a: wanted 1, found nothing"]
    assert differences({}, {"a": 1}) == ["a: wanted nothing, found 1"]
    assert differences({"a": 1}, {"a": 1}) == []


def test_flatten_joins_names_with_dots():
    assert flatten({"a": {"b": {"c": 1}}, "d": 2, "e.f": 3}) == {"a.b.c": 1, "d": 2, "e.f": 3}


def test_changed_omits_defaults():
    assert load().changed("curation") == load().changed("augment") == {}
    assert load("tour", {"curation.leaks": "drop", "curation.min_snr_db": 0.0}).changed("curation") == {
        "curation.leaks": "drop"
    }


# --- extends ----------------------------------------------------------------------------------------------------------


def write_recipes(folder: Path, **files: str) -> None:
    """Write `<name>.toml` for each keyword; the name is added as a setting."""
    for name, content in files.items():
        (folder / f"{name}.toml").write_text(f'name = "{name}"\n{content}\n', "utf-8")


def test_extended_settings_are_those_of_the_parent(tmp_path):
    write_recipes(tmp_path, child='extends = "planted-checked"\n[training]\nlearning_rate = 3e-4')
    child, parent = load(tmp_path / "child.toml"), load("planted-checked")
    assert [line.split(":")[0] for line in differences(parent.settings(), child.settings())] == [
        "name",
        "training.learning_rate",
    ]


def test_extends_may_name_a_file_beside_the_recipe(tmp_path):
    write_recipes(
        tmp_path,
        child='extends = "parent.toml"\n[training]\nsteps = 3',
        parent='extends = "planted-checked"\n[training]\nsteps = 2\nseed = 5',
    )
    training = load(tmp_path / "child.toml").training
    assert (training.steps, training.seed, training.eval_every) == (3, 5, load("planted-checked").training.eval_every)


def test_extends_is_no_setting(tmp_path):
    write_recipes(tmp_path, child='extends = "tour"')
    child = load(tmp_path / "child.toml")
    assert "extends" not in child.settings() and "extends" not in recipes.as_toml(child)
    assert digest(child.settings()) == digest(load("tour", {"name": "child"}).settings())
    assert "extends is read from a recipe's file" in error_message("tour", {"extends": "small"})


@pytest.mark.parametrize("extends", ['"child.toml"', '"other.toml"'])
def test_extends_cycle_is_a_one_line_error(tmp_path, extends):
    write_recipes(tmp_path, child=f"extends = {extends}", other='extends = "child.toml"')
    assert "extend each other in a cycle: child.toml -> " in error_message(tmp_path / "child.toml")


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ('"tuor"', "child.toml extends the recipe 'tuor', which does not exist; did you mean 'tour'?"),
        ('"nowhere.toml"', "extends the recipe 'nowhere.toml', which does not exist"),
        ('["tour", "small"]', "extends must be the name of one recipe or a .toml file, got ['tour', 'small']"),
    ],
)
def test_unknown_parent_is_a_one_line_error(tmp_path, extends, message):
    write_recipes(tmp_path, child=f"extends = {extends}")
    assert message in error_message(tmp_path / "child.toml")


def test_misspelt_setting_of_a_parent_is_an_error(tmp_path):
    write_recipes(tmp_path, child='extends = "parent.toml"', parent="[training]\nstesp = 3")
    assert "unknown setting 'training.stesp'" in error_message(tmp_path / "child.toml")


@pytest.mark.parametrize(
    "text",
    [
        f"x = {'[' * 5_000}{']' * 5_000}",
        f"x = {'{x = ' * 5_000}1{'}' * 5_000}",
        f"x{'.x' * 5_000} = 1",
        f"[{'.'.join('x' * 5_000)}]",
    ],
    ids=["arrays", "tables", "dotted", "header"],
)
def test_deep_recipe_is_a_one_line_error(tmp_path, text):
    write_recipes(tmp_path, deep=text)
    assert len(error_message(tmp_path / "deep.toml")) < 700


@pytest.mark.parametrize("name", ["training.seed", "source.seed", "curation.seed", "evaluation.seed", "search.seed"])
def test_seed_outside_32_bits_is_a_one_line_error(name):
    for value in (2**32, -1):
        assert f"setting {name}: Input should be" in error_message("tour", {name: value})


def test_error_of_a_long_value_is_short():
    assert len(error_message("tour", {"training.steps": "9" * 100_000})) < 700


def test_stages_of_two_processes_are_both_recorded(tmp_path):
    recipe = load("tour")
    barrier = threading.Barrier(2)

    def record(name):
        with runs.record_stage(recipe, tmp_path, name) as note:
            note["of"] = name
            barrier.wait()  # both end at the same time

    for _ in range(10):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(record, ("features", "training")))
        assert runs.read_stages(recipe, tmp_path).keys() == {"features", "training"}
        (tmp_path / "tour/stages.json").unlink()


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 10_000])
def test_damaged_stage_record_is_replaced(tmp_path, content):
    (tmp_path / "tour").mkdir()
    (tmp_path / "tour/stages.json").write_text(content)
    with runs.record_stage(load("tour"), tmp_path, "features"):
        pass
    assert runs.read_stages(load("tour"), tmp_path).keys() == {"features"}
